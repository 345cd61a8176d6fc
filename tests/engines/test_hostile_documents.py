"""Whatever one of five silos signs and uploads, the round ends with the other four merged.

Replies and manifests are spoiled field by field (tests/shared/extremes.py), signed by its own
key, and referred to as the protocol has it: nothing but their content is wrong.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from extremes import examples, spoiled
from hypothesis import given
from hypothesis import strategies as st
from remote_bench import RUN_ID, Bench, Federated, ask_again_at_once

from photon.federation import CheckpointStore, Federation, Server
from photon.federation.checkpoint import RunState
from photon.federation.envelopes import Reply
from photon.federation.sampling import FixedFleet
from photon.link.manifest import Manifest
from photon.runs.rounds import Rounds
from photon.telemetry import Recorder
from photon.telemetry.events import RoundMerged, UpdateDropped

HOSTILE = "grey"
HONEST = ["blue", "green", "red", "white"]


class Round:
    """A round of five, as often as it is wanted: four always answer alike, one as it is told."""

    def __init__(self, config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.federated = Federated(config, folder)
        self.bench = Bench(self.federated, folder / "bench")
        self._kept: dict[str, Any] = {}
        #: What silos sent; a round removes from the store what it did not accept.
        self._sent: dict[str, bytes] = {}
        self.bench.wire.fault = self._keep
        self.begun = {name: one.clone() for name, one in self.federated.state.items()}
        self.honest = self.weights()
        self._sent = {key: bytes(data) for key, data in self.bench.store._objects.items()}

    def _keep(self, silo, ask, times):
        """Answers of the honest, made once."""
        if ask.task_id not in self._kept:
            self._kept[ask.task_id] = silo.answer(ask)
        return self._kept[ask.task_id]

    @property
    def reply(self) -> dict[str, Any]:
        """The hostile silo's true answer."""
        return json.loads(self._kept[f"{RUN_ID}/fit/1/{HOSTILE}"].text)

    def manifest(self) -> dict[str, Any]:
        return json.loads(self._sent[self.reply["fit"]["update"]["key"]])

    def weights(self, lie: bytes | None = None, *, anew: bool = True) -> dict[str, torch.Tensor]:
        """The global state after the round, in which the hostile silo answers with a lie.

        Args:
            anew: no answer is known from before.
        """
        bench, federated, events = self.bench, self.federated, []
        for key, sent in self._sent.items():
            bench.store.put(key, sent)
        if anew:
            bench.roster.tasks.prune(RUN_ID, 2)
        bench.wire.fault = lambda silo, ask, times: (
            self._keep(silo, ask, times) if lie is None or silo.name != HOSTILE else silo.sign(lie)
        )
        for silo in bench.silos:
            bench.wire.be_here(silo)
        checkpoints = CheckpointStore(self.folder / "checkpoints", 1)
        for name, tensor in self.begun.items():
            federated.state[name].copy_(tensor)
        recorder = Recorder([SimpleNamespace(on_event=events.append)])
        begun, fleet = RunState(0, 0, "model", "data"), FixedFleet(dict.fromkeys(bench.silos, 1))
        federation = Federation(
            self.config,
            fleet,
            bench.new_engine(),
            Server(self.config, self.folder, {"global": federated.state}, begun),
            events.append,
        )
        Rounds(federation, begun, recorder, checkpoints).run()
        (merged,) = [one for one in events if isinstance(one, RoundMerged)]
        assert set(HONEST) <= set(merged.participants)
        weights = federation.server.weights
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        for event in events:
            json.dumps(event.model_dump(mode="json"), allow_nan=False)
        assert checkpoints.load_latest()[0].round == 1
        self.dropped = [one for one in events if isinstance(one, UpdateDropped)]
        assert {one.silo for one in self.dropped} <= {HOSTILE}
        return {name: tensor.clone() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def a_round(prepare_text, make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    data = prepare_text(folder / "text", dict.fromkeys([*HONEST, HOSTILE], 8))
    config = make_config(
        data, "local.steps=1", "federation.rounds=1", "eval.every=0", "eval.per_silo=false"
    )
    made = Round(config, folder)
    with pytest.MonkeyPatch.context() as patch:
        ask_again_at_once(patch)
        yield made
    made.bench.roster.close()


@pytest.fixture(scope="module")
def without(a_round):
    """The state after a round whose hostile silo signs what is no Reply."""
    state = a_round.weights(b"{}")
    assert a_round.dropped
    return state


def require_same(left, right) -> None:
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@examples(12)
@given(data=st.data())
def test_replies(a_round, without, data):
    lie = data.draw(spoiled(Reply, a_round.reply))
    state = a_round.weights(json.dumps(lie).encode())
    if a_round.dropped:
        require_same(state, without)
    # Another process, which finds what the first one kept, comes to the same.
    require_same(state, a_round.weights(json.dumps(lie).encode(), anew=False))


@examples(12)
@given(data=st.data())
def test_manifests(a_round, without, data):
    lie = data.draw(spoiled(Manifest, a_round.manifest()))
    content, reply = json.dumps(lie).encode(), a_round.reply
    digest = hashlib.sha256(content).hexdigest()
    update = reply["fit"]["update"] | {"bytes": len(content), "sha256": digest}
    update["key"] = update["key"].rpartition("/")[0] + f"/{HOSTILE}-{digest[:16]}.json"
    a_round.bench.store.put(update["key"], content)
    reply["fit"]["update"] = update
    state = a_round.weights(json.dumps(reply).encode())
    require_same(state, without if a_round.dropped else a_round.honest)
