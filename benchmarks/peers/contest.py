"""The organiser's side: contestants as processes, one computing at a time, in shuffled rounds."""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Self

from peers.turns import Work

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / "build" / "peers"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
        name: in the table.
        module: in peers/.
        foreign: runs in the peers' environment, not in the project's.
        arguments: after the work file.
        turns: takes part in the timed rounds; else only shows its memory.
        overrides: of the work.
    """

    name: str
    module: str
    foreign: bool = False
    arguments: tuple[str, ...] = ()
    turns: bool = True
    overrides: tuple[tuple[str, Any], ...] = ()


class Turn(NamedTuple):
    """What a turn took, in seconds: of the clock, and of all the process's threads."""

    seconds: float
    cpu_seconds: float


PHOTON = Entry("Photon Trainer", "photon_loop")
BARE = Entry("bare loop", "bare_loop")
#: The noise floor: where the two bare loops differ, so may anyone.
TWIN = Entry("bare loop, a second one", "bare_loop")
LEAN = Entry("bare loop, lean imports", "bare_loop", arguments=("--lean",), turns=False)
HF = Entry("Hugging Face Trainer", "hf_trainer", foreign=True)
LITGPT = Entry("litgpt pretrain", "litgpt_loop", foreign=True)
#: litgpt compiles its model as shipped; on a CPU nobody else does, so it also runs without.
LITGPT_EAGER = Entry(
    "litgpt pretrain, not compiled", "litgpt_loop", foreign=True, overrides=(("compile", False),)
)


class Contestant:
    """A process that trains when told to.

    Args:
        entry: who.
        work: what.
        scratch: folder for its files and what it prints.
        python: the interpreter of its environment.
    """

    def __init__(self, entry: Entry, work: Work, scratch: Path, python: Path) -> None:
        self.entry = entry
        self._log = scratch / "log.txt"
        scratch.mkdir(parents=True)
        task = scratch / "work.json"
        mine = asdict(work) | {"scratch": str(scratch)} | dict(entry.overrides)
        task.write_text(json.dumps(mine), encoding="utf-8")
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": str(work.threads),
            # Idle contestants must sleep, not spin at a barrier.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        }
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", f"peers.{entry.module}", str(task), *entry.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=scratch,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate("quit\n", timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            self._process.kill()
            self._process.wait()

    def run(self, steps: int) -> Turn:
        """Take that many optimizer steps."""
        return Turn(**self._ask(f"run {steps}"))

    def report(self) -> dict[str, Any]:
        return self._ask("report")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"{self.entry.name} ended early; it said:\n{tail}")
        return json.loads(answer)


@contextmanager
def contestants(
    entries: Sequence[Entry], work: Work, scratch: Path, peers: Path | None
) -> Iterator[list[Contestant]]:
    """All processes started; ended on exit."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Contestant(
                    entry,
                    work,
                    scratch / str(number),
                    peers if entry.foreign and peers else Path(sys.executable),
                )
            )
            for number, entry in enumerate(entries)
        ]


def take_turns(
    group: Sequence[Contestant], *, warmup: int, steps: int, rounds: int, seed: int
) -> dict[str, list[Turn]]:
    """Every turn by contestant's name; one of them computes at a time.

    The order is shuffled anew each round, so that a drift of the machine favours nobody.
    """
    for contestant in group:
        contestant.run(warmup)
    runners = [contestant for contestant in group if contestant.entry.turns]
    turns: dict[str, list[Turn]] = {contestant.entry.name: [] for contestant in runners}
    shuffle = random.Random(seed)
    for number in range(rounds):
        shuffle.shuffle(runners)
        for contestant in runners:
            turns[contestant.entry.name].append(contestant.run(steps))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return turns


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def speed_ratio(
    turns: dict[str, list[Turn]], mine: str, other: str, key: str = "seconds"
) -> Spread:
    """Speed of `mine` over that of `other`, round by round; by the clock or by cpu_seconds."""
    pairs = zip(turns[mine], turns[other], strict=True)
    return Spread.of([getattr(theirs, key) / getattr(ours, key) for ours, theirs in pairs])


def require_same_work(reports: dict[str, dict[str, Any]], *, tolerance: float) -> None:
    """First losses and parameter counts must agree, or the contest would compare nothing.

    Raises:
        SystemExit: naming who differs.
    """
    expected = reports[BARE.name]
    for name, report in reports.items():
        difference = abs(report["first_loss"] - expected["first_loss"])
        if difference > tolerance * expected["first_loss"]:
            raise SystemExit(
                f"{name} starts from loss {report['first_loss']:.6f}, the bare loop from "
                f"{expected['first_loss']:.6f}: not the same work"
            )
        if report["parameters"] != expected["parameters"]:
            raise SystemExit(
                f"{name} has {report['parameters']} parameters, the bare loop "
                f"{expected['parameters']}: not the same work"
            )


def peers_environment(torch: str) -> Path:
    """The interpreter of an environment of their own, made on first use under build/peers.

    Args:
        torch: words for pip, for instance "torch==2.13.0".

    Raises:
        SystemExit: the pinned transformers is not the project's.
    """
    pins = REQUIREMENTS.read_text(encoding="utf-8")
    if f"transformers=={metadata.version('transformers')}" not in pins.splitlines():
        raise SystemExit(
            f"{REQUIREMENTS.name} pins another transformers than the project's "
            f"{metadata.version('transformers')}: bring it up to date first"
        )
    python = ENVIRONMENT / "bin" / "python"
    key = hashlib.sha256(f"{torch}\n{pins}".encode()).hexdigest()[:16]
    stamp = ENVIRONMENT / f".installed-{key}"
    if stamp.exists():
        return python
    print(f"installing the peers into {ENVIRONMENT.relative_to(ROOT)}", file=sys.stderr)
    # --clear: what an older list installed must not stay. pip works on it from outside, as
    # Debian's python3 has no ensurepip.
    call = [sys.executable, "-m", "venv", "--without-pip", "--clear", str(ENVIRONMENT)]
    subprocess.run(call, check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    for what in (torch.split(), ["--no-deps", "-r", str(REQUIREMENTS)]):
        subprocess.run([*pip, "install", "--quiet", *what], check=True)
    stamp.touch()
    return python


def peer_versions() -> str:
    """The pinned versions that matter, for the table."""
    wanted = ("transformers", "accelerate", "litgpt", "lightning")
    pins = dict(
        line.split("==")
        for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    return ", ".join(f"{name} {pins[name]}" for name in wanted)
