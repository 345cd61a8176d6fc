"""Photon: train one language model across organisations that keep their data.

    import photon

    data = photon.prepare_data(photon.PrepareOptions(input="speeches/", out="data/speeches", iid=4))
    config = photon.load_config("first/run.toml", ["data.path=data/speeches"])
    result = photon.simulate(config, listener=photon.show_progress())
    photon.export(result, "my-model")
    losses = photon.read_run(result).table(photon.events.Evaluated)

Names are imported when first used, so that `import photon` is quick. Import it before torch: see
openmp.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon.aggregation import MergingRule, OuterOptimizer
    from photon.config import RunConfig
    from photon.config import load_run_config as load_config
    from photon.config import parse_run_config as build_config
    from photon.dashboard import progress_view as show_progress
    from photon.dashboard import write_report as report
    from photon.data import Partitioner, PreparedData, PrepareOptions, open_data
    from photon.data import prepare as prepare_data
    from photon.errors import PhotonError
    from photon.products import evaluate, export, generate
    from photon.runs import RunResult, resume, simulate, train
    from photon.telemetry import RunHistory, events
    from photon.telemetry import read_history as read_run

importlib.import_module("photon.openmp")  # before anything imports torch

_HOMES: dict[str, tuple[str, str]] = {
    "MergingRule": ("photon.aggregation", "MergingRule"),
    "OuterOptimizer": ("photon.aggregation", "OuterOptimizer"),
    "Partitioner": ("photon.data", "Partitioner"),
    "PhotonError": ("photon.errors", "PhotonError"),
    "PrepareOptions": ("photon.data", "PrepareOptions"),
    "PreparedData": ("photon.data", "PreparedData"),
    "RunConfig": ("photon.config", "RunConfig"),
    "RunHistory": ("photon.telemetry", "RunHistory"),
    "RunResult": ("photon.runs", "RunResult"),
    "build_config": ("photon.config", "parse_run_config"),
    "evaluate": ("photon.products", "evaluate"),
    "events": ("photon.telemetry", "events"),
    "export": ("photon.products", "export"),
    "generate": ("photon.products", "generate"),
    "load_config": ("photon.config", "load_run_config"),
    "open_data": ("photon.data", "open_data"),
    "prepare_data": ("photon.data", "prepare"),
    "read_run": ("photon.telemetry", "read_history"),
    "report": ("photon.dashboard", "write_report"),
    "resume": ("photon.runs", "resume"),
    "show_progress": ("photon.dashboard", "progress_view"),
    "simulate": ("photon.runs", "simulate"),
    "train": ("photon.runs", "train"),
}

__all__ = [
    "MergingRule",
    "OuterOptimizer",
    "Partitioner",
    "PhotonError",
    "PrepareOptions",
    "PreparedData",
    "RunConfig",
    "RunHistory",
    "RunResult",
    "build_config",
    "evaluate",
    "events",
    "export",
    "generate",
    "load_config",
    "open_data",
    "prepare_data",
    "read_run",
    "report",
    "resume",
    "show_progress",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    try:
        home, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'photon' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(home), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
