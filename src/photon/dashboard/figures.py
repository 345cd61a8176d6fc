"""The report's figures: each an SVG with a caption, or None where there is nothing to draw."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from photon.dashboard import canvas, palette, wording
from photon.dashboard.digest import (
    PHASES,
    SAME_TOKENIZER,
    EvaluationPoint,
    Measure,
    RunDigest,
    curve,
    cut_alike,
    phases_of,
)

Points = Sequence[tuple[float, float]]

_GLOBAL = "shared held-out"
_MOST_COLUMNS = 64
#: Bytes per token may differ by so much from one silo's text to another's.
_SAME_TEXT = 0.2
#: What must be reached for a unit, what it divides by, and its name.
_TIMES = ((3 * 3600, 3600.0, "hours"), (180, 60.0, "minutes"), (0, 1.0, "seconds"))
_BYTES = (
    (1e9, 1e9, "gigabytes"),
    (1e6, 1e6, "megabytes"),
    (1e3, 1e3, "kilobytes"),
    (0, 1, "bytes"),
)
_JOULES = ((3.6e6, 3.6e6, "kWh"), (3.6e3, 3.6e3, "Wh"), (0, 1, "joules"))
#: Colours of phases of energy.
_ENERGY = {"training": "phase-0", "evaluation": "phase-1", "merging": "phase-2"}
_ENERGY |= {"privacy": "phase-3", "other": "phase-4", "idle": "muted", "communication": "silo-1"}
_SAID = {"privacy": "compression and privacy", "idle": "waiting"}
_SCORES: dict[Measure, tuple[str, str]] = {
    "perplexity": ("Perplexity", "silos"),
    "bits_per_byte": ("Bits per byte", "bytes-of-silos"),
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        narrow: a wide figure drawn again for a narrow screen.
        legend: names with their CSS colours, for those that need it.
    """

    title: str
    svg: str
    caption: str
    narrow: str = ""
    legend: Sequence[tuple[str, str]] = ()

    @classmethod
    def of(
        cls,
        figure: Figure,
        prefix: str,
        title: str,
        kind: str,
        caption: str,
        legend: Sequence[tuple[str, str]] = (),
    ) -> Drawing:
        """A figure whose ids begin with `prefix`; a screen reader says its kind and caption."""
        return cls(
            title, canvas.to_svg(figure, prefix, f"{kind}. {caption}"), caption, legend=legend
        )


def all_drawings(digest: RunDigest, compare: Mapping[str, RunDigest]) -> list[Drawing]:
    """Every figure that has something to show, in the page's order."""
    with canvas.drawing_style():
        drawings = [
            *wide_drawings(digest, compare),
            silo_scores(digest),
            silo_bits_per_byte(digest),
            time_per_round(digest),
            bytes_per_round(digest),
            throughput(digest),
            *energy(digest),
        ]
    return [drawing for drawing in drawings if drawing is not None]


def wide_drawings(digest: RunDigest, compare: Mapping[str, RunDigest]) -> Iterator[Drawing]:
    """Loss, and other runs beside this one."""
    for draw in (loss_against_tokens, partial(comparison, compare=compare)):
        wide, narrow = draw(digest), draw(digest, narrow=True)
        if wide is not None and narrow is not None:
            yield replace(wide, narrow=narrow.svg)


def loss_against_tokens(digest: RunDigest, *, narrow: bool = False) -> Drawing | None:
    """Training loss of each silo, thin, and the global model's held-out loss, thick."""
    most = 120 if narrow else 400
    thin = {name: _thin_out(silo.training, most) for name, silo in digest.silos.items()}
    curves = {name: line for name, line in thin.items() if line}
    points = curve(digest.evaluations, "loss", "tokens")
    if not curves and not points:
        return None
    named = len(curves) <= palette.MOST_NAMED
    figure, axes, longest = _axes_for([_GLOBAL, *(curves if named else ())], narrow)
    order, (width, alpha) = list(digest.silos), (1.0, 0.75) if named else (0.5, 0.35)
    ends = []
    for name, line in curves.items():
        style = palette.silo_style(order.index(name)) if named else (palette.MUTED, "-")
        ends.append(_plot(axes, name, line, *style, width, alpha=alpha))
    ends = ends if named else []
    if points:
        ends.append(_plot(axes, _GLOBAL, points, palette.INK, "-", 2.4, **_marks(points, 3.6)))
    canvas.count_ticks(axes)
    canvas.name_axes(axes, "tokens trained on, all silos together", "loss (nats per token)")
    axes.margins(x=0.01)
    canvas.label_ends(axes, ends, bold=_GLOBAL, longest=longest)
    who = "each silo's training loss" if named else f"the training loss of {len(curves)} silos"
    caption = (
        f"Thin lines: {who}. Thick line: loss of the merged model on shared held-out text; "
        "this is the one that counts."
    )
    caption += _left_out(digest.evaluations)
    prefix = "loss-narrow" if narrow else "loss"
    return Drawing.of(figure, prefix, "Loss", "Line plot", caption)


def comparison(
    digest: RunDigest, compare: Mapping[str, RunDigest], *, narrow: bool = False
) -> Drawing | None:
    """Held-out loss of the merged model and of other runs, against the tokens each trained on.

    Bits per byte in its place where tokenizers differ, as nats are per token.
    """
    runs = [digest, *compare.values()]
    alike = cut_alike([run.last.score for run in runs if run.last], SAME_TOKENIZER)
    measure: Measure = "loss" if alike else "bits_per_byte"
    others = {label: curve(run.evaluations, measure, "tokens") for label, run in compare.items()}
    others = {label: points for label, points in others.items() if points}
    points = curve(digest.evaluations, measure, "tokens")
    if not others or not points:
        return None
    figure, axes, longest = _axes_for([*others, "this run"], narrow)
    ends = []
    styles = _comparison_styles(list(others), list(digest.silos))
    for (label, line), style in zip(others.items(), styles, strict=True):
        ends.append(_plot(axes, label, line, *style, 1.4, **_marks(line, 2.6)))
    ends.append(_plot(axes, "this run", points, palette.INK, "-", 2.4, **_marks(points, 3.6)))
    canvas.count_ticks(axes)
    what = "Loss" if alike else "Bits per byte"
    unit = "held-out loss (nats per token)" if alike else "held-out bits per byte"
    canvas.name_axes(axes, "tokens the run trained on", unit)
    above = max((y for line in [*others.values(), points] for _, y in line[1:]), default=0.0)
    cut = len(points) > 2 and above < points[0][1]
    if cut:  # what was lost before training would take all the room from what matters
        lowest = min(y for line in [*others.values(), points] for _, y in line)
        axes.set_ylim(lowest - 0.06 * (above - lowest), above + 0.06 * (above - lowest))
    canvas.label_ends(axes, ends, bold="this run", longest=longest)
    caption = (
        f"{what} on the same shared held-out text. Lower is better; a line that ends further left "
        "trained on fewer tokens."
    )
    if not alike:
        caption += " Tokenizers differ, so losses per token don't compare."
    if cut:
        caption += f" Before training, above the plot: {wording.decimal(points[0][1], 2)}."
    prefix = "comparison-narrow" if narrow else "comparison"
    return Drawing.of(figure, prefix, "Against other runs", "Line plot", caption)


def silo_scores(digest: RunDigest, measure: Measure = "perplexity") -> Drawing | None:
    """What the merged model scores on each silo's own held-out text, over rounds."""
    order = list(digest.silos)
    lines = {name: curve(silo.evaluations, measure) for name, silo in digest.silos.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    title, prefix = _SCORES[measure]
    if len(lines) > palette.MOST_NAMED:
        return _heat_strip(lines, title, prefix)
    figure, axes, longest = _axes_for(lines, narrow=True, most=22)
    ends = []
    for name, points in lines.items():
        style = palette.silo_style(order.index(name))
        ends.append(_plot(axes, name, points, *style, 1.5, marker="o", markersize=2.5))
    flat = [point for points in lines.values() for point in points]
    logarithmic = canvas.scale_perplexity(axes, [y for _, y in flat])
    canvas.round_ticks(axes, [int(x) for x, _ in flat])
    canvas.name_axes(axes, "round", title.lower() + (" (logarithmic)" if logarithmic else ""))
    canvas.label_ends(axes, ends, longest=longest)
    caption = f"{title} of the merged model on each silo's own held-out text."
    return Drawing.of(figure, prefix, f"{title} in each silo", "Line plot", caption)


def silo_bits_per_byte(digest: RunDigest) -> Drawing | None:
    """Where silos' texts differ so much, in language for one, that perplexities don't compare."""
    newest = [silo.evaluations[-1].score for silo in digest.silos.values() if silo.evaluations]
    drawn = None if cut_alike(newest, _SAME_TEXT) else silo_scores(digest, "bits_per_byte")
    if drawn is None:
        return None
    caption = f"{drawn.caption} A token holds more bytes in some silos than in others, so compare "
    return replace(drawn, caption=caption + "silos by this, not by perplexity.")


def _heat_strip(lines: Mapping[str, list[tuple[float, float]]], title: str, prefix: str) -> Drawing:
    """Many silos: one thin row each, best at the end on top, colour for the score."""
    import numpy as np

    rounds = sorted({number for points in lines.values() for number, _ in points})
    # Every n-th round and the last: a cell is a path, and a page must stay small.
    stride = -(-len(rounds) // _MOST_COLUMNS)
    rounds = rounds[::-1][::stride][::-1]
    rows = sorted(lines.items(), key=lambda item: item[1][-1][1])
    grid = np.full((len(rows), len(rounds)), np.nan)
    for i, (_, points) in enumerate(rows):
        values = dict(points)
        grid[i] = [values.get(number, np.nan) for number in rounds]
    # Before training all silos are far off alike; that column would eat the scale.
    judged = grid[:, 1:] if len(rounds) > 3 and np.isfinite(grid[:, 1:]).any() else grid
    low, high = float(np.nanmin(grid)), float(np.nanmax(judged))
    clipped = float(np.nanmax(grid)) > high
    figure, axes = canvas.new_axes(canvas.HALF, right=0.2)
    axes.grid(visible=False)
    high = max(high, low)
    norm = LogNorm(low, high) if low > 0 and high / low > 10 else Normalize(low, high)
    colours = LinearSegmentedColormap.from_list("photon", palette.HEAT)
    columns = np.arange(len(rounds) + 1) - 0.5
    # Vector cells, not an image: sharp in print, and no encoder whose bytes may vary.
    edges = np.arange(len(rows) + 1)
    mesh = axes.pcolormesh(
        columns, edges, grid, norm=norm, cmap=colours, edgecolors="face", linewidth=0.3
    )
    axes.invert_yaxis()
    axes.set_yticks([])
    every = max(1, len(rounds) // 8)
    axes.set_xticks(range(0, len(rounds), every), [f"{r:g}" for r in rounds[::every]])
    canvas.name_axes(axes, "round", f"{len(rows)} silos, best on top")
    where = axes.get_position()
    beside = figure.add_axes((where.x1 + 0.03, where.y0, 0.025, where.height))
    scale = figure.colorbar(mesh, cax=beside)
    scale.outline.set_visible(False)  # type: ignore[operator]
    beside.tick_params(colors=palette.MUTED, length=0, labelsize=8.5, which="both")
    ticks = [low, (low * high) ** 0.5, high] if low > 0 else [low, high]
    beside.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    labels = [wording.perplexity(tick) for tick in ticks]
    labels[-1] = f"≥ {labels[-1]}" if clipped else labels[-1]
    scale.set_ticks(ticks, labels=labels)
    best, worst = rows[0], rows[-1]
    caption = (
        f"{title} of the merged model on each silo's own held-out text, one row per silo. "
        f"Last round: {wording.one_line(best[0])} {wording.perplexity(best[1][-1][1])} (best), "
        f"{wording.one_line(worst[0])} {wording.perplexity(worst[1][-1][1])} (worst)."
    )
    return Drawing.of(figure, prefix, f"{title} in each silo", "Heat strip", caption)


def time_per_round(digest: RunDigest) -> Drawing | None:
    """Seconds of each round, stacked by phase."""
    if not digest.rounds:
        return None
    longest = max(cost.round_s for cost in digest.rounds)
    figure, axes, xs, scale = _axes_of_rounds(digest, longest, _TIMES)
    bottom = [0.0] * len(xs)
    for phase, colour in zip(PHASES, palette.PHASES_LIGHT, strict=True):
        heights = [phases_of(cost)[phase] / scale for cost in digest.rounds]
        axes.bar(xs, heights, bottom=bottom, width=_bar_width(xs), color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    title = "Where the time went, round by round"
    legend = [(phase, f"var(--phase-{i})") for i, phase in enumerate(PHASES)]
    caption = "Wall-clock time of each round and what it was spent on."
    return Drawing.of(figure, "time", title, "Stacked bars", caption, legend)


def bytes_per_round(digest: RunDigest) -> Drawing | None:
    """Payload bytes of each round: up above the line, down below it."""
    most = max((max(c.bytes_up, c.bytes_down) for c in digest.rounds), default=0)
    if not most:
        return None
    figure, axes, xs, scale = _axes_of_rounds(digest, most, _BYTES)
    width, (up, _, down, *_) = _bar_width(xs), palette.PHASES_LIGHT
    axes.bar(xs, [cost.bytes_up / scale for cost in digest.rounds], width=width, color=up)
    axes.bar(xs, [-cost.bytes_down / scale for cost in digest.rounds], width=width, color=down)
    axes.axhline(0, color=palette.MUTED, linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):,g}"))
    legend = [("up, to the aggregator", "var(--phase-0)"), ("down, to nodes", "var(--phase-2)")]
    caption = "What moved between nodes and aggregator: model state and updates, never text."
    return Drawing.of(figure, "bytes", "Bytes exchanged", "Mirrored bars", caption, legend)


def throughput(digest: RunDigest) -> Drawing | None:
    """Median tokens per second of each silo, with the range over its rounds."""
    order = list(digest.silos)
    rows = [silo for silo in digest.silos.values() if silo.throughput]
    if not rows:
        return None
    rows.sort(key=lambda silo: statistics.median(silo.throughput))
    named = len(rows) <= 2 * palette.MOST_NAMED
    figure, axes = canvas.new_axes(canvas.HALF)
    axes.grid(visible=False)
    axes.grid(axis="x", color=palette.GRID, linewidth=0.8)
    shown: list[str] = []
    if named:
        shown = list(wording.distinct([silo.name for silo in rows], 22).values())
        longest = max(len(name) for name in shown)
        left = 0.06 + longest * 0.0155
        box = axes.get_position()
        axes.set_position((left, box.y0, 0.97 - left, box.height))
    for y, silo in enumerate(rows):
        colour, _ = palette.silo_style(order.index(silo.name))
        colour = colour if len(order) <= palette.MOST_NAMED else palette.MUTED
        size = 6 if named else 2.5
        axes.plot([min(silo.throughput), max(silo.throughput)], [y, y], color=colour, linewidth=1.2)
        axes.plot([statistics.median(silo.throughput)], [y], "o", color=colour, markersize=size)
    if shown:
        axes.set_yticks(range(len(rows)))
        axes.set_yticklabels(shown, parse_math=False)
        axes.tick_params(axis="y", colors=palette.INK)
    else:
        axes.set_yticks([])
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_xlim(0, max(max(silo.throughput) for silo in rows) * 1.06)
    canvas.count_ticks(axes)
    canvas.name_axes(
        axes, "tokens per second of local training", "" if named else f"{len(rows)} silos"
    )
    caption = "Dot: median over the rounds a silo took part in. Line: slowest to fastest round."
    if not named:
        slowest, fastest = wording.one_line(rows[0].name), wording.one_line(rows[-1].name)
        caption += f" Slowest: {slowest}. Fastest: {fastest}."
    return Drawing.of(figure, "throughput", "Training speed of each silo", "Dot plot", caption)


def energy(digest: RunDigest) -> Iterator[Drawing]:
    """Joules by phase, stacked: of each round, and of each silo and the aggregator."""
    told = [one for one in digest.energy if one.silo is None or one.silo in digest.silos]
    known, colours = sorted({one.how for one in told if one.how}), palette.variables(dark=False)
    for by in ("round", "silo") if known else ():
        rows: dict[Any, Counter[str]] = {}
        for one in told:
            rows.setdefault(getattr(one, by), Counter()).update(one.joules)
        names = sorted(rows, key=lambda name: (name is None, name))
        most = max(row.total() for row in rows.values())
        scale, unit = next((scale, unit) for least, scale, unit in _JOULES if most >= least)
        figure, axes = canvas.new_axes(canvas.HALF)
        places, bottom = names if by == "round" else range(len(names)), [0.0] * len(names)
        for phase, colour in _ENERGY.items():
            heights = [rows[name][phase] / scale for name in names]
            axes.bar(places, heights, _bar_width(names), bottom, color=colours[colour])
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        if by == "round":
            canvas.round_ticks(axes, names)
        else:
            shown = wording.distinct([name or "aggregator" for name in names], 60 // len(names) + 2)
            axes.set_xticks(places, shown.values() if len(names) <= 16 else [""] * len(names))
        axes.set_xlim(min(places) - 0.7, max(places) + 0.7)
        canvas.name_axes(axes, by if by == "round" else "", f"{unit} per {by}")
        legend = [(_SAID.get(one, one), f"var(--{colour})") for one, colour in _ENERGY.items()]
        caption = f"Joules by phase: {' and '.join(known)}; communication always modelled."
        yield Drawing.of(figure, f"energy-{by}", f"Energy by {by}", "Stacked bars", caption, legend)


def _axes_for(
    names: Iterable[str], narrow: bool, *, most: int | None = None
) -> tuple[Figure, Axes, int]:
    """Axes with room at their right for these names, and how many characters a name may have."""
    size = canvas.HALF if narrow else canvas.WIDE
    most = most or (18 if narrow else 40)
    longest = max(len(name) for name in wording.distinct(names, most).values())
    return *canvas.new_axes(size, right=max(0.6, 0.32 + 0.062 * longest) / size[0]), most


def _plot(
    axes: Axes, name: str, points: Points, colour: str, dash: str, width: float, **more: Any
) -> tuple[float, float, str, str]:
    """Draws a line; returns its end as `canvas.label_ends` takes it."""
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=width, **more)
    return *points[-1], name, colour


def _marks(points: Points, size: float) -> dict[str, Any]:
    """Dots on a line that has few points."""
    return {"marker": "o" if len(points) <= 40 else "", "markersize": size}


def _comparison_styles(labels: list[str], silos: list[str]) -> Iterator[tuple[str, str]]:
    """A silo that trained alone keeps its colour, dotted the second time; others are muted."""
    seen: set[str] = set()
    for index, label in enumerate(labels):
        name = label.rpartition(":")[2].strip()
        if name in silos and len(silos) <= palette.MOST_NAMED:
            colour, dash = palette.silo_style(silos.index(name))
            yield colour, ":" if name in seen else dash
            seen.add(name)
        else:
            yield palette.MUTED, ("--", ":", "-.")[index % 3]


def _left_out(points: Sequence[EvaluationPoint]) -> str:
    missing = sum(point.loss is None for point in points)
    if not missing:
        return ""
    word = wording.several(missing, "evaluation")
    return f" {wording.sentence(word)} gave no finite number and can't be drawn."


def _axes_of_rounds(
    digest: RunDigest, most: float, units: Sequence[tuple[float, float, str]]
) -> tuple[Figure, Axes, list[int], float]:
    """Axes for bars of each round, the rounds, and what the unit that suits `most` divides by."""
    scale, unit = next((scale, unit) for least, scale, unit in units if most >= least)
    figure, axes = canvas.new_axes(canvas.HALF)
    rounds = [cost.round for cost in digest.rounds]
    canvas.round_ticks(axes, rounds)
    axes.set_xlim(min(rounds) - 0.7, max(rounds) + 0.7)
    canvas.name_axes(axes, "round", f"{unit} per round")
    return figure, axes, rounds, scale


def _bar_width(xs: Sequence[int]) -> float:
    return 0.45 if len(xs) == 1 else 0.74 if len(xs) <= 60 else 1.0


def _thin_out(points: Points, most: int) -> list[tuple[float, float]]:
    """At most so many points, as means of neighbours: a page stays small after a long run."""
    points = [point for point in points if math.isfinite(point[1])]
    group = max(1, -(-len(points) // most))
    chunks = [points[i : i + group] for i in range(0, len(points), group)]
    return [(c[-1][0], sum(loss for _, loss in c) / len(c)) for c in chunks]
