"""What residuals cost: time of a tree's rounds with them against without, and the bytes they add.

    python benchmarks/residuals.py --corpus DIR --work DIR [--turns 3] [--out results/FILE.md]

The tree of languages of worldlm.py, with attention both ways; every other run lets residuals out
and in everywhere. Runs take turns, and start from nothing: --work holds the text alone. Seconds are
of the wall clock and of this process, a whole run's over its rounds. Bytes are predicted from the
shapes of key layers, a residual being a parcel of one layer in fp32: those that left with a group's
update are in `bytes_up` of the run, those that a group took in `bytes_down`, with its next task.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path

import torch

from codec_quality import small_llama
from photon.aggregation.edit import module_of
from photon.config import RunConfig
from photon.data import open_data
from photon.federation.layout import empty_model, layout_of
from photon.federation.tasks import WEIGHTS, parcel_header
from photon.link import Entry, entries_bytes
from photon.runs import simulate
from photon.telemetry import read_history
from photon.telemetry.events import ResidualRouted
from trainer import machine, table
from worldlm import RESIDUALS, Case, config_of, data_of

TREE = "languages"
METHODS = ("attention", RESIDUALS)


def layer_bytes(config: RunConfig, data: Path) -> dict[str, int]:
    """Of a residual on the wire, by key layer: fp32, manifest and all."""
    opened = open_data(data)
    model = empty_model(config, vocab_size=opened.vocab_size, eos_id=opened.eos_id)
    layers: dict[str, list[Entry]] = {}
    for name in layout_of(model).named("key"):
        shape, full = model.get_parameter(name).shape, WEIGHTS + name
        values = {"values": torch.empty(shape, device="meta")}
        layers.setdefault(module_of(full), []).append(Entry(full, shape, "fp32", values))
    shapes = {one.name: one.shape for entries in layers.values() for one in entries}
    header = parcel_header("update", config.run.name, 1, shapes, silo="wiki-es")
    return {
        layer: entries_bytes(header, entries, config.link.chunk_bytes)
        for layer, entries in layers.items()
    }


def measured(options: argparse.Namespace, method: str, turn: int, data: Path, model: Path) -> dict:
    config = config_of(options, Case(TREE, "natural", method, options.seed), data, model)
    folder = options.work / f"run-{method.replace(' ', '-')}-{turn}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter(), time.process_time()
    summary = simulate(config, run_dir=folder).summary
    spent = time.perf_counter() - began[0], time.process_time() - began[1]
    routed = read_history(folder).of(ResidualRouted)
    shutil.rmtree(folder)
    wall_s, cpu_s = (one / options.rounds for one in spent)
    told = {name: summary[name] for name in ("bytes_up", "bytes_down")}
    return {"wall_s": wall_s, "cpu_s": cpu_s, "routed": routed, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="prepared text is kept here")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    for name, default in (("batch-size", 4), ("sequence-length", 128), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("vocabulary", 1024), ("leaf-bytes", 600_000), ("eval-tokens", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--out", type=Path, help="write the report here too")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data, model = data_of(options, TREE, "natural"), options.work / f"model-{options.width}"
    if not model.exists():
        small_llama(model, options.width, options.layers, options.vocabulary)
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for turn in range(options.turns):
        for method in METHODS:
            found[method].append(measured(options, method, turn, data, model))
            seconds = {name: found[method][-1][name] for name in ("wall_s", "cpu_s")}
            print(f"{method}, turn {turn + 1}: {seconds} a round", flush=True)
    config = config_of(options, Case(TREE, "natural", RESIDUALS, options.seed), data, model)
    text = report(options, found, layer_bytes(config, data))
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def report(options: argparse.Namespace, found: dict[str, list[dict]], sizes: dict[str, int]) -> str:
    without, with_them = (found[method] for method in METHODS)
    plain, routed = without[0], with_them[0]["routed"]
    rows = []
    for method, turns in found.items():
        spread = []
        for name in ("wall_s", "cpu_s"):
            mine, its = ([one[name] for one in some] for some in (turns, without))
            ratios = [a / b for a, b in zip(mine, its, strict=True)]
            spread += [
                f"{statistics.median(some):.3f} ({min(some):.3f} to {max(some):.3f})"
                for some in (mine, ratios)
            ]
        rows.append([method, str(len(turns)), *spread])
    counted = {name: with_them[0][name] - plain[name] for name in plain if name[:5] == "bytes"}
    # What was taken in the last round goes nowhere any more.
    down = [one for one in routed if one.outcome == "taken" and one.round < options.rounds]
    up = [one for one in routed if one.outcome == "up"]
    predicted = {
        "bytes_up": sum(sizes[one.module] for one in up),
        "bytes_down": sum(sizes[one.module] for one in down if not one.silo),
    }
    both = [
        [name, f"{predicted[name]:,}", f"{counted[name]:,}", f"{counted[name] / plain[name]:.2%}"]
        for name in predicted
    ]
    outcomes = Counter(one.outcome for one in routed)
    left = len({(one.round, one.origin, one.module) for one in routed})
    most = options.rounds * 8 * len(sizes)
    return "\n".join(
        [
            machine(),
            f"{options.rounds} rounds of {options.steps} steps of {options.batch_size} x "
            f"{options.sequence_length} tokens, eight silos in four groups with two inner rounds, "
            f"Llama of {options.layers} layers of {options.width}, {len(sizes)} key layers, one "
            f"thread. {left} layers of a member left, of {most} that could have: "
            + ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())),
            "",
            table(["", "turns", "wall, s", "times without", "CPU, s", "times without"], rows),
            "",
            table(["at the root", "predicted", "counted", "of those without"], both),
            "",
            "A residual's bytes by layer: "
            + ", ".join(f"{layer} {size:,}" for layer, size in sizes.items()),
        ]
    )


if __name__ == "__main__":
    main()
