"""The schema: every event survives the file, and units stand in names."""

from __future__ import annotations

import json
import math
import re

import pytest
from pydantic import ValidationError

from photon.telemetry.events import (
    EVENTS,
    ComputeChosen,
    Event,
    Notice,
    RunChanged,
    RunFinished,
    RunStopped,
    Standing,
    UpdateDropped,
    WorkerLost,
    parse_event,
)


@pytest.fixture
def one_of_each(begin, one_round):
    found = {type(event): event for event in one_round(1)}
    found |= {
        type(event): event
        for event in (
            begin(resumed_from_round=3),
            ComputeChosen(
                worker=0,
                ranks=8,
                strategy="fsdp",
                reason="a copy is too large for a device",
                device="cuda",
                precision="bf16",
            ),
            Notice(round=1, silo="north", text="out of memory; going on with 4 sequences"),
            UpdateDropped(round=1, silo="north", reason="not finite"),
            WorkerLost(round=1, silo="north", worker=2, reason="exit code -9"),
            RunChanged(round=1, changes={"local.lr": (0.1, 0.2)}),
            RunFinished(summary={"perplexity": 12.5, "nested": {"a": [1, 2]}}),
            RunStopped(round=2, reason="interrupted"),
            Standing(waits_for="for two silos", away=["north"]),
        )
    }
    return found


def test_every_event_has_a_name_and_survives_json(one_of_each):
    assert set(one_of_each) == set(EVENTS.values())
    for event in one_of_each.values():
        record = {"event": event.name, **event.model_dump(mode="json")}
        assert parse_event(json.loads(json.dumps(record))) == event


def test_names_are_the_snake_case_of_their_class():
    for name, kind in EVENTS.items():
        assert name == re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("told", [lambda bad: bad, str])  # as an older version wrote it
def test_every_number_is_finite_or_null_whoever_told_it(one_of_each, bad, told):
    for event in one_of_each.values():
        record = {"event": event.name, **event.model_dump(mode="json")}
        floats = [key for key, value in record.items() if isinstance(value, float)]
        back = parse_event(record | {key: told(bad) for key in floats})
        kept = json.loads(json.dumps(back.model_dump(mode="json"), allow_nan=False))
        spans = {key for key in floats if key.endswith("_s") and key != "tokens_per_s"}
        assert all(kept[key] == 0.0 if key in spans else kept[key] is None for key in floats)
    summary = RunFinished(summary={"loss": bad, "per_silo": {"north": [bad]}}).summary
    assert summary == {"loss": None, "per_silo": {"north": [None]}}


def test_a_newer_version_may_say_more(evaluation):
    record = {"event": "evaluated", **evaluation(1, 2.0).model_dump(), "from_the_future": 1}
    assert parse_event(record) == evaluation(1, 2.0)
    assert parse_event({"event": "from_the_future"}) is None
    assert parse_event({}) is None


def test_events_are_frozen(evaluation):
    with pytest.raises(ValidationError):
        evaluation(1, 2.0).loss = 3.0


def test_times_and_sizes_carry_their_unit():
    seconds = re.compile(r"(time|elapsed|duration|seconds)$")
    for kind in EVENTS.values():
        assert issubclass(kind, Event)
        assert not [name for name in kind.model_fields if seconds.search(name)]
