"""A site's screen: a line for each change, and for all that the aggregator knows of the site."""

from __future__ import annotations

from dataclasses import replace

import pytest

from photon.errors import UnknownMemberError, UnreachableError
from photon.membership.roster import Presence
from photon.silo.narrator import GOES_ON, SAYS, Narrator

TASK = {"run": "r", "round": 3, "task": "r/fit/3/lab-a"}


class Screen:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.narrator = Narrator(self.lines.append)

    @property
    def said(self) -> list[str]:
        """And forgets it."""
        found = [line.removeprefix(SAYS) for line in self.lines if line.startswith(SAYS)]
        self.lines.clear()
        return found


@pytest.fixture
def screen() -> Screen:
    return Screen()


def test_a_round_from_the_question_to_the_answer(screen) -> None:
    doing = screen.narrator.doing
    doing(Presence("idle"))
    doing(Presence("loading", detail="med, 40 rounds", **TASK))
    training = Presence("training", of=500, **TASK)
    doing(training)
    for step in (10, 20):
        doing(replace(training, step=step, detail=f"loss {3 - step / 100:.2f}, 9 tokens/s"))
    live = [line for line in screen.lines if line.startswith(GOES_ON)]
    assert live[-1] == f"{GOES_ON}round 3: step 20 of 500: loss 2.80, 9 tokens/s"
    assert len(live) == 2
    doing(Presence("publishing", step=500, of=500, **TASK))
    doing(Presence("idle", detail="round 3: answered"))
    doing(Presence("idle", detail="round 3: answered"))
    assert screen.said == [
        "round 3: asked; receives the global state: med, 40 rounds",
        "round 3: trains, 500 steps",
        "round 3: done; sends the update",
        "round 3: answered; waits for the next task",
    ]


def test_scoring_is_two_lines_and_the_state_before_round_1_has_a_number(screen) -> None:
    task = {"run": "r", "round": 0, "task": "r/evaluate/0/lab-a"}
    screen.narrator.doing(Presence("loading", detail="med, 40 rounds", **task))
    screen.narrator.doing(Presence("training", detail="scoring held-out text", **task))
    screen.narrator.doing(Presence("idle", detail="round 0: scored"))
    assert screen.said == [
        "round 0: asked to score the global state on its held-out text",
        "round 0: scored; waits for the next task",
    ]


def test_a_refusal_says_which_rule(screen) -> None:
    screen.narrator.doing(Presence("refused", round=1, detail="policy.runs allows med-*"))
    assert screen.said == ["round 1: this site refuses the task: policy.runs allows med-*"]


def test_an_aggregator_that_goes_and_comes(screen) -> None:
    narrator = screen.narrator
    for words in ("connection refused", "connection refused", "no route"):
        narrator.missed(UnreachableError(words))
    (said,) = screen.said  # once, and not each time that it is tried
    assert said.startswith("no answer from the aggregator since ")
    assert "(connection refused); waits for it, for as long as it takes" in said
    narrator.heard({"ok": True})
    narrator.heard({"ok": True})
    assert screen.said == ["the aggregator knows that this node is here; waits for a task"]
    narrator.missed(UnreachableError("gone"))
    narrator.heard({"ok": True})
    assert [line.partition(" (")[0] for line in screen.said][1] == "the aggregator answers again"


def test_suspended_and_expelled_is_said_in_the_aggregator_s_words(screen) -> None:
    for _ in range(3):
        screen.narrator.missed(UnknownMemberError("lab-a is suspended by the operator"))
    screen.narrator.missed(UnknownMemberError("lab-a was expelled by the operator"))
    for _ in range(3):
        screen.narrator.heard({"ok": True})
    assert screen.said[2:] == [
        "the aggregator knows that this node is here; waits for a task",
    ]
    for _ in range(3):
        screen.narrator.missed(UnknownMemberError("lab-a is suspended by the operator"))
    screen.narrator.missed(UnknownMemberError("lab-a was expelled by the operator"))
    screen.narrator.heard({"ok": True})
    assert screen.said == [
        "the aggregator refuses this node: lab-a is suspended by the operator; waits until it is "
        "let in",
        "the aggregator refuses this node: lab-a was expelled by the operator; waits until it is "
        "let in",
        "the aggregator lets this node in again",
    ]


def answer(run: str = "", silo: str = "", at: float = 1000.0, now: float = 1000.0) -> dict:
    told = {"run": {"at": at, "words": run} if run else None}
    told["silo"] = {"at": at, "words": silo} if silo else None
    return {"ok": True, "server_time": now, "told": told}


def test_what_the_aggregator_tells_is_said_once(screen) -> None:
    narrator = screen.narrator
    narrator.heard({"ok": True})
    assert len(screen.said) == 1
    dropped = "round 3: this silo's update was dropped: norm 9 exceeds 1"
    for _ in range(3):
        narrator.heard(answer("med waits for 3 silos", dropped))
    assert screen.said == [
        "the aggregator: med waits for 3 silos",
        f"the aggregator: {dropped}",
    ]
    narrator.heard(answer("med: the run is over", dropped, at=2000.0))
    assert screen.said == [
        "the aggregator: med: the run is over",
        f"the aggregator: {dropped}",  # told again: another round's
    ]


def test_what_was_told_before_this_node_started_is_no_news(screen) -> None:
    screen.narrator.heard(answer(silo="round 1: merged", at=1000.0, now=9000.0))
    assert len(screen.said) == 1
    screen.narrator.heard(answer(silo="round 2: merged", at=9001.0, now=9002.0))
    assert screen.said == ["the aggregator: round 2: merged"]


@pytest.mark.parametrize(
    "told",
    [
        None,
        5,
        [],
        {"run": 7, "silo": []},
        {"run": {"at": "x"}, "silo": {"words": 3, "at": None}},
        {"run": {"words": "", "at": {}}},
    ],
)
def test_nothing_that_a_desk_answers_ends_it(screen, told) -> None:
    screen.narrator.heard({"told": told, "server_time": "now"})
    assert all(line.startswith(SAYS) for line in screen.lines)


def test_the_aggregator_s_words_are_bounded_and_on_one_line(screen) -> None:
    screen.narrator.heard({"ok": True})
    screen.lines.clear()
    screen.narrator.heard(answer(f"a\n{SAYS}round 3: answered\r\n" + "x" * 10_000))
    (line,) = screen.lines
    assert line.startswith(f"{SAYS}the aggregator: a {SAYS}round 3: answered x")
    assert "\n" not in line
    assert len(line) < 600
