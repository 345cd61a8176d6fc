"""Silos elsewhere: updates in the store, late, damaged, missing or of no use."""

from __future__ import annotations

import time

import pytest
from remote_bench import RUN_ID, Bench, Federated, calm_of, hashes, only_fails

from photon.engines.remote import Depot
from photon.errors import ChunkCorruptError, ObjectMissingError, StoreUnavailableError
from photon.federation import fitted
from photon.federation.envelopes import parse_reply
from photon.link import tensors_sha256


def chunks_of(bench, silo):
    return [key for key, _ in bench.store.keys(f"{RUN_ID}/silos/{silo}/chunks")]


def damage(bench, silo):
    """Other bytes of the same length, as a failing disk leaves them."""
    for key in chunks_of(bench, silo):
        bench.store._objects[key] = bytes(len(bench.store._objects[key]))


def test_a_damaged_chunk_is_sent_again(bench):
    def damaged_once(silo, ask, times):
        answer = silo.answer(ask)
        if times == 1:
            damage(bench, "red")
        return answer

    bench.on("red", damaged_once)
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert bench.wire.fired == ["red", "red"]


def test_a_chunk_that_is_always_damaged_fails_its_silo_by_name(bench):
    open_when_asked = []

    def damaged(silo, ask, times):
        open_when_asked.append([task.id for task in bench.roster.tasks.open_for("red")])
        answer = silo.answer(ask)
        damage(bench, "red")
        return answer

    bench.on("red", damaged)
    words = only_fails(bench.answers(), "red", ChunkCorruptError, bench.federated.expected)
    assert f"{RUN_ID}/silos/red/chunks/" in words
    # Each time the silo was let write again.
    assert open_when_asked == [[f"{RUN_ID}/fit/1/red"]] * 3


def test_an_update_that_is_not_in_the_store_fails_its_silo(bench):
    def missing(silo, ask, times):
        answer = silo.answer(ask)
        bench.store.delete(chunks_of(bench, "red"))
        return answer

    bench.on("red", missing)
    only_fails(bench.answers(), "red", ObjectMissingError, bench.federated.expected)
    assert bench.wire.fired == ["red"] * 3


def test_a_store_that_is_away_is_waited_for(bench, monkeypatch):
    """Longer than a silo's own faults would be."""
    away, fetch = [], Depot.fetch

    def without_store(self, task, ref, state):
        if task.silo == "red" and len(away) < 5:
            away.append(task)
            raise StoreUnavailableError("the store is away")
        return fetch(self, task, ref, state)

    monkeypatch.setattr(Depot, "fetch", without_store)
    assert bench.answers()["red"][1] == bench.federated.expected["red"]
    assert len(away) == 5


def test_an_update_is_read_again_from_the_store_when_the_spool_is_gone(bench):
    """A merging rule reads again what it has added, where a later one turns out bad."""
    kept = list(fitted(bench.engine, bench.federated.tasks(), calm_of(bench)))
    assert not list((bench.folder / "arrivals").iterdir())
    again = {
        one.receipt.silo: tensors_sha256({k: v.clone() for k, v in one.tensors()}) for one in kept
    }
    assert again == bench.federated.expected


def test_an_update_that_is_here_needs_no_store(bench):
    for update in fitted(bench.engine, bench.federated.tasks(), calm_of(bench)):
        objects = dict(bench.store._objects)
        bench.store._objects.clear()
        found = tensors_sha256({k: v.clone() for k, v in update.tensors()})
        assert found == bench.federated.expected[update.receipt.silo]
        bench.store._objects |= objects


def test_one_that_is_slow_keeps_nobody_elses_update_from_coming(five_silos, remake, tmp_path):
    """The first to be merged answers when the updates of all others are on their way here."""
    federated = Federated(remake(five_silos), tmp_path / "federated")
    bench = Bench(federated, tmp_path)
    slow, *others = sorted(federated.silos)
    seen = []

    def answers_last(silo, ask, times):
        until = time.monotonic() + 30
        while len(seen) < len(others) and time.monotonic() < until:
            seen[:] = (bench.folder / "arrivals").iterdir()
            time.sleep(0.01)
        return silo.answer(ask)

    bench.on(slow, answers_last)
    answers = bench.answers()
    assert bench.wire.fired == [slow]
    assert len(seen) == len(others)
    expected = hashes(federated.local, federated.tasks(), federated.version)
    assert list(answers) == list(expected) == [slow, *others]
    assert {name: digest for name, (_, digest) in answers.items()} == expected
    federated.local.close()
    bench.roster.close()


def test_updates_that_wait_take_no_more_of_the_disk_than_there_is_room(bench, monkeypatch):
    fetch, waiting = Depot.fetch, []

    def counted(self, task, ref, state):
        waiting.append(len(list((bench.folder / "arrivals").iterdir())))
        return fetch(self, task, ref, state)

    monkeypatch.setattr(Depot, "fetch", counted)
    monkeypatch.setattr(Depot, "free_bytes", lambda self: 0)
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert waiting == [0, 0, 0]


def test_a_later_update_that_can_not_be_had_is_asked_for_before_its_turn(bench):
    """What is damaged is sent again while the first to be merged still works."""
    first, *_, last = sorted(bench.silos)

    def damaged_once(silo, ask, times):
        if silo.name == first and bench.wire.times(last) < 2:
            bench.wire._waiting[f"message-{bench.wire.asked.index(ask) + 1}"] = ask
            return None
        answer = silo.answer(ask)
        if silo.name == last and times == 1:
            damage(bench, last)
        return answer

    bench.wire.fault = damaged_once
    answers = bench.answers()
    assert {name: digest for name, (_, digest) in answers.items()} == bench.federated.expected
    assert bench.wire.times(last) == 2
    assert bench.wire.times(first) == 1


@pytest.mark.parametrize(
    "junk", [b"[]", b"\xff", b'{"chunks": 5}', b'{"chunks": [{"sha256": {}}]}', b"[" * 5000]
)
def test_what_a_silo_leaves_in_its_folder_stops_nobody(junk, bench):
    """It is removed from the store, whatever it is and is called; what was accepted stays."""
    key = f"{RUN_ID}/silos/red/update/round-000001/x.json"
    bench.store.put(key, junk)
    for name in ("update/round-000000/x.json", "update/round-999999999/z.json", "junk", "chunks/a"):
        bench.store.put(f"{RUN_ID}/silos/red/{name}", junk)
    bench.config = bench.config.model_copy(
        update={"serve": bench.config.serve.model_copy(update={"keep_rounds": 1})}
    )
    bench.engine = bench.new_engine()
    tasks = bench.federated.tasks()
    assert {name: found for name, (_, found) in bench.answers(tasks).items()} == (
        bench.federated.expected
    )
    named = [parse_reply(reply.text).fit for reply in bench.roster.tasks.replies(RUN_ID, 1)]
    kept = {fit.update.key for fit in named if fit is not None and fit.update is not None}
    assert len(kept) == 3
    left = {name for name, _ in bench.store.keys(f"{RUN_ID}/silos") if "/chunks/" not in name}
    assert left == kept
    assert all(receipt.failure is None for receipt, _ in bench.answers(tasks).values())


def test_a_task_may_be_written_to_under_the_silos_own_folder_only(bench):
    seen = {}

    def look(silo, ask, times):
        (seen["task"],) = bench.roster.tasks.open_for("red")
        return silo.answer(ask)

    bench.on("red", look)
    bench.answers()
    task = seen["task"]
    own = f"{RUN_ID}/silos/red"
    assert task.writable == (
        f"{own}/chunks/{{sha256}}",
        f"{own}/update/round-000001/red-{{sha256:.16}}.json",
    )
    chunks, state = task.readable
    assert chunks == f"{RUN_ID}/global/chunks/"
    assert state.startswith(f"{RUN_ID}/global/state/round-000000/")
    written = [key for key, _ in bench.store.keys(own)]
    allowed = [template.partition("{")[0] for template in task.writable]
    assert written
    assert all(any(key.startswith(one) for one in allowed) for key in written)
    values = sum(tensor.numel() for tensor in calm_of(bench).tensors.values())
    assert task.most_bytes > 4 * values
    assert bench.roster.tasks.open_for("red") == []
