"""What /metrics of `photon serve` and of `photon join` says, read where it is known already."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon.config.addresses import host_and_port
from photon.deploy.ports import require_free
from photon.deploy.service import ServiceStatus
from photon.silo.socket import ask_figures
from photon.version import photon_version

if TYPE_CHECKING:
    from photon.telemetry.metrics import Page

#: Tells a page its figures.
Reader = Callable[["Page"], None]

#: What a node can be at (photon.membership.records.Presence).
_STATES = ("idle", "loading", "training", "publishing", "refused", "stopping")


@contextlib.contextmanager
def figures_served(address: str | None, readers: Callable[[], Iterable[Reader]]) -> Iterator[None]:
    """Serve /metrics at HOST:PORT while the block runs; None serves none.

    Args:
        readers: makes those who are asked at each scrape.

    Raises:
        PortInUseError, DeployError: there is no listening there.
    """
    if address is None:
        yield
        return
    from photon.telemetry.metrics import page_served  # costs memory

    host, port = host_and_port(address)
    require_free(host, port)
    with page_served(host, port, readers()):
        yield


def tell_machine(
    page: Page, folders: Mapping[str, Path], reserve_gib: float, services: Iterable[ServiceStatus]
) -> None:
    """Photon's version, disks by what they are for, and services."""
    page.gauge("info", "Photon's version, as a label.", 1, version=photon_version())
    for name, folder in folders.items():
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            page.gauge("disk_free_bytes", "Free where a folder lies.", free, folder=name)
    page.gauge("disk_reserve_bytes", "Kept free: min_free_gib.", reserve_gib * 2**30)
    for one in services:
        up = one.state in ("up", "stopped") or (one.state == "starting" and not one.restarts)
        page.gauge("service_up", "Whether a service does its work.", up, service=one.name)
        page.counter("service_restarts", "Starts after a death.", one.restarts, service=one.name)


def tell_desk(
    page: Page,
    status: Mapping[str, Any],
    expected: int,
    letters: Mapping[str, Collection[str]],
    polls: int,
    refusals: Counter[str],
) -> None:
    """The run, its silos and the mailbox.

    Args:
        status: as Desk.status has it.
        expected: fewest silos that must be here before a round begins.
        letters: those not answered yet, by silo.
        polls: that are held.
        refusals: requests refused at the desk, by the error's class.
    """
    run, members = status["run"], [one for one in status["members"] if one["status"] == "active"]
    page.gauge("rounds_planned", "Rounds of the run.", run["rounds"])
    page.gauge("quorum_lost", "Whether a round waits to be drawn again.", run["lost"] is not None)
    page.gauge("waiting", "Whether the loop waits for silos.", run["waiting"] is not None)
    page.gauge("draining", "Whether no new round is begun.", status["draining"])
    page.gauge(
        "certificate_expiry_timestamp_seconds",
        "The door's certificate ends at.",
        (run["certificate"] or {}).get("until"),
    )
    page.gauge("silos_here", "Active members heard lately.", sum(one["here"] for one in members))
    page.gauge("silos_needed", "Fewest that must be here for a round.", expected)
    page.gauge("silos_known", "Active members.", len(members))
    page.gauge("polls_held", "Silos' questions for work that are held open.", polls)
    for name, times in sorted(refusals.items()):
        page.counter("requests_refused", "At the desk, by class.", times, cause=name)
    opened: dict[str, float] = {}
    for task in status["open_tasks"]:
        opened[task["silo"]] = min(task["opened_at"], opened.get(task["silo"], task["opened_at"]))
    for one in members:
        silo, doing = one["name"], one["presence"] or {}
        page.gauge("silo_here", "Whether it was heard lately.", one["here"], silo=silo)
        page.gauge(
            "silo_last_seen_timestamp_seconds", "It was heard at.", doing.get("seen_at"), silo=silo
        )
        busy = doing.get("state") not in (None, "idle", "refused", "stopping")
        page.gauge("silo_busy", "Whether it works on a task.", one["here"] and busy, silo=silo)
        page.gauge(
            "letters_waiting",
            "Questions without an answer, those that are worked on included.",
            len(letters.get(silo, ())),
            silo=silo,
        )
        page.gauge(
            "oldest_task_timestamp_seconds", "Asked at.", opened.get(silo) or None, silo=silo
        )


def tell_node(page: Page, socket: Path) -> None:
    """What a node does, as its trainer says; a trainer that is away says nothing."""
    said = ask_figures(socket)
    page.gauge("node_trainer_answers", "Whether the trainer answers here.", said is not None)
    if said is None:
        return
    now = said["presence"]
    for state in _STATES:
        page.gauge("node_state", "1 for what it does.", now["state"] == state, state=state)
    page.gauge("node_round", "Of the task that is worked on.", now["round"])
    page.gauge("node_step", "Local steps done.", now["step"])
    page.gauge("node_steps", "Local steps to do.", now["of"])
    page.gauge("node_tokens_per_second", "Of the newest step told.", now["tokens_per_s"])
    page.gauge("node_train_loss", "Of the newest step told, nats a token.", now["loss"])
    page.gauge(
        "node_last_contact_timestamp_seconds", "The aggregator answered at.", said["heard_at"]
    )
    for way in ("up", "down"):
        moved = said[f"bytes_{way}"]
        page.counter("node_transferred_bytes", "Of updates and states.", moved, direction=way)
