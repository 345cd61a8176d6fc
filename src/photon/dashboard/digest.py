"""A run folder boiled down to the numbers its report shows. No drawing, no HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from photon.telemetry import Event, RunHistory, events, read_events
from photon.telemetry.baselines import all_reduce_bytes, bf16_exchange_bytes

State = Literal["finished", "stopped", "unfinished"]
Measure = Literal["loss", "perplexity", "bits_per_byte"]

#: What a round's time goes into; "other" is what nothing accounts for.
PHASES = ("local training", "evaluation", "merging", "checkpoint", "other")
#: What a step does, in its order; the rest of the training time is the last one.
STEP_PARTS = ("data", "forward", "backward", "optimizer", "other")
#: Bytes per token may differ by so much between runs that score the same text with one tokenizer.
SAME_TOKENIZER = 0.01
#: The incident that counts against a silo.
DROPPED = "update dropped"


@dataclass(frozen=True)
class EvaluationPoint:
    """Held-out loss after so many rounds and tokens, in nats per token; None: the model diverged.

    Attributes:
        bits_per_byte: None also where the text holds too much that the vocabulary does not know.
    """

    round: int
    tokens: int
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None

    @property
    def score(self) -> tuple[float | None, float | None]:
        return self.perplexity, self.bits_per_byte


@dataclass
class SiloDigest:
    """One silo over the whole run.

    Attributes:
        share: of the text of all silos.
        tasks: those it finished.
        dropped: how many of its updates were not merged.
        training: tokens that all silos had trained on, and its loss.
        scoring_bytes: that it received to score states.
    """

    name: str
    text_tokens: int | None = None
    share: float | None = None
    dropped: int = 0
    tasks: list[events.LocalFinished] = field(default_factory=list)
    training: list[tuple[float, float]] = field(default_factory=list)
    evaluations: list[EvaluationPoint] = field(default_factory=list)
    scoring_bytes: int = 0

    def sum(self, figure: str) -> float:
        """Of a figure of all its tasks; what is not known counts as none."""
        return sum(getattr(task, figure) or 0 for task in self.tasks)

    @property
    def step_shares(self) -> list[float]:
        """Of each of STEP_PARTS in its training time; none where its times were not told."""
        spent_s = [self.sum(f"{part}_s") for part in STEP_PARTS[:-1]]
        rest_s = max(0.0, self.sum("train_s") - sum(spent_s))
        return [each / (sum(spent_s) + rest_s) for each in (*spent_s, rest_s) if sum(spent_s) > 0]

    @property
    def throughput(self) -> list[float]:
        """Tokens per second of local training, of each task."""
        return [task.tokens / task.train_s for task in self.tasks if task.train_s > 0]


@dataclass(frozen=True)
class Incident:
    """Something a reader should know of. `undone` marks rounds that a resume ran again.

    time_s counts every second in which the run ran, also those of rounds that were run again.
    """

    time_s: float
    round: int | None
    kind: str
    silo: str | None
    text: str
    undone: bool = False


@dataclass
class RunDigest:
    """A run as its report sees it; `sessions` holds each process that worked on it."""

    folder: Path
    started: events.RunStarted
    sessions: list[events.RunStarted]
    state: State
    stop: events.RunStopped | None
    rounds: list[events.RoundFinished]
    silos: dict[str, SiloDigest]
    evaluations: list[EvaluationPoint]
    incidents: list[Incident]
    tasks: int
    tokens: int
    bytes_up: int
    bytes_down: int
    wall_s: float
    setup_eval_s: float
    superseded: int
    left_out: float | None = None
    #: Participants that are federations, and nodes that split a text.
    groups: dict[str, SiloDigest] = field(default_factory=dict)
    attention: list[events.KeyMerged] = field(default_factory=list)
    routes: list[events.ResidualRouted] = field(default_factory=list)
    energy: list[events.EnergySpent] = field(default_factory=list)
    #: summary.json's, where the run is finished.
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rounds_done(self) -> int:
        return self.rounds[-1].round if self.rounds else 0

    @property
    def first(self) -> EvaluationPoint | None:
        return self.evaluations[0] if self.evaluations else None

    @property
    def last(self) -> EvaluationPoint | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def baseline_bytes(self) -> int:
        """Bytes of the same local steps with a gradient exchange after each, in fp32.

        0 where nothing would be exchanged: a single participant.
        """
        if not self._exchanges:
            return 0
        return all_reduce_bytes(self.started.parameters, self.started.local_steps, self.tasks)

    @property
    def whole_model_bytes(self) -> int:
        """Bytes of the same rounds with whole models exchanged in bf16; 0 as above."""
        return bf16_exchange_bytes(self.started.parameters, self.tasks) if self._exchanges else 0

    @property
    def _exchanges(self) -> bool:
        return self.started.kind != "train" and self.started.participants_per_round > 1

    @property
    def phases_s(self) -> list[tuple[str, float]]:
        """Seconds of the whole run by phase; what is left of the wall clock is `other`."""
        spent = [phases_of(one) for one in self.rounds]
        known = {name: sum(phases[name] for phases in spent) for name in PHASES[:-1]}
        known["evaluation"] += self.setup_eval_s
        return [*known.items(), (PHASES[-1], max(0.0, self.wall_s - sum(known.values())))]

    @property
    def train_share(self) -> float | None:
        """Share of the wall clock in which nodes trained; None before the first round's end."""
        phases = self.phases_s
        total_s = sum(seconds for _, seconds in phases)
        return phases[0][1] / total_s if self.rounds and total_s > 0 else None


def read_digest(folder: Path) -> RunDigest:
    """Reads a run folder.

    Raises:
        RunNotFoundError: no events.jsonl, or none of its lines starts a run.
    """
    raw = list(read_events(folder))
    history = RunHistory.of_events(folder, raw)
    started = history.started
    state, stop = _state(raw)
    before = _tokens_before(history)
    silos = _silos(history, before)
    incidents = _incidents(raw)
    for incident in incidents:
        if incident.kind == DROPPED and incident.silo is not None:
            silos.setdefault(incident.silo, SiloDigest(incident.silo)).dropped += 1
    points: list[EvaluationPoint] = []
    for event in history.of(events.Evaluated):
        tokens, bits = before.get(event.round + 1, max(before.values())), event.bits_per_byte
        point = EvaluationPoint(event.round, tokens, event.loss, event.perplexity, bits)
        target = silos[event.silo].evaluations if event.silo else points
        if event.silo:
            silos[event.silo].scoring_bytes += event.bytes_down
        # Evaluated again after a resume: the newer one counts.
        target[:] = [old for old in target if old.round != point.round]
        target.append(point)
    others = sorted(set(silos) - set(started.silos)) if started.kind == "simulate" else ()
    groups = {name: silos.pop(name) for name in others}
    rounds = {event.round: event for event in history.of(events.RoundFinished)}
    drawn = {event.round: event for event in history.of(events.RoundStarted)}
    # Totals are the aggregator's own: they hold even where a kill cost one round's last line.
    closed = history.of(events.RoundFinished)[-1:]
    done = closed[0].round if closed else 0
    return RunDigest(
        folder=folder,
        started=started,
        sessions=[event for event in raw if isinstance(event, events.RunStarted)],
        state=state,
        stop=stop,
        rounds=[rounds[number] for number in sorted(rounds)],
        silos=silos,
        groups=groups,
        evaluations=points,
        incidents=incidents,
        tasks=sum(len(event.participants) for event in drawn.values() if event.round <= done),
        tokens=closed[0].total_tokens if closed else 0,
        bytes_up=closed[0].total_bytes_up if closed else 0,
        bytes_down=closed[0].total_bytes_down if closed else 0,
        wall_s=max((event.time_s for event in history.events), default=0.0),
        setup_eval_s=sum(
            event.eval_s for event in history.of(events.Evaluated) if event.round == 0
        ),
        superseded=history.superseded,
        left_out=_left_out(history),
        attention=history.of(events.KeyMerged),
        routes=history.of(events.ResidualRouted),
        energy=history.of(events.EnergySpent),
        summary=history.of(events.RunFinished)[-1].summary if state == "finished" else {},
    )


def _left_out(history: RunHistory) -> float | None:
    """Mean share of the newest round's updates that codecs left for later; None without any."""
    told = [event for event in history.of(events.LocalFinished) if event.left_out is not None]
    newest = [event.left_out for event in told if event.round == told[-1].round]
    return sum(share for share in newest if share is not None) / len(newest) if newest else None


def curve(
    points: Iterable[EvaluationPoint], measure: Measure, over: Literal["tokens", "round"] = "round"
) -> list[tuple[float, float]]:
    """x and y of the points that have the figure."""
    both = ((getattr(point, over), getattr(point, measure)) for point in points)
    return [(x, y) for x, y in both if y is not None]


def cut_alike(scores: Iterable[tuple[float | None, float | None]], tolerance: float) -> bool:
    """Whether texts have as many bytes per token as each other, so far as it is known.

    Perplexity compares only where they have.

    Args:
        scores: perplexity and bits per byte of each.
    """
    sizes = [math.log2(perplexity) / bits for perplexity, bits in scores if perplexity and bits]
    return not sizes or max(sizes) <= min(sizes) * (1 + tolerance)


def _state(raw: list[Event]) -> tuple[State, events.RunStopped | None]:
    for event in reversed(raw):
        match event:
            case events.RunFinished():
                return "finished", None
            case events.RunStopped():
                return "stopped", event
            case events.RunStarted():
                return "unfinished", None
    return "unfinished", None


def _tokens_before(history: RunHistory) -> dict[int, int]:
    """Tokens trained on before each round; under round r + 1, those after round r."""
    per_round: dict[int, int] = {}
    for event in history.of(events.LocalFinished):
        per_round.setdefault(event.round, 0)
    for event in history.of(events.RoundMerged):
        per_round[event.round] = event.tokens
    totals = {}
    for event in history.of(events.RoundFinished):
        per_round[event.round] = event.tokens
        totals[event.round] = event.total_tokens
    before, total = {0: 0, 1: 0}, 0
    for number in range(1, max(per_round, default=0) + 1):
        before[number] = total
        total = totals.get(number, total + per_round.get(number, 0))
        before[number + 1] = total
    return before


def _silos(history: RunHistory, before: dict[int, int]) -> dict[str, SiloDigest]:
    started = history.started
    silos = {name: SiloDigest(name) for name in started.silos}
    whole = sum(started.silo_tokens.values())
    for name, tokens in started.silo_tokens.items():
        silo = silos.setdefault(name, SiloDigest(name))
        silo.text_tokens, silo.share = tokens, tokens / whole if whole else None
    drawn = {event.round: event for event in history.of(events.RoundStarted)}
    per_task = started.local_steps * started.batch_size * started.sequence_length
    stepwise: set[tuple[str, int]] = set()
    for event in history.events:
        name = getattr(event, "silo", None)
        if not name:
            continue
        silo = silos.setdefault(name, SiloDigest(name))
        match event:
            case events.LocalProgress() if event.loss is not None:
                asked, step = drawn.get(event.round), event.step
                beside = asked.participants if asked else [name]
                if asked and not set(beside) <= set(started.silos):
                    # Groups: all train, and their members count the steps of inner rounds.
                    beside, step = started.silos, event.global_step - asked.global_step
                within = len(beside) * per_task * step / max(1, started.local_steps)
                silo.training.append((before.get(event.round, 0) + within, event.loss))
                stepwise.add((name, event.round))
            case events.LocalFinished():
                silo.tasks.append(event)
                # Rounds shorter than run.log_every, and silos that told no steps.
                if event.loss is not None and (name, event.round) not in stepwise:
                    silo.training.append((before[event.round + 1], event.loss))
    return silos


def phases_of(finished: events.RoundFinished) -> dict[str, float]:
    """Seconds of a round by what they went into."""
    rest_s = finished.eval_s + finished.merge_s + finished.checkpoint_s
    # Workers that train side by side may add up to more seconds than the round had.
    train_s = min(finished.local_train_s, max(0.0, finished.round_s - rest_s))
    other_s = max(0.0, finished.round_s - rest_s - train_s)
    spent_s = (train_s, finished.eval_s, finished.merge_s, finished.checkpoint_s, other_s)
    return dict(zip(PHASES, spent_s, strict=True))


def _incidents(raw: list[Event]) -> list[Incident]:
    """From every line of the file: also of rounds that a resume took back."""
    found: list[Incident] = []
    lost_s = newest_s = 0.0

    for event in raw:
        if isinstance(event, events.RunStarted):
            # The run's clock goes back to the checkpoint; a reader's does not.
            lost_s = max(lost_s, newest_s - event.time_s)
        newest_s = max(newest_s, event.time_s + lost_s)
        number, silo = getattr(event, "round", None), getattr(event, "silo", None)
        match event:
            case events.UpdateDropped():
                kind, text = DROPPED, event.reason
            case events.Notice():
                kind, text = "notice", event.text
            case events.WorkerLost():
                kind, text = "worker lost", f"worker {event.worker}: {event.reason}"
            case events.RunStopped():
                kind, text = "run stopped", event.reason
            case events.RunStarted(resumed_from_round=int(number)):
                kind, text = "resumed", f"goes on after round {number}, with its checkpoint"
                found = [
                    replace(i, undone=True)
                    if (i.round or 0) > number and i.kind not in ("run stopped", "resumed")
                    else i
                    for i in found
                ]
            case _:
                continue
        found.append(Incident(event.time_s + lost_s, number, kind, silo, text))
    return found
