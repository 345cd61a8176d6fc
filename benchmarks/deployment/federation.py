"""A real federation on loopback: `photon serve` and some `photon join`, ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployment.links import inside
from deployment.processes import children
from photon.data import PrepareOptions, open_data, prepare
from photon.deploy import tether
from photon.deploy.ports import free_ports

_PHOTON = (sys.executable, "-m", "photon.cli.main")
#: To end in good order; then it is killed, with what it started.
_STOP_S = 45.0
#: To be killed.
_GONE_S = 10.0

RUN_FILE = """
[run]
name = "bench"
seed = 11
keep_checkpoints = 1

[model]
preset = "{preset}"

[data]
path = "{data}"
sequence_length = {sequence_length}

[federation]
rounds = {rounds}
silence_s = {silence_s}

[local]
steps = {steps}
batch_size = {batch_size}
optimizer = "{optimizer}"
lr = 1e-3

[outer]
name = "fedavg"

[compute]
device = "cpu"
threads = {threads}

[eval]
every = 0
max_tokens = {eval_tokens}
per_silo = false

[serve]
listen = "{address}:{port}"
host = "{address}"
home = "{home}"
min_silos = {silos}
min_free_gib = 1.0
keep_rounds = 1

{more}
"""

NODE_FILE = """
[data]
path = "{data}"
silo = "{silo}"

[compute]
device = "cpu"
threads = 1

[disk]
keep_answers = 1
"""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        preset: of the model.
        rounds, steps: federated rounds, and local steps of each.
        threads: of the aggregator; a silo has one.
        silence_s: a silo that was not heard of for so long is left out of its round.
        optimizer: of local steps.
        more: sections of the run file.
    """

    preset: str
    rounds: int
    steps: int = 1
    sequence_length: int = 32
    threads: int = 1
    silence_s: float = 120.0
    optimizer: str = "sgd"
    batch_size: int = 1
    more: str = ""


def write_text(folder: Path, *, words: int, documents: int) -> Path:
    """Files of made-up words, each at least twice, so that a tokenizer has as much to learn."""
    draw = random.Random(0)
    made: set[str] = set()
    while len(made) < words:
        made.add("".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9))))
    spoken = sorted(made) * 2
    spoken += draw.choices(spoken, k=max(0, 300 * documents - len(spoken)))
    draw.shuffle(spoken)
    folder.mkdir(parents=True)
    for number in range(documents):
        text = " ".join(spoken[number::documents])
        (folder / f"{number:04d}.txt").write_text(text + ".\n", encoding="utf-8")
    return folder


def prepare_text(
    folder: Path, silos: int, *, vocabulary: int, text: Path | None
) -> tuple[Path, list[str]]:
    """Prepared text of some silos, and what they are called.

    Args:
        folder: for everything.
        vocabulary: size of the tokenizer, which the text may not be rich enough for.
        text: a file or folder of text; made up by default.
    """
    if text is None:
        text = write_text(folder / "text", words=max(200, vocabulary), documents=16 * silos)
    options = PrepareOptions(
        input=text, out=folder / "data", iid=silos, vocab_size=vocabulary, global_fraction=0.05
    )
    path = prepare(options).path
    return path, sorted(open_data(path).silos)


class Federation:
    """An aggregator and its silos. A context manager: all processes are ended on leaving it.

    Each is in a session of its own, and is killed when this process ends in whatever way.

    Attributes:
        folder: of everything.
        home, run, run_file: of the aggregator, of its run.
        silos: their names.

    Args:
        address: of the aggregator, on its host.
        spaces: network namespaces of silos by name, and of the aggregator as "server"; here by
            default.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        silos: Sequence[str],
        plan: Plan,
        *,
        address: str = "127.0.0.1",
        spaces: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.silos = list(silos)
        self.home = folder / "server"
        self.run = folder / "run"
        self._data = data
        self.run_file = folder / "run.toml"
        self._spaces = spaces or {}
        self.serving: subprocess.Popen[bytes] | None = None
        self.joined: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (port,) = free_ports(1)
        text = RUN_FILE.format(
            data=data,
            home=self.home,
            port=port,
            address=address,
            silos=len(self.silos),
            eval_tokens=4 * plan.sequence_length,
            **vars(plan),
        )
        self.run_file.write_text(text, encoding="utf-8")
        for silo in self.silos:
            text = NODE_FILE.format(data=data, silo=silo)
            (folder / f"{silo}.toml").write_text(text, encoding="utf-8")

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        processes = [*self.joined.values(), *([self.serving] if self.serving else [])]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _STOP_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            if process.poll() is None:
                _kill(process)

    # --- starting and ending -------------------------------------------------------------------

    def serve(self) -> None:
        """Start the aggregator, or go on with its run, and wait until silos can join.

        Raises:
            SystemExit: it ended, or did not come up.
        """
        begun = (self.run / "serve.json").exists()
        words = ["--resume", self.run] if begun else [self.run_file, "--run-dir", self.run]
        self.serving = self._start(
            self.folder / "serve.log", "serve", *words, "--quiet", host="server"
        )
        self.wait("the aggregator is up", lambda: self.pid("loop") is not None, within_s=300)

    def invite(self, silo: str) -> Path:
        """An invitation file for a silo."""
        file = self.folder / f"{silo}.invitation.toml"
        file.unlink(missing_ok=True)
        words = ["invite", silo, "--run-file", str(self.run_file), "--out", str(file)]
        subprocess.run(
            [*self._at("server"), *_PHOTON, *words],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )
        return file

    def join(self, silo: str, invitation: Path | None = None) -> None:
        """Start a silo's node; with its invitation the first time."""
        words = ["--invite", invitation] if invitation is not None else []
        words += ["--node", self.folder / f"{silo}.toml", "--home", self.node_home(silo)]
        self.joined[silo] = self._start(self.folder / f"{silo}.log", "join", *words, host=silo)

    def stop(self, silo: str) -> None:
        """End a silo's node in good order."""
        process = self.joined[silo]
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill(silo)
        self.joined.pop(silo, None)

    def kill(self, silo: str) -> None:
        """kill -9 of a silo's node; what it started ends with it.

        Raises:
            SystemExit: something that it started still runs after some seconds.
        """
        _kill(self.joined[silo])
        del self.joined[silo]

    def begin(self) -> None:
        """Bring everything up, with all silos."""
        self.serve()
        self.join_all()

    def join_all(self) -> None:
        """Invite all silos and start them."""
        for silo in self.silos:
            self.join(silo, self.invite(silo))

    def node_home(self, silo: str) -> Path:
        return self.folder / "nodes" / silo

    def _at(self, host: str) -> list[str]:
        space = self._spaces.get(host)
        return inside(space) if space is not None else []

    def _start(self, log: Path, *words: str | Path, host: str) -> subprocess.Popen[bytes]:
        # Its threads sleep while they wait, as the command line's do: silos share these cores.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        command = [*self._at(host), *_PHOTON, *map(str, words)]
        tied = [sys.executable, "-I", "-S", str(Path(tether.__file__))]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*tied, "run", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    # --- what runs, and what it says -----------------------------------------------------------

    def pid(self, service: str, home: Path | None = None) -> int | None:
        """Of a service that runs now; of the aggregator's, unless a node's home is given."""
        record = self.home / "serve.json" if home is None else home / "join.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            one = json.loads(record.read_text(encoding="utf-8"))["services"][service]
            if one["birth"] is not None and tether.birth(one["pid"]) == one["birth"]:
                return int(one["pid"])
        return None

    def services(self) -> dict[str, int | None]:
        """Processes of the aggregator that matter, by name."""
        serving = self.serving.pid if self.serving and self.serving.poll() is None else None
        return {
            "loop": self.pid("loop"),
            "serve": serving,
            "weed": self.pid("store"),
            "caddy": self.pid("door"),
        }

    def node_services(self, silo: str) -> dict[str, int | None]:
        """Processes of a silo, by name."""
        joined = self.joined.get(silo)
        running = joined.pid if joined is not None and joined.poll() is None else None
        home = self.node_home(silo)
        return {"join": running} | {"trainer": self.pid("trainer", home)}

    @property
    def over(self) -> bool:
        """Whether the run has its summary."""
        return (self.run / "summary.json").exists()

    def require_alive(self) -> None:
        """Raises SystemExit where the aggregator or a node ended, with its last words."""
        if self.over:
            return
        for name, process in {"serve": self.serving, **self.joined}.items():
            if process is not None and process.poll() is not None:
                log = self.folder / f"{name}.log"
                tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
                raise SystemExit(f"{name} ended with exit code {process.returncode}:\n{tail}")

    def wait(self, what: str, true: Callable[[], bool], *, within_s: float) -> None:
        """Until something is so.

        Raises:
            SystemExit: it was not in time, or a process ended.
        """
        deadline = time.monotonic() + within_s
        while not true():
            self.require_alive()
            if time.monotonic() > deadline:
                raise SystemExit(f"not within {within_s:g} s: {what}")
            time.sleep(0.2)


class EventFile:
    """Reads events.jsonl as it grows, each line once, and when on the clock they happened."""

    def __init__(self, run: Path) -> None:
        self._path = run / "events.jsonl"
        self._read = 0
        self._offset_s = float("inf")

    def new(self) -> Iterator[dict[str, Any]]:
        """Events since the last look."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
                written_s = os.fstat(file.fileno()).st_mtime
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                # The file was last written just after its last line was stamped.
                self._offset_s = min(self._offset_s, written_s - event["time_s"])
                yield event

    def clock(self, time_s: float) -> float:
        """Seconds since the epoch of an event's time_s, as long as one process wrote them."""
        return self._offset_s + time_s


def read_tasks(home: Path) -> dict[tuple[int, str], tuple[float, float | None]]:
    """When the aggregator opened and closed each task of late rounds, by (round, silo)."""
    found = {}
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(
            sqlite3.connect(f"file:{home / 'mailbox.sqlite'}?mode=ro", uri=True, timeout=5)
        ) as db,
    ):
        rows = db.execute(
            "SELECT round, silo, opened_at, closed_at FROM tasks WHERE kind = 'fit'"
        ).fetchall()
        found = {(number, silo): (opened, closed) for number, silo, opened, closed in rows}
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    started = {pid: tether.birth(pid) for pid in children(process.pid)}
    process.kill()
    process.wait()
    deadline = time.monotonic() + _GONE_S
    while left := [pid for pid, born in started.items() if born and tether.birth(pid) == born]:
        if time.monotonic() > deadline:
            raise SystemExit(f"kill -9 of {process.pid} left its children {left}")
        time.sleep(0.05)
