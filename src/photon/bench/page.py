"""docs/results.md: from the files of results alone, so that nobody has to edit it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from photon.bench.bench import read_results
from photon.bench.results import Results
from photon.bench.suite import At, Sizes, load_suite, scale_of
from photon.bench.verdict import RULE

_HEAD = f"""# Results

Made by `photon bench SUITE --page`, never by hand: each figure below is of the file that its
section names, which has each run's run file, seed, curve, bytes, time and version. {RULE}
"""
_AT: tuple[tuple[At, str], ...] = (
    ("tokens", "equal tokens"),
    ("flops", "equal FLOPs"),
    ("time", "equal time"),
)


def write_page(files: Iterable[Path], page: Path) -> None:
    """Write the page of these results, and a plot of each beside it."""
    parts, others = [], []
    for file in sorted(files):
        told = read_results(file)
        results = Results(
            load_suite(told["suite"]), told["scale"], told["seeds"], tuple(told["runs"])
        )
        plot = page.with_name(f"{page.stem}-{file.stem}.svg")
        _plot(results).savefig(plot, metadata={"Date": None}, bbox_inches="tight")
        parts += _section(results, told, file.name, plot.name)
        others += [[*row, file.stem] for row in _claims(results) if row[1] != "Photon"]
    heads = ["claim", "said by", "published", "bar", "here", "so it is", "in"]
    parts = [_HEAD, "## What others say, one by one\n", _table(heads, others), "", *parts]
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _section(results: Results, told: dict[str, Any], name: str, plot: str) -> Iterator[str]:
    suite, scale = results.suite, scale_of(results.suite, results.scale)
    yield f"## {suite.title}: {results.scale}\n"
    yield suite.about.strip()
    yield f"\n{scale.note} {told['date']}, {told['hardware']}. Results: `{name}`."
    hashes = ", ".join(f"{cut} {sha256}".strip() for cut, sha256 in told["data_sha256"].items())
    yield f"Text: {', '.join(filter(None, (told.get('text'), f'sha256 once prepared: {hashes}')))}."
    tries = max((len(results.losses(method)) for method in suite.methods), default=0)
    yield (
        f"Each method that has something to search tried at most {tries} points with the first "
        f"seed; its best one was then run with {results.seeds} seeds in all. Loss in nats a token, "
        "mean ± standard deviation of seeds.\n"
    )
    rows = sorted(_rows(results), key=lambda row: row[0])
    heads = ["method", "best point", "inside its grid", "points", "seeds"]
    heads += [text for _, text in _AT] + ["fewer bytes than all-reduce"]
    yield _table(heads, [row[1] for row in rows])
    yield (
        "\nEqual FLOPs and equal time: after what the cheapest method has spent in all. Rates are "
        "still on their way down there, so it is hard on methods that spend more. Time: compute on "
        f"the same hardware in all, and {scale.exchange_steps:g} centralised steps' time for each "
        "exchange of the model in fp32, as in the paper's 7B row at 10 Gbit/s; other bytes in "
        "proportion.\n"
    )
    yield f"![Held-out loss against tokens, and against time]({plot})\n"
    if suite.claims:
        yield "### Claims\n"
        yield _table(["claim", "said by", "published", "bar", "here", "so it is"], _claims(results))
    if suite.sizes:
        yield "\n### By size\n"
        heads = ["whose", "loss above the other's, by parameters", "fit: for each tenfold size"]
        yield _table(heads, _sizes(results, suite.sizes))
    missing = list(results.missing())
    yield f"\n**Not run**: {'; '.join(missing) or 'nothing'}.\n"


def _rows(results: Results) -> Iterator[tuple[float, list[str]]]:
    """By final loss."""
    best = {method: results.best(method) for method in results.suite.methods}
    there = [one for records in best.values() for one in records]
    for method, records in best.items():
        if not records:
            continue
        points = results.losses(method)
        point = ", ".join(f"{key} {value:g}" for key, value in records[0]["point"].items())
        grid = results.suite.methods[method].grid
        edge = "yes" if results.is_inside(method) else "**no**"
        row = [method, point or "-", edge if grid else "-", str(len(points)), str(len(records))]
        means = []
        for at, _ in _AT:
            alike = [one for one in there if one["parameters"] == records[0]["parameters"]]
            budget = results.budget(alike, at)
            losses = [results.loss(one, at, budget) for one in records]
            means.append(statistics.fmean(losses))
            row.append(_with_spread(losses))
        sent = records[0]["exchanges"]
        steps = records[0]["tokens"] / records[0]["step_tokens"]
        row.append(f"{steps / sent:,.1f}x" if sent else "sends nothing")
        yield means[0], row


def _claims(results: Results) -> Iterator[list[str]]:
    for claim in results.suite.claims:
        verdict = results.judged(claim)
        bar = f"{claim.one} / {claim.other}, {claim.measure}: at most {claim.most:g}"
        here, so = "not run", "-"
        if verdict is not None:
            here = "never" if math.isinf(verdict.ratio) else f"{verdict.ratio:.4g}"
            so = str(verdict)
        yield [claim.says, claim.source, claim.published or "-", bar, here, so]


def _sizes(results: Results, sizes: Sizes) -> Iterator[list[str]]:
    """Each with the power law a N^b that fits its gaps best, by least squares of logarithms."""
    ours = []
    for pair in sizes.pairs:
        one, other = map(results.best, pair)
        if one and other:
            losses = [statistics.fmean(record["loss"] for record in each) for each in (one, other)]
            ours.append((one[0]["parameters"], *losses))
    for whose, rows in {"here": ours, **sizes.published}.items():
        gaps = [(size, loss / other - 1) for size, loss, other in rows]
        fit = "-"
        if len(gaps) > 1 and all(gap > 0 for _, gap in gaps):
            logs = [[math.log10(value) for value in values] for values in zip(*gaps, strict=True)]
            fit = f"x {10 ** statistics.linear_regression(*logs).slope:.2f}"
        yield [whose, ", ".join(f"{size / 1e6:g} M: {gap:+.1%}" for size, gap in gaps), fit]


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plot(results: Results) -> Figure:
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2, sharey=True)
    lowest = math.inf
    for number, method in enumerate(results.suite.methods):
        for one in results.best(method)[:1]:
            spent = results.spent(one, "time") / one["tokens"]
            points = [(tokens, loss) for tokens, loss in one["curve"] if loss is not None]
            seen, losses = [x for x, _ in points], [y for _, y in points]
            lowest = min([lowest, *losses])
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            left.plot([x / 1e6 for x in seen], losses, label=method, **style)
            right.plot([x * spent for x in seen], losses, **style)
    if math.isfinite(lowest):
        left.set_ylim(lowest - 0.1, lowest + 2.0)
    left.set_xlabel("million tokens, of all silos")
    left.set_ylabel("held-out loss, nats a token")
    right.set_xlabel("time, in centralised steps")
    right.set_xscale("symlog", linthresh=10)
    left.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    return figure
