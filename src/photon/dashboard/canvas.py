"""From matplotlib to an SVG that lives inside a page: themed, deterministic, free of id clashes."""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from photon.dashboard import palette, wording

#: Inches; a wide figure fills the page, a half one shares it with a neighbour.
WIDE, HALF = (10.2, 3.9), (5.0, 3.4)

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "photon",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "path.simplify": True,
}


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Draw within it: matplotlib's own defaults and ours, whatever a matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def new_axes(size: tuple[float, float], *, right: float = 0.0) -> tuple[Figure, Axes]:
    """A figure with one bare plot; `right` is the share of its width kept free for labels."""
    figure = Figure(figsize=size)
    FigureCanvasSVG(figure)
    left, bottom = 0.62 / size[0], 0.5 / size[1]
    axes = figure.add_axes((left, bottom, 1 - left - 0.02 - right, 0.96 - bottom))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.MUTED)
    axes.tick_params(colors=palette.MUTED, length=0, labelsize=8.5)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="y", color=palette.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Axis titles, in words."""
    axes.set_xlabel(x, color=palette.MUTED, fontsize=9)
    axes.set_ylabel(y, color=palette.MUTED, fontsize=9)


def scale_perplexity(axes: Axes, values: Sequence[float]) -> bool:
    """A logarithmic y axis where values span more than ten times; whether it is one."""
    logarithmic = min(values) > 0 and max(values) / min(values) > 10
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    return logarithmic


def count_ticks(axes: Axes) -> None:
    """x ticks like 200k, 1.5M."""
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: wording.count(v).replace(".0", "") if v else "0")
    )


def round_ticks(axes: Axes, rounds: Sequence[int]) -> None:
    """Whole rounds on the x axis, also when there is only one."""
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    low, high = min(rounds), max(rounds)
    room = 0.6 if low == high else 0.0
    axes.set_xlim(low - room - 0.02 * (high - low), high + room + 0.02 * (high - low))


def label_ends(
    axes: Axes,
    ends: Sequence[tuple[float, float, str, str]],
    *,
    longest: int,
    bold: str | None = None,
) -> None:
    """Names lines at their right end instead of in a legend, pushed apart where they would touch.

    Args:
        ends: x, y, name and colour of each line, in data units.
        longest: characters of a name that there is room for.
        bold: the name that stands out.
    """
    axes.autoscale_view()  # Limits are settled lazily; the transform below needs them now.
    height_pt = axes.bbox.height / axes.get_figure(root=True).dpi * 72  # type: ignore[union-attr]
    step = 11.5 / height_pt
    to_axes = axes.transData + axes.transAxes.inverted()
    shown = wording.distinct([name for _, _, name, _ in ends], longest)
    columns: dict[float, list[tuple[float, float, float, str, str]]] = {}
    for x, y, name, colour in ends:
        along, up = to_axes.transform((x, y))
        # Lines that reach the right edge share its margin; one that stops early is named there.
        column = 1.0 if along > 0.9 else round(along, 2)
        columns.setdefault(column, []).append((up, x, y, name, colour))
    for column, placed in columns.items():
        placed.sort()
        targets = spread([up for up, *_ in placed], step)
        for target, (_, x, y, name, colour) in zip(targets, placed, strict=True):
            axes.annotate(
                shown[name],
                xy=(x, y),
                xytext=(column + 0.022, target),
                textcoords="axes fraction",
                va="center",
                color=palette.INK,
                fontsize=8.5,
                fontweight="bold" if name == bold else "normal",
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "lw": 1.0,
                    "shrinkA": 0,
                    "shrinkB": 3,
                    "relpos": (0, 0.5),
                },
                bbox={
                    "facecolor": palette.CARD_LIGHT,
                    "edgecolor": "none",
                    "alpha": 0.8,
                    "pad": 0.4,
                },
                annotation_clip=False,
                parse_math=False,
            )


def spread(wanted: Sequence[float], step: float) -> list[float]:
    """Ascending positions in 0..1 at least `step` apart, as close to the wanted ones as can be."""
    # Least squares under spacing is isotonic regression of (wanted - i step): pool what collides.
    pools: list[tuple[float, int]] = []
    for i, value in enumerate(wanted):
        mean, size = value - i * step, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean = (mean * size + other * count) / (size + count)
            size += count
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    highest = max(0.0, 1.0 - (len(flat) - 1) * step)
    return [min(max(mean, 0.0), highest) + i * step for i, mean in enumerate(flat)]


def to_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an `<svg>` element, with ids under `prefix` and colours from CSS variables.

    Args:
        description: what a screen reader says; plain text.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"photon-{prefix}"}), warnings.catch_warnings():
        # A silo may be called anything; the browser has glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    view = re.search(r'viewBox="([^"]+)"', svg)
    box = view.group(1) if view else "0 0 100 100"
    label = html.escape(description)
    head = f'<svg viewBox="{box}" role="img" aria-label="{label}" class="figure">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # The page's own font.
    # Light colours become variables, which follow the reader's colour scheme.
    for name, colour in palette.variables(dark=False).items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()


def standalone(svg: str) -> str:
    """A figure of `to_svg` as a file of its own: a card that follows the reader's colour scheme."""
    light, dark = (
        "; ".join(f"--{name}: {colour}" for name, colour in palette.variables(scheme).items())
        for scheme in (False, True)
    )
    font = "font-family: system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
    style = (
        f"<style>svg {{ {light}; background: var(--card); {font} }}\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>\n"
    )
    head, rest = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">\n{style}{rest.lstrip()}\n'
