"""A suite at a scale: which runs are next, and what each came to, kept in one file as they end."""

from __future__ import annotations

import datetime
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.bench.case import Case
from photon.bench.results import Record, Results
from photon.bench.search import Point, as_point, best_point
from photon.bench.suite import Suite, load_suite, scale_of
from photon.data import PreparedData
from photon.data.shards import HELD_OUT
from photon.errors import ConfigError
from photon.store.disk import write_json
from photon.training.hardware import inspect_machine

#: In a folder that was prepared for a bench: which text it is, in words.
TEXT_FILE = "text.txt"
#: Final tokens of a method's runs may differ by so much: rounds are whole.
_SAME_TOKENS = 0.01


@dataclass
class Bench:
    """The runs of a suite.

    Args:
        name: of the suite, or its file. scale: of it.
        seeds: the first is searched with; a method's best point is run with each.
        data: by cut.
        work: where runs are while they go on.
        file: of results; runs that are in it, as they would be made now, are not made again.

    Raises:
        ConfigError: no such suite or scale, cuts that hold out different text, or the file is no
            file of results.
    """

    name: str
    scale: str
    seeds: int
    data: Mapping[str, PreparedData]
    work: Path
    file: Path
    suite: Suite = field(init=False)
    _records: dict[str, Record] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.suite = load_suite(self.name)
        scale_of(self.suite, self.scale)
        held_out = {
            cut: [shard.sha256 for shard in data.held_out.shards(HELD_OUT)]
            for cut, data in self.data.items()
        }
        if any(shards != next(iter(held_out.values())) for shards in held_out.values()):
            raise ConfigError(
                f"the cuts {', '.join(map(repr, held_out))} hold out different text",
                hint="Runs compare on the same: cut by options that make silos, and no others.",
            )
        if not self.file.exists():
            return
        for one in read_results(self.file)["runs"]:
            if one["method"] in self.suite.methods:
                case = self._case(one["method"], as_point(one["point"]), one["seed"])
                if case.key == one["key"]:
                    self._records[case.key] = one

    @property
    def results(self) -> Results:
        """Of the runs so far."""
        return Results(self.suite, self.scale, self.seeds, tuple(self._records.values()))

    def wave(self) -> list[Case]:
        """What can be run now; empty where all is done."""
        results, cases = self.results, []
        for method in self.suite.methods:
            points = results.next_points(method)
            cases += [self._case(method, point, 1) for point in points]
            best = best_point(results.losses(method))
            if not points and best is not None:
                cases += [self._case(method, best, seed) for seed in range(2, self.seeds + 1)]
        return [case for case in cases if case.key not in self._records]

    def take(self, case: Case) -> None:
        """Note what a finished run came to, and remove its folder.

        Raises:
            ConfigError: it trained on another number of tokens than methods before it.
        """
        record = case.record(self.work)
        first = next(iter(self._records.values()), record)
        if abs(record["tokens"] / first["tokens"] - 1) > _SAME_TOKENS:
            raise ConfigError(
                f"{case.method} trains on {record['tokens']:,} tokens, {first['method']} on "
                f"{first['tokens']:,}: a suite compares at equal tokens",
                hint="Give both the same product of rounds, steps, batch and silos.",
            )
        record["loss"] = _or_none(record["loss"])
        record["curve"] = [[tokens, _or_none(loss)] for tokens, loss in record["curve"]]
        self._records[case.key] = record
        order = sorted(
            self._records.values(), key=lambda one: (one["method"], one["seed"], one["key"])
        )
        text = next(iter(self.data.values())).path / TEXT_FILE
        told = {
            "suite": self.name,
            "scale": self.scale,
            "seeds": self.seeds,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": ", ".join(one.name for one in inspect_machine().devices),
            "text": text.read_text("utf-8") if text.exists() else None,
            "data_sha256": {cut: data.sha256 for cut, data in self.data.items()},
            "runs": order,
        }
        write_json(self.file, told, "results")
        for folder, _ in case.runs(self.work):
            shutil.rmtree(folder, ignore_errors=True)

    def runs_at_most(self) -> int:
        """Runs that may be to come, a local one's silos as one."""
        points = scale_of(self.suite, self.scale).points
        methods = self.suite.methods.values()
        whole = sum((points if one.grid else 1) + self.seeds - 1 for one in methods)
        return max(0, whole - len(self._records))

    def _case(self, method: str, point: Point, seed: int) -> Case:
        told = self.suite.methods[method]
        data = self.data[told.cut]
        silos = tuple(sorted(data.silos))
        config = self.suite.config(self.scale, method, dict(point), seed, data.path, len(silos))
        return Case(method, told.kind, point, seed, config, silos, data.sha256)


def read_results(file: Path) -> dict[str, Any]:
    """What `Bench.take` wrote; raises ConfigError where it is none."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        for one in told["runs"]:
            _ = one["method"], one["point"], one["seed"], one["key"], one["curve"], one["tokens"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{file} is no file of results: {str(error)[:200]}",
            hint="Move it away, or name another --out.",
        ) from error
    return told


def _or_none(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
