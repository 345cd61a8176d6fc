"""Differential privacy of a task: which noise it takes, and what its text may still spend.

A group's update has a ledger as a silo's has; its "text" is its path, or all that its node serves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from photon.config import PrivacyConfig, RunConfig
from photon.config.children import LEAF, mechanisms, privacy_of, tables
from photon.data import PreparedData, TokenStream, open_stream
from photon.data.shards import TRAIN
from photon.errors import PolicyError, ResumeMismatchError
from photon.federation.engine import Version
from photon.federation.tasks import Epsilon, FitTask
from photon.link import tensors_sha256
from photon.privacy import node_secret
from photon.privacy.epsilon import epsilon, multiplier
from photon.privacy.ledger import Entry, Ledger, Span, Unit, mu_squared
from photon.store.disk import write_json
from photon.training import PrivateSteps

#: A site's max_epsilon holds at this delta, or the run's where that is less.
SITE_DELTA = 1e-5
#: Two z that are as near are one: another machine may round otherwise.
_SAME = 1e-9


@dataclass(frozen=True)
class Purse:
    """Where a node keeps what its texts spend.

    Attributes:
        folder: of noise.key and the ledgers; a site's outlives its runs.
        run: of no other run, whatever it is called.
        max_epsilon: of a text, over all runs; the site's.
    """

    folder: Path
    run: str
    max_epsilon: float | None = None


@dataclass(frozen=True)
class Spending:
    """A task's place in a ledger.

    Attributes:
        privacy: with its noise_multiplier, whatever the run file names.
        text: digest of the text that pays.
        asked: digest of what an answer depends on beside the task; see `asked_of`.
        tokens, stream, spans: of dp_sgd, as in an Entry.
    """

    privacy: PrivacyConfig
    purse: Purse
    task: FitTask
    text: str
    asked: str = ""
    tokens: int = 1
    stream: str = ""
    spans: list[Span] = field(default_factory=list)

    def secret(self) -> bytes:
        """What noise is drawn with; empty without noise. Raises as `begin`, but for the budget."""
        if not self.privacy.promises:
            return b""
        self._ledger.entries()  # it is there before the secret
        return node_secret(self.purse.folder)

    def steps(self) -> PrivateSteps | None:
        """How the task's steps are noised; None where they aren't. Raises as `secret`."""
        if self.privacy.mechanism != "dp_sgd":
            return None
        clip, z = self.privacy.clip_norm, self.privacy.noise_multiplier
        assert clip is not None
        assert z is not None
        return PrivateSteps(clip, z, self.secret(), (self.question,))

    def withheld(self, *names: str) -> dict[str, Any]:
        """Figures of the text that no noise covers, where a mechanism covers what leaves."""
        return dict.fromkeys(names) if self.privacy.mechanism != "none" else {}

    def begin(self) -> None:
        """Before training: that the text can pay for an answer; of dp_sgd, it has from here.

        Raises:
            PolicyError: it can't.
            ResumeMismatchError: earlier tasks of this run had other noise.
            CheckpointCorruptError, DiskFullError: see `Ledger.held` and `node_secret`.
        """
        if self.privacy.promises:
            with self._ledger.held() as entries:
                if all(one.question != self.question for one in entries):
                    self._pay(entries, self._entry)
                    if self.privacy.mechanism == "client":
                        entries.pop()

    def answered(self, digest: str) -> None:
        """Before this answer leaves; raises as `begin`.

        Args:
            digest: of all that decides what leaves, the noise included.
        """
        if self.privacy.promises:
            answered = self._entry.model_copy(update={"answer": digest})
            with self._ledger.held() as entries:
                if self._entry in entries:
                    entries[entries.index(self._entry)] = answered
                elif answered not in entries:
                    self._pay(entries, answered)

    def epsilon(self) -> Epsilon | None:
        """What this run has cost the text so far; None where nothing is promised."""
        if not self.privacy.promises:
            return None
        delta, unit = self.privacy.at_delta, self.privacy.unit
        cost = mu_squared(self._of_run(self._ledger.entries()), unit)
        return Epsilon(value=epsilon(cost, delta), delta=delta, unit=unit)

    @property
    def _ledger(self) -> Ledger:
        return Ledger(self.purse.folder, self.text)

    @cached_property
    def question(self) -> str:
        """Digest of all that an answer depends on but the text, and what the silo kept.

        Noise is drawn by it, too. Were it drawn by the answer alone, two questions whose answers
        are the same would have the same noise, and so tell that they are.
        """
        task, privacy = self.task, self.privacy
        asked = [self.purse.run, task.run, task.round, task.silo, task.pooled, task.cursor]
        asked += [task.steps, task.global_step, task.node_round, self.asked, self.stream]
        return _digest([*asked, privacy.noise_multiplier, privacy.clip_norm, self.spans])

    @cached_property
    def _entry(self) -> Entry:
        z = self.privacy.noise_multiplier
        assert z is not None
        return Entry(
            run=self.purse.run,
            question=self.question,
            unit=self.privacy.unit,
            multiplier=z,
            tokens=self.tokens,
            stream=self.stream,
            spans=self.spans,
        )

    def _of_run(self, entries: Iterable[Entry]) -> list[Entry]:
        return [one for one in entries if one.run == self.purse.run]

    def _pay(self, entries: list[Entry], new: Entry) -> None:
        for one in self._of_run(entries):
            if not math.isclose(one.multiplier, new.multiplier, rel_tol=_SAME):
                raise ResumeMismatchError(
                    f"privacy.noise_multiplier is {new.multiplier:g} for {self.task.silo}, and was "
                    f"{one.multiplier:g} in earlier tasks of this run",
                    hint="Go on with that, for which the promise is, or start a new run.",
                )
        entries.append(new)
        delta, run = self.privacy.at_delta, self._of_run(entries)
        target, most = self.privacy.target_epsilon, self.purse.max_epsilon
        # A text that ever promised of its sequences is held to that.
        unit: Unit = "sequence" if any(one.unit == "sequence" for one in entries) else new.unit
        limits: list[tuple[float | None, float, list[Entry], Unit, str]] = [
            (target, delta, run, new.unit, "privacy.target_epsilon"),
            (most, min(delta, SITE_DELTA), entries, unit, "policy.max_epsilon, over all runs"),
        ]
        for limit, at, counted, of, said in limits:
            if limit is not None and epsilon(mu_squared(counted, of), at) > limit * (1 + _SAME):
                # Not what it would have cost: other runs' part of that is not this aggregator's.
                raise PolicyError(
                    f"epsilon spent: with this task the text of {self.task.silo} would have cost "
                    f"more than {limit:g} at delta {at:g} ({said})",
                    hint="It takes no part any more. More noise, or fewer rounds, cost less.",
                )


def asked_of(config: RunConfig, version: Version, *own_update: PrivacyConfig) -> str:
    """Digest of run file and version, where any mechanism is to tell questions apart.

    Args:
        own_update: of a group, what its own update goes through, which is not in `config`.
    """
    if not any(one.promises for one in (*own_update, *mechanisms(config))):
        return ""
    # Where it runs, and how often it is scored, moves no answer.
    own: dict[str, Any] = dict.fromkeys(("compute", "energy", "serve", "eval", "comply"), True)
    own |= {"data": {"path"}, "model": {"path"}, "run": {"name", "log_every", "keep_checkpoints"}}
    own |= {"federation": {"workers", "silence_s", "quorum"}}
    told = config.model_dump(mode="json", exclude=own)
    return _digest([told, tensors_sha256(version.tensors), version.once_sha256])


def require_same_privacy(folder: Path, config: RunConfig) -> None:
    """Hold a run file against what the run's silos have kept their states under.

    What a silo keeps is covered by the mechanism that it was made under, and by no other.

    Raises:
        ResumeMismatchError: [privacy] was another.
        DiskFullError: no room to note it.
    """
    path, plain = folder / "privacy.json", PrivacyConfig()
    now = {"privacy": [one.model_dump(mode="json") for one in mechanisms(config)]}
    if path.exists():
        if json.loads(path.read_bytes()) != now:
            raise ResumeMismatchError(
                f"[privacy] is not what this run began with: {path}",
                hint="What silos keep of it would leave uncovered: start a new run.",
            )
    elif any(one != plain for one in mechanisms(config)):
        write_json(path, now, "what a run promises", mode=0o600)


def spending_of(
    config: RunConfig, purse: Purse, data: PreparedData, task: FitTask, asked: str = ""
) -> Spending:
    """Of a silo's task, by a run file as photon.privacy.epsilon.settled has it."""
    shards = [one.sha256 for silo in {*task.pooled} for one in data.silo(silo).shards(TRAIN)]
    privacy, text = privacy_of(config, task.pooled[0]), _digest(sorted(shards))
    if privacy.mechanism != "dp_sgd":
        return Spending(privacy, purse, task, text, asked)
    length = config.data.sequence_length
    order = _digest([data.sha256, config.run.seed, length])
    with open_stream(config, data, task.pooled) as stream:
        privacy = noised(config, task.pooled[0], stream)
        spans = spans_of(stream, task.cursor, task.steps, config.local.batch_size)
    return Spending(privacy, purse, task, text, asked, length, order, spans)


def of_group(
    privacy: PrivacyConfig, purse: Purse, task: FitTask, path: str, asked: str = ""
) -> Spending:
    """Of what a group sends up, or of a residual of one of its members."""
    return Spending(privacy, purse, task, _digest(["group", path]), asked)


def of_sums(privacy: PrivacyConfig, rounds: int) -> Epsilon | None:
    """What so many noised sums cost each silo, as if it had been in all of them.

    Args:
        privacy: with its noise_multiplier, whatever the run file names.
    """
    if not (privacy.at_sum and privacy.noise_multiplier):
        return None
    value = epsilon(rounds / privacy.noise_multiplier**2, privacy.at_delta)
    return Epsilon(value=value, delta=privacy.at_delta, unit="client")


def noised(config: RunConfig, silo: str, stream: TokenStream) -> PrivacyConfig:
    """[privacy] of a silo with its z: under dp_sgd, target_epsilon's is worked out of its text."""
    privacy = privacy_of(config, silo)
    if privacy.mechanism != "dp_sgd" or privacy.target_epsilon is None:
        return privacy
    nodes = dict(tables(config.federation.children)).get(silo, LEAF).nodes or 1
    spans = spans_of(stream, 0, config.total_steps * nodes, config.local.batch_size)
    whole = Entry(run="", question="", unit="sequence", multiplier=1.0, tokens=1, spans=spans)
    z = multiplier(privacy.target_epsilon, privacy.at_delta, mu_squared([whole], "sequence"))
    return privacy.model_copy(update={"noise_multiplier": z})


def spans_of(stream: TokenStream, first: int, steps: int, batch: int) -> list[Span]:
    """What a stretch of the stream costs: a sequence that m places of a step have moves m times as
    far and costs m^2 / z^2, m at each place.
    """
    size, end = stream.sequences, first + steps * batch
    if batch >= size:  # a silo of next to nothing: all of it is in each step, this often at most
        return [(first // size, 0, size, steps * ((batch - 2) // size + 2) ** 2)]
    epochs = range(first // size, (end - 1) // size + 1)
    found = [(n, max(first - n * size, 0), min(end - n * size, size), 1) for n in epochs]
    for start in {first + (n * size - first) // batch * batch for n in epochs if n * size > first}:
        numbers = stream.numbers(start, batch)  # of a step across the end of an epoch
        times = Counter(numbers)
        for place, number in enumerate(numbers, start):
            if times[number] > 1:
                epoch, at = divmod(place, size)
                found.append((epoch, at, at + 1, times[number] - 1))
    return found


def worst(told: Iterable[Epsilon | None]) -> Epsilon | None:
    """The largest; None where anybody has none, or nobody answered."""
    every = list(told)
    known = [one for one in every if one is not None]
    whole = known and len(known) == len(every)
    return max(known, key=lambda one: one.value) if whole else None


def misstated(config: RunConfig, task: FitTask, told: Epsilon | None) -> str | None:
    """What is wrong with an epsilon that a silo, or group, states; None: nothing."""
    child = config.federation.children.get(task.silo)
    privacy = child.update_privacy if child else config.privacy
    if child and privacy.mechanism == "none":
        return None  # its members state theirs
    if (told is not None) != privacy.promises:
        return f"its receipt has {'an' if told else 'no'} epsilon, and the run promises otherwise"
    most = (privacy.target_epsilon or math.inf) * (1 + _SAME)
    promised = (privacy.unit, privacy.at_delta)
    if told is None or ((told.unit, told.delta) == promised and told.value <= most):
        return None
    return f"its receipt says an epsilon of {told.value:g} of a {told.unit} at delta {told.delta:g}"


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
