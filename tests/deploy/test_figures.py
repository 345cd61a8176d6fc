"""/metrics of aggregator and node: what is known already, under bounded labels, on loopback."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import types
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from photon.config import parse_run_config
from photon.config.watch import WatchConfig
from photon.deploy.desk import Desk
from photon.deploy.figures import figures_served, tell_machine, tell_node
from photon.deploy.ports import free_ports
from photon.deploy.serve import Aggregator
from photon.deploy.service import ServiceStatus
from photon.errors import PortInUseError, SignatureError
from photon.membership.keys import NodeKey
from photon.membership.records import Facts, Presence
from photon.silo.presence import Reporter
from photon.silo.service import Listener
from photon.silo.socket import ask_figures
from photon.store.presign import S3Presigner
from photon.telemetry.events import (
    Evaluated,
    RoundFinished,
    RoundMerged,
    RoundStarted,
    RunStarted,
    UpdateDropped,
)
from photon.telemetry.metrics import Page, RunFigures


def scraped(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return answer.read().decode()


def figures(text: str) -> dict[str, float]:
    """Samples by name and labels, as a line of the page has them."""
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in one.labels.items())
            found[f"{one.name}{{{labels}}}" if labels else one.name] = one.value
    return found


def told(*readers) -> dict[str, float]:
    """What readers tell, without a socket."""
    found = {}
    for family in Page(readers).collect():
        for one in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in one.labels.items())
            found[f"{one.name}{{{labels}}}" if labels else one.name] = one.value
    return found


def address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


def started(**what) -> RunStarted:
    figures = dict.fromkeys(
        ("rounds", "local_steps", "participants_per_round", "batch_size", "sequence_length"), 1
    ) | dict.fromkeys(("parameters", "threads", "workers"), 1)
    words = dict.fromkeys(("run", "photon_version", "device", "precision"), "x")
    own = {"kind": "serve", "silos": [], "silo_tokens": {}}
    return RunStarted.model_validate(figures | words | own | what)


def finished(number: int, **what) -> RoundFinished:
    names = ("global_step", "local_train_s", "eval_s", "merge_s", "checkpoint_s", "total_tokens")
    zero = dict.fromkeys((*names, "total_bytes_up", "total_bytes_down"), 0)
    return RoundFinished.model_validate(
        zero | {"round": number, "round_s": 8, "tokens": 100, "bytes_up": 5, "bytes_down": 7} | what
    )


def write(path: Path, *events) -> None:
    with path.open("a", encoding="utf-8") as file:
        for one in events:
            file.write(json.dumps({"event": one.name, **one.model_dump(mode="json")}) + "\n")


@pytest.mark.parametrize("given", ["0.0.0.0:9464", "[::]:9464", "ai.example.org:9464"])
def test_others_reach_no_figures_unless_that_is_said(given) -> None:
    with pytest.raises(ValidationError, match="metrics_open = true"):
        WatchConfig(metrics=given)
    assert WatchConfig(metrics=given, metrics_open=True).metrics == given


@pytest.mark.parametrize("given", [None, "127.0.0.1:9464", "[::1]:9464", "localhost:9464"])
def test_this_machine_may_and_nobody_must(given) -> None:
    assert WatchConfig(metrics=given).metrics == given
    with pytest.raises(ValidationError, match="HOST:PORT"):
        WatchConfig(metrics="9464")
    assert WatchConfig().metrics is None


def test_a_run_is_read_from_its_events_each_line_once(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    tell = RunFigures(path)
    assert told(tell)["photon_round"] == 0  # there is no file yet
    began = "2026-01-01T00:00:00+00:00"
    write(
        path,
        started(started_at=began, time_s=100.0),
        RoundStarted(round=1, global_step=1, participants=["a", "b"]),
        UpdateDropped(round=1, silo="a", reason="x" * 50, cause="ClockSkewError"),
        UpdateDropped(round=1, silo="b", reason="of an older Photon"),
        RoundMerged(
            round=1, participants=[], tokens=1, train_loss=2.5, pseudo_gradient_norm=1, merge_s=1
        ),
        Evaluated(round=1, silo="a", loss=9, perplexity=9, bits_per_byte=1, tokens=1, eval_s=1),
        Evaluated(round=1, silo=None, loss=3, perplexity=9, bits_per_byte=1, tokens=1, eval_s=1),
        finished(1, time_s=160.0, eval_s=2.0),
    )
    with path.open("a") as file:
        file.write('{"event":"round_fini')  # is being written
    found = told(tell)
    assert found["photon_round"] == found["photon_round_under_way"] == 1
    assert found["photon_last_round_seconds"] == 8
    assert found["photon_last_round_phase_seconds{phase=eval}"] == 2
    assert found["photon_last_round_end_timestamp_seconds"] == 1767225600 + 60
    assert (found["photon_heldout_loss"], found["photon_train_loss"]) == (3, 2.5)
    assert found["photon_updates_dropped_total{silo=a,cause=ClockSkewError}"] == 1
    assert found["photon_updates_dropped_total{silo=b,cause=unknown}"] == 1
    with path.open("a") as file:
        file.write('shed"\n')  # no JSON after all: a kill cut it
    write(path, finished(2, time_s=170.0))
    for _ in range(2):  # a scrape counts nothing
        found = told(tell)
        assert found["photon_rounds_finished_total"] == found["photon_round"] == 2
        assert found["photon_trained_tokens_total"] == 200
        assert found["photon_transferred_bytes_total{direction=up}"] == 10
        assert found["photon_transferred_bytes_total{direction=down}"] == 14
        assert found["photon_loop_starts_total"] == 1
        assert found["photon_unreadable_parts"] == 0


@pytest.fixture
def aggregator(home):
    tree = {
        "model": {"preset": "tiny"},
        "data": {"path": "unread"},
        "federation": {"rounds": 40, "quorum": 3},
        "serve": {"home": str(home), "host": "127.0.0.1", "metrics": address()},
    }
    folder = home / "run"
    folder.mkdir()
    made = Aggregator(parse_run_config(tree), folder, log=lambda _: None)
    signer = S3Presigner("https://s", "b", region="r", access_key_id="a", secret="s")
    desk = Desk(
        made._roster,
        signer,
        about=lambda: {"run": made.status(), "services": []},
        on_event=made._desk_told,
    )
    desk.start()
    yield made, desk
    desk.stop()
    made._roster.close()


def test_the_aggregators_page(aggregator, home) -> None:
    made, desk = aggregator
    roster, now = made._roster, time.time()
    for name in ("lab-a", "lab-b", "lab-c"):
        key = NodeKey.create(home / f"{name}.key")
        facts = Facts("d" * 64, "e" * 64, 100, "0.1.0")
        roster.redeem(roster.invite(name, 60), name, key.public_pem, facts)
    roster.expel("lab-c")
    words = Presence("training", detail='no label "of a stranger"\nphoton_round 99')
    desk._attendance.seen("lab-a", words, now=now)
    desk._attendance.seen("lab-b", Presence("idle"), now=now - 3600)
    key = NodeKey.create(home / "stranger.key")
    desk._note("127.0.0.1", "/photon/v2/task", SignatureError(f"key {key.fingerprint}"))
    write(home / "run" / "events.jsonl", finished(7))
    where = made._serve.metrics
    with figures_served(where, lambda: made._figures(desk)):
        text = scraped(where)
        with pytest.raises(PortInUseError), figures_served(where, lambda: ()):
            pass
    found = figures(text)
    assert found["photon_round"] == 7
    assert found["photon_rounds_planned"] == 40
    assert (found["photon_silos_here"], found["photon_silos_known"]) == (1, 2)
    assert found["photon_silos_needed"] == 3
    assert found["photon_silo_here{silo=lab-a}"] == found["photon_silo_busy{silo=lab-a}"] == 1
    assert found["photon_silo_here{silo=lab-b}"] == found["photon_silo_busy{silo=lab-b}"] == 0
    seen = found["photon_silo_last_seen_timestamp_seconds{silo=lab-b}"]
    assert seen == pytest.approx(now - 3600, abs=1)
    assert found["photon_requests_refused_total{cause=SignatureError}"] == 1
    assert found["photon_disk_free_bytes{folder=run}"] > 0
    assert found["photon_letters_waiting{silo=lab-a}"] == found["photon_polls_held"] == 0
    assert found["photon_quorum_lost"] == found["photon_unreadable_parts"] == 0
    for never in ("stranger", "lab-c", "sha256", key.fingerprint):
        assert never not in text
    if promtool := shutil.which("promtool"):
        done = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_what_can_not_be_read_hides_nothing_else() -> None:
    def broken(_: Page) -> None:
        raise OSError("the disk")

    found = told(broken, lambda page: page.gauge("round", "A round.", 3))
    assert (found["photon_round"], found["photon_unreadable_parts"]) == (3, 1)


def test_services_and_disks(tmp_path) -> None:
    services = [
        ServiceStatus("door", "up", 1, 0.0, 2, ""),
        ServiceStatus("store", "unwell", 2, 0.0, 0, ""),
    ]
    folders = {"home": tmp_path, "gone": tmp_path / "gone"}
    found = told(lambda page: tell_machine(page, folders, 2.0, services))
    assert found["photon_service_up{service=door}"] == 1
    assert found["photon_service_up{service=store}"] == 0
    assert found["photon_service_restarts_total{service=door}"] == 2
    assert found["photon_disk_reserve_bytes"] == 2 * 2**30
    assert "photon_disk_free_bytes{folder=gone}" not in found


def test_a_nodes_page_says_what_its_trainer_does_and_whether_there_is_one(home) -> None:
    path = home / "trainer.sock"
    assert ask_figures(path) is None
    assert told(lambda page: tell_node(page, path))["photon_node_trainer_answers"] == 0
    reporter = Reporter(types.SimpleNamespace(presence=lambda _: {}))
    Listener(path, lambda raw: None, lambda raw, error: {}, reporter.figures)
    reporter.say("training", round=3, step=20, of=500)
    reporter.add(tokens_per_s=1e4, loss=2.0)
    reporter.bytes_up += 11
    until = time.monotonic() + 10
    while reporter.heard_at is None and time.monotonic() < until:
        time.sleep(0.01)
    found = told(lambda page: tell_node(page, path))
    assert found["photon_node_trainer_answers"] == 1
    assert found["photon_node_state{state=training}"] == 1
    assert sum(found[one] for one in found if one.startswith("photon_node_state")) == 1
    assert (found["photon_node_step"], found["photon_node_steps"]) == (20, 500)
    assert found["photon_node_tokens_per_second"] == 1e4
    assert found["photon_node_transferred_bytes_total{direction=up}"] == 11
    assert found["photon_node_last_contact_timestamp_seconds"] == pytest.approx(time.time(), abs=9)


def test_refusals_are_counted_by_class(aggregator) -> None:
    made, _ = aggregator
    for code in (82, 82, 93):
        made._desk_told("refused", {"code": code})
    assert made._refusals == Counter({"UnknownMemberError": 2, "ClockSkewError": 1})
