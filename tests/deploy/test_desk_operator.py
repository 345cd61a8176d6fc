"""The operator's part of the desk: status, drain and stop, over a socket of its owner's."""

from __future__ import annotations

import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from desk_place import RUN, Place

from photon.deploy.desk import Desk, DeskLimits, ask_operator
from photon.errors import DeployError, PortInUseError, ProtocolError, UnreachableError


def test_status_says_who_is_here_and_what_each_does(place: Place) -> None:
    services = [{"name": "superlink", "state": "up", "pid": 1}]
    place.desks[0].stop()
    place.open(
        operator_socket=place.socket,
        about=lambda: {"services": services, "run": {"name": "demo", "round": 3}},
    )
    blue = place.member("blue")
    place.member("red")
    task = place.task("blue")
    doing = {"state": "training", "run": RUN, "round": 1, "of": 9, "task": task.id, "boot": "b"}
    place.post("presence", doing | {"step": 1}, blue)
    first = ask_operator(place.socket, "GET", "/operator/status")
    time.sleep(0.02)
    place.post("presence", doing | {"step": 2}, blue)
    status = ask_operator(place.socket, "GET", "/operator/status")
    assert (status["run"], status["services"]) == ({"name": "demo", "round": 3}, services)
    assert (status["draining"], status["stopping"]) == (False, False)
    by_name = {member["name"]: member for member in status["members"]}
    assert by_name["red"] | {"here": False, "presence": None} == by_name["red"]
    shown = by_name["blue"]["presence"]
    assert by_name["blue"]["here"] is True
    assert (shown["state"], shown["round"], shown["step"], shown["of"]) == ("training", 1, 2, 9)
    assert shown["until"] == pytest.approx(task.until)
    # Since the first step, not the last.
    assert shown["since"] == first["members"][0]["presence"]["since"] < shown["seen_at"]
    assert [one["id"] for one in status["open_tasks"]] == [task.id]
    assert status["events"][-1]["what"]
    assert "boot" not in shown
    # Another state begins now; silence makes it gone.
    place.post("presence", {"state": "idle"}, blue)
    assert place.desks[-1].status()["members"][0]["presence"]["since"] > shown["since"]


def test_status_of_a_run_that_went_wrong(place: Place) -> None:
    """Its loss is no number, which JSON can't say."""
    place.desks[0].stop()
    place.open(
        operator_socket=place.socket,
        about=lambda: {
            "services": [{"name": "weed", "pid": None, "log": Path("weed.log")}],
            "run": {"loss": float("nan"), "rounds": [1.5, float("inf")], "done": False},
        },
    )
    status = ask_operator(place.socket, "GET", "/operator/status")
    assert status["run"] == {"loss": None, "rounds": [1.5, None], "done": False}
    assert status["services"] == [{"name": "weed", "pid": None, "log": "weed.log"}]


def test_who_is_silent_is_not_here(place: Place) -> None:
    place.open(limits=DeskLimits(here_s=0.05))
    place.post("presence", {"state": "idle"}, place.member("blue"))
    time.sleep(0.1)
    (blue,) = place.desks[-1].status()["members"]
    assert (blue["here"], blue["presence"]["state"]) == (False, "idle")


def test_drain_and_stop(place: Place) -> None:
    assert ask_operator(place.socket, "POST", "/operator/drain")["draining"] is True
    assert place.roster.setting("draining") is True
    ask_operator(place.socket, "POST", "/operator/drain", {"draining": False})
    assert place.roster.setting("draining") is False
    for wrong in ({"draining": 1}, {}, {"x": []}):
        with pytest.raises(ProtocolError, match="the drain request can't be read"):
            ask_operator(place.socket, "POST", "/operator/drain", wrong)
    assert ask_operator(place.socket, "POST", "/operator/stop")["stopping"] is True
    assert place.roster.setting("stopping") is True
    kinds = [kind for kind, _ in place.told if kind != "refused"]
    assert kinds == ["drain", "drain", "stop"]
    assert [one.what for one in place.roster.journal.events(9) if one.actor == "operator"] == [
        *("drain", "drain taken back"),
        "stop",
    ]


def test_the_operator_s_socket_is_its_owner_s_alone(place: Place) -> None:
    assert stat.S_IMODE(place.socket.stat().st_mode) == 0o600
    assert sorted(path.name for path in place.socket.parent.glob(".s*")) == []
    with pytest.raises(ProtocolError, match="not asked here"):
        ask_operator(place.socket, "POST", "/photon/v2/join", {})
    place.desks[0].stop()
    assert not place.socket.exists()
    with pytest.raises(UnreachableError, match=r"no `photon serve` answers on .*operator\.sock"):
        ask_operator(place.socket, "GET", "/operator/status")


def test_sockets_that_are_taken(place: Place) -> None:
    def desk(**options: Any) -> Desk:
        made = Desk(place.roster, place.presigner(), **options)
        place.desks.append(made)
        return made

    with pytest.raises(PortInUseError, match=r"127\.0\.0\.1:\d+") as caught:
        desk().start(place.desks[0].port)
    assert caught.value.hint
    with pytest.raises(PortInUseError, match="somebody answers on"):
        desk().start(operator_socket=place.socket)
    # A socket of a serve that was killed is in nobody's way.
    dead = place.folder / "dead.sock"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(dead))
    desk().start(operator_socket=dead)
    assert ask_operator(dead, "GET", "/operator/status")["members"] == []
    # What is no socket is not removed.
    file = place.folder / "precious"
    file.write_text("x")
    with pytest.raises(DeployError, match="is no socket"):
        desk().start(operator_socket=file)
    assert file.read_text() == "x"
    with pytest.raises(DeployError, match="can't make the operator's socket") as caught:
        desk().start(operator_socket=place.folder / ("d" * 100) / "o.sock")
    assert "107 characters" in (caught.value.hint or "")
