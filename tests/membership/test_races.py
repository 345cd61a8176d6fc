"""Several processes at once on one roster, and processes that are killed: real ones."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from audit_rounds import last

from photon.membership.audit import AuditLog
from photon.membership.roster import Roster
from photon.membership.verification import verify_audit

PROGRAMS = Path(__file__).parent / "programs"
KILLS = 4


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, PROGRAMS / program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("prepared", [True, False], ids=["a roster", "no file yet"])
def test_of_processes_that_redeem_one_token_at_once_one_joins(tmp_path, prepared):
    path = tmp_path / "members.sqlite"
    token = "a token of another aggregator"
    if prepared:
        with Roster(path) as roster:
            token = roster.invite("lab", 60)
    racers = [start("redeem.py", path, token, "lab") for _ in range(4)]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    with Roster(path) as roster:
        if not prepared:  # four made the file at once, and none was refused by the file
            assert [line.split(" ")[0] for line in said] == ["refused"] * 4
            return
        assert said[0] == f"joined {roster.member('lab').fingerprint}"
        assert [line.split(" at ")[0] for line in said[1:]] == [
            "refused the invitation for lab was used"
        ] * 3
        assert len(roster.members()) == 1
        assert [event.what for event in roster.journal.events()][:2] == ["invited", "joined"]


def test_threads_and_processes_share_a_roster(tmp_path):
    with Roster(tmp_path / "members.sqlite") as one, Roster(one.path) as two:
        one.journal.note("test", "start", "")

        def work(number):
            roster = (one, two)[number % 2]
            roster.set_setting(f"key-{number}", number)
            assert roster.setting(f"key-{number}", None) == number
            return (two, one)[number % 2].setting(f"key-{number}", None)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(60))) == list(range(60))


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    path, log = tmp_path / "members.sqlite", tmp_path / "audit.jsonl"
    draw = random.Random(7)
    acknowledged, torn = 0, []
    for kill in range(KILLS):
        child = start("fill.py", path, log)
        try:
            said = [int(child.stdout.readline())]
            time.sleep(draw.uniform(0.0, 0.15))
            child.kill()
            rest, _ = child.communicate(timeout=30)
            said += [int(line) for line in rest.splitlines()]
        finally:
            child.kill()
            child.wait()
        assert child.returncode == -9  # the fault fired, in the middle of its work
        acknowledged += len(said)
        if kill % 2:  # and as if power had been lost while the last line was written
            with log.open("ab") as file:
                file.write(b'{"at":17')
        # The kill itself may have cut a line short, too.
        cut = len(log.read_bytes().rpartition(b"\n")[2])
        assert cut >= 8 * (kill % 2)
        torn += [cut] if cut else []
        with Roster(path) as roster:
            for number in said:
                assert roster.tasks.reply(f"task-{number}").text == b"x" * 2000
        report = verify_audit(log)
        assert report.problems == []
        assert report.lines >= acknowledged
        assert any("the last line is cut short" in remark for remark in report.remarks) == bool(cut)
        assert last(AuditLog(log), "number")["number"] >= said[-1]
    assert len(torn) >= KILLS // 2
    assert last(AuditLog(log), "torn") == {"bytes": torn[-1]}
    assert log.read_bytes().count(b'"kind":"torn"') == len(torn)


def test_several_processes_write_one_log(tmp_path):
    log = tmp_path / "audit.jsonl"
    children = [start("fill.py", tmp_path / f"{number}.sqlite", log) for number in range(3)]
    said = 0
    try:
        for child in children:  # all are at work, then
            child.stdout.readline()
            said += 1
        for child in children:
            for _ in range(15):
                child.stdout.readline()
                said += 1
    finally:
        for child in children:
            child.kill()
            said += len(child.communicate()[0].splitlines())
    assert [child.returncode for child in children] == [-9] * 3  # none of them gave up
    report = verify_audit(log)
    assert report.problems == []
    assert said >= 48
    assert report.lines >= said
