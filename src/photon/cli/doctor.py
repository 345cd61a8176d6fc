"""`photon doctor`: what this machine is, what can be trained on it, and what is amiss, in words."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from photon.cli.options import AsJson
from photon.cli.screen import console, show, show_json, show_table
from photon.dashboard.wording import count, size
from photon.errors import some

if TYPE_CHECKING:
    from photon.training.hardware import Device, Machine

#: Share of peak that a well-tuned dense transformer reaches; estimates say that they assume it.
ASSUMED_MFU = 0.4

_LITTLE_DISK_BYTES = 20_000_000_000
_GAIN_OF_BF16 = 1.2
#: (sequence length, vocabulary) unless the user says: the usual ones, and for `tiny` those that run
#: files and `photon data prepare` have by default.
_USUAL, _TINY = (2048, 50_368), (128, 4096)
_OPTIMIZERS = ("adamw", "muon", "adopt", "amsgrad", "sgd")


def doctor(
    run_file: Annotated[
        Path | None,
        typer.Argument(help="A run file: which role each of its model's tensors has."),
    ] = None,
    as_json: AsJson = False,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a training sequence; 2048, for tiny 128.", min=2),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Tokens of the tokenizer; 50368, for tiny 4096.", min=2),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help=f"Inner optimizer: {', '.join(_OPTIMIZERS)}.")
    ] = "adamw",
) -> None:
    """Look at this machine: what it is, which models it can train, what is missing.

    Takes some seconds and changes nothing. Memory is estimated for this optimizer, vocabulary and
    sequence length; speed is stated as a share of peak, not measured. With a run file: its model's
    tensors by their role ([parts]), and what of them travels.

    Example: `photon doctor run.toml`, or `photon doctor --sequence-length 1024 --json`
    """
    if run_file is not None:
        roles = roles_of(run_file)
        show_json(roles) if as_json else _show_roles(roles)
        return
    if optimizer not in _OPTIMIZERS:
        raise typer.BadParameter(
            f"{optimizer!r} is not one of {', '.join(_OPTIMIZERS)}", param_hint="--optimizer"
        )
    with console().status("Looking at this machine ..."):
        findings = examine(sequence_length, vocab_size, optimizer)
    if as_json:
        show_json(findings)
        return
    _show(findings)


def examine(sequence_length: int | None, vocab_size: int | None, optimizer: str) -> dict[str, Any]:
    """All findings as JSON's types; bytes, seconds and FLOP/s are in the names."""
    import torch

    from photon.energy.counters import counters_here
    from photon.training.device import nvml_name
    from photon.training.hardware import inspect_machine

    machine = inspect_machine()
    nvidia = map(nvml_name, range(torch.cuda.device_count()))
    precision = _precision(machine.devices[0])
    devices = [_device(device, precision) for device in machine.devices]
    return {
        "machine": {key: value for key, value in asdict(machine).items() if key != "devices"},
        "devices": devices,
        "precision": precision,
        "compile": _compile(machine),
        "strategies": _strategies(machine),
        "energy": counters_here(nvidia),
        "assumptions": {
            "optimizer": optimizer,
            "sequence_length": sequence_length or _USUAL[0],
            "vocab_size": vocab_size or _USUAL[1],
            "share_of_peak": ASSUMED_MFU,
        },
        "presets": _presets(devices, sequence_length, vocab_size, optimizer),
        "missing": _missing(machine),
        "warnings": _warnings(machine, torch.get_num_threads()),
    }


def roles_of(run_file: Path) -> list[dict[str, Any]]:
    """Each role's tensors and what of them travels; bytes are fp32's, before any codec.

    Raises:
        PhotonError: the run file, its data or its model can't be read, or don't suit each other.
    """
    from photon.config import load_run_config
    from photon.config.parts import ROLES
    from photon.data import open_data
    from photon.federation.layout import empty_model, layout_of
    from photon.models import carried_tensors

    config = load_run_config(run_file)
    data = open_data(config.data.path, own_vocabularies=True)
    model = empty_model(config, vocab_size=data.vocab_size, eos_id=data.eos_id)
    layout, carried = layout_of(model), carried_tensors(model)
    rows = []
    for role in ROLES:
        values = sum(carried[name].numel() for name in layout.named(role))
        rounds, once = (8, 0) if role in ("shared", "key") else (0, 4)
        figures = {"bytes_a_round": rounds * values, "bytes_once": once * values}
        names = list(layout.named(role))
        rows.append({"role": role, "tensors": names, "parameters": values} | figures)
    return rows


def _show_roles(roles: list[dict[str, Any]]) -> None:
    rows = []
    for role, names, values, *figures in (row.values() for row in roles):
        rows.append((role, f"{len(names)}", count(values), *map(size, figures), some(names, 2)))
    headings = ("role", "tensors", "parameters", "bytes a round", "bytes once", "names")
    show_table(headings, rows, right=(1, 2, 3, 4))
    show("Bytes are one participant's, down and up, in fp32; codecs make them fewer.")


def _precision(device: Device) -> dict[str, Any]:
    """Products measured in fp32 and bf16, and what compute.precision = "auto" takes."""
    import torch

    from photon.training.hardware import measure_peak

    kind = device.type
    measured = {
        name: measure_peak(kind, dtype, seconds=0.15)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    ratio = measured["bf16"] / measured["fp32"]
    return {
        "auto_takes": "bf16" if kind == "cuda" and device.has_bf16 else "fp32",
        "measured_fp32_flops": measured["fp32"],
        "measured_bf16_flops": measured["bf16"],
        "bf16_pays": ratio >= _GAIN_OF_BF16,
        "bf16_over_fp32": ratio,
    }


def _device(device: Device, precision: dict[str, Any]) -> dict[str, Any]:
    from photon.training.hardware import stated_peak

    stated = stated_peak(device.name) if device.type == "cuda" else None
    used = precision["auto_takes"]
    flops = stated.flops(used) if stated else None
    origin = "stated" if flops else "measured"
    return asdict(device) | {
        "peak_flops": flops or precision[f"measured_{used}_flops"],
        "peak_precision": used,
        "peak_origin": origin,
    }


def _compile(machine: Machine) -> dict[str, Any]:
    if machine.devices[0].type == "cuda":
        found = machine.packages["triton"]
        why = "on CUDA, with triton" if found else "triton is not installed"
    elif found := bool(machine.compiler):
        why = f'with {machine.compiler}; only compute.compile = "on" asks for it here'
    else:
        why = "no C++ compiler (g++ or clang++, or name one in CXX)"
    return {"available": found, "why": why}


def _strategies(machine: Machine) -> dict[str, Any]:
    here = machine.devices
    devices = len(here)
    if devices > 1:
        possible = ["ddp", "fsdp"]
        reason = f"{devices} devices ({machine.interconnect}): a rank on each"
    elif machine.backends and here[0].type == "cpu":
        possible = ["single", "ddp", "fsdp"]
        reason = "ranks on one CPU share its cores and memory, which gains nothing"
    else:
        possible = ["single"]
        reason = "there is one device"
    return {
        "devices": devices,
        "possible": possible,
        # Between machines the same ranks can be a hybrid, which one machine can't tell.
        "possible_with_more_machines": ["hybrid"] if devices > 1 else ["ddp", "fsdp"],
        "reason": reason,
    }


def _presets(
    devices: list[dict[str, Any]],
    asked_length: int | None,
    asked_vocabulary: int | None,
    optimizer: str,
) -> list[dict[str, Any]]:
    """How each preset trains here: strategy, micro-batch, recomputation, memory, tokens/s."""
    from photon.models import SHAPES
    from photon.training.flops import count_flops
    from photon.training.memory import (
        MemorySettings,
        largest_fitting,
        preset_skeleton,
        standing_bytes,
    )
    from photon.training.ranks import Seat
    from photon.training.strategy import choose_strategy

    room = min(device["memory_free_bytes"] for device in devices)
    first, ranks = devices[0], len(devices)
    seat = Seat(world_size=ranks, local_world_size=ranks)
    rows = []
    for preset in SHAPES:
        usual = _TINY if preset == "tiny" else _USUAL
        sequence_length, vocab_size = asked_length or usual[0], asked_vocabulary or usual[1]
        model = preset_skeleton(preset, sequence_length, vocab_size)
        settings = MemorySettings(
            optimizer=optimizer,
            sequence_length=sequence_length,
            bf16=first["peak_precision"] == "bf16",
            device_type=first["type"],
            accumulates=True,
        )
        standing = standing_bytes(model, settings)
        # What "auto" takes with a rank on each device.
        chosen = choose_strategy("auto", seat, state_bytes=standing, device_bytes=room)
        shards = ranks if chosen.shards else 1
        settings = replace(settings, strategy=chosen.name, shards=shards)
        found = largest_fitting(model, settings, room)
        flops = count_flops(model, sequence_length).per_token
        row: dict[str, Any] = {
            "preset": preset,
            "sequence_length": sequence_length,
            "vocab_size": vocab_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_per_token": flops,
            "state_bytes": standing,
            "fits": found is not None,
            "strategy": settings.strategy,
        }
        if found is not None:
            row |= {
                "micro_batch_size": found.settings.micro_batch_size,
                "activation_checkpointing": found.settings.activation_checkpointing,
                "memory_bytes": found.total_bytes,
                "estimated_tokens_per_s": ASSUMED_MFU * first["peak_flops"] * ranks / flops,
            }
        rows.append(row)
    return rows


def _missing(machine: Machine) -> list[str]:
    """Optional things that are not here, and what they would be for."""
    has, kind = machine.packages, machine.devices[0].type
    found = []
    if kind == "cuda" and not has["triton"]:
        found.append("triton, for torch.compile on CUDA; it comes with PyTorch's CUDA builds")
    if kind == "cuda" and not has["flash_attn"]:
        found.append(
            'flash-attn, only for compute.attention = "flash_attention_2"; PyTorch\'s own '
            "FlashAttention needs nothing"
        )
    if machine.compiler is None and kind != "cuda":
        found.append("a C++ compiler, for torch.compile on a CPU: install g++ or clang++")
    return found


def _warnings(machine: Machine, threads: int) -> list[str]:
    found = []
    device = machine.devices[0]
    if machine.disk_free_bytes < _LITTLE_DISK_BYTES:
        found.append(
            f"Only {size(machine.disk_free_bytes)} of disk are free here; a checkpoint takes 4 "
            "bytes a parameter, 12 with AdamW's state, and two are kept."
        )
    if threads > machine.cores:
        found.append(
            f"PyTorch would run {threads} threads on {machine.cores} cores, which is slow; unset "
            "OMP_NUM_THREADS, or set compute.threads."
        )
    if device.type == "cuda" and not device.has_bf16:
        found.append(f"{device.name} has no bf16 arithmetic; training runs in fp32.")
    if device.type != "cuda" and shutil.which("nvidia-smi"):
        found.append(
            f"An NVIDIA driver is here, but PyTorch {machine.torch} finds no CUDA device: install "
            "a CUDA build, or look at CUDA_VISIBLE_DEVICES and the driver's version."
        )
    if len(machine.devices) > 1 and "nccl" not in machine.backends:
        found.append("There are several CUDA devices, but this PyTorch has no NCCL to join them.")
    if len({each.name for each in machine.devices}) > 1:
        found.append("Devices differ; ranks wait for the slowest in every step.")
    if machine.ram_available_bytes < machine.ram_total_bytes / 4:
        found.append(
            f"Other programs hold memory: {size(machine.ram_available_bytes)} of "
            f"{size(machine.ram_total_bytes)} are available."
        )
    return found


def _show(findings: dict[str, Any]) -> None:
    machine = findings["machine"]
    facts = {
        "versions": f"Photon {machine['photon']}, Python {machine['python']}, "
        f"PyTorch {machine['torch']}, {machine['system']}",
        "cores": str(machine["cores"]),
        "memory": f"{size(machine['ram_available_bytes'])} of "
        f"{size(machine['ram_total_bytes'])} available",
        "disk": f"{size(machine['disk_free_bytes'])} free in the current folder",
    }
    for index, device in enumerate(findings["devices"]):
        facts[f"device {index}"] = _device_words(device)
    if machine["interconnect"]:
        facts["interconnect"] = machine["interconnect"]
    facts["precision"] = _precision_words(findings["precision"])
    compiles = findings["compile"]
    facts["compile"] = f"{'yes' if compiles['available'] else 'no'}: {compiles['why']}"
    strategies = findings["strategies"]
    facts["strategies"] = f"{', '.join(strategies['possible'])}: {strategies['reason']}"
    counted, hidden = (", ".join(names) for names in findings["energy"].values())
    facts["energy"] = f"measured by {counted}" if counted else "no counter: estimated by [energy]"
    facts["energy"] += f"; only root may read {hidden}" if hidden else ""
    facts["distributed"] = ", ".join(machine["backends"]) or "none in this PyTorch"
    show_table((), facts.items(), frame=False)
    _show_presets(findings)
    asked, origin = findings["assumptions"], findings["devices"][0]["peak_origin"]
    tiny = findings["presets"][0]
    alike = all(tiny[name] == asked[name] for name in ("vocab_size", "sequence_length"))
    of_tiny = "" if alike else f" (tiny: {tiny['vocab_size']:,} and {tiny['sequence_length']:,})"
    show(
        f"Memory is estimated for {asked['optimizer']}, {asked['vocab_size']:,} tokens of "
        f"vocabulary and sequences of {asked['sequence_length']:,}{of_tiny}; "
        f"tokens/s are what {asked['share_of_peak']:.0%} of the {origin} peak would give, not a "
        "measurement."
    )
    for title in ("missing", "warnings"):
        for words in findings[title]:
            name = title.rstrip("s").capitalize()
            show(f"{name}: {words}")


def _device_words(device: dict[str, Any]) -> str:
    capability = f", capability {device['capability']}" if device["capability"] else ""
    return (
        f"{device['name']} ({device['type']}{capability}): {size(device['memory_free_bytes'])} of "
        f"{size(device['memory_total_bytes'])} free; peak {_flops(device['peak_flops'])} "
        f"{device['peak_precision']} ({device['peak_origin']})"
    )


def _precision_words(precision: dict[str, Any]) -> str:
    ratio = f"{precision['bf16_over_fp32']:.2g} times as fast as fp32's here"
    if precision["auto_takes"] == "bf16":
        return f"bf16, whose matrix products are {ratio}"
    if precision["bf16_pays"]:
        # Only these were measured; the rest of a step is emulated on most CPUs.
        return (
            f'fp32; bf16\'s matrix products are {ratio}, so compute.precision = "bf16" may train '
            "faster: `photon profile` tells"
        )
    return f"fp32; bf16's matrix products are {ratio}, so it would gain nothing"


def _show_presets(findings: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = []
    for row in findings["presets"]:
        if row["fits"]:
            how = f"{row['strategy']}, micro-batch {row['micro_batch_size']}"
            cost = (size(row["memory_bytes"]), count(row["estimated_tokens_per_s"]))
            figures = (how, row["activation_checkpointing"], *cost)
        else:
            figures = (f"no: {size(row['state_bytes'])} without activations", "", "", "")
        rows.append((row["preset"], count(row["parameters"]), *figures))
    headings = ("preset", "parameters", "trains here", "recomputation", "memory", "tokens/s")
    show_table(headings, rows, right=(1, 4, 5))


def _flops(value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:.0f} GFLOP/s"
