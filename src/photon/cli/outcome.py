"""What a finished federation or baseline ends with on screen: figures, silos, what comes next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from photon.cli.screen import program, show, show_facts, show_json, show_table
from photon.dashboard import wording
from photon.dashboard.digest import RunDigest, read_digest
from photon.dashboard.palette import MOST_NAMED

#: What a run's bytes are held against: the summary's key, and what it is.
_BASELINES = {
    "all_reduce_bytes": "fp32 gradients after every step",
    "bf16_exchange_bytes": "bf16 models every round",
}


def show_outcome(folder: Path, summary: dict[str, Any], *, as_json: bool = False) -> None:
    """A finished run in one screen, or its summary as JSON."""
    if as_json:
        show_json({"run_dir": str(folder), **summary})
        return
    digest = read_digest(folder)
    bits, perplexity = summary["bits_per_byte"], summary["global_perplexity"]
    none = "diverged" if perplexity is None else f"none: {wording.UNKNOWN_TEXT}"
    facts = [
        ("held-out perplexity", wording.perplexity(perplexity, "diverged")),
        ("bits per byte", none if bits is None else wording.decimal(bits, 4)),
        ("rounds, tokens", f"{summary['rounds']}, {summary['tokens']:,}"),
    ]
    sent = summary["bytes_up"] + summary["bytes_down"]
    facts.append(("exchanged", wording.size(sent)))
    for key, what in _BASELINES.items():
        if sent and key in summary:
            facts.append(("", f"{wording.times_less(summary[key], sent)} {what}"))
    training = f", {digest.train_share:.0%} training" if digest.train_share is not None else ""
    if summary.get("simulated_s") is not None:
        facts += _simulated(summary)
    if told := summary.get("epsilon"):
        words = f"{told['value']:.3g} of a {told['unit']}, at delta {told['delta']:g}"
        facts.append(("epsilon", words))
    if told := summary.get("energy"):
        facts.append(("energy", f"{wording.energy(told['kwh'])}, {told['how']}"))
    facts += [
        ("time", wording.duration(digest.wall_s) + training),
        ("weights sha256", summary["weights_sha256"]),
        ("run folder", str(folder)),
    ]
    show_facts(facts)
    _show_silos(digest)
    show("\nNext:")
    audit = [("check its log", f"{program()} audit {shlex.quote(str(folder))}")]
    served = audit if digest.started.kind == "serve" else []
    show_facts([*next_steps(folder), *served, *_baseline_steps(digest)])


def show_study(result: dict[str, Any], *, as_json: bool = False) -> None:
    """What a simulation of time alone came to."""
    if as_json:
        show_json(result)
        return
    figures = ("updates", "up_share", "lost_share")
    more = [(name.replace("_", " "), f"{result[name]:.4g}") for name in figures]
    show_facts([("rounds, tokens", f"{result['rounds']}, {result['tokens']:,}")])
    show_facts([*_simulated(result), *more])


def _simulated(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Shares of simulated time; docs/clock.md defines them."""
    return [
        ("simulated time", wording.duration(summary["simulated_s"])),
        ("goodput", f"{summary['goodput']:.1%} of all silos' time"),
        ("utilisation", f"{summary['utilisation']:.1%}, waits for the line only"),
        ("tokens lost", f"{summary['tokens_lost']:,}"),
    ]


def _show_silos(digest: RunDigest) -> None:
    """The newest score on each silo's own held-out text."""
    rows = [
        (name, wording.perplexity(last.perplexity, "diverged"), wording.decimal(last.bits_per_byte))
        for name, silo in digest.silos.items()
        for last in silo.evaluations[-1:]
    ]
    if not rows:
        return
    show("")
    headings = ("held-out text of", "perplexity", "bits per byte")
    show_table(headings, rows[:MOST_NAMED], right=(1, 2), frame=False)
    if len(rows) > MOST_NAMED:
        show(f"... and {len(rows) - MOST_NAMED} more, in the report")


def next_steps(folder: Path) -> list[tuple[str, str]]:
    """What can be done with a finished run, and the command for it."""
    photon = program()
    run, exported = shlex.quote(str(folder)), shlex.quote(f"{folder}-hf")
    return [
        ("pictures", f"{photon} report {run}"),
        ("text from it", f'{photon} generate {run} --prompt "..."'),
        ("for transformers", f"{photon} export {run} --out {exported}"),
        ("on other text", f"{photon} eval {run} --data DATA"),
        ("curves", f"{program('tensorboard')} --logdir {shlex.quote(str(folder / 'tensorboard'))}"),
    ]


def _baseline_steps(digest: RunDigest) -> list[tuple[str, str]]:
    """How to see what a federation was good for: its largest silo alone, at equal tokens."""
    texts = digest.started.silo_tokens
    if digest.started.kind != "simulate" or len(texts) < 2:
        return []
    most = max(texts, key=lambda name: texts[name])
    batch = digest.started.participants_per_round * digest.started.batch_size
    file, alone = digest.folder / "config.resolved.toml", f"{digest.folder}-alone"
    photon = program()
    run, file, alone, most = (shlex.quote(str(it)) for it in (digest.folder, file, alone, most))
    return [
        (
            "alone, equal tokens",
            f"{photon} train {file} --set train.batch_size={batch} --silo {most} --run-dir {alone}",
        ),
        ("beside this run", f"{photon} report {run} --compare alone={alone}"),
    ]
