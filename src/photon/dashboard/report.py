"""One HTML page about a run: self-contained, readable without scripts, light, dark and printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.dashboard import palette, wording
from photon.dashboard.comparison import ComparisonRow, compared_by, in_words
from photon.dashboard.digest import EvaluationPoint, RunDigest, SiloDigest, read_digest
from photon.dashboard.effort import STEP_PARTS, effort_rows, step_legend
from photon.errors import DiskFullError, MachineError, RunError
from photon.store.disk import write_whole

_TEMPLATE = "report.html.j2"
_MEASURES = {"perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}

GLOSSARY = (
    ("Silo", "An organisation that takes part with its own text and machines. Its text stays."),
    ("Round", "Silos train on their own, then their updates are merged into one model."),
    ("Local steps (tau)", "Optimizer steps a silo takes between two exchanges."),
    (
        "Perplexity",
        "How many tokens the model hesitates between, on average, when it predicts the next one. "
        "Lower is better.",
    ),
    (
        "Bits per byte",
        "The same quality per byte of text, so that models with other tokenizers compare. "
        "Lower is better.",
    ),
    (
        "Pseudo-gradient",
        "Global weights minus a silo's weights after its local steps: what is averaged.",
    ),
    ("Outer optimizer", "The rule by which the averaged pseudo-gradient moves the global model."),
    (
        "MFU",
        "Model FLOPs utilisation: the arithmetic that the model's steps need, over what the device "
        "could do in that time.",
    ),
    ("Utilisation", "Share of the wall clock in which nodes trained, not waited, sent or saved."),
)


@dataclass(frozen=True)
class Tile:
    """One figure in large type, what it is, and one line of context."""

    name: str
    value: str
    note: str = ""


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
    _write(target, text)
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
    # Slow to import, and a run that only shows its progress needs neither.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from photon.dashboard.figures import all_drawings

    environment = Environment(
        loader=PackageLoader("photon.dashboard", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    started = digest.started
    template = environment.get_template(_TEMPLATE)
    return template.render(
        title=wording.one_line(started.run),
        headline=headline(digest),
        notice=notice(digest),
        tiles=tiles(digest),
        drawings=all_drawings(digest, others),
        evaluated=bool(digest.evaluations),
        phases=_phases(digest),
        silos=[_silo_row(digest, i, silo) for i, silo in enumerate(digest.silos.values())],
        shares=any(silo.share is not None for silo in digest.silos.values()),
        effort=effort_rows(digest),
        step_parts=STEP_PARTS,
        step_legend=step_legend(),
        incidents=[_incident_row(incident) for incident in digest.incidents],
        comparison=_comparison_rows(digest, others),
        measure=_MEASURES[compared_by(_comparison(digest, others))],
        config=_config(digest.folder),
        glossary=GLOSSARY,
        facts=_facts(digest),
        formula=baseline_formula(digest),
        superseded=digest.superseded,
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


def tiles(digest: RunDigest) -> list[Tile]:
    """The figures a manager asks for."""
    started, first, last = digest.started, digest.first, digest.last
    was = ""
    if first is not None and last is not None and first is not last:
        when = "before training" if first.round == 0 else f"after round {first.round}"
        was = f"{wording.perplexity(first.perplexity, 'diverged')} {when}"
    moved = digest.bytes_up + digest.bytes_down
    speed = digest.tokens / digest.wall_s if digest.wall_s > 0 else 0.0
    train_share = digest.train_share
    return [
        Tile("perplexity", _perplexity(last), was),
        Tile(
            "bits per byte",
            wording.decimal(last.bits_per_byte if last else None, 2),
            "of held-out text",
        ),
        Tile(
            "rounds",
            f"{digest.rounds_done} of {started.rounds}",
            f"{started.local_steps} local steps each",
        ),
        Tile("tokens trained on", wording.count(digest.tokens), f"{wording.count(speed)} a second"),
        Tile("bytes exchanged", wording.size(moved), _ratio_note(digest, moved)),
        Tile("wall-clock time", wording.duration(digest.wall_s), f"on {started.device}"),
        Tile(
            "training",
            wording.percent(train_share) if train_share is not None else "–",
            "of the time, nodes trained",
        ),
    ]


def _perplexity(point: EvaluationPoint | None) -> str:
    return "–" if point is None else wording.perplexity(point.perplexity, "diverged")


def _ratio_note(digest: RunDigest, moved: int) -> str:
    if digest.started.kind == "train":
        return "a central run exchanges nothing"
    if not moved or not digest.baseline_bytes:
        return ""
    return f"{wording.times_less(digest.baseline_bytes, moved)} an exchange every step"


def baseline_formula(digest: RunDigest) -> str | None:
    """The per-step baseline, with its numbers in."""
    if not digest.baseline_bytes or not digest.rounds:
        return None
    started = digest.started
    return (
        "An exchange every step, for the same local steps, in fp32: "
        f"4 bytes × {started.parameters:,} parameters × 2 directions × "
        f"{started.local_steps} local steps × {digest.tasks} tasks (participants summed over "
        f"{wording.several(len(digest.rounds), 'round')}) = {wording.size(digest.baseline_bytes)}. "
        f"Whole models every round, in bf16: 2 bytes × 2 directions × the same = "
        f"{wording.size(digest.whole_model_bytes)}. "
        f"This run: {wording.size(digest.bytes_up)} up ({started.update_codec}) + "
        f"{wording.size(digest.bytes_down)} down ({started.broadcast_codec})."
        + _left_out(digest.left_out)
    )


def _left_out(share: float | None) -> str:
    if share is None:
        return ""
    return (
        f" Of a silo's update the codec left {wording.percent(share, 1)} of its norm for later "
        "ones (mean of the last round)."
    )


def _phases(digest: RunDigest) -> list[dict[str, Any]]:
    phases = digest.phases_s
    total_s = sum(seconds for _, seconds in phases)
    if not digest.rounds or total_s <= 0:
        return []
    return [
        {
            "name": name,
            "width": f"{seconds / total_s * 100:.2f}",
            "share": wording.percent(seconds / total_s, 0 if seconds / total_s >= 0.0995 else 1),
            "time": wording.duration(seconds),
            "colour": f"var(--phase-{i})",
        }
        for i, (name, seconds) in enumerate(phases)
    ]


def _silo_row(digest: RunDigest, index: int, silo: SiloDigest) -> dict[str, Any]:
    first = silo.evaluations[0] if silo.evaluations else None
    last = silo.evaluations[-1] if silo.evaluations else None
    return {
        "name": wording.one_line(silo.name),
        "colour": palette.silo_variable(index, len(digest.silos)),
        "text": wording.count(silo.text_tokens) if silo.text_tokens is not None else "–",
        "share": wording.percent(silo.share, 1) if silo.share is not None else "–",
        "width": f"{(silo.share or 0.0) * 100:.2f}",
        "rounds": len({task.round for task in silo.tasks}),
        "loss": wording.decimal(silo.tasks[-1].last_loss if silo.tasks else None),
        "first": _perplexity(first),
        "last": _perplexity(last),
        "bits": wording.decimal(last.bits_per_byte if last else None),
        "dropped": silo.dropped or "–",
    }


def _incident_row(incident: Any) -> dict[str, Any]:
    return {
        "time": wording.clock(incident.time_s),
        "round": "–" if incident.round is None else incident.round,
        "kind": incident.kind,
        "silo": wording.one_line(incident.silo) if incident.silo else "–",
        "text": wording.one_line(incident.text),
        "undone": incident.undone,
    }


def _comparison(digest: RunDigest, others: Mapping[str, RunDigest]) -> list[ComparisonRow]:
    this = ComparisonRow.of("this run", digest, federated=True)
    return [this, *(ComparisonRow.of(label, other) for label, other in others.items())]


def _comparison_rows(digest: RunDigest, others: Mapping[str, RunDigest]) -> list[dict[str, Any]]:
    if not others:
        return []
    rows = _comparison(digest, others)
    return [
        in_words(row, rows) | {"this": row.federated, "unfinished": other.state != "finished"}
        for row, other in zip(rows, [digest, *others.values()], strict=True)
    ]


def _facts(digest: RunDigest) -> list[tuple[str, str]]:
    started = digest.started
    facts = [
        ("Run", f"{wording.one_line(started.run)} ({started.kind})"),
        ("Started", wording.one_line(digest.sessions[0].started_at)),
        ("Photon", wording.one_line(started.photon_version)),
        ("Model", f"{started.parameters:,} parameters"),
        ("Participants of a round", f"{started.participants_per_round} of {len(started.silos)}"),
        ("Batch", f"{started.batch_size} sequences of {started.sequence_length} tokens"),
        ("Device", f"{started.device}, {started.precision}"),
        ("Processes", f"{max(1, started.workers)}, {started.threads} threads each"),
    ]
    if len(digest.sessions) > 1:
        again = wording.several(len(digest.sessions) - 1, "time")
        facts.insert(2, ("Resumed", f"{again}, last {wording.one_line(started.started_at)}"))
    return facts


def _config(folder: Path) -> str | None:
    try:
        text = (folder / "config.resolved.toml").read_text("utf-8", errors="replace")
    except OSError:
        return None
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


def _write(path: Path, text: str) -> None:
    hint = "Free some space, or write the report elsewhere: --out FILE."
    try:
        write_whole(path, text, "the report")
    except DiskFullError as error:
        raise DiskFullError(error.message, hint=hint) from error
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}", hint=hint) from error
