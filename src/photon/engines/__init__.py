"""Engines carry tasks to participants and answers back."""

from photon.engines.local import LocalEngine
from photon.engines.workers import WorkerEngine

__all__ = ["LocalEngine", "WorkerEngine"]
