"""Stock Flower carrying a model's bytes: FedAvg, an ArrayRecord, clients that return it unchanged.

    python -m venv build/flower && build/flower/bin/pip install flwr==1.41.0
    python benchmarks/stock_flower.py --programs build/flower/bin [--parameters 125] [--silos 2]

To be read beside benchmarks/deployed.py. As its documentation starts it: one flower-superlink, a
flower-supernode for each client, `flwr run` of an app; no TLS and no keys, which cost nothing here,
and its state in memory. Its ServerApp and ClientApps are processes of their own, which Flower
starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from deployment.flower import Flower
from deployment.processes import PeakWatch, available_bytes
from trainer import machine, table

#: Measured for Flower 1.41: memory of a client and of the server, in payloads.
CLIENT_PAYLOADS, SERVER_PAYLOADS = 5.4, 3.4
#: Of Python, numpy and Flower, for each client and for the server.
_FIXED_BYTES = 450_000_000
#: Below this, the machine is about to kill somebody.
_LEAST_BYTES = 1_000_000_000
#: ServerApp writes here when each round was over, clients when they were asked and had answered.
_TIMES = "PHOTON_BENCH_TIMES"
#: In the place of a round's number: of a client. (-1 of the server: the end of it all.)
_ASKED, _ANSWERED = -2, -3

PROJECT = """\
[project]
name = "same-bytes"
version = "1.0.0"
description = "FedAvg over a model of so many bytes."
license = "Apache-2.0"
dependencies = ["flwr==1.41.0"]

[tool.flwr.app]
publisher = "photon"

[tool.flwr.app.components]
serverapp = "same_bytes.server_app:app"
clientapp = "same_bytes.client_app:app"

[tool.flwr.app.config]
rounds = 1
nodes = 1
payload-bytes = 1
timeout-s = 1
"""

SERVER_APP = f"""\
import os
import time

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()
LARGEST = 16 << 20


@app.main()
def main(grid: Grid, context: Context) -> None:
    told = context.run_config
    values, draw = int(told["payload-bytes"]) // 4, np.random.default_rng(0)
    arrays = [
        draw.standard_normal(min(LARGEST, values - start), dtype=np.float32)
        for start in range(0, values, LARGEST)
    ]
    initial = ArrayRecord(arrays)
    del arrays

    def note(number, _):
        with open(os.environ["{_TIMES}"], "a") as file:
            file.write(f"{{number}} {{time.time()}}\\n")
        return None

    nodes = int(told["nodes"])
    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=nodes,
        min_evaluate_nodes=0,
        min_available_nodes=nodes,
    )
    strategy.start(
        grid,
        initial,
        num_rounds=int(told["rounds"]),
        timeout=float(told["timeout-s"]),
        evaluate_fn=note,
    )
    note(-1, None)
"""

CLIENT_APP = f"""\
import os
import time

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def note(what):
    with open(os.environ["{_TIMES}"], "a") as file:
        file.write(f"{{what}} {{time.time()}}\\n")


@app.train()
def train(message: Message, context: Context) -> Message:
    note({_ASKED})
    arrays = message.content["arrays"]
    metrics = MetricRecord({{"num-examples": 1}})
    reply = Message(RecordDict({{"arrays": arrays, "metrics": metrics}}), reply_to=message)
    note({_ANSWERED})
    return reply
"""


@dataclass(frozen=True)
class Carried:
    """What stock Flower took.

    Attributes:
        payload_bytes: of the model, each way and client.
        round_s: median over rounds, without the first where there are others.
        down_s, up_s: medians of a message's way, from the round's beginning to the first client's
            being asked, and from the last client's answer to the round's end.
        rounds: how many were finished.
        server_bytes, client_bytes: the most memory that the processes of the server, and of the
            client that had most, held together; pages that they share count for each.
        note: what kept it from finishing; empty where nothing did.
    """

    payload_bytes: int
    round_s: float = float("nan")
    down_s: float = float("nan")
    up_s: float = float("nan")
    rounds: int = 0
    server_bytes: int = 0
    client_bytes: int = 0
    note: str = ""


def needed_bytes(payload_bytes: int, clients: int) -> int:
    """Memory that it takes, about."""
    payloads = CLIENT_PAYLOADS * clients + SERVER_PAYLOADS
    return round(payloads * payload_bytes) + _FIXED_BYTES * (clients + 1)


def carry(
    folder: Path,
    payload_bytes: int,
    clients: int,
    rounds: int,
    *,
    programs: Path,
    timeout_s: float,
) -> Carried:
    """Run it, within the time given and the memory that there is.

    Args:
        folder: for its app, homes and logs; must not exist.
        payload_bytes: of the model, fp32.
        programs: where Flower's are, with a Python beside them.
        timeout_s: for all of it.
    """
    needed, there = needed_bytes(payload_bytes, clients), available_bytes()
    if needed > there:
        return Carried(
            payload_bytes,
            note=f"not run: it takes some {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB "
            "are there; see --mb",
        )
    folder.mkdir(parents=True)
    _write_app(folder / "app")
    times, asked = folder / "times.txt", folder / "asked.txt"
    with contextlib.ExitStack() as ends:
        flower = ends.enter_context(Flower(folder, programs))
        control = flower.superlink({_TIMES: str(times)})
        nodes = [
            flower.node(f"node-{number}", environment={_TIMES: str(asked)})
            for number in range(clients)
        ]
        pids = {f"client-{number}": node.pid for number, node in enumerate(nodes)}
        watch = ends.enter_context(PeakWatch({"server": control.pid, **pids}))
        deadline = time.monotonic() + timeout_s
        config = f"rounds={rounds} nodes={clients} payload-bytes={payload_bytes} "
        note = flower.submit(folder / "app", f"{config}timeout-s={timeout_s:.0f}")
        while not note and -1 not in (number for number, _ in _times(times)):
            time.sleep(0.2)
            lost = [one for one in (control, *nodes) if one.poll() is not None]
            if lost:
                note = f"a process of it ended with exit code {lost[0].returncode}"
            elif time.monotonic() > deadline:
                note = f"not finished in {timeout_s:g} s"
            elif watch.lowest_available < _LEAST_BYTES:
                note = "stopped, as the machine's memory ran out"
    if note and (lines := flower.log("superlink").strip().splitlines()):
        note += f": {json.dumps(' / '.join(lines[-3:])[-500:])}"
    ways = _ways(dict(_times(times)), _times(asked))
    return Carried(
        payload_bytes,
        *(_median([one[which] for one in ways]) for which in range(3)),
        len(ways),
        watch.peaks["server"],
        max(watch.peaks[name] for name in pids),
        note,
    )


def _ways(
    over: dict[int, float], clients: list[tuple[int, float]]
) -> list[tuple[float, float, float]]:
    """Of each round: seconds of it all, of the way down, of the way up."""
    found = []
    for number in sorted(number for number in over if number > 0):
        begin, end = over[number - 1], over[number]
        asked = [at for what, at in clients if what == _ASKED and begin <= at <= end]
        answered = [at for what, at in clients if what == _ANSWERED and begin <= at <= end]
        ways = (min(asked) - begin, end - max(answered)) if asked and answered else (math.nan,) * 2
        found.append((end - begin, *ways))
    return found


def _median(values: list[float]) -> float:
    """Without the first round, where there are others: it waits for the clients' beginning."""
    return statistics.median(values[1:] or values) if values else math.nan


def _write_app(folder: Path) -> None:
    package = folder / "same_bytes"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "server_app.py").write_text(SERVER_APP, encoding="utf-8")
    (package / "client_app.py").write_text(CLIENT_APP, encoding="utf-8")


def _times(path: Path) -> list[tuple[int, float]]:
    """When each round was over, with its number; 0 is the start, -1 the end of it all."""
    found: list[tuple[int, float]] = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii").splitlines():
            with contextlib.suppress(ValueError):
                number, at = line.split()
                found.append((int(number), float(at)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, required=True, help="folder of Flower's programs")
    parser.add_argument("--parameters", type=float, default=125, help="of the model, in millions")
    parser.add_argument("--mb", type=float, help="so many MB instead")
    parser.add_argument("--silos", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=1800)
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    payload = 4 * round((options.mb or 4 * options.parameters) * 1e6 / 4)
    with tempfile.TemporaryDirectory(prefix="photon-flower-") as scratch:
        one = carry(
            Path(scratch) / "flower",
            payload,
            options.silos,
            options.rounds,
            programs=options.programs.resolve(),
            timeout_s=options.timeout_s,
        )
    figures = (payload / 1e6, one.round_s, one.down_s, one.up_s, 1e6 * one.round_s / payload)
    cells = [f"{figure:,.4g}" for figure in figures]
    cells += [f"{peak / 1e6:,.0f}" for peak in (one.server_bytes, one.client_bytes)]
    head = ("MB of model", "s a round", "down", "up", "s a round and MB")
    head += ("server's processes, peak MB", "one client's processes, peak MB", "rounds", "")
    text = (
        f"# Stock Flower 1.41, {options.silos} nodes, {machine()}\n\n"
        f"{table(head, [(*cells, str(one.rounds), one.note)])}\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
