"""The report's colours: one palette for silos, one for phases of a round, in light and in dark.

Silo colours were searched for in OKLCH so that any two stay at least 0.14 apart in OKLab for normal
sight and for protan, deutan and tritan observers (Machado et al. 2009), with a contrast of 3:1 or
more against the card behind them, and so that a silo has one hue in both schemes; a test measures
it again. Figures are drawn in the light values
and the page swaps in CSS variables, which follow the reader's colour scheme.
"""

from __future__ import annotations

CARD_LIGHT, CARD_DARK = "#ffffff", "#1b1e24"

SILOS_LIGHT = ("#319bda", "#a64406", "#07787b", "#64283c", "#9d962d", "#4424a4")
SILOS_DARK = ("#61a9d9", "#fc7e40", "#96eaed", "#ab4f6d", "#e6df73", "#7667e0")

#: Local training, evaluation, merging, checkpoint, other: one hue by lightness, then grey.
PHASES_LIGHT = ("#1f4e79", "#4f86b8", "#8fb8dc", "#c3d9ec", "#d2d0cb")
PHASES_DARK = ("#8cc0f2", "#5b95cc", "#3f6f9f", "#2e5075", "#55585f")

#: Low to high perplexity in the heat strip of many silos.
HEAT = ("#16324f", "#2b6a99", "#6aa5c9", "#b9d7e3", "#f3ead2")

INK, INK_DARK = "#1d2228", "#e9eaec"
MUTED, MUTED_DARK = "#626b76", "#a3abb5"
GRID, GRID_DARK = "#e3e5e9", "#343943"

#: More silos than this are drawn as a crowd, not as so many labelled lines.
MOST_NAMED = 12


def variables(dark: bool) -> dict[str, str]:
    """CSS variables of one colour scheme, without the leading dashes."""
    silos, phases = (SILOS_DARK, PHASES_DARK) if dark else (SILOS_LIGHT, PHASES_LIGHT)
    named = {f"silo-{i}": colour for i, colour in enumerate(silos)}
    named |= {f"phase-{i}": colour for i, colour in enumerate(phases)}
    named |= {
        "ink": INK_DARK if dark else INK,
        "muted": MUTED_DARK if dark else MUTED,
        "grid": GRID_DARK if dark else GRID,
        "card": CARD_DARK if dark else CARD_LIGHT,
    }
    return named


def silo_style(index: int) -> tuple[str, str]:
    """Colour and line style of a silo: six colours, then the same six dashed."""
    return SILOS_LIGHT[index % len(SILOS_LIGHT)], "-" if index < len(SILOS_LIGHT) else "--"


def silo_variable(index: int, silos: int) -> str:
    """The CSS variable that holds the colour of one of so many silos."""
    return "var(--muted)" if silos > MOST_NAMED else f"var(--silo-{index % len(SILOS_LIGHT)})"
