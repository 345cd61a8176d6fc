"""Data parallelism over a slow link, federated rounds over the same, and the wall-time model.

    python benchmarks/walltime.py [--mbit 10,50,200] [--tau 32] [--text DIR] [--out FILE.md]
    python benchmarks/walltime.py --quick

Needs root and Debian's iproute2. Two machines are network namespaces whose link has tc's tbf at
either end. Data parallelism: `photon train` on both, a rank each, gradients all-reduced by gloo
after every step. Federated: `photon serve` in one namespace and two `photon join` in two others,
each with a link of that rate. Both train the same model on as many tokens a step. Modelled: by the
paper's wall-time model (arXiv 2411.02908, section 5; docs/planning.md), with the seconds of compute
that each way itself took, so what it says is what the exchanges take.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deployment.federation import Federation, Plan, prepare_text
from deployment.links import inside, ip
from photon.config import load_run_config
from photon.data import open_data
from photon.deploy.ports import free_ports
from photon.federation.layout import empty_model
from photon.runs.plan import exchange_s
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished, RoundFinished
from trainer import machine, table

HUB = "10.97.0.1"
SILOS = ("silo-0", "silo-1")


@contextlib.contextmanager
def star(mbit: float) -> Iterator[dict[str, str]]:
    """Namespaces of the aggregator ("server") and of two silos, each with a link to it."""
    spaces = {name: f"photon-{os.getpid()}-{name}" for name in ("server", *SILOS)}
    with contextlib.ExitStack() as stack:
        for space in spaces.values():
            ip("netns", "add", space)
            stack.callback(ip, "netns", "del", space)
            ip("-n", space, "link", "set", "lo", "up")
        server = spaces["server"]
        ip("-n", server, "address", "add", f"{HUB}/32", "dev", "lo")
        for number, silo in enumerate(SILOS, start=1):
            own, ends = f"10.97.{number}.2", ((server, f"to{number}"), (spaces[silo], "wire"))
            peer = ("peer", "name", "wire", "netns", spaces[silo])
            ip("link", "add", f"to{number}", "netns", server, "type", "veth", *peer)
            for (space, device), here, there in zip(ends, (HUB, own), (own, HUB), strict=True):
                ip("-n", space, "address", "add", f"{here}/32", "dev", device)
                ip("-n", space, "link", "set", device, "up")
                ip("-n", space, "route", "add", f"{there}/32", "dev", device, "src", here)
                rate = ["rate", f"{mbit:g}mbit", "burst", "64kb", "latency", "200ms"]
                words = ["tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", *rate]
                subprocess.run(words, check=True)
        yield spaces


def data_parallel(run_file: Path, folder: Path, spaces: dict[str, str], steps: int) -> float:
    """Seconds of a step of two ranks, one with the aggregator, one with the first silo."""
    (port,) = free_ports(1)
    changes = {
        "federation.rounds": 3,
        "local.steps": steps,
        "compute.strategy": "ddp",  # on as many tokens a step as all silos together
    }
    words = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "photon.cli.main", "train", str(run_file), *words]
    command += ["--run-dir", str(folder), "--quiet"]
    ranks = []
    for rank, (host, device) in enumerate((("server", "to1"), (SILOS[0], "wire"))):
        seat = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": HUB,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": device,
            "OMP_NUM_THREADS": "1",
        }
        started = subprocess.Popen(
            inside(spaces[host], *command),
            env={**os.environ, **seat},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ranks.append(started)
    try:
        for process in ranks:
            _, said = process.communicate(timeout=3600)
            if process.returncode:
                raise SystemExit(said[-2000:])
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    told = read_history(folder).of(LocalFinished)[1:]
    return statistics.median(one.train_s / steps for one in told)


def federated(
    data: Path, folder: Path, spaces: dict[str, str], plan: Plan
) -> tuple[float, float, float]:
    """Of a round: its seconds, those of its training, and bytes up and down of a silo."""
    with Federation(folder, data, list(SILOS), plan, address=HUB, spaces=spaces) as federation:
        federation.begin()
        federation.wait("the run is over", lambda: federation.over, within_s=3600)
        history = read_history(federation.run)
    rounds = history.of(RoundFinished)[1:-1]  # trainers start in the first, and score in the last
    told = [one for one in history.of(LocalFinished) if 1 < one.round < plan.rounds]
    return (
        statistics.median(one.round_s for one in rounds),
        statistics.median(one.train_s for one in told),
        statistics.median(one.bytes_up + one.bytes_down for one in told),
    )


def measure(options: argparse.Namespace, data: Path, scratch: Path) -> list[list[str]]:
    rows = []
    plan = Plan(
        "tiny",
        options.rounds,
        options.tau,
        sequence_length=128,
        batch_size=options.batch_size,
        optimizer="adamw",
    )
    vocab_size = open_data(data).vocab_size
    alone_s = None
    for mbit in (None, *options.mbit):  # first without a limit to speak of: a step's compute
        name = f"{mbit:g}" if mbit else "free"
        with star(mbit or 10_000) as spaces:
            run_file = Federation(scratch / f"ddp-{name}", data, SILOS, plan, address=HUB).run_file
            step_s = data_parallel(run_file, scratch / f"train-{name}", spaces, options.ddp_steps)
            if mbit is None:
                alone_s = step_s
                model = empty_model(load_run_config(run_file), vocab_size=vocab_size, eos_id=0)
                options.parameters = sum(one.numel() for one in model.parameters())
                continue
            round_s, train_s, sent = federated(data, scratch / name, spaces, plan)
        assert alone_s is not None
        bytes_per_s = mbit * 1e6 / 8
        size = options.parameters * 4
        modelled_step_s = alone_s + exchange_s("rar", 2, size, bytes_per_s)
        modelled_round_s = train_s + sent / bytes_per_s
        print(name, alone_s, step_s, round_s, train_s, sent, file=sys.stderr)
        rows.append(
            [
                f"{mbit:g}",
                f"{step_s:.3f}",
                f"{modelled_step_s:.3f}",
                f"{round_s:.2f}",
                f"{modelled_round_s:.2f}",
                f"{step_s * options.tau / round_s:.1f}x",
                f"{modelled_step_s * options.tau / modelled_round_s:.1f}x",
            ]
        )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="file or folder; made up by default")
    parser.add_argument("--mbit", default="10,50,200", help="of each link")
    parser.add_argument("--tau", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--ddp-steps", type=int, default=6, help="of each of three rounds")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see it run")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if options.quick:
        options.mbit, options.tau, options.rounds, options.ddp_steps = "50", 2, 3, 2
    options.mbit = [float(one) for one in options.mbit.split(",")]
    return options


def main() -> None:
    options = arguments()
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SystemExit("Needs root on Linux: it makes network namespaces.")
    with tempfile.TemporaryDirectory(prefix="photon-walltime-") as folder:
        scratch = Path(folder)
        data, _ = prepare_text(scratch / "text", 2, vocabulary=1024, text=options.text)
        rows = measure(options, data, scratch)
    head = ["Mbit/s", "DDP step, s", "modelled", "federated round, s", "modelled"]
    head += [f"DDP over federated, {options.tau} steps", "modelled"]
    text = (
        f"# Data parallelism and federated rounds over the same links, {machine()}\n\n"
        f"Two ranks, two silos; Llama of {options.parameters / 1e6:.2f} M parameters in fp32, "
        f"{options.batch_size} sequences of 128 tokens a rank or silo and step, AdamW; tau "
        f"{options.tau}, updates and states in fp32. Medians. Two silos and the aggregator share "
        "this machine's cores, as two ranks do.\n\n"
        f"{table(head, rows)}\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
