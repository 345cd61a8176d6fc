"""The benchmarks run (`make benches`). What they measure is nobody's assertion."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.benches

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers.contest")


def run(*arguments: str, within_s: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=within_s, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help(script: Path) -> None:
    assert "usage: " + script.name in run(str(script), "--help")


@pytest.mark.slow
def test_trainer_against_a_bare_loop(one_silo: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.md"
    script = str(BENCHMARKS / "trainer.py")
    out = run(script, "--data", str(one_silo), "--quick", "--out", str(file))
    assert "| adamw, tokens/s |" in out
    assert "| muon, tokens/s |" in out
    assert out == file.read_text(encoding="utf-8")
    assert str(one_silo) not in out


@pytest.mark.slow
def test_photon_and_the_bare_loop_take_turns_on_the_same_work(one_silo: Path) -> None:
    out = run(str(BENCHMARKS / "trainer.py"), "--data", str(one_silo), "--quick", "--memory")
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    losses = {row[0]: row[-2:] for row in rows}
    # The same windows in the same order, so the losses stay together, not only the first.
    assert losses["Photon Trainer"] == losses["bare loop"]
    assert "Memory, Photon over the bare loop with the same imports: " in out


def test_the_loss_by_rows_and_the_plain_one_take_turns() -> None:
    out = run(str(BENCHMARKS / "head_loss.py"), "--quick")
    assert "| 64 x 16 x 128 | plain |" in out
    assert "(chosen)" in out


def test_private_steps_take_turns_with_plain_ones() -> None:
    out = run(str(BENCHMARKS / "dp_sgd.py"), "--quick")
    for name in ("plain", "clipped", "clipped and noised", "vectorised, clipped"):
        assert f"| {name} |" in out


def test_codecs_take_turns_with_a_copy() -> None:
    out = run(str(BENCHMARKS / "link.py"), "--quick")
    for name in ("plain copy", "int8", "fp4", "sign"):
        assert f"| {name} |" in out


@pytest.mark.slow
def test_aggregator_beside_plain_means() -> None:
    out = run(
        str(BENCHMARKS / "aggregator.py"), "--quick", "--codec", "int8", "--key-rule", "attention"
    )
    assert "| int8 | as the rest | 2 |" in out
    assert "| int8 | attention | 4 |" in out
    rules = ("--key-rule", "mean", "--key-rule", "attention", "--turns", "2")
    out = run(str(BENCHMARKS / "aggregator.py"), "--quick", "--codec", "fp32", *rules)
    assert "| fp32 | mean | 2 |" in out
    assert out.count("| 1.00 (1.00 to 1.00) |") == 2 * 2  # the first rule, of itself


@pytest.mark.slow
def test_codecs_and_learning(three_silos: Path) -> None:
    out = run(str(BENCHMARKS / "codec_quality.py"), "--data", str(three_silos), "--quick")
    assert "| fp32 |" in out
    assert "| int8 |" in out
    assert str(three_silos) not in out


@pytest.mark.slow
def test_transfer_between_namespaces() -> None:
    script = str(BENCHMARKS / "transfer.py")
    command = [sys.executable, script, "--quick"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        out, err = process.communicate(timeout=300)
    if process.returncode and err.startswith("Needs "):
        pytest.skip(err.strip())
    assert process.returncode == 0, err
    assert "| 200 | 10 | 0 | 4 |" in out
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"-{process.pid}" not in left.stdout


@pytest.mark.slow
def test_deployed_rounds(tmp_path: Path) -> None:
    file = tmp_path / "result.md"
    out = run(str(BENCHMARKS / "deployed.py"), "--quick", "--out", str(file), within_s=220)
    assert out == file.read_text(encoding="utf-8") + "\n"
    assert out.count("| tiny, 0.8 M | 2 |") == 3  # two rounds, and their median
    for service in ("loop", "caddy", "serve", "weed"):
        assert f" {service} |" in out
    assert str(tmp_path) not in out


@pytest.mark.slow
def test_soak_with_churn(tmp_path: Path) -> None:
    script, file = str(BENCHMARKS / "soak.py"), tmp_path / "result.md"
    out = run(script, "--quick", "--hours", "0.008", "--out", str(file), within_s=220)
    assert " 1 were killed with -9" in out
    assert " ended by itself 0 times" in out
    assert "| loop | memory, MB |" in out
    # The same table again, from what was written on the way.
    again = run(script, "--report", str(file.with_suffix(".csv")))
    assert again.splitlines()[2:] == out.splitlines()[2:]


def test_turns_are_shuffled_and_only_runners_are_timed(contest: Any) -> None:
    told: list[tuple[str, int]] = []

    class Fake:
        def __init__(self, entry: Any) -> None:
            self.entry = entry

        def run(self, steps: int) -> Any:
            told.append((self.entry.name, steps))
            return (
                contest.Turn(2.0, 4.0) if self.entry is contest.PHOTON else contest.Turn(3.0, 5.0)
            )

    group = [Fake(contest.PHOTON), Fake(contest.BARE), Fake(contest.LEAN)]
    turns = contest.take_turns(group, warmup=1, steps=7, rounds=8, seed=0)
    assert told[:3] == [(fake.entry.name, 1) for fake in group]
    firsts = {told[3 + 2 * number][0] for number in range(8)}
    assert firsts == set(turns) == {contest.PHOTON.name, contest.BARE.name}
    ratio = contest.speed_ratio(turns, contest.PHOTON.name, contest.BARE.name)
    assert (ratio.low, ratio.median, ratio.high) == (1.5, 1.5, 1.5)
    by_cpu = contest.speed_ratio(turns, contest.PHOTON.name, contest.BARE.name, "cpu_seconds")
    assert by_cpu.median == 1.25


@pytest.mark.parametrize("change", [{"first_loss": 5.01}, {"parameters": 11}])
def test_a_contest_of_different_work_is_refused(contest: Any, change: dict[str, Any]) -> None:
    fair = {"first_loss": 5.0, "parameters": 10}
    contest.require_same_work({contest.BARE.name: fair, "peer": dict(fair)}, tolerance=1e-4)
    with pytest.raises(SystemExit, match=r"peer .* not the same work"):
        contest.require_same_work({contest.BARE.name: fair, "peer": fair | change}, tolerance=1e-4)


def test_the_peers_share_the_projects_transformers(contest: Any) -> None:
    lock = (BENCHMARKS.parent / "requirements.lock").read_text(encoding="utf-8").split()
    assert {pin for pin in lock if pin.startswith("transformers==")} <= set(
        contest.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    )


def test_paces(three_silos: Path) -> None:
    paces = str(BENCHMARKS / "paces.py")
    out = run(paces, "--data", str(three_silos), "--slow", "red", "--vocabulary", "300", "--quick")
    assert "| unequal steps | " in out
    assert "| buffered, 16 | " in run(paces, "--week", "--quick")


def test_one_hostile_silo(three_silos: Path) -> None:
    out = run(
        str(BENCHMARKS / "hostile.py"), "--data", str(three_silos), "--vocabulary", "300", "--quick"
    )
    assert "| mean | +" in out


@pytest.mark.slow
def test_vocabularies_of_silos_own(tmp_path: Path) -> None:
    for silo, words in (("one", "der die das und nicht"), ("two", "el la los y no")):
        folder = tmp_path / "text" / silo
        folder.mkdir(parents=True)
        for number in range(40):
            (folder / f"{number}.txt").write_text(f"{words} {number} " * 60)
    where = ("--text", str(tmp_path / "text"), "--work", str(tmp_path / "work"), "--quick")
    out = run(str(BENCHMARKS / "dept.py"), *where)
    rows = {line.split(" | ")[0]: line for line in out.splitlines() if line.startswith("| ")}
    assert {"| own", "| local", "| shared", "| longer"} <= rows.keys()
    assert "undecided" in rows["| own against local"]  # of one seed
