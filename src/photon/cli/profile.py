"""`photon profile`: where the time and memory of a run's local steps go on this machine."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from photon.cli.options import AsJson, RunFile, set_option
from photon.cli.screen import console, say, show, show_facts, show_json
from photon.dashboard.wording import count, size


def profile(
    run_file: RunFile,
    overrides: Annotated[list[str] | None, set_option("compute.compile=on")] = None,
    steps: Annotated[int, typer.Option(help="Local steps to measure.", min=1)] = 20,
    silo: Annotated[
        str | None, typer.Option(help="Whose text to train on; the first silo's by default.")
    ] = None,
    as_json: AsJson = False,
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
    with console().status(f"Training {steps} steps ..."):
        found = measure(config, silo=silo, steps=steps)
    if not found:  # a rank other than 0 under torchrun: rank 0 tells
        return
    if as_json:
        show_json(found)
        return
    _show(found)


def _show(found: dict[str, Any]) -> None:
    ranks = f"{found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
    facts = [
        ("strategy", f"{found['strategy']} on {ranks}: {found['reason']}"),
        ("arithmetic", f"{found['device']}, {found['precision']}"),
        ("parameters", count(found["parameters"])),
        ("micro-batch", f"{found['micro_batch_size']} sequences on each rank"),
        ("speed", f"{count(found['tokens_per_s'])} tokens/s"),
        ("a step", _ms(found["step_s"])),
    ]
    for name, seconds in found["phases_s"].items():
        facts.append((f"  {name}", f"{_ms(seconds)}, {seconds / found['step_s']:.0%}"))
    if found["ranks"] > 1 and (seconds := found["communication_s"]) is not None:
        words = f"{_ms(seconds)} of collectives, hidden behind arithmetic or not"
        facts.append(("  communication", words))
    mfu = "unknown: no peak is stated for this device" if found["mfu"] is None else ""
    held, estimated = found["peak_memory_bytes"], found["estimated_memory_bytes"]
    facts += [
        ("FLOPs per token", f"{found['flops_per_token']:.4g}"),
        ("MFU", mfu or f"{found['mfu']:.1%} of the stated peak"),
        ("memory", f"{size(held)} at most; {size(estimated)} were estimated"),
    ]
    show_facts(facts)
    show(found["flops_explained"])
    for text in found["notices"]:
        say(f"Notice: {text}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
