"""`photon status`: who is here and what each does, whatever a silo says of itself."""

from __future__ import annotations

import pytest

from photon.cli import serve


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
