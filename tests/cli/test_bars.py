"""Bars of several runs show names letter by letter, and no number where there is none."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from photon.cli.bars import run_bars
from photon.telemetry.events import Evaluated


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_no_markup_and_no_control_characters(monkeypatch, terminal):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setenv("TERM", "xterm-256color")
    names = {"a": "[/x] y", "b": "[link=https://evil.example]in\x1b[2J", "c": "[bold]c"}
    shown = Screen()
    console = Console(file=shown, width=200, color_system=None, force_terminal=terminal)
    bad = math.nan
    diverged = Evaluated(
        round=0, silo=None, loss=bad, perplexity=bad, bits_per_byte=bad, tokens=1, eval_s=1.0
    )
    with run_bars(console, names) as bars:
        for bar in bars.values():
            bar.on_event(diverged)
    text = shown.getvalue()
    assert all(name in text for name in ("[/x] y", "[link=https://evil.example]in", "[bold]c"))
    assert "in\x1b[2J" not in text
    assert "diverged" in text
