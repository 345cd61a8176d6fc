"""What accounting for energy costs a run: the same tasks with it and without, in turns.

    python benchmarks/energy.py [--pairs 60] [--steps 8] [--out FILE.md]

One node of the tiny model trains and scores; each pair does the same task once with the account,
once without, and which comes first changes from pair to pair. What is compared is CPU time and
time on the clock of whole tasks, codec included: the median over pairs of their ratio. A busy
machine moves that by more than the account costs, so the account's own work is measured too: how
often a task reads the meter, which is the same each time, and the CPU time of a reading. Where this
machine has no counter, `--counters` reads files like RAPL's, as it would be with one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from deployment.federation import prepare_text
from photon.config import parse_run_config
from photon.data import open_data
from photon.energy.account import Power, Spent
from photon.energy.counters import Packages
from photon.energy.meter import METER, Meter
from photon.federation import EvalTask, FitTask, Node, NodeSettings, Version
from photon.federation.layout import initial_model, layout_of
from photon.federation.tasks import WEIGHTS


@contextmanager
def _no_phase(meter: Meter, name: str) -> Iterator[None]:
    yield


def _files(folder: Path) -> Path:
    """Counters of two packages, as the kernel shows them."""
    for number in range(2):
        zone = folder / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"package-{number}\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        (zone / "energy_uj").write_text("123456789\n")
    return folder


def ratios(folder: Path, pairs: int, steps: int) -> tuple[list[tuple[float, float]], int, float]:
    """CPU time and time on the clock with the account, over those without, of each pair.

    And how often a task reads the meter, and the median of a task's CPU seconds without.
    """
    data, (silo, *_) = prepare_text(folder, 2, vocabulary=512, text=None)
    config = parse_run_config(
        {
            "model": {"preset": "tiny"},
            "data": {"path": str(data), "sequence_length": 64},
            "local": {"steps": steps, "batch_size": 4, "warmup_steps": 1},
            "link": {"update_codec": "int8"},
            "compute": {"threads": 1},
            "eval": {"max_tokens": 1000},
        }
    )
    model = initial_model(config, open_data(data))
    names = layout_of(model).merged
    start = {WEIGHTS + one: model.get_parameter(one).detach().clone() for one in names}
    (folder / "nodes").mkdir()
    node, version = Node(NodeSettings(config, folder / "nodes"), lambda _: None), Version(0, start)

    def turn(number: int) -> tuple[float, float]:
        cpu_s, clock_s = time.process_time(), time.perf_counter()
        update = node.fit(FitTask("bench", number, silo, 0, steps, None), version)
        assert update.receipt.failure is None
        node.evaluate(EvalTask(number, silo), version)
        return time.process_time() - cpu_s, time.perf_counter() - clock_s

    nothing = Spent(how="estimated")
    found, without_s = [], []
    turn(1)
    with patch.object(Meter, "_charge", autospec=True, side_effect=Meter._charge) as charged:
        turn(1)
    for pair in range(pairs):
        took = {}
        for on in (True, False) if pair % 2 else (False, True):
            if on:
                took[on] = turn(2 * pair + 2)
                continue
            off = patch.object(Power, "taken", lambda *_, **__: nothing)
            with patch.object(Meter, "phase", _no_phase), off:
                took[on] = turn(2 * pair + 3)
        both = zip(took[True], took[False], strict=True)
        found.append(tuple(with_it / without for with_it, without in both))
        without_s.append(took[False][0])
    node.close()
    return found, charged.call_count, statistics.median(without_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--counters", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.counters:
            (folder / "powercap").mkdir()
            METER._make = partial(Packages, _files(folder / "powercap"))
        found, readings, task_s = ratios(folder, options.pairs, options.steps)
    lines = ["| with the account over without | median | quartiles | |", "|---|---|---|---|"]
    columns = zip(*found, strict=True)
    for name, column in zip(("CPU time", "time on the clock"), columns, strict=True):
        low, middle, high = statistics.quantiles(column, n=4)
        lines.append(f"| {name} | {middle:.4f} | {low:.4f} | {high:.4f} |")
    began_s, many = time.process_time(), 5000
    for _ in range(many):
        with METER.phase("training"):  # two readings
            pass
    reading_s = (time.process_time() - began_s) / many / 2
    share = readings * reading_s / task_s
    lines += ["", f"A task of {task_s:.3g} CPU seconds reads the meter {readings} times, for"]
    lines += [f"{reading_s * 1e6:.1f} us of CPU time each: {share:.4%} of it."]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
