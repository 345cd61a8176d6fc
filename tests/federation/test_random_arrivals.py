"""Whatever speeds, stalls, joins and kills: every run ends, and its books are right at every point.

The silos learn one number each time, so that hundreds of federations take seconds.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from extremes import examples
from hypothesis import given
from hypothesis import strategies as st

from photon.config import parse_run_config
from photon.config.clock import ClockConfig
from photon.engines.local import LocalEngine
from photon.engines.simulated import SimulatedEngine, SimulatedFleet
from photon.errors import QuorumLostError
from photon.federation import Federation, Receipt, RunState, Server, Update
from photon.federation.outstanding import Order
from photon.telemetry.events import LocalFinished, RoundMerged, RoundStarted, UpdateDropped

SILOS = ("a", "b", "c", "d")
STEPS, BATCH, LENGTH = 4, 2, 8
STEP_TOKENS = BATCH * LENGTH


class Learner:
    """A participant whose update says which task it answers, and how often it was asked to."""

    def __init__(self, diverging: frozenset[tuple[str, int]]) -> None:
        self._diverging = diverging

    def fit(self, task, version):
        receipt = Receipt(task.round, task.silo, tokens=task.steps * STEP_TOKENS, bytes_up=100)
        delta = torch.tensor([1.0 + task.cursor + 7 * SILOS.index(task.silo)]) / 1000
        if (task.silo, task.round) in self._diverging:
            delta = delta * float("nan")
        return Update(receipt, lambda: iter([("weights/w", delta)]))

    def settle(self):
        pass

    def close(self):
        pass


class Run:
    """A federation on a clock, as a process that may be ended and begun again."""

    def __init__(self, config, clock, diverging, folder: Path) -> None:
        self.config, self.clock, self.diverging, self.folder = config, clock, diverging, folder
        self.told: list = []
        self.tell = self.told.append
        self.saved = json.dumps(asdict(RunState()))
        self.groups = {"global": {"weights/w": torch.zeros(1)}}
        self.begin()

    def begin(self) -> None:
        """From the last checkpoint, as a new process does."""
        state = RunState(**json.loads(self.saved))
        groups = {
            group: {name: one.clone() for name, one in tensors.items()}
            for group, tensors in self.groups.items()
        }
        server = Server(self.config, self.folder, groups, state)
        inner = LocalEngine(Learner(self.diverging))
        self.engine = SimulatedEngine(
            inner, self.clock, SILOS, self.folder / "arrivals", state.clock
        )
        needed = self.config.federation.sample or self.config.federation.quorum
        tokens = {silo: 1000 + 10 * number for number, silo in enumerate(SILOS)}
        self.fleet = SimulatedFleet(tokens, needed, self.engine, self.clock)
        self.loop = Federation(
            self.config,
            self.fleet,
            self.engine,
            server,
            lambda event: self.tell(event),
            order=Order(self.folder / "order.jsonl"),
        )
        self.loop.outstanding.go_on_with(state.in_flight, groups, server)
        self.state = state

    def step(self) -> bool:
        """One round and its checkpoint; whether there was one."""
        if self.state.global_step >= self.config.total_steps or self.state.round > 60:
            return False
        candidates = self.fleet.drawn_from(self.state.round + 1)
        if candidates is None:
            return False
        closed = self.loop.round(self.state, candidates)
        record = asdict(closed.after) | {"clock": self.engine.clock()}
        record["total_tokens"] = self.state.total_tokens + closed.costs.tokens
        record["tokens_lost"] = self.state.tokens_lost + closed.costs.tokens_lost
        self.saved = json.dumps(record)
        self.groups = {
            group: {name: one.clone() for name, one in tensors.items()}
            for group, tensors in (
                self.loop.server.groups() | self.loop.outstanding.versions()
            ).items()
        }
        self.state = RunState(**json.loads(self.saved))
        return True

    def end(self):
        """Of what every way to the end must agree on."""
        weight = self.groups["global"]["weights/w"]
        facts = json.loads(self.saved)
        return facts, None if weight.isnan().any() else weight.item()


CLOCKS = st.builds(
    lambda speeds, spans, joins: ClockConfig.model_validate(
        {
            "silos": {
                silo: {"step_s": speed, "latency_s": 0.1, "from_s": join}
                for silo, speed, join in zip(SILOS, speeds, joins, strict=True)
            },
            "failures": {"mean_up_s": spans[0], "mean_down_s": spans[1], "seed": spans[2]}
            if spans is not None
            else {},
        }
    ),
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 5.0]), min_size=4, max_size=4),
    st.none()
    | st.tuples(st.sampled_from([3.0, 20.0]), st.sampled_from([1.0, 15.0]), st.integers(0, 9)),
    st.lists(st.sampled_from([0.0, 0.0, 7.5]), min_size=4, max_size=4),
)
KEYS = st.fixed_dictionaries(
    {
        "pace": st.sampled_from(["synchronous", "quorum", "buffered"]),
        "quorum": st.integers(1, 3),
        "grace": st.sampled_from([0.0, 0.5]),
        "late": st.sampled_from(["drop", "merge"]),
        "max_staleness": st.integers(1, 3),
        "deadline_s": st.sampled_from([3.0, 1e6]),
        "unequal_steps": st.booleans(),
        "normalise": st.booleans(),
    },
    optional={"sample": st.integers(2, 4), "over_sample": st.integers(0, 2)},
)


@given(
    clock=CLOCKS,
    keys=KEYS,
    kills=st.sets(st.integers(1, 8), max_size=3),
    diverging=st.frozensets(st.tuples(st.sampled_from(SILOS), st.integers(1, 4)), max_size=2),
)
@examples(60)
def test_every_run_ends_and_its_books_are_right(clock, keys, kills, diverging, tmp_path_factory):
    keys["quorum"] = min(keys["quorum"], keys.get("sample", 4))
    config = parse_run_config(
        {
            "model": {"preset": "tiny"},
            "data": {"path": "none", "sequence_length": LENGTH},
            "federation": {"rounds": 5, "max_update_norm": "none", **keys},
            "local": {"steps": STEPS, "batch_size": BATCH},
            "eval": {"every": 0, "per_silo": False},
        }
    )
    ends = []
    for at in (set(), kills):
        run = Run(config, clock, diverging, tmp_path_factory.mktemp("run"))
        lost = False
        try:
            while run.step():
                if run.state.round in at:
                    run.begin()
        except QuorumLostError:
            lost = True
        ends.append((run.end(), lost))
        books(run, config, at)
    assert ends[0] == ends[1]


def books(run: Run, config, kills) -> None:
    """What was told and what is kept say the same."""
    facts = json.loads(run.saved)
    merged = Counter()
    for event in run.told:
        if isinstance(event, LocalFinished):
            merged[event.round, event.silo] += 1
    rounds = [event.round for event in run.told if isinstance(event, RoundMerged)]
    assert len(rounds) == len(set(rounds)) == facts["round"]
    assert (
        sum(event.tokens for event in run.told if isinstance(event, RoundMerged))
        == facts["total_tokens"]
    )
    # Nothing is merged twice; a round that lost its quorum is not in the checkpoint.
    assert all(count == 1 for count in merged.values())
    # What was asked of silos was merged, was lost, or is still being worked on.
    read = sum(facts["cursors"].values()) * LENGTH
    going = sum(one["task"]["steps"] for one in facts["in_flight"]) * STEP_TOKENS
    dropped = Counter(
        (event.round, event.silo) for event in run.told if isinstance(event, UpdateDropped)
    )
    assert all(count == 1 for count in dropped.values())
    assert facts["total_tokens"] + facts["tokens_lost"] + going == read


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_between_two_updates_keeps_their_order(moment, tmp_path):
    """What a quorum had merged before the kill is merged first, and in that order."""
    config = parse_run_config(
        {
            "model": {"preset": "tiny"},
            "data": {"path": "none", "sequence_length": LENGTH},
            "federation": {"rounds": 2, "pace": "quorum", "quorum": 4, "max_update_norm": "none"},
            "local": {"steps": STEPS, "batch_size": BATCH},
        }
    )
    speeds = dict(zip(SILOS, (3.0, 1.0, 4.0, 2.0), strict=True))
    clock = ClockConfig.model_validate({"silos": {one: {"step_s": s} for one, s in speeds.items()}})
    calm = Run(config, clock, frozenset(), tmp_path / "calm")
    (tmp_path / "calm").mkdir()
    while calm.step():
        pass
    run = Run(config, clock, frozenset(), tmp_path)
    count = 0

    class KilledError(Exception):
        pass

    def tell(event):
        nonlocal count
        if isinstance(event, LocalFinished):
            count += 1
            if count == moment:
                raise KilledError

    run.tell = tell
    with pytest.raises(KilledError):
        run.step()
    # Other silos are faster after the kill: the order is the one that was written down.
    run.clock = ClockConfig.model_validate(
        {"silos": {one: {"step_s": 5 - s} for one, s in speeds.items()}}
    )
    run.begin()
    run.told = told = []
    run.tell = told.append
    assert run.step()
    order = [event.silo for event in told if isinstance(event, LocalFinished)]
    assert order[:moment] == ["b", "d", "a", "c"][:moment]
    assert isinstance(told[0], RoundStarted)
