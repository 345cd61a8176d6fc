"""Asks and Replies with every field filled in, and copies of them with another value."""

from __future__ import annotations

import copy

from hypothesis import strategies as st

from photon.energy.account import Spent
from photon.federation.envelopes import (
    Ask,
    EvalAnswer,
    EvalPart,
    FitAnswer,
    FitPart,
    Refusal,
    Reply,
    RunPart,
)
from photon.federation.tasks import EvalReceipt, Receipt, StateRef
from photon.link import Ref
from photon.training import StepTimes

RUN_ID = "0123456789abcdef" * 2
SITE = {"data": {"path": "/its/own"}, "compute": {"threads": 3}}

WHOLE = Ref("run/global/state/round-000003/x.json", 500, "1" * 64, 4_000)
UPDATE = Ref("run/global/outer_update/round-000003/x.json", 400, "2" * 64, 1_000)
STATE = StateRef(3, "3" * 64, WHOLE, UPDATE, "4" * 64)
RECEIPT = Receipt(
    4,
    "red",
    tokens=512,
    loss=5.5,
    first_loss=5.75,
    last_loss=5.25,
    bytes_down=4_500,
    bytes_up=WHOLE.wire_bytes,
    train_s=1.5,
    load_s=0.25,
    publish_s=0.125,
    times=StepTimes(0.1, 0.2, 0.3, 0.4),
    communication_s=0.5,
    mfu=0.375,
    peak_memory_bytes=1 << 30,
    micro_batch_size=4,
    left_out=0.01,
    energy=Spent(how="measured", training_j=120.5, idle_j=3.25),
)
SCORE = EvalReceipt(
    "red",
    loss=5.5,
    bits_per_byte=2.25,
    tokens=1_990,
    eval_s=0.75,
    bytes_down=4_500,
    energy=Spent(how="estimated", evaluation_j=8.5),
)


def run_part(config=None, **fields):
    plain = {
        "id": RUN_ID,
        "silos": ["blue", "red"],
        "config": {"run": {"name": "a run"}, "data": {}} if config is None else config,
        "model": "5" * 64,
        "tokenizer": "6" * 64,
        "vocab_size": 300,
        "eos_id": 0,
    }
    return RunPart(**plain | fields)


def ask(kind="fit", **fields):
    part = {
        "fit": FitPart(round=4, global_step=12, steps=4, node_round=2),
        "evaluate": EvalPart(round=3),
    }[kind]
    plain = {
        "photon_version": "0.1.0",
        "kind": kind,
        "silo": "red",
        "run": run_part(),
        "state": STATE,
        "log_head": "8" * 64,
        "within_s": 3600.5,
        kind: part,
    }
    return Ask(**plain | fields)


def reply(kind="fit", **fields):
    part = {
        "fit": {"fit": FitAnswer.of(RECEIPT, WHOLE)},
        "evaluate": {"evaluate": EvalAnswer.of(SCORE)},
        "refused": {"refused": Refusal(code=85, message="policy.runs allows none", hint="Ask.")},
    }[kind]
    plain = {
        "photon_version": "0.1.0",
        "kind": "evaluate" if kind == "evaluate" else "fit",
        "silo": "red",
        "ask": ask(kind).sha256 if kind != "refused" else ask().sha256,
        "log_head": "8" * 64,
        "run": RUN_ID,
        "round": 3 if kind == "evaluate" else 4,
        "task": f"{RUN_ID}/fit/4/red",
        "state": "3" * 64,
        "data": "7" * 64,
    }
    return Reply(**plain | part | fields)


ASKS = [ask("fit"), ask("evaluate")]
REPLIES = [
    reply("fit"),
    reply("evaluate"),
    reply("refused"),
    reply(fit=FitAnswer(failure="its loss became nan", failure_code=61, failure_hint="Lower lr.")),
]


def paths(tree, at=()):
    """All places in a document."""
    yield at
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths(value, (*at, key))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from paths(value, (*at, place))


def put(tree, path, value):
    """A copy with another value at a place."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    here = tree
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    return tree


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**53, 2**64, 10**400, 1e308, float("inf"), float("nan")])
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["\ud800", "\x00", "../..", "/etc/passwd", "a" * 5000, "1", "fit"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
