"""Numbers as people read them: 1.1M parameters, 44 MB, 4 min 20 s, perplexity 96.3."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def count(value: float | None) -> str:
    """A count in at most four figures: 987, 12.3k, 1.1M, 6.7B, 1.2T; a dash for no number."""
    return "–" if value is None or not math.isfinite(value) else _scaled(value, "", "kMBT")


def size(value: float) -> str:
    """Bytes in decimal units: 812 B, 4.4 MB, 1.3 GB."""
    return _scaled(value, " B", (" kB", " MB", " GB", " TB"))


def energy(kwh: float) -> str:
    """In joules below a watt-hour: 340 J, 2.4 kJ; else 12 Wh, 1.3 kWh."""
    if kwh < 1e-3:
        return _scaled(kwh * 3.6e6, " J", (" kJ",))
    return _scaled(kwh * 1e3, " Wh", (" kWh", " MWh", " GWh"))


def _scaled(value: float, unit: str, larger: Sequence[str]) -> str:
    """In the unit that leaves at most four figures; each larger one is a thousand of the last."""
    # The limits allow for rounding: 999,960 is 1.0M, not 1000.0k.
    if abs(value) < 999.5:
        return f"{value:.0f}{unit}"
    for one in larger:
        value, unit = value / 1e3, one
        if abs(value) < 999.5:
            break
    return f"{value:.{1 if abs(value) < 99.95 or unit == larger[-1] else 0}f}{unit}"


def duration(seconds: float) -> str:
    """A span in words: 3.2 s, 48 s, 4 min 20 s, 35 min, 2 h 05 min, 3 d 4 h."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def coarse(seconds: float) -> str:
    """A span in whole ones of the largest unit that it has two of: 119 s, 45 min, 30 h, 3 d."""
    for size_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{int(seconds // size_s)} {unit}"
    return f"{max(0, int(seconds))} s"


def clock(seconds: float) -> str:
    """A span as a clock shows it, of steady width: 0:07, 4:20, 2:05:09."""
    whole = max(0, int(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def perplexity(value: float | None, none: str = "–") -> str:
    """Four figures or so; `none` where there is no number."""
    if value is None or not math.isfinite(value):
        return none
    if value >= 1e5:
        return f"{value:.2g}"
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


#: Why a text that was scored has no bits per byte.
UNKNOWN_TEXT = "too much of the text is unknown to the tokenizer for a figure to mean anything"


def decimal(value: float | None, places: int = 3) -> str:
    """A loss or bits per byte; a dash for no number."""
    return f"{value:.{places}f}" if value is not None and math.isfinite(value) else "–"


def percent(share: float, places: int = 0) -> str:
    """A share of one, in percent."""
    return f"{share * 100:.{places}f}%"


def signed_percent(share: float) -> str:
    """A change of one part, with its sign: +4.2%, −13%."""
    if not math.isfinite(share):
        return "–"
    text = f"{abs(share) * 100:.1f}%"
    sign = "±" if text == "0.0%" else "+" if share > 0 else "−"
    return sign + text


def times_less(baseline: float, ours: float) -> str:
    """`ours` against a baseline, both above 0: `32× less than`, `as much as`, `1.4× more than`."""
    factor, word = (baseline / ours, "less") if baseline >= ours else (ours / baseline, "more")
    if factor < 1.05:
        return "as much as"
    return f"{factor:,.0f}× {word} than" if factor >= 9.95 else f"{factor:.1f}× {word} than"


def several(number: int, singular: str) -> str:
    """`four silos`, `one round`, `64 silos`."""
    word = _WORDS[number] if 0 <= number < len(_WORDS) else f"{number:,}"
    return f"{word} {singular}{'' if number == 1 else 's'}"


def sentence(text: str) -> str:
    """With a capital first letter; the rest stays."""
    return text[:1].upper() + text[1:]


def one_line(text: str) -> str:
    """Without line breaks and control characters, so that a name can't break a layout."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def distinct(names: Iterable[str], most: int) -> dict[str, str]:
    """Each name on one line of at most so many cells, cut so that it still differs from the others.

    Ends are cut if that will do, else middles, else beginnings; what is alike then is numbered.
    """
    lines = {name: one_line(name) for name in names}
    tails = (0, (most - 1) // 2, most - 3, most - 1)
    cuts = [{name: _cut(line, most, tail) for name, line in lines.items()} for tail in tails]
    best = max(cuts, key=lambda short: len(set(short.values())))
    counts = Counter(best.values())
    for number, (name, short) in enumerate(best.items(), 1):
        if counts[short] > 1:
            best[name] = _cut(lines[name], most - len(str(number)), 0) + str(number)
    return best


def _cut(line: str, most: int, tail: int) -> str:
    if cell_len(line) <= most:
        return line
    end = set_cell_size(line[::-1], tail)[::-1].lstrip()
    return set_cell_size(line, most - 1 - tail).rstrip() + "…" + end
