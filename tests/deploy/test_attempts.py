"""What `photon serve` does while its run goes on: the loop begun again, the desk, who is told."""

from __future__ import annotations

import json
import time
import types

import httpx2
import pytest

from photon.config import parse_run_config
from photon.deploy import attempts as attempts_module
from photon.deploy import serve as serve_module
from photon.deploy.attempts import Attempts
from photon.deploy.desk import Desk
from photon.deploy.serve import Aggregator
from photon.deploy.service import Service
from photon.deploy.supervisor import Supervisor
from photon.errors import InvalidValueError, QuorumLostError, ServiceLostError
from photon.membership.bulletin import told
from photon.membership.keys import NodeKey
from photon.membership.roster import ENDED_SETTING, Facts, Presence
from photon.store.presign import S3Presigner

LOST = "round 3 has 1 good updates of 2, the quorum is 2; dropped: lab-b"
#: As progress_of has it in the middle of round 3, and between two rounds.
IN_ROUND, BETWEEN = {"round": 2, "in_round": 3}, {"round": 2, "in_round": None}


def attempts(gather_s: float = 86_400.0) -> Attempts:
    return Attempts(gather_s, "runs/med", "loop.log")


def test_a_lost_quorum_is_waited_for_with_growing_pauses_and_then_given_up() -> None:
    tried, now_s = attempts(gather_s=4000.0), 100.0
    for pause_s in (30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1800.0):
        again = tried.after(44, LOST, IN_ROUND, now_s)
        assert (again.pause_s, again.lost) == (pause_s, True)
        assert "the round is drawn again in" in again.words
        now_s += again.pause_s + 10.0
    assert now_s < 100.0 + 4000.0
    with pytest.raises(QuorumLostError, match="dropped: lab-b; tried for") as caught:
        tried.after(44, LOST, IN_ROUND, now_s)
    assert "--resume runs/med" in (caught.value.hint or "")


def test_a_round_that_is_closed_after_all_begins_a_new_count() -> None:
    tried = attempts()
    for _ in range(4):
        tried.after(44, LOST, IN_ROUND, 0.0)
    assert tried.after(44, LOST, {"round": 3, "in_round": 4}, 9e9).pause_s == 30.0


def test_silos_that_never_came_were_waited_for_by_the_loop() -> None:
    words = "1 silos are here (lab-a), round 3 needs 2; waited 86400 s"
    with pytest.raises(QuorumLostError, match=r"^1 silos are here"):
        attempts().after(44, words, BETWEEN, 0.0)


def test_deaths_go_on_at_once_until_they_are_too_many() -> None:
    tried = attempts()
    for number in range(9):
        assert tried.after(None, "killed by SIGKILL", IN_ROUND, float(number)).pause_s == 0
    with pytest.raises(ServiceLostError, match="died 10 times in round 3"):
        tried.after(71, "the store", IN_ROUND, 9.0)
    with pytest.raises(InvalidValueError, match=r"^no such key"):
        attempts().after(12, "no such key", IN_ROUND, 0.0)


# --- with the rest of serve ---


class Script:
    """Loops that end as they are told to: None in order, a number by that signal."""

    def __init__(self, made: Aggregator, *ends: tuple[int, str] | int | None) -> None:
        self.ends = list(ends)
        self.started = 0
        self._made = made
        made._begin = self.begin

    def begin(self, supervisor: Supervisor) -> None:
        self.started += 1
        end = self.ends.pop(0)
        code, told = 0, None
        if isinstance(end, tuple):
            code, told = end[0], {"exit_code": end[0], "words": end[1]}
        self._made._roster.set_setting(ENDED_SETTING, told)
        words = f"kill -{end} $$" if isinstance(end, int) else f"exit {code}"
        supervisor.start(Service("loop", ("sh", "-c", words), once=True))


@pytest.fixture
def serving(three_silos, home, monkeypatch):
    """An aggregator as it is once all is up, its desk, and what it said."""
    monkeypatch.setattr(serve_module, "_LOOK_S", 0.01)
    monkeypatch.setattr(attempts_module, "_FIRST_PAUSE_S", 0.05)
    tree = {
        "run": {"name": "med"},
        "model": {"preset": "tiny"},
        "data": {"path": str(three_silos)},
        "serve": {"home": str(home), "host": "127.0.0.1"},
    }
    said: list[str] = []
    folder = home / "run"
    folder.mkdir()
    made = Aggregator(parse_run_config(tree), folder, log=said.append, on_event=said.append)
    signer = S3Presigner("https://s", "b", region="r", access_key_id="a", secret="s")
    desk = Desk(made._roster, signer)
    desk.start(operator_socket=home / "o.sock")
    yield made, desk, said
    desk.stop()
    made._roster.close()


def test_a_key_that_was_lost_is_not_replaced_in_silence(home) -> None:
    tree = {
        "model": {"preset": "tiny"},
        "data": {"path": "unread"},
        "serve": {"home": str(home), "host": "127.0.0.1"},
    }
    said: list[str] = []

    def begun() -> Aggregator:
        config = parse_run_config(tree)
        return Aggregator(config, home / "run", log=said.append, on_event=said.append)

    first = begun()
    pem = NodeKey.create(home / "node.key").public_pem
    facts = Facts("d" * 64, "e" * 64, 1000, "0.1.0")
    first._roster.redeem(first._roster.invite("lab", 60), "lab", pem, facts)
    first._roster.close()
    begun()._roster.close()
    assert not said
    (home / "aggregator.key").unlink()
    begun()._roster.close()
    (warning,) = said
    assert "1 members know another key" in warning
    assert "photon members rotate" in warning


def healthy(desk: Desk) -> bool:
    return httpx2.get(f"http://127.0.0.1:{desk.port}/photon/v2/health").json()["ok"]


def kill(desk: Desk) -> None:
    """Its thread ends, as by an error that nobody caught."""
    assert desk._server is not None
    for server in desk._server._servers:
        server.should_exit = True
    desk._server._thread.join(30)
    assert not desk.alive


def test_a_desk_that_ended_is_missed_and_back_where_the_door_looks_for_it(serving, home) -> None:
    made, desk, said = serving
    port = desk.port
    kill(desk)
    Script(made, None)
    with Supervisor(home / "serve.json", home / "logs") as supervisor:
        made._see_through(supervisor, desk)
    assert desk.alive
    assert desk.port == port
    assert healthy(desk)
    assert sum("the desk ended" in line for line in said) == 1


def test_a_lost_round_is_tried_again_and_everybody_told(serving, home) -> None:
    made, desk, said = serving
    event = {"event": "round_started", "round": 3, "participants": ["lab-a", "lab-b"]}
    (home / "run" / "events.jsonl").write_text(json.dumps(event) + "\n")
    (home / "run" / "summary.json").write_text('{"rounds": 4, "global_perplexity": 12.345}')
    script = Script(made, (44, LOST), (44, LOST), 9, None)
    with Supervisor(home / "serve.json", home / "logs") as supervisor:
        finished = made._see_through(supervisor, desk)
    assert finished
    assert script.started == 4
    assert sum("died (killed by SIGKILL); it goes on" in line for line in said) == 1
    assert sum("the round is drawn again in 0 s" in line for line in said) == 2
    assert all("dropped: lab-b" in line for line in said if "drawn again" in line)
    # The operator hears of whom; of lab-b's troubles lab-a hears nothing.
    made._lost = {"why": LOST, "until": 1.8e9}
    made._tell()
    assert told(made._roster, "lab-a")["run"]["words"] == (
        "med had too few good updates; it tries again at 2027-01-15 08:00 UTC"
    )
    made._over("the run is over: 4 rounds, held-out perplexity 12.35; its operator has the model")
    assert told(made._roster, "lab-a")["run"]["words"] == (
        "med: the run is over: 4 rounds, held-out perplexity 12.35; its operator has the model"
    )


def test_a_run_that_is_drained_while_it_waits_to_draw_again_ends(serving, home, monkeypatch):
    made, desk, said = serving
    monkeypatch.setattr(attempts_module, "_FIRST_PAUSE_S", 1e6)
    (home / "run" / "events.jsonl").write_text(
        json.dumps({"event": "round_started", "round": 3, "participants": ["lab-a"]}) + "\n"
    )
    made._on_event = lambda words: (said.append(words), made._roster.set_setting("draining", True))
    with Supervisor(home / "serve.json", home / "logs") as supervisor:
        made._serve = made._serve.model_copy(update={"gather_s": 1e9})
        Script(made, (44, LOST))
        finished = made._see_through(supervisor, desk)
    assert not finished
    assert "the run is drained; it can be resumed" in said


def test_what_is_waited_for_is_said_once_with_its_end_and_to_silos_without_names(serving) -> None:
    made, _, said = serving
    waiting = {"for_silos": 3, "round": 1, "here": ["lab-a"], "until": 1.8e9}
    made._roster.set_setting("waiting", waiting)
    made._tell()
    made._tell()
    line = "waits for 3 silos for round 1, 1 here, until 2027-01-15 08:00 UTC"
    assert said == [line.replace("1 here", "1 here (lab-a)")]
    assert told(made._roster, "lab-b")["run"]["words"] == f"med {line}"
    made._roster.set_setting("waiting", None)
    made._tell()
    assert told(made._roster, "lab-b")["run"]["words"] == "med goes on"


def test_the_end_is_held_until_those_who_are_here_heard_of_it(serving, keys_of, monkeypatch):
    made, desk, _ = serving
    keys_of(made._roster, "lab-a", "lab-b")
    desk._attendance.seen("lab-a", Presence("idle", boot="a"))
    desk._attendance.seen("lab-b", Presence("stopping", boot="b"))
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 100
        if len(naps) == 3:
            desk._attendance.seen("lab-a", Presence("idle", boot="a"))

    monkeypatch.setattr(serve_module, "_LAST_WORDS_S", 1e6)
    # Not the module's own `sleep`, which other threads use.
    monkeypatch.setattr(serve_module, "time", types.SimpleNamespace(**vars(time) | {"sleep": nap}))
    made._tell_end(desk)
    assert len(naps) == 3


@pytest.fixture
def keys_of(tmp_path):
    from photon.membership.keys import NodeKey

    def join(roster, *names: str) -> None:
        for name in names:
            pem = NodeKey.create(tmp_path / f"{name}.key").public_pem
            roster.redeem(roster.invite(name, 60), name, pem, Facts("d" * 64, "e" * 64, 9, "0.1"))

    return join
