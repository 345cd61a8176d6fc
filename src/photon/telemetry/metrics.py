"""Figures for Prometheus: families asked for anew at each scrape, and a run's, from its events.

Nothing is kept beside what is there already. Names begin with photon_ and end in their unit; the
only labels that others choose are the names of silos.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_PHASES = ("local_train", "eval", "merge", "checkpoint")


class Page(Collector):
    """One registry's only collector: each scrape asks the readers, in order.

    Args:
        readers: called with this page while it is scraped, one scrape at a time or several; each
            tells its figures by `gauge` and `counter` of the page it is given.
    """

    def __init__(self, readers: Iterable[Callable[[Page], None]]) -> None:
        self._readers = tuple(readers)
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def collect(self) -> Iterator[Metric]:
        page = Page(())  # of this scrape alone: there may be two at once
        failed = 0
        for reader in self._readers:
            try:
                reader(page)
            except Exception as error:  # the rest is still worth having
                failed += 1
                logger.warning("figures can't be read: %s: %s", type(error).__name__, error)
        page.gauge("unreadable_parts", "Parts of these figures that could not be read.", failed)
        yield from page._families.values()

    def gauge(self, name: str, meaning: str, value: float | None, **labels: str) -> None:
        """A figure that goes up and down, without photon_; None is left out."""
        self._add(GaugeMetricFamily, name, meaning, value, labels)

    def counter(self, name: str, meaning: str, value: float | None, **labels: str) -> None:
        """A figure that grows, without photon_ and _total; None is left out."""
        self._add(CounterMetricFamily, name, meaning, value, labels)

    def _add(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        meaning: str,
        value: float | None,
        labels: Mapping[str, str],
    ) -> None:
        if value is None:
            return
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = kind(f"photon_{name}", meaning, labels=list(labels))
        family.add_metric(list(labels.values()), value)


@contextlib.contextmanager
def page_served(host: str, port: int, readers: Iterable[Callable[[Page], None]]) -> Iterator[None]:
    """Answer scrapes of /metrics, in threads, while the block runs.

    Raises:
        OSError: there is no listening there.
    """
    registry = CollectorRegistry()
    registry.register(Page(readers))
    server, thread = start_http_server(port, host, registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RunFigures:
    """A run's figures out of its events.jsonl, of which each scrape reads what is new.

    Counters sum over all that was done, a round that a resume did again included.

    Args:
        path: of the file; there may be none yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self._newest: dict[str, dict[str, Any]] = {}
        self._sums: Counter[str] = Counter()
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._ended_at: float | None = None  # seconds since the epoch

    def __call__(self, page: Page) -> None:
        for event in self._new():
            self._fold(event)
        self._tell(page)

    def _new(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._read_bytes += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def _fold(self, event: dict[str, Any]) -> None:
        name = event["event"]
        if name == "update_dropped":
            self._dropped[event["silo"], event.get("cause") or "unknown"] += 1
        elif name == "round_finished":
            self._newest[name] = event
            self._sums.update({key: event[key] for key in ("tokens", "bytes_up", "bytes_down")})
            self._sums["rounds"] += 1
            if start := self._newest.get("run_started"):
                began = datetime.fromisoformat(start["started_at"]).timestamp()
                self._ended_at = began + event["time_s"] - start["time_s"]
        elif name in ("run_started", "round_started", "round_merged") or (
            name == "evaluated" and event["silo"] is None
        ):
            self._newest[name] = event
            self._sums["starts"] += name == "run_started"

    def _tell(self, page: Page) -> None:
        ended, begun = (self._newest.get(f"round_{how}", {}) for how in ("finished", "started"))
        page.gauge("round", "The newest finished round.", ended.get("round", 0))
        page.gauge("round_under_way", "The round begun last.", begun.get("round"))
        page.gauge("last_round_seconds", "The newest finished round took.", ended.get("round_s"))
        page.gauge(
            "last_round_end_timestamp_seconds", "The newest round was finished at.", self._ended_at
        )
        for phase in _PHASES:
            seconds = ended.get(f"{phase}_s")
            page.gauge("last_round_phase_seconds", "Of the newest round.", seconds, phase=phase)
        merged, scored = (self._newest.get(name, {}) for name in ("round_merged", "evaluated"))
        page.gauge(
            "train_loss", "Mean of the newest merge, nats a token.", merged.get("train_loss")
        )
        page.gauge("heldout_loss", "Of the global held-out text, nats a token.", scored.get("loss"))
        sums = self._sums
        page.counter("rounds_finished", "Rounds finished.", sums["rounds"])
        page.counter("trained_tokens", "Tokens behind what was merged.", sums["tokens"])
        page.counter("loop_starts", "Starts of the federation's loop.", sums["starts"])
        for way in ("up", "down"):
            moved = sums[f"bytes_{way}"]
            page.counter("transferred_bytes", "Of updates and states.", moved, direction=way)
        for (silo, cause), times in sorted(self._dropped.items()):
            page.counter("updates_dropped", "Updates not merged.", times, silo=silo, cause=cause)
