"""`photon profile`: where the time and memory of a run's local steps go on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from photon.dashboard.wording import count, size


def profile(
    run_file: Annotated[Path, typer.Argument(help="The run file, TOML.", metavar="RUN.toml")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Override a key, e.g. compute.compile=on."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Local steps to measure.", min=1)] = 20,
    silo: Annotated[
        str | None, typer.Option(help="Whose text to train on; the first silo's by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Take some local steps as the run would and tell where time and memory go.

    Nothing is kept. Compare settings before a long run.

    Example: `photon profile run.toml --set compute.activation_checkpointing=full --steps 50`
    """
    # torch's profiler reports its own start and stop on stderr; read when torch is loaded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from photon.config import load_run_config
    from photon.runs.profile import profile as measure

    config = load_run_config(run_file, overrides or [])
    with Console(stderr=True).status(f"Training {steps} steps ..."):
        found = measure(config, silo=silo, steps=steps)
    if not found:  # a rank other than 0 under torchrun: rank 0 tells
        return
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    _show(found, Console())


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None)
    ranks = f"{found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
    table.add_row("strategy", f"{found['strategy']} on {ranks}: {found['reason']}")
    table.add_row("arithmetic", f"{found['device']}, {found['precision']}")
    table.add_row("parameters", count(found["parameters"]))
    table.add_row("micro-batch", f"{found['micro_batch_size']} sequences on each rank")
    table.add_row("speed", f"{count(found['tokens_per_s'])} tokens/s")
    table.add_row("a step", f"{found['step_s'] * 1e3:,.1f} ms")
    for name, seconds in found["phases_s"].items():
        share = seconds / found["step_s"]
        table.add_row(f"  {name}", f"{seconds * 1e3:,.1f} ms, {share:.0%}")
    if found["ranks"] > 1 and found["communication_s"] is not None:
        seconds = found["communication_s"]
        words = f"{seconds * 1e3:,.1f} ms of collectives, hidden behind arithmetic or not"
        table.add_row("  communication", words)
    table.add_row("FLOPs per token", f"{found['flops_per_token']:.4g}")
    mfu = "unknown: no peak is stated for this device" if found["mfu"] is None else ""
    table.add_row("MFU", mfu or f"{found['mfu']:.1%} of the stated peak")
    held, estimated = found["peak_memory_bytes"], found["estimated_memory_bytes"]
    table.add_row("memory", f"{size(held)} at most; {size(estimated)} were estimated")
    console.print(table)
    console.print(found["flops_explained"], highlight=False, soft_wrap=True)
    for text in found["notices"]:
        console.print(f"Notice: {text}", highlight=False, markup=False, soft_wrap=True)
