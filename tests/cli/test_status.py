"""`photon status`: who is here and what each does, whatever a silo says of itself."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest

from photon.cli import following, serve
from photon.dashboard.progress import RunProgress
from photon.errors import UnreachableError
from photon.telemetry.events import RoundStarted, RunStopped, UpdateDropped


def found(detail: str) -> dict:
    doing = {"state": "idle", "detail": detail, "since": 1, "seen_at": 99}
    member = {"name": "lab-a", "status": "active", "here": True, "presence": doing}
    service = {"name": "door", "state": "up", "pid": 1, "since": 1, "restarts": 0, "detail": detail}
    return {"run": {}, "server_time": 100.0, "services": [service], "members": [member]}


@pytest.mark.parametrize(
    "text",
    [
        "x [/x] y",
        "[link=https://evil.example/login]session expired[/link] [bold red]ALL GOOD[/]",
        ":warning: 1 < 2",
    ],
)
def test_what_a_member_says_is_shown_letter_by_letter(text, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("FORCE_COLOR", "1")
    serve._show_status(found(text))
    said = capsys.readouterr().out
    assert said.count(text) == 2  # as a member's words, and as a service's
    assert "\x1b]8;" not in said


def test_and_moves_no_cursor(capsys) -> None:
    serve._show_status(found("\x1b[2J\x07\x9b2J\u202eall good"))
    said = capsys.readouterr().out
    assert "all good" in said
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(said)


def test_the_view_of_a_served_run_says_what_it_waits_for(tmp_path, monkeypatch) -> None:
    events = [
        RoundStarted(round=2, global_step=4, participants=["lab-a", "lab-b"]),
        RunStopped(round=2, reason="interrupted"),
    ]
    path = tmp_path / "events.jsonl"
    lines = [json.dumps({"event": one.name, **one.model_dump()}) for one in events]
    path.write_text("\n".join([*lines, ""]))
    waiting = {"for_silos": 2, "round": 2, "here": ["lab-a"], "until": 4e9}
    monkeypatch.setattr(following, "_STATUS_EVERY", 1)

    class Over:
        """An end that comes after so many looks."""

        def __init__(self, looks: int) -> None:
            self.looks = looks

        def wait(self, _: float) -> bool:
            self.looks -= 1
            return self.looks < 0

    said: list[str] = []
    for looks, known, words in (
        (1, {}, "for the federation's loop to start"),
        (2, found("x"), "for the federation's loop to start"),
        (2, found("x") | {"run": {"waiting": waiting}}, "for 2 silos for round 2, here: lab-a"),
    ):
        progress = RunProgress()
        following._follow(path, progress.fold, lambda known=known: known, said.append, Over(looks))
        assert said == []
        assert progress.waits_for is not None
        assert progress.waits_for.startswith(words)

    def nobody() -> dict:
        raise UnreachableError("no desk")

    progress = RunProgress()
    following._follow(path, progress.fold, nobody, said.append, Over(2))
    assert progress.stopped is not None
    lost = found("x") | {"run": {"lost": {"why": "dropped: lab-b", "until": 4e9}}}
    following._follow(path, progress.fold, lambda: lost, said.append, Over(2))
    assert progress.waits_for == "until 2096-10-02 07:06 UTC: dropped: lab-b"


def test_why_an_update_was_dropped_is_said_whole_whatever_the_view_has_room_for(tmp_path) -> None:
    path, said = tmp_path / "events.jsonl", []
    reason = "lab-b: the text was cut by another tokenizer than the run's: " + "x" * 300
    before = UpdateDropped(round=1, silo="lab-b", reason="of an earlier process")
    path.write_text(json.dumps({"event": before.name, **before.model_dump()}) + "\n")

    class Over:
        looks = 0

        def wait(self, _: float) -> bool:
            self.looks += 1
            if self.looks == 2:
                event = UpdateDropped(round=2, silo="lab-b", reason=reason)
                with path.open("a") as file:
                    file.write(json.dumps({"event": event.name, **event.model_dump()}) + "\n")
            return self.looks == 3

    following._follow(path, lambda _: None, dict, said.append, Over())
    assert said == [f"round 2: dropped lab-b: {reason}"]


def test_each_line_is_written_for_programs_too_where_that_is_asked(tmp_path, capsys) -> None:
    for form in ("text", "json"):
        lines = serve._Lines(tmp_path / form / "serve.log", form, verbose=False)
        lines.service('12:00:00 door | said "a | b" \u00fc')
        lines.event("all is up")
        for log in filter(None, (lines._log, lines._json)):
            log.close()
    assert not (tmp_path / "text" / "serve.jsonl").exists()
    readable = (tmp_path / "json" / "serve.log").read_text(encoding="utf-8").splitlines()
    written = (tmp_path / "json" / "serve.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in written.splitlines()]
    assert len(readable) == 2
    assert [(one["service"], one["text"]) for one in records] == [
        ("door", 'said "a | b" \u00fc'),
        ("photon", "all is up"),
    ]
    for one in records:
        assert datetime.fromisoformat(one["at"]).utcoffset() == timedelta(0)


def test_where_nobody_answers_the_hint_knows_a_run_that_is_over(tmp_path) -> None:
    with pytest.raises(UnreachableError, match="no `photon serve` answers") as refused:
        serve.status(tmp_path)
    assert "Is it running" in refused.value.hint
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UnreachableError) as refused:
        serve.status(tmp_path)
    assert f"The run in {tmp_path} is over" in refused.value.hint
