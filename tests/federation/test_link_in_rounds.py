"""Codecs in rounds: the same bits in every engine and after a resume, error feedback, broadcast."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from photon.config import LinkConfig
from photon.engines.local import LocalEngine
from photon.errors import ChunkCorruptError, PhotonError
from photon.federation.broadcast import Broadcast, Inbox
from photon.federation.outbox import feedback_path, pack
from photon.federation.tasks import WEIGHTS, FitTask
from photon.link import TensorFile
from photon.runs import resume, simulate
from photon.store.contract import FolderStore
from photon.store.transfer import Transfer
from photon.telemetry import read_history
from photon.telemetry.events import Evaluated, LocalFinished, RoundFinished

#: One that looks at a whole update first and is of three stages, one that learns.
CODECS = ("topk(density=0.05)+int8+zstd", "powersgd(rank=2)+bf16")


def finished(folder):
    return read_history(folder).of(LocalFinished)


@pytest.mark.parametrize("codec", CODECS)
def test_engines_agree_to_the_bit_and_to_the_byte(codec, three_silos, make_config, tmp_path):
    """In this process nothing is written; with workers, parcels move through a folder."""
    seen = []
    for workers in (0, 1):
        config = make_config(
            three_silos, f'link.update_codec="{codec}"', f"federation.workers={workers}"
        )
        folder = tmp_path / str(workers)
        summary = simulate(config, run_dir=folder).summary
        rows = sorted((e.round, e.silo, e.bytes_up, e.left_out) for e in finished(folder))
        seen.append((summary["weights_sha256"], summary["bytes_up"], rows))
    assert seen[0] == seen[1]
    plain = 4 * read_history(tmp_path / "0").started.parameters
    assert all(0 < bytes_up < plain / 3 for _, _, bytes_up, _ in seen[0][2])
    assert all(0 < left_out < 1 for *_, left_out in seen[0][2])


def interrupt(monkeypatch, number):
    """Ctrl-C in the last silo's task of a round; returns the fired tasks."""
    fired = []
    build = LocalEngine.__init__

    def hook(task, _):
        if task.round == number and task.silo == "red" and not fired:
            fired.append(task)
            raise KeyboardInterrupt

    def with_fault(self, node):
        node._fault = hook
        build(self, node)

    monkeypatch.setattr(LocalEngine, "__init__", with_fault)
    return fired


@pytest.mark.parametrize("codec", ["sparseloco", "powersgd(rank=2)"])
def test_feedback_survives_an_interruption(codec, three_silos, make_config, tmp_path, monkeypatch):
    config = make_config(three_silos, f'link.update_codec="{codec}"', 'link.broadcast_codec="int4"')
    calm = simulate(config, run_dir=tmp_path / "calm").summary
    fired = interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, run_dir=tmp_path / "cut")
    assert len(fired) == 1
    resumed = resume(tmp_path / "cut").summary
    for key in ("weights_sha256", "bytes_up", "bytes_down", "global_loss"):
        assert resumed[key] == calm[key], key


def test_feedback_is_pruned_with_the_checkpoints(three_silos, make_config, tmp_path):
    config = make_config(three_silos, 'link.update_codec="int8"', "run.keep_checkpoints=1")
    simulate(config, run_dir=tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run/nodes/red").glob("feedback-*"))
    assert kept == ["feedback-000003.safetensors"]


def task(number, node_round):
    return FitTask("run", number, "red", 0, 1, node_round)


def update(number):
    draw = torch.Generator().manual_seed(number)
    return {
        WEIGHTS + "matrix": torch.randn(200, 300, generator=draw) * 1e-3,
        WEIGHTS + "vector": torch.randn(70, generator=draw) * 1e-3,
        "optimizer/matrix.m": torch.randn(200, 300, generator=draw),
    }


@pytest.mark.parametrize("codec", ["int4", "topk(density=0.01)", "sparseloco", "sign"])
def test_what_is_left_out_comes_later(codec, tmp_path):
    """Without decay all that was sent, and what is left, is all there was to send."""
    link = LinkConfig(update_codec=codec, feedback_decay=1.0)
    given, sent = {}, {}
    for number in range(1, 8):
        last = number - 1 or None
        named = update(number)
        packed = pack(link, tmp_path, task(number, last), lambda t=named: iter(t.items()))
        for entry in packed.entries():
            given[entry.name] = given.get(entry.name, 0) + named[entry.name].double()
            sent[entry.name] = sent.get(entry.name, 0) + entry.decoded().double()
    with TensorFile(feedback_path(tmp_path, "red", 7)) as file:
        left = file.read()
    for name in given:
        if name.startswith(WEIGHTS):
            total = sent[name] + left["residual/" + name]
            torch.testing.assert_close(total, given[name], rtol=0, atol=1e-6)
            assert left["residual/" + name].any()
        else:  # averaged optimizer state goes as it is
            assert torch.equal(sent[name], given[name])


def test_decay_forgets(tmp_path):
    link = LinkConfig(update_codec="sign", feedback_decay=0.5)
    named = update(1)
    packed = pack(link, tmp_path, task(1, None), lambda: iter(named.items()))
    with TensorFile(feedback_path(tmp_path, "red", 1)) as file:
        left = file.read()
    name = WEIGHTS + "matrix"
    sent = {entry.name: entry.decoded() for entry in packed.entries()}
    torch.testing.assert_close(left["residual/" + name], 0.5 * (named[name] - sent[name]))


@pytest.mark.parametrize(("decay", "added"), [(0.5, 0.5**3), (1.0, 1.0), (0.0, 0.0)])
def test_what_was_left_out_fades_with_every_round_missed(decay, added, tmp_path):
    link = LinkConfig(update_codec="sign", feedback_decay=decay)
    named, name = update(1), WEIGHTS + "matrix"
    pack(link, tmp_path, task(1, None), lambda: iter(named.items()))
    with TensorFile(feedback_path(tmp_path, "red", 1)) as file:
        left = file.read()["residual/" + name]
    nothing = {key: torch.zeros_like(tensor) for key, tensor in named.items()}
    late = pack(link, tmp_path, task(5, 1), lambda: iter(nothing.items()))
    sent = next(entry.decoded() for entry in late.entries() if entry.name == name)
    # A sign codec sends the mean magnitude of each block.
    at_once = pack(link, tmp_path, task(2, 1), lambda: iter(nothing.items()))
    soon = next(entry.decoded() for entry in at_once.entries() if entry.name == name)
    assert bool(left.any()) == (decay > 0)
    torch.testing.assert_close(sent, added * soon)


def test_a_codec_without_feedback_keeps_nothing(tmp_path):
    for codec in ("bf16", "zstd", "fp16+zstd"):
        link = LinkConfig(update_codec=codec)
        packed = pack(link, tmp_path, task(1, None), lambda: iter(update(1).items()))
        assert packed.receipt.left_out is None
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("codec", ["int8", "int4+zstd", "topk(density=0.1)+bf16", "sparseloco"])
def test_nodes_hold_the_aggregators_state_to_the_bit(codec, tmp_path):
    """Over a real store: one node at every round, one that skips some, one that comes late."""
    config = LinkConfig(broadcast_codec=codec)
    broadcast = Broadcast(config, "a")
    carrier = Transfer(FolderStore(tmp_path), streams=2)
    state = {name: tensor * 30 for name, tensor in update(0).items()}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    always, sometimes, late = (Inbox(carrier, "a", shapes, config.specs) for _ in range(3))
    ref = broadcast.publish(carrier, "s", 0, state, base=None)
    assert ref.update is None
    for node in (always, sometimes):
        assert_same(node.receive(ref), state)
    exact = {name: tensor.clone() for name, tensor in state.items()}
    for number in range(1, 6):
        before = broadcast.keep(state)
        for name, tensor in update(number).items():
            state[name] -= tensor
            exact[name] -= tensor
        broadcast.encode(number, state, before)
        base = ref.sha256
        ref = broadcast.publish(carrier, "s", number, state, base=base)
        assert ref.update is not None
        assert ref.update.wire_bytes == broadcast.bytes_down(number + 1, state, holds_last=True)
        assert ref.whole.wire_bytes == broadcast.bytes_down(number + 1, state, holds_last=False)
        assert_same(always.receive(ref), state)
        if number in (1, 4):
            assert_same(sometimes.receive(ref), state)
    assert_same(late.receive(ref), state)
    for name in exact:  # nothing is lost for good: what was left out waits
        waiting = broadcast.left_out.get(name, 0)
        torch.testing.assert_close(state[name] + waiting, exact[name], rtol=0, atol=1e-6)
    assert broadcast.update_bytes < broadcast.bytes_down(6, state, holds_last=False)


def test_a_node_refuses_a_state_that_is_not_the_promised_one(tmp_path):
    config = LinkConfig(broadcast_codec="int8")
    broadcast = Broadcast(config, "a")
    carrier = Transfer(FolderStore(tmp_path))
    state = update(0)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    node = Inbox(carrier, "a", shapes, config.specs)
    first = broadcast.publish(carrier, "s", 0, state, base=None)
    node.receive(first)
    before = broadcast.keep(state)
    for tensor in state.values():
        tensor += 1e-3
    broadcast.encode(1, state, before)
    whole = broadcast.publish(carrier, "s", 1, state, base=first.sha256)
    second = replace(whole, whole=None)
    newcomer = Inbox(carrier, "a", shapes, config.specs)
    with pytest.raises(ChunkCorruptError, match="this node holds none"):
        newcomer.receive(second)
    node._held[WEIGHTS + "vector"][3] += 1  # a bit flipped in its memory
    with pytest.raises(ChunkCorruptError, match="was promised"):
        node.receive(second)
    assert_same(node.receive(whole), state)


def assert_same(found, state):
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    for name in state:
        assert torch.equal(found[name], state[name]), name


def test_newcomers_are_given_a_whole_state_and_others_the_update(
    three_silos, make_config, tmp_path
):
    config = make_config(
        three_silos,
        'link.broadcast_codec="int8"',
        "federation.sample=2",
        "federation.rounds=6",
        "run.seed=3",
        "eval.per_silo=false",
    )
    simulate(config, run_dir=tmp_path / "run")
    history = read_history(tmp_path / "run")
    whole = 4 * history.started.parameters
    last = {}
    kinds = {True: 0, False: 0}
    for event in history.of(LocalFinished):
        holds = event.round > 1 and last.get(event.silo) == event.round - 1
        assert (event.bytes_down < whole / 3) == holds
        assert holds or event.bytes_down > whole
        last[event.silo] = event.round
        kinds[holds] += 1
    assert min(kinds.values()) >= 2, kinds
    down = sum(event.bytes_down for event in history.of(RoundFinished))
    assert down == sum(event.bytes_down for event in history.of(LocalFinished))


def test_a_silo_that_evaluates_a_state_gets_it_once(three_silos, make_config, tmp_path):
    """Counted as a site's inbox would: what it holds is not sent again."""
    config = make_config(
        three_silos,
        'link.broadcast_codec="int8"',
        "federation.sample=2",
        "federation.rounds=5",
        "local.steps=1",
        "eval.every=2",
        "eval.max_tokens=64",
    )
    simulate(config, run_dir=tmp_path / "run")
    history = read_history(tmp_path / "run")
    whole, held, kinds = 4 * history.started.parameters, {}, Counter()
    for event in history.events:
        if isinstance(event, LocalFinished):
            needed = event.round - 1
        elif isinstance(event, Evaluated) and event.silo is not None:
            needed = event.round
        else:
            continue
        behind = needed - held.get(event.silo, -9)
        if behind == 0:
            assert event.bytes_down == 0
        elif behind == 1:
            assert 0 < event.bytes_down < whole / 3
        else:
            assert event.bytes_down > whole
        kinds[min(behind, 2)] += 1
        held[event.silo] = needed
    assert min(kinds[0], kinds[1], kinds[2]) >= 2, kinds
    down = sum(event.bytes_down for event in history.of(RoundFinished))
    told = [*history.of(LocalFinished), *history.of(Evaluated)]
    assert down == sum(event.bytes_down for event in told)


def test_quantised_both_ways_still_learns(three_silos, make_config, tmp_path):
    steps = ("federation.rounds=4", "local.steps=8")
    plain = simulate(make_config(three_silos, *steps), run_dir=tmp_path / "plain").summary
    coded = simulate(
        make_config(
            three_silos, *steps, 'link.update_codec="int4+zstd"', 'link.broadcast_codec="int8"'
        ),
        run_dir=tmp_path / "coded",
    ).summary
    assert coded["global_loss"] == pytest.approx(plain["global_loss"], rel=0.02)
    moved = coded["bytes_up"] + coded["bytes_down"]
    assert moved < (plain["bytes_up"] + plain["bytes_down"]) / 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['link.update_codec="int9"'], "did you mean int8"),
        (['link.update_codec="topk(density=2)"'], "density"),
        (['federation.merge="adopt"', 'link.update_codec="int8"'], "for deltas"),
        (
            ['federation.merge="adopt"', 'link.update_codec="bf16"', "link.error_feedback=true"],
            "error feedback",
        ),
        (["link.chunk_mib=100"], "64"),
        (['link.broadcast_codec="lowrank"'], "rounded otherwise on other machines"),
    ],
)
def test_what_can_not_work_is_refused_with_the_run_file(overrides, words, three_silos, make_config):
    with pytest.raises(PhotonError, match=words):
        make_config(three_silos, *overrides)


def test_weights_may_be_adopted_through_a_codec_that_keeps_them(three_silos, make_config, tmp_path):
    for codec in ("zstd", "bf16"):
        config = make_config(
            three_silos, 'federation.merge="adopt"', f'link.update_codec="{codec}"'
        )
        simulate(config, run_dir=tmp_path / codec)
    plain = make_config(three_silos, 'federation.merge="adopt"')
    expected = simulate(plain, run_dir=tmp_path / "plain").summary
    lossless = (tmp_path / "zstd/summary.json").read_text()
    assert expected["weights_sha256"] in lossless
