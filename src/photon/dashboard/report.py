"""One HTML page about a run: self-contained, readable without scripts, light, dark and printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from photon.dashboard import palette, tree, wording
from photon.dashboard.comparison import ComparisonRow, compared_by, in_words
from photon.dashboard.digest import STEP_PARTS, EvaluationPoint, RunDigest, read_digest
from photon.errors import DiskFullError, MachineError, RunError
from photon.store.disk import write_whole
from photon.templates import filled

_MEASURES = {"perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}
#: How the template words what the digest holds.
_FILTERS = (
    wording.clock,
    wording.count,
    wording.decimal,
    wording.duration,
    wording.energy,
    wording.one_line,
    wording.percent,
    wording.perplexity,
    wording.several,
    wording.size,
    statistics.median,
)


def write_report(
    run_folder: Path | str,
    *,
    out: Path | str | None = None,
    compare: Mapping[str, Path] | None = None,
) -> Path:
    """Writes the page and returns where it stands.

    The page depends on the run folder alone: the same events give the same bytes.

    Args:
        run_folder: with events.jsonl; the run may be finished, stopped or still going.
        out: the file to write, atomically; RUN/report.html by default. A name that ends in .svg
            gets one picture instead: the run beside those it is compared with, or its loss.
        compare: other run folders by the label they get, e.g. "centralised" or "alone: SILO".

    Raises:
        RunNotFoundError: a folder without a run.
        RunError: a picture of a run that has nothing to draw yet.
        DiskFullError: no room; an older report stays as it was.
        MachineError: it can't be written there, likewise.
    """
    folder = Path(run_folder)
    digest = read_digest(folder)
    others = {label: read_digest(Path(path)) for label, path in (compare or {}).items()}
    target = Path(out) if out is not None else folder / "report.html"
    text = picture(digest, others) if target.suffix == ".svg" else render(digest, others)
    hint = "Free some space, or write the report elsewhere: --out FILE."
    try:
        write_whole(target, text, "the report")
    except DiskFullError as error:
        raise DiskFullError(error.message, hint=hint) from error
    except OSError as error:
        raise MachineError(f"{target}: {error.strerror}", hint=hint) from error
    return target


def picture(digest: RunDigest, others: Mapping[str, RunDigest]) -> str:
    """The figure that says most, as a file of its own."""
    from photon.dashboard.canvas import drawing_style, standalone
    from photon.dashboard.figures import wide_drawings

    with drawing_style():
        drawings = list(wide_drawings(digest, others))
    if not drawings:
        raise RunError(
            f"{digest.folder} has nothing to draw yet", hint="Wait for its first evaluation."
        )
    return standalone(drawings[-1].svg)


def render(digest: RunDigest, others: Mapping[str, RunDigest]) -> str:
    """The page as text."""
    from photon.dashboard.figures import all_drawings  # slow to import

    rows = [ComparisonRow.of("this run", digest, federated=True)]
    rows += [ComparisonRow.of(label, other) for label, other in others.items()]
    return filled(
        "photon.dashboard",
        "report.html.j2",
        *_FILTERS,
        run=digest,
        started=digest.started,
        headline=headline(digest),
        notice=notice(digest),
        ratio=_ratio_note(digest),
        drawings=all_drawings(digest, others),
        phases=digest.phases_s,
        silo_colour=partial(palette.silo_variable, silos=len(digest.silos)),
        step_parts=STEP_PARTS,
        comparison=[
            (in_words(row, rows), row.federated, one.state != "finished")
            for row, one in zip(rows, [digest, *others.values()], strict=True)
        ],
        measure=_MEASURES[compared_by(rows)],
        tree=tree.read_tree(digest.folder, digest.started.silos),
        heard=tree.heard(digest),
        leaf_scores=tree.leaf_scores(digest, others),
        config=_config(digest.folder),
        formula=baseline_formula(digest),
        light=palette.variables(dark=False),
        dark=palette.variables(dark=True),
    )


def headline(digest: RunDigest) -> str:
    """The run in one sentence that needs no glossary."""
    started, first, last = digest.started, digest.first, digest.last
    size = wording.count(started.parameters)
    done, total = digest.rounds_done, started.rounds
    rounds = wording.several(total, "round")
    if digest.state != "finished":
        rounds = f"{done} of {rounds}"
    verb = "trained" if digest.state == "finished" else "have so far trained"
    if started.kind == "train" or len(started.silos) == 1:
        where = " centrally, on pooled text" if started.kind == "train" else " in one silo"
        was = "was trained" if digest.state == "finished" else "has so far been trained"
        steps = done * started.local_steps
        text = f"one model of {size} parameters {was}{where}, over {steps:,} optimizer steps"
    else:
        silos = wording.several(len(started.silos), "silo")
        text = (
            f"{silos} {verb} one model of {size} parameters over {rounds} without moving their text"
        )
    return wording.sentence(text) + "; " + _outcome(first, last) + "."


def _outcome(first: EvaluationPoint | None, last: EvaluationPoint | None) -> str:
    if first is None or last is None:
        return "it has not been evaluated on held-out text yet"
    subject = "perplexity on shared held-out text"
    now = wording.perplexity(last.perplexity)
    if last.perplexity is None:
        return f"{subject} is no finite number: the model has diverged"
    if first is last or first.perplexity is None:
        return f"{subject} is {now}"
    before = wording.perplexity(first.perplexity)
    since = f" after round {first.round}" if first.round else ""
    if before == now:
        return f"{subject} stayed at {now}"
    verb = "fell" if last.perplexity < first.perplexity else "rose"
    return f"{subject} {verb} from {before}{since} to {now}"


def notice(digest: RunDigest) -> str | None:
    """What a reader must know first, where the run has not reached its end."""
    done, total = digest.rounds_done, digest.started.rounds
    progress = (
        f"{done} of {wording.several(total, 'round')} {'is' if done == 1 else 'are'} complete"
    )
    if digest.state == "stopped" and digest.stop is not None:
        reason = wording.one_line(digest.stop.reason).rstrip(".")
        return (
            f"This run was stopped in round {digest.stop.round} ({reason}). {progress}; "
            "it can be resumed from its last checkpoint."
        )
    if digest.state == "unfinished":
        return (
            f"This run is not finished: {progress}. It is still going, or its process ended "
            "without saying so; it can be resumed from its last checkpoint."
        )
    return None


def _ratio_note(digest: RunDigest) -> str:
    if digest.started.kind == "train":
        return "a central run exchanges nothing"
    moved = digest.bytes_up + digest.bytes_down
    if not moved or not digest.baseline_bytes:
        return ""
    return f"{wording.times_less(digest.baseline_bytes, moved)} an exchange every step"


def baseline_formula(digest: RunDigest) -> str | None:
    """The per-step baseline, with its numbers in."""
    if not digest.baseline_bytes or not digest.rounds:
        return None
    started, left_out = digest.started, ""
    if digest.left_out is not None:
        left_out = (
            f" Of a silo's update the codec left {wording.percent(digest.left_out, 1)} of its norm "
            "for later ones (mean of the last round)."
        )
    return (
        "An exchange every step, for the same local steps, in fp32: "
        f"4 bytes × {started.parameters:,} parameters × 2 directions × "
        f"{started.local_steps} local steps × {digest.tasks} tasks (participants summed over "
        f"{wording.several(len(digest.rounds), 'round')}) = {wording.size(digest.baseline_bytes)}. "
        f"Whole models every round, in bf16: 2 bytes × 2 directions × the same = "
        f"{wording.size(digest.whole_model_bytes)}. "
        f"This run: {wording.size(digest.bytes_up)} up ({started.update_codec}) + "
        f"{wording.size(digest.bytes_down)} down ({started.broadcast_codec}).{left_out}"
    )


def _config(folder: Path) -> str | None:
    try:
        text = (folder / "config.resolved.toml").read_text("utf-8", errors="replace")
    except OSError:
        return None
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
