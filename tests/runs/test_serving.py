"""A served run in one process: who is drawn, what goes on after a crash, what is written down."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest
import rotation
import torch

from photon.config import load_run_config
from photon.dashboard.digest import read_digest
from photon.data import open_data
from photon.errors import (
    AccessRefusedError,
    DoesNotFitError,
    MembershipError,
    QuorumLostError,
    RunNotFoundError,
)
from photon.federation import Candidates
from photon.federation.envelopes import parse_reply
from photon.link import write_tensors
from photon.membership.bulletin import told, whom_and_what_for
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import Presence
from photon.membership.verification import verify_audit
from photon.runs import fleet as fleet_module
from photon.runs.nodes import Nodes
from photon.runs.notary import Notary
from photon.store.contract import FolderStore
from photon.store.served import Serving
from photon.telemetry import read_history
from photon.telemetry.events import EnergySpent, RunStopped, UpdateDropped
from photon.training import fit


def same(summary, calm):
    for name in ("weights_sha256", "tokens", "global_loss", "per_silo", "bytes_up"):
        assert summary[name] == calm[name], name


def crash_before_the_record(monkeypatch, number):
    """A process that dies once between the checkpoint of a round and its line in the log."""
    fired, close_round = [], Notary._close_round

    def dying(self, round_number):
        if round_number == number and not fired:
            fired.append(round_number)
            raise KeyboardInterrupt
        close_round(self, round_number)

    monkeypatch.setattr(Notary, "_close_round", dying)
    return fired


# --- whole runs ------------------------------------------------------------------------------


def test_silos_tell_their_own_energy_and_one_without_figures_is_as_good(served, calm):
    def of_an_older_version(silo, ask, times):
        if silo.name != "green":
            return silo.answer(ask)
        reply = parse_reply(silo.answer(ask).text)
        part = "fit" if ask.fit else "evaluate"
        told = {part: replace(getattr(reply, part), energy=None)}
        return silo.sign(reply.model_copy(update=told))

    served.wire.fault = of_an_older_version
    summary = served.go_on().summary
    same(summary, calm)
    told = read_history(served.folder).of(EnergySpent)
    assert {one.how for one in told if one.silo in ("red", "blue", None)} == {"estimated"}
    green = [one for one in told if one.silo == "green"]
    assert {one.how for one in green} == {None}
    assert all(list(one.joules) == ["communication"] for one in green)
    energy = summary["energy"]
    assert energy["how"].endswith(f"{len(green)} answers came without figures")
    assert energy["kwh_by_phase"]["training"] > 0
    assert energy["independent_kwh"] is None


def test_a_key_that_changes_in_mid_round_and_the_weights_of_one_process(
    served, calm, run_id, tmp_path
):
    rotated = []

    def rotate(silo, ask, times):
        # The wire asks the last silo first: red's answer is here, and waits for blue's.
        if silo.name == "blue" and ask.round == 2 and ask.fit and not rotated:
            red = served.silos["red"]
            assert served.roster.tasks.reply(f"{run_id}/fit/2/red") is not None
            rotated.append(red.key.fingerprint)
            new = red.take_key(tmp_path / "new.key")
            rotation.rotate(served.roster, "red", new.public_pem)
            rotated.append(new.fingerprint)
        return silo.answer(ask)

    served.wire.fault = rotate
    same(served.go_on().summary, calm)
    assert len(rotated) == 2
    digest = read_digest(served.folder)  # what silos received to evaluate, too, is a silo's
    down = [task.bytes_down for silo in digest.silos.values() for task in silo.tasks]
    down += [silo.scoring_bytes for silo in digest.silos.values()]
    assert sum(down) == digest.bytes_down > 0
    report = served.audit()
    assert (report.rounds, report.updates, report.last_round) == (3, 9, 3)
    assert report.members["red"] == rotated[1]
    lines = served.lines()
    signed = [
        update["fingerprint"]
        for line in lines
        if line["kind"] == "round"
        for update in line["body"]["merged"]
        if update["silo"] == "red"
    ]
    assert signed == [rotated[0], rotated[0], rotated[1]]
    # The aggregator signed each line, and each round goes on from the last one's state: the silos
    # have signed that, and what they were told of the log.
    key = NodeKey.load(tmp_path / "served-0" / "home" / AGGREGATOR_KEY_FILE)
    assert report.aggregator == key.fingerprint
    rounds = [line for line in lines if line["kind"] == "round"]
    told = [json.loads(update["reply"]) for line in rounds for update in line["body"]["merged"]]
    assert {reply["state"] for reply in told[3:6]} == {rounds[0]["body"]["state_sha256"]}
    assert {reply["state"] for reply in told[6:]} == {rounds[1]["body"]["state_sha256"]}
    assert rounds[2]["body"]["state_sha256"] not in (None, rounds[1]["body"]["state_sha256"])
    assert {reply["log_head"] for reply in told[6:]} == {rounds[1]["sha256"]}
    assert served.roster.setting("waiting") is None


def test_the_aggregator_only_scores_whatever_its_machine_and_shell_say(
    make_served, calm, monkeypatch
):
    """Found by a silo of two machines: with two ranks the aggregator trained by itself."""
    served = make_served("compute.processes=2", 'compute.strategy="ddp"')
    # As docs/deploy.md has it for a silo of two machines.
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.255.255.1"}.items():
        monkeypatch.setenv(name, value)
    same(served.go_on().summary, calm)
    for number in (1, 2, 3):
        assert served.asked(number) == ["blue", "green", "red"]


def test_an_aggregator_needs_no_room_for_training(config, tmp_path, monkeypatch):
    data = open_data(config.data.path)
    monkeypatch.setattr(fit, "memory_of", lambda device: (4 << 20, 4 << 20))
    places = {kind: Nodes(kind, config, data, ["red"], tmp_path) for kind in ("simulate", "serve")}
    model = places["serve"].skeleton()
    with pytest.raises(DoesNotFitError):
        places["simulate"].fit(model)
    assert places["serve"].fit(model).strategy.name == "single"


def test_a_crash_between_checkpoint_and_record_is_made_good(served, calm, monkeypatch):
    served.silos["green"].start('policy.runs=["another"]')
    fired = crash_before_the_record(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        served.go_on()
    assert fired == [1]
    assert verify_audit(served.folder).problems  # a checkpoint that the log knows nothing of
    served.silos["green"].start()
    served.wire.boots["green"] = "another process"
    served.roster.set_setting("draining", True)
    served.go_on()
    report = served.audit()
    assert (report.rounds, report.updates) == (1, 2)
    (line,) = [line["body"] for line in served.lines() if line["kind"] == "round"]
    assert [update["silo"] for update in line["merged"]] == ["blue", "red"]
    assert [one["silo"] for one in line["dropped"]] == ["green"]
    assert "policy.runs" in line["dropped"][0]["reason"]
    served.roster.set_setting("draining", False)
    served.go_on()
    assert served.audit().rounds == 3
    (dropped,) = read_history(served.folder).of(UpdateDropped)
    assert (dropped.round, dropped.silo) == (1, "green")
    # Each silo hears of its own part when it next says that it is here.
    heard = {name: told(served.roster, name)["silo"]["words"] for name in served.silos}
    assert heard == dict.fromkeys(served.silos, "round 3: this silo's update was merged")


def test_a_silo_hears_why_its_update_was_dropped(served):
    served.silos["green"].start('policy.runs=["another"]')

    def once(silo, ask, times):
        if ask.fit:
            served.roster.set_setting("draining", True)
        return silo.answer(ask)

    served.wire.fault = once
    served.go_on()
    words = told(served.roster, "green")["silo"]["words"]
    assert words.startswith("round 1: this silo's update was dropped: ")
    assert "policy.runs" in words
    assert told(served.roster, "red")["silo"]["words"] == "round 1: this silo's update was merged"
    assert told(served.roster, "nobody")["silo"] is None


def test_a_fall_back_is_written_down_and_answers_are_not_asked_for_twice(served, calm, monkeypatch):
    def drain(silo, ask, times):
        if ask.round == 2:
            served.roster.set_setting("draining", True)
        return silo.answer(ask)

    served.wire.fault = drain
    assert served.go_on().summary == {}
    (stopped,) = read_history(served.folder).of(RunStopped)
    assert (stopped.round, stopped.reason) == (2, "drained")
    file = served.folder / "checkpoints" / "round-000002" / "global.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    served.wire.fault = lambda silo, ask, times: silo.answer(ask)
    served.roster.set_setting("draining", False)
    # And it dies again, before the new record of round 2: the old one does not stand for it.
    fired = crash_before_the_record(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        served.go_on()
    assert fired == [2]
    same(served.go_on().summary, calm)
    report = served.audit()
    assert (report.rounds, report.updates, report.last_round) == (3, 9, 3)
    assert any("round 2 was taken back" in remark for remark in report.remarks)
    kinds = [line["kind"] for line in served.lines()]
    assert kinds.count("resumed") == 1
    assert kinds.count("round") == 4
    assert served.asked(2) == ["blue", "green", "red"]  # once each, though it was run twice
    assert served.rounds_told == [1, 2, 3]


def test_a_round_goes_on_with_those_it_was_given_to(served, calm):
    """Killed in mid-round; the silos of another run of the round would be others."""

    def die(silo, ask, times):
        if ask.round == 1 and silo.name == "blue" and ask.fit and not served.wire.fired:
            served.wire.fired.append("blue")
            raise KeyboardInterrupt
        return silo.answer(ask)

    served.wire.fault = die
    with pytest.raises(KeyboardInterrupt):
        served.go_on()
    assert served.wire.fired == ["blue"]
    begun = len(served.wire.asked)
    same(served.go_on().summary, calm)
    assert served.asked(1) == ["blue", "blue", "green", "red"]
    assert begun == 6  # three that scored the state of the beginning, three that were to train
    assert served.audit().rounds == 3


def test_too_few_silos_end_the_run_by_name(make_served):
    run = make_served("serve.gather_s=0.3", "serve.min_silos=4")
    with pytest.raises(QuorumLostError, match="3 silos are here"):
        run.go_on()
    assert run.wire.asked == []
    assert run.roster.setting("waiting") is None


def test_a_run_that_is_over_waits_for_no_silo(make_served, calm):
    served = make_served("serve.gather_s=5")
    same(served.go_on().summary, calm)
    for name in served.silos:
        served.wire.quiet.add(name)
        served.roster.all_seen({name: (Presence("stopping", boot=name), time.time())})
    asked = len(served.wire.asked)
    same(served.go_on().summary, calm)
    assert len(served.wire.asked) == asked


def killed_before_its_summary(served):
    """All rounds done and checkpointed, and the process killed before summary.json; red leaves."""
    summary = served.go_on().summary
    (served.folder / "summary.json").unlink()
    served.wire.quiet.add("red")
    served.roster.all_seen({"red": (Presence("stopping", boot="red"), time.time())})
    return summary


def test_last_scores_wait_a_while_for_silos_and_do_without(make_served, calm, monkeypatch):
    """Found on a served run: it waited for serve.min_silos though no round was left."""
    served = make_served("serve.gather_s=5")
    killed_before_its_summary(served)
    monkeypatch.setattr(fleet_module, "_SCORES_S", 1.0)
    seen = []
    served.watch = lambda: seen.append(served.roster.setting("waiting"))
    summary = served.go_on().summary
    (waiting,) = [one for one in seen if one is not None][:1]
    assert whom_and_what_for(waiting) == "3 silos for the last scores"
    assert waiting["here"] == ["blue", "green"]
    assert sorted(summary["per_silo"]) == ["blue", "green"]
    for name in ("weights_sha256", "tokens", "global_loss"):
        assert summary[name] == calm[name]
    assert json.loads((served.folder / "summary.json").read_text()) == summary
    assert served.roster.setting("waiting") is None
    assert served.audit().rounds == 3


# --- who is drawn ----------------------------------------------------------------------------


def test_a_run_goes_on_where_its_data_has_moved(served, calm):
    def drain(silo, ask, times):
        served.roster.set_setting("draining", ask.round == 1)
        return silo.answer(ask)

    served.wire.fault = drain
    assert served.go_on().summary == {}
    resolved = served.folder / "config.resolved.toml"
    old = load_run_config(resolved).data.path
    resolved.write_text(resolved.read_text().replace(old, "/where/it/was"))  # on another host
    served.wire.fault = lambda silo, ask, times: silo.answer(ask)
    served.roster.set_setting("draining", False)
    same(served.go_on().summary, calm)
    assert load_run_config(resolved).data.path == old


def test_those_who_are_here_are_drawn_from(fleet, roster):
    assert fleet().drawn_from(1).tokens == {"blue": 100, "green": 200, "red": 300}
    assert fleet().present() == ["blue", "green", "red"]
    assert fleet('serve.silos=["red", "blue", "unknown"]').present() == ["blue", "red"]


def test_who_is_suspended_expelled_silent_or_stopping_is_not_drawn(fleet, roster):
    roster.suspend("green")
    assert fleet().present() == ["blue", "red"]
    roster.reinstate("green")
    roster.expel("red")
    assert fleet().present() == ["blue", "green"]
    roster.all_seen({"blue": (Presence("stopping", boot="blue"), time.time())})
    assert sorted(fleet().drawn_from(1).tokens) == ["green"]
    roster.all_seen({"green": (Presence("training", boot="green"), time.time() - 61)})
    with pytest.raises(QuorumLostError, match=r"0 silos are here \(none\)"):
        fleet("serve.gather_s=0.1").drawn_from(2)
    roster.all_seen({"green": (Presence("idle", boot="green"), time.time() - 10)})
    assert fleet().present() == ["green"]
    assert fleet("federation.silence_s=5").present() == []


def test_a_begun_round_has_the_silos_it_was_given_to(fleet, roster):
    roster.suspend("green")
    assert fleet().drawn_from(4).tokens == {"blue": 100, "red": 300}
    roster.reinstate("green")
    # Silent, suspended or expelled since: the round is the same, and the engine leaves them out.
    roster.all_seen({"blue": (Presence("idle", boot="blue"), time.time() - 600)})
    roster.expel("red")
    another = fleet("federation.sample=2", "serve.min_silos=3", "serve.gather_s=0.05")
    assert another.drawn_from(4) == Candidates({"blue": 100, "red": 300}, attempt=1)
    assert another.expected(4) == {"blue": 100, "red": 300}
    for number in (3, 5):
        with pytest.raises(QuorumLostError):
            another.drawn_from(number)
    other = fleet("federation.sample=2", "serve.gather_s=0.05", run="f" * 32)
    with pytest.raises(QuorumLostError):  # another run's draws say nothing of this one's
        other.drawn_from(4)


def test_last_scores_are_waited_for_only_from_silos_that_may_come(fleet, roster, monkeypatch):
    fleet().drawn_from(7)
    roster.expel("red")
    begun = time.monotonic()
    drawn = {"blue": 100, "green": 200, "red": 300}
    over = fleet("federation.rounds=7", "serve.min_silos=3")
    assert over.expected(8) == drawn  # blue and green are here, red won't be
    roster.all_seen({"blue": (Presence("stopping", boot="blue"), time.time())})
    no_scores = fleet("federation.rounds=7", "serve.min_silos=3", "eval.per_silo=false")
    assert no_scores.expected(8) == drawn
    ending = fleet("federation.rounds=7", "serve.min_silos=3", ending=lambda: True)
    assert ending.expected(8) == drawn
    monkeypatch.setattr(fleet_module, "_SCORES_S", 0.1)  # and serve.gather_s a day
    assert over.expected(8) == drawn
    assert time.monotonic() - begun < 20
    assert roster.setting("waiting") is None


def test_it_waits_for_silos_and_says_so(fleet, roster, monkeypatch):
    roster.all_seen({"red": (Presence("stopping", boot="red"), time.time())})
    told, written, sleep = [], [], time.sleep
    set_setting = roster.set_setting

    def counted(key, value):
        written.append(key)
        set_setting(key, value)

    def look(seconds):
        told.append(roster.setting("waiting"))
        if len(told) == 3:
            roster.all_seen({"red": (Presence("idle", boot="red"), time.time())})
        sleep(seconds)

    monkeypatch.setattr(roster, "set_setting", counted)
    monkeypatch.setattr(fleet_module.time, "sleep", look)
    found = fleet("serve.min_silos=3").drawn_from(1)
    assert sorted(found.tokens) == ["blue", "green", "red"]
    assert [(one["for_silos"], one["round"], one["here"]) for one in told] == [
        (3, 1, ["blue", "green"])
    ] * 3
    assert told[0]["until"] > time.time() + 80_000
    assert roster.setting("waiting") is None
    assert written == ["waiting"] * 2  # the disk is left alone while nothing changes


def test_a_sample_is_waited_for_too_and_given_up(fleet, roster):
    roster.suspend("red")
    started = time.monotonic()
    with pytest.raises(QuorumLostError, match=r"2 silos are here \(blue, green\), round 7 needs 3"):
        fleet("federation.sample=3", "serve.gather_s=0.4").drawn_from(7)
    assert 0.4 <= time.monotonic() - started < 20
    assert roster.setting("waiting") is None


# --- the record, and serve.json --------------------------------------------------------------


def test_a_merged_silo_without_a_receipt_is_never_written_down(roster, run_id, tmp_path):
    notary = Notary(tmp_path, roster, run_id, NodeKey.create(tmp_path / "aggregator.key"))
    checkpoint = tmp_path / "checkpoints/round-000001"
    checkpoint.mkdir(parents=True)
    state = {"merged": {"red": 1}, "in_flight": [], "files": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_tensors(checkpoint / "global.safetensors", {"weights/one": torch.zeros(1)})
    with pytest.raises(MembershipError, match="round 1 merged red, whose receipt is not there"):
        notary._close_round(1)
    shutil.rmtree(checkpoint)
    assert verify_audit(tmp_path).rounds == 0


def test_serve_json_is_read_as_it_was_written(run_id, tmp_path):
    whole = Serving(run_id, "/srv", "s3://bucket", {"endpoint": "http://x"}, "/srv/secrets")
    for one in (whole, Serving(run_id, "/srv", "/store", {})):
        one.write(tmp_path)
        assert Serving.read(tmp_path) == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["serve.json"]


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "5", "{}", '{"run_id": "1"}', '{"more": 1}', b"\xff\xfe"]
)
def test_what_is_no_served_run_is_named(text, tmp_path):
    if text is not None:
        raw = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "serve.json").write_bytes(raw)
    with pytest.raises(RunNotFoundError, match="no served run in") as caught:
        Serving.read(tmp_path)
    assert str(tmp_path / "serve.json") in caught.value.message
    assert caught.value.hint == "Name a folder that `photon serve` made."


@pytest.mark.parametrize("text", [None, "{", "5"])
def test_credentials_that_can_not_be_read_are_named(text, run_id, tmp_path):
    secrets = tmp_path / "secrets.json"
    if text is not None:
        secrets.write_text(text)
    one = Serving(run_id, str(tmp_path), "s3://bucket", {}, str(secrets))
    with pytest.raises(AccessRefusedError, match=r"secrets\.json"):
        one.open_store()


def test_options_and_secrets_open_the_store(run_id, tmp_path):
    (tmp_path / "secrets.json").write_text("{}")
    found = Serving(run_id, "", str(tmp_path / "s"), {}, str(tmp_path / "secrets.json"))
    assert isinstance(found.open_store(), FolderStore)
