"""What a site answers: what a node in one process gives, kept, and sent again."""

from __future__ import annotations

import json
import math
import time

import pytest
from kept_state import WHOLE_LIFE, keys_of

from photon.federation.broadcast import Inbox
from photon.federation.envelopes import parse_reply
from photon.store.disk import write_json


def own_keys(store):
    return [key for key in keys_of(store) if "/silos/" in key]


def test_an_answer_is_what_a_node_in_this_process_gives(bench, aggregator, tmp_path):
    ask = aggregator.fit()
    receipt, ref = aggregator.expected(aggregator.node(tmp_path / "alone"), ask)
    reply = bench.answer(ask)
    assert reply.fit.update == ref
    for field in ("tokens", "loss", "first_loss", "last_loss"):
        assert getattr(reply.fit, field) == getattr(receipt, field), field
    assert reply.fit.receipt(1, "red").bytes_up == ref.wire_bytes == receipt.bytes_up
    # As received, whatever the aggregator reckons with.
    assert reply.fit.bytes_down == ask.state.whole.wire_bytes
    assert reply.data == aggregator.data.sha256
    assert ref.key in own_keys(bench.store)
    assert all(key.startswith(f"{ask.run.id}/silos/red/") for key in own_keys(bench.store))
    assert bench.reporter.now.state == "idle"


def test_the_wait_for_the_state_is_part_of_loading(bench, aggregator, monkeypatch):
    receive = Inbox.receive

    def slowly(self, ref):
        time.sleep(0.5)
        return receive(self, ref)

    monkeypatch.setattr(Inbox, "receive", slowly)
    assert bench.answer(aggregator.fit()).fit.load_s >= 0.5


@pytest.mark.parametrize("recipe", [WHOLE_LIFE, ("federation.optimizer_state=average",)])
def test_rounds_go_on_from_what_the_silo_keeps(recipe, make_aggregator, make_bench, tmp_path):
    """Over three rounds and a restart, against one node that lives through all of them."""
    aggregator = make_aggregator(*recipe)
    bench = make_bench(aggregator)
    alone = aggregator.node(tmp_path / "alone")
    node_round, received = None, []
    for number in (1, 2, 3):
        ask = aggregator.fit(number=number, node_round=node_round)
        receipt, ref = aggregator.expected(alone, ask)
        if number == 3:
            # Restarted, it holds no state that an outer update could go on top of.
            aggregator.ref = aggregator.publish()
            bench.start()
            ask = aggregator.fit(number=number, node_round=node_round)
        reply = bench.answer(ask)
        assert reply.fit.update == ref, number
        assert reply.fit.left_out == receipt.left_out
        received.append(reply.fit.bytes_down)
        node_round = number
        aggregator.move()
    if recipe is WHOLE_LIFE:
        assert received[1] < received[0] / 3  # the outer update only
        assert received[2] == received[0]
    kept = sorted(path.name for path in (bench.home / "nodes" / ask.run.id).glob("red/round-*"))
    assert kept == (["round-000002", "round-000003"] if recipe is WHOLE_LIFE else [])


def test_asked_again_it_gives_the_same_answer_without_training(bench, aggregator, fits):
    ask = aggregator.fit()
    first = bench.trainer.answer(ask, lambda: math.inf)
    bench.start()  # also another process
    assert bench.trainer.answer(ask, lambda: math.inf) == first
    # The same question in another Ask, as a restarted aggregator asks it: its answer says so.
    other = ask.model_copy(update={"within_s": 7000.0, "log_head": "9" * 64})
    again = bench.answer(other)
    assert again.fit == parse_reply(first.text).fit
    assert (again.ask, again.log_head) == (other.sha256, "9" * 64)
    assert len(fits) == 1


def test_what_the_store_lost_is_sent_again(bench, aggregator, fits):
    ask = aggregator.fit()
    first = bench.answer(ask)
    mine = own_keys(bench.store)
    bench.store.delete(mine)
    assert not own_keys(bench.store)
    assert bench.answer(ask) == first
    assert own_keys(bench.store) == mine
    assert len(fits) == 1


def test_another_question_under_the_same_name_is_another_task(bench, aggregator, fits):
    """An aggregator that went back to an older checkpoint."""
    first = bench.answer(aggregator.fit())
    aggregator.move()
    second = bench.answer(aggregator.fit())
    assert second.task == first.task
    assert second.fit.update.sha256 != first.fit.update.sha256
    assert len(fits) == 2


def test_a_kept_answer_that_the_disk_lost_is_made_again(bench, aggregator, fits):
    ask = aggregator.fit()
    first = bench.answer(ask)
    (chunk,) = (bench.home / "answers").rglob("chunks/*")
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    bench.store.delete(own_keys(bench.store))
    second = bench.answer(ask)
    assert second.fit.update == first.fit.update
    assert len(fits) == 2


def test_evaluation_scores_the_silos_own_text(bench, aggregator, tmp_path):
    ask = aggregator.evaluation()
    expected = aggregator.score(aggregator.node(tmp_path / "alone"), "red")
    reply = bench.answer(ask)
    assert reply.evaluate.loss == expected.loss
    assert reply.evaluate.tokens == expected.tokens
    assert bench.answer(ask) == reply  # kept, the seconds that it took and all
    assert not own_keys(bench.store)


def test_a_silo_may_be_called_otherwise_in_its_folder(make_aggregator, make_bench, one_silo):
    """One silo in the folder is this site's, whatever its name; of several it must be told."""
    aggregator = make_aggregator(data=one_silo)
    aggregator.run = aggregator.run.model_copy(update={"silos": ["hospital"]})
    bench = make_bench(aggregator, name="hospital")
    reply = bench.answer(aggregator.fit("hospital"))
    assert reply.fit.tokens > 0
    scored = bench.answer(aggregator.evaluation("hospital"))
    assert scored.evaluate.tokens > 0


def test_the_node_file_says_which_silo(aggregator, make_bench):
    aggregator.run = aggregator.run.model_copy(update={"silos": ["hospital", "blue"]})
    bench = make_bench(aggregator, name="hospital")
    refused = bench.refusal(aggregator.fit("hospital"))
    assert refused.code == 22
    assert "data.silo" in refused.hint
    bench.node = bench.node.model_copy(
        update={"data": bench.node.data.model_copy(update={"silo": "blue"})}
    )
    bench.start()
    assert bench.answer(aggregator.fit("hospital")).fit.tokens > 0


def overflow(aggregator, factor, part=""):
    """Another state, so large that arithmetic with it ends in infinities."""
    for name in [name for name in aggregator.state if part in name]:
        aggregator.state[name] = aggregator.state[name] * factor
    aggregator.number += 1
    aggregator.ref = aggregator.publish()


def test_a_loss_that_is_not_finite_is_a_failure_and_kept(bench, aggregator, fits):
    overflow(aggregator, 1e30)
    ask = aggregator.fit()
    reply = bench.answer(ask)
    assert reply.fit.update is None
    assert "the loss became" in reply.fit.failure
    assert reply.fit.failure_code == 61
    assert reply.fit.bytes_down > 0
    assert bench.answer(ask) == reply
    assert len(fits) == 1
    assert not own_keys(bench.store)
    # It goes on with the next task as if nothing had been.
    overflow(aggregator, 1e-30)
    assert bench.answer(aggregator.fit(number=2)).fit.update is not None


def test_a_score_that_is_not_finite_is_refused(bench, aggregator):
    overflow(aggregator, 1e38, "proj")
    refused = bench.refusal(aggregator.evaluation())
    assert refused.code == 61
    assert "held-out text of red is nan" in refused.message


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_an_update_that_is_not_finite_is_a_failure(codec, make_aggregator, make_bench, fits):
    """The loss of the last step was fine, what came of it is not."""
    aggregator = make_aggregator(
        "local.steps=1",
        "local.optimizer=sgd",
        "local.lr=1e38",
        "local.clip_norm=0",
        f'link.update_codec="{codec}"',
        "federation.rounds=1",
    )
    bench = make_bench(aggregator)
    overflow(aggregator, 30.0)
    reply = bench.answer(aggregator.fit())
    assert reply.fit is not None, reply.refused
    assert reply.fit.failure_code == 61
    assert "can't encode" in reply.fit.failure
    assert bench.answer(aggregator.fit()) == reply
    assert len(fits) == 1


def test_a_new_run_gets_a_new_node(make_aggregator, make_bench, tmp_path):
    one = make_aggregator()
    two = make_aggregator("local.optimizer=muon", "local.lr=1e-2", run_id="f" * 32)
    bench = make_bench(one)
    for aggregator, number in ((one, 1), (two, 1), (one, 2)):
        folder = tmp_path / f"alone-{aggregator.run.id}-{number}"
        ask = aggregator.fit(number=number)
        _, ref = aggregator.expected(aggregator.node(folder), ask)
        assert bench.answer(ask).fit.update == ref
    told = json.loads((bench.home / "run.json").read_text())
    assert (told["id"], told["silos"]) == (one.run.id, ["blue", "green", "red"])


def test_only_so_many_answers_are_kept(make_bench, aggregator, fits):
    bench = make_bench(aggregator, "disk.keep_answers=2")
    for number in (1, 2, 3):
        bench.answer(aggregator.fit(number=number))
        bench.answer(aggregator.evaluation(number=number))
    folder = bench.home / "answers" / aggregator.run.id
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["evaluate-000002", "evaluate-000003", "fit-000002", "fit-000003"]
    bench.answer(aggregator.fit(number=2))
    assert len(fits) == 3


def test_states_of_old_runs_do_not_pile_up(bench, make_aggregator):
    nodes = bench.home / "nodes"
    for digit in "123456":
        aggregator = make_aggregator(run_id=digit * 32)
        bench.answer(aggregator.fit())
        if digit == "1":  # of secure aggregation: an update enters one sum, ever
            write_json(nodes / (digit * 32) / "red/secure-000001.json", {}, "a record")
        time.sleep(0.01)  # folders are told apart by their times
    kept = sorted(path.name[0] for path in nodes.iterdir())
    assert kept == ["1", "3", "4", "5", "6"]
    assert [path.name for path in nodes.glob("1*/**/*") if path.is_file()] == ["secure-000001.json"]
