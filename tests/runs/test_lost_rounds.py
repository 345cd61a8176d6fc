"""A round that lost its quorum is drawn again from those who are here; nothing of it is lost."""

from __future__ import annotations

import json
import time

import pytest

from photon.errors import CheckpointCorruptError, QuorumLostError
from photon.federation import sample_participants
from photon.membership.records import OpenTask
from photon.membership.refusals import refusing
from photon.membership.roster import Presence
from photon.runs.fleet import Drawn, Draws
from photon.silo.trainer import SiloTrainer
from photon.telemetry import read_history
from photon.telemetry.events import RoundMerged, RoundStarted, UpdateDropped

TWO = ("serve.min_silos=2", "federation.quorum=2", "federation.silence_s=6", "eval.per_silo=false")


@pytest.fixture
def trained(monkeypatch):
    """The tasks that were really trained, and not answered from a disk."""
    found, fit = [], SiloTrainer._fit

    def counted(self, ask, running, state):
        found.append((ask.round, ask.silo))
        return fit(self, ask, running, state)

    monkeypatch.setattr(SiloTrainer, "_fit", counted)
    return found


def fall_silent(run, number, *names):
    """From round `number` on these take their task and are never heard of again."""

    def silent(silo, ask, times):
        if ask.round >= number and ask.fit and silo.name in names:
            run.wire.fired.append((ask.round, silo.name))
            run.wire.quiet.add(silo.name)
            return None
        return silo.answer(ask)

    run.wire.fault = silent


def come_back(run, *names):
    run.wire.quiet -= set(names)
    run.wire.fault = lambda silo, ask, times: silo.answer(ask)


def lost_lines(run):
    return [line["body"] for line in run.lines() if line["kind"] == "lost"]


def merged(run, number):
    (line,) = [
        line["body"]
        for line in run.lines()
        if line["kind"] == "round" and line["body"]["round"] == number
    ]
    return [update["silo"] for update in line["merged"]]


def lose_round_two(run):
    """Of three silos, one answers."""
    fall_silent(run, 2, "green", "red")
    with pytest.raises(QuorumLostError, match="round 2 has 1 good updates of 3, the quorum is 2"):
        run.go_on()
    assert sorted(run.wire.fired) == [(2, "green"), (2, "red")]


def without_red(make_served):
    """What it comes to where round 2 is drawn from blue and green at once."""
    run = make_served(*TWO)

    def drain(silo, ask, times):
        run.roster.set_setting("draining", True)
        return silo.answer(ask)

    run.wire.fault = drain
    run.go_on()
    run.wire.quiet.add("red")
    run.roster.all_seen({"red": (Presence("stopping", boot="red"), time.time())})
    run.roster.set_setting("draining", False)
    come_back(run)
    return run.go_on().summary


def test_who_is_gone_for_good_does_not_hold_up_the_run(make_served, trained, run_id):
    expected = without_red(make_served)
    trained.clear()
    run = make_served(*TWO)
    lose_round_two(run)
    assert run.roster.tasks.reply(f"{run_id}/fit/2/blue") is not None
    assert run.audit().rounds == 1  # the log stands, with the loss in it
    come_back(run, "green")
    summary = run.go_on().summary
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["tokens"] == expected["tokens"]
    # Blue had finished round 2: asked again, it answered from its disk.
    assert run.asked(2) == ["blue", "blue", "green", "green", "red"]
    assert trained.count((2, "blue")) == trained.count((2, "green")) == 1
    assert (2, "red") not in trained
    assert [merged(run, number) for number in (1, 2, 3)] == [
        ["blue", "green", "red"],
        ["blue", "green"],
        ["blue", "green"],
    ]
    report = run.audit()
    assert (report.rounds, report.updates, report.last_round) == (3, 7, 3)
    (lost,) = lost_lines(run)
    assert (lost["round"], lost["attempt"], lost["run"]) == (2, 1, run_id)
    assert lost["asked"] == ["blue", "green", "red"]
    assert [one["silo"] for one in lost["dropped"]] == ["green", "red"]
    assert all("has not been heard of for 6 s" in one["reason"] for one in lost["dropped"])
    kinds = [line["kind"] for line in run.lines() if line["kind"] in ("round", "lost")]
    assert kinds == ["round", "lost", "round", "round"]
    assert [event.round for event in read_history(run.folder).of(RoundMerged)] == [1, 2, 3]


def test_the_next_attempt_is_one_round_for_whoever_goes_on_with_it(make_served, trained):
    """Killed in the second attempt: the third process has the second one's silos."""
    run = make_served(*TWO)
    lose_round_two(run)
    come_back(run, "green")

    def die(silo, ask, times):
        if ask.round == 2 and silo.name == "blue":
            run.wire.fired.append("killed")
            raise KeyboardInterrupt
        return silo.answer(ask)

    run.wire.fault = die
    with pytest.raises(KeyboardInterrupt):
        run.go_on()
    assert run.wire.fired[-1] == "killed"
    come_back(run, "red")  # it is here now, and the round is under way without it
    run.go_on()
    assert merged(run, 2) == ["blue", "green"]
    assert merged(run, 3) == ["blue", "green", "red"]
    # Green's answer to the second attempt was here already when the third process began.
    assert run.asked(2) == ["blue", "blue", "blue", "green", "green", "red"]
    assert trained.count((2, "blue")) == trained.count((2, "green")) == 1
    assert [one["attempt"] for one in lost_lines(run)] == [1]
    assert run.audit().rounds == 3


def test_a_round_may_be_lost_more_than_once_and_a_loss_be_told_twice(make_served, monkeypatch):
    run = make_served(*TWO)
    died, lose = [], Draws.lose

    def dying(self, number):
        if not died:
            died.append(number)
            raise KeyboardInterrupt
        lose(self, number)

    monkeypatch.setattr(Draws, "lose", dying)
    fall_silent(run, 2, "green", "red")
    with pytest.raises(KeyboardInterrupt):
        run.go_on()
    assert died == [2]
    # The loss is in the log, and not yet in draws.json: the same attempt again.
    with pytest.raises(QuorumLostError):
        run.go_on()
    assert run.asked(2).count("blue") == 1
    come_back(run, "green")
    fall_silent(run, 2, "green")
    with pytest.raises(QuorumLostError, match="1 good updates of 2"):
        run.go_on()
    assert [one["attempt"] for one in lost_lines(run)] == [1, 1, 2]
    assert [one["asked"] for one in lost_lines(run)][-1] == ["blue", "green"]
    come_back(run, "green", "red")
    run.go_on()
    assert merged(run, 2) == ["blue", "green", "red"]
    report = run.audit()
    assert (report.rounds, report.updates) == (3, 9)
    started = [event.participants for event in read_history(run.folder).of(RoundStarted)]
    assert started[-2:] == [["blue", "green", "red"]] * 2


def test_a_site_is_asked_about_the_new_company(make_served, run_id):
    """An answer that was given for a round of three is not merged into one of two."""
    run = make_served(*TWO, "serve.gather_s=1")
    run.silos["blue"].start("policy.min_participants=3")
    fall_silent(run, 2, "green", "red")
    # By its policy, blue takes part where all three are merged: a quorum of all.
    text = (run.folder / "serve.toml").read_text()
    (run.folder / "serve.toml").write_text(text.replace("quorum = 2", "quorum = 3"))
    with pytest.raises(QuorumLostError, match="1 good updates of 3"):
        run.go_on()
    assert run.roster.tasks.replies(run_id, 2)
    resolved = run.folder / "config.resolved.toml"
    resolved.write_text(resolved.read_text().replace("quorum = 3", "quorum = 2"))
    come_back(run, "green")
    # It refuses, and is not drawn again as it is: the run waits for others.
    with pytest.raises(QuorumLostError, match=r"1 silos are here \(green\), round 2 needs 2"):
        run.go_on()
    assert "policy.min_participants" in lost_lines(run)[-1]["dropped"][0]["reason"]
    assert run.audit().rounds == 1


def test_a_silo_that_can_not_train_is_told_of_and_asked_no_more(make_served):
    run = make_served(*TWO)
    run.silos["red"].start("policy.max_local_steps=1")
    run.go_on()
    assert [run.asked(number) for number in (1, 2, 3)] == [
        ["blue", "green", "red"],
        ["blue", "green"],
        ["blue", "green"],
    ]
    (dropped,) = read_history(run.folder).of(UpdateDropped)
    assert dropped.silo == "red"
    assert "a task takes 2 local steps; policy.max_local_steps allows 1" in dropped.reason
    assert run.audit().rounds == 3


def test_a_round_lost_by_refusals_is_tried_again_with_who_starts_anew(make_served, run_id):
    """The run waits for a quorum instead of ending, and says for what and why."""
    run = make_served(*TWO, "serve.gather_s=60")
    for name in ("green", "red"):
        run.silos[name].start("policy.max_local_steps=1")
    waited = []

    def watch() -> None:
        """Somebody looks at what is waited for, and mends one silo."""
        waiting = run.roster.setting("waiting")
        if waiting and waiting["refusing"] and not waited:
            waited.append(waiting)
            run.silos["red"].start()
            run.wire.boots["red"] = "another process"

    run.watch = watch
    run.go_on()
    (waiting,) = waited
    assert sorted(waiting["refusing"]) == ["green", "red"]
    assert "policy.max_local_steps allows 1" in waiting["refusing"]["green"]
    assert waiting["here"] == ["blue"]
    assert run.asked(1) == ["blue", "blue", "green", "red", "red"]
    assert [merged(run, number) for number in (1, 2, 3)] == [["blue", "red"]] * 3
    assert set(refusing(run.roster, run_id)) == {"green"}
    (lost,) = lost_lines(run)
    assert (lost["round"], lost["attempt"]) == (1, 1)
    assert run.audit().rounds == 3


def test_reasons_stand_in_the_words_that_end_a_run(make_served):
    run = make_served(*TWO, "serve.gather_s=0.1", "serve.min_silos=3", "federation.quorum=3")
    fall_silent(run, 1, "red")
    with pytest.raises(QuorumLostError, match="dropped: red has not been heard of for 6 s"):
        run.go_on()


def test_fewer_than_the_quorum_are_waited_for(fleet, roster):
    """A quorum is not lowered to those who happen to be here."""
    roster.suspend("green")
    roster.suspend("red")
    few = fleet("federation.quorum=2", "serve.gather_s=0.1")
    with pytest.raises(QuorumLostError, match=r"1 silos are here \(blue\), round 4 needs 2"):
        few.drawn_from(4)
    roster.reinstate("red")
    assert sorted(few.drawn_from(4).tokens) == ["blue", "red"]


def test_a_lost_round_is_drawn_anew_and_earlier_answers_are_forgotten(fleet, roster, run_id):
    told = []
    own = fleet(on_lost=lambda number, attempt: told.append((number, attempt)))
    assert own.drawn_from(4).attempt == 1
    now = time.time()
    for silo in ("blue", "red"):
        task = f"{run_id}/fit/4/{silo}"
        roster.tasks.open(OpenTask(task, run_id, 4, silo, "fit", now, now + 60, 1, (), ()))
    assert own.drawn_from(4).attempt == 1
    assert roster.tasks.asked(run_id, 4) == {"blue", "red"}
    own.lost(4)
    own.lost(4)  # is no news
    assert told == [(4, 1)]
    assert roster.tasks.asked(run_id, 4) == {"blue", "red"}
    roster.expel("red")
    again = fleet().drawn_from(4)
    assert (again.attempt, sorted(again.tokens)) == (2, ["blue", "green"])
    assert roster.tasks.asked(run_id, 4) == set()
    assert fleet().drawn_from(5).attempt == 1


def test_another_attempt_draws_others_of_the_same_silos():
    tokens = {f"silo-{index:02d}": 100 for index in range(10)}

    def draw(number, attempt):
        return sample_participants(
            tokens, count=2, sampling="uniform", seed=3, round_number=number, attempt=attempt
        )

    first = [draw(number, 1) for number in range(1, 60)]
    assert first == [
        sample_participants(tokens, count=2, sampling="uniform", seed=3, round_number=number)
        for number in range(1, 60)
    ]
    second = [draw(number, 2) for number in range(1, 60)]
    assert second == [draw(number, 2) for number in range(1, 60)]
    assert sum(one != other for one, other in zip(first, second, strict=True)) > 50


# --- draws.json ------------------------------------------------------------------------------


def test_draws_are_read_as_they_were_written(tmp_path):
    draws = Draws(tmp_path)
    assert draws.of(1) is None
    for number in range(1, 6):
        draws.keep(number, Drawn(1, {"blue": number, "red": 7}))
    draws.lose(5)
    assert Draws(tmp_path).of(5) == Drawn(1, {"blue": 5, "red": 7}, lost=True)
    assert Draws(tmp_path).of(3) == Drawn(1, {"blue": 3, "red": 7})
    assert draws.of(2) is None  # no checkpoint leads back there
    draws.keep(4, Drawn(1, {"blue": 9}))  # a run that fell back
    assert draws.of(5) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["draws.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", "{}", '{"rounds": []}', '{"rounds": {"x": {}}}', '{"rounds": {"1": {}}}'],
)
def test_draws_that_can_not_be_read_are_named(text, tmp_path):
    (tmp_path / "draws.json").write_text(text)
    with pytest.raises(CheckpointCorruptError, match=r"can't read .*draws\.json") as caught:
        Draws(tmp_path).of(1)
    assert caught.value.hint is not None
    assert "Remove it" in caught.value.hint
    with pytest.raises(CheckpointCorruptError):
        Draws(tmp_path).keep(1, Drawn(1, {}))
    assert (tmp_path / "draws.json").read_text() == text


def test_draws_hold_what_weighted_sampling_needs(fleet, roster, run_id, tmp_path):
    fleet().drawn_from(3)
    record = json.loads((tmp_path / run_id / "draws.json").read_text())
    assert record == {
        "rounds": {
            "3": {"attempt": 1, "tokens": {"blue": 100, "green": 200, "red": 300}, "lost": False}
        }
    }
