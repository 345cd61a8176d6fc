"""A node's client asks for leave to read and write: one request for many, and bad answers."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from member_desk import RUN, Aggregator
from odd_server import an_error, saying

from photon.errors import AccessRefusedError, PhotonError, StoreUnavailableError, UnreachableError
from photon.membership.keys import NodeKey
from photon.silo.desk_client import DeskClient
from photon.silo.grant_book import GrantBook, Leave
from photon.store.presign import Grant


def test_leave_for_a_task_s_objects(aggregator: Aggregator) -> None:
    blue = aggregator.member("blue")
    book = blue.grants(aggregator.task("blue").id)
    grant = book("PUT", f"{RUN}/silos/blue/a", 5, "c" * 64)
    assert grant.verb == "PUT"
    assert grant.url.startswith(f"https://s/box/{RUN}/silos/blue/a?")
    assert grant.headers["content-length"] == "5"
    assert 290 < grant.expires_at - time.time() <= 301
    with pytest.raises(AccessRefusedError, match="not part of task"):
        book("PUT", f"{RUN}/silos/red/a", 5, "c" * 64)
    with pytest.raises(AccessRefusedError, match="blue has no open task") as caught:
        blue.grants("another")("GET", f"{RUN}/global/a", None, None)
    assert isinstance(caught.value.__cause__, AccessRefusedError)
    aggregator.roster.expel("blue")
    with pytest.raises(AccessRefusedError, match="expelled"):
        book("GET", f"{RUN}/global/a", None, None)


def test_what_may_pass_and_what_will_not(tmp_path: Path) -> None:
    """A transfer tries again after StoreUnavailableError only."""
    key = NodeKey.create(tmp_path / "node.key")
    client = DeskClient("http://127.0.0.1:1", None, key)
    with pytest.raises(StoreUnavailableError, match="can't be reached") as caught:
        client.grants("t")("GET", "a", None, None)
    assert isinstance(caught.value.__cause__, UnreachableError)
    client.close()
    for status, body, kind in (
        (502, b"", StoreUnavailableError),
        (429, an_error(95), StoreUnavailableError),
        (401, an_error(93), AccessRefusedError),
        (404, b"", AccessRefusedError),
        (200, {"server_time": 1.0, "grants": [an_error(71)]}, StoreUnavailableError),
        (200, {"server_time": 1.0, "grants": [an_error(76)]}, AccessRefusedError),
        (200, {"grants": []}, AccessRefusedError),
    ):
        with saying(status, body) as (address, _):
            client = DeskClient(address, None, key)
            with pytest.raises(kind):
                client.grants("t")("GET", "a", None, None)
            client.close()


GOOD = {"verb": "GET", "key": "a", "url": "https://s/a?X-Amz-Signature=hush", "headers": {}}
GOOD |= {"expires_at": 2.0}


@pytest.mark.parametrize(
    "answer",
    [
        {"server_time": 1.0, "grants": []},
        {"server_time": 1.0, "grants": [GOOD, GOOD]},
        {"server_time": 1.0, "grants": [GOOD | {"verb": "PUT"}]},
        {"server_time": 1.0, "grants": [GOOD | {"key": "b"}]},
        {"server_time": 1.0, "grants": [GOOD | {"url": "x" * 9000}]},
        {"server_time": 1.0, "grants": [GOOD | {"headers": {"Host": "evil"}}]},
        {"server_time": 1.0, "grants": [GOOD | {"headers": {"a": "b\r\nc: d"}}]},
        {"server_time": 1.0, "grants": [{}]},
        {"server_time": "now", "grants": [GOOD]},
        {"server_time": 1.0, "grants": {}},
    ],
    ids=lambda answer: json.dumps(answer)[:60],
)
def test_grants_of_a_server_that_means_harm(tmp_path: Path, answer: dict[str, Any]) -> None:
    key = NodeKey.create(tmp_path / "node.key")
    with saying(200, answer) as (address, _):
        client = DeskClient(address, None, key)
        with pytest.raises(AccessRefusedError, match=r"desk of") as caught:
            client.grants("t")("GET", "a", None, None)
        client.close()
    assert "hush" not in str(caught.value) + repr(caught.value.__cause__)


class SlowDesk:
    """Stands in for DeskClient where the order of events matters: how requests are put together."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, str]]] = []
        self.good_s = 600.0
        self.answering = threading.Event()
        self.answering.set()
        self.fail: BaseException | None = None

    def ask_grants(self, task_id: str, wants: list[dict[str, Any]]) -> list[Leave | PhotonError]:
        self.batches.append([(want["verb"], want["key"]) for want in wants])
        assert self.answering.wait(20)
        if self.fail is not None:
            raise self.fail
        found: list[Leave | PhotonError] = []
        for want in wants:
            if want["key"].startswith("no"):
                found.append(AccessRefusedError("no"))
            else:
                grant = Grant(want["verb"], "https://s/" + want["key"], {}, 0.0)
                found.append(Leave(grant, time.monotonic() + self.good_s))
        return found


def in_threads(book: GrantBook, keys: list[str]) -> tuple[list[threading.Thread], dict[str, Any]]:
    found: dict[str, Any] = {}

    def ask(key: str) -> None:
        try:
            found[key] = book("GET", key, None, None).url
        except PhotonError as error:
            found[key] = error

    threads = [threading.Thread(target=ask, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    return threads, found


def test_threads_that_ask_at_once_share_a_request() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    desk.answering.clear()
    threads, found = in_threads(book, ["first"])
    give_up = time.monotonic() + 20
    while not desk.batches:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    keys = [f"k{n}" for n in range(300)] + ["no-1", "no-2"]
    more, found_more = in_threads(book, keys)
    while len(book._waiting) < len(keys):
        assert time.monotonic() < give_up
        time.sleep(0.001)
    desk.answering.set()
    for thread in threads + more:
        thread.join(20)
    assert found == {"first": "https://s/first"}
    assert {key: value for key, value in found_more.items() if not key.startswith("no")} == {
        key: f"https://s/{key}" for key in keys[:300]
    }
    # Each gets an error of its own: a shared one would mix up its tracebacks.
    errors = [found_more["no-1"], found_more["no-2"]]
    assert all(type(error) is AccessRefusedError for error in errors)
    assert errors[0] is not errors[1]
    assert [len(batch) for batch in desk.batches] == [1, 256, 46]


def test_one_request_that_fails_fails_all_who_wait_for_it() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    desk.fail = UnreachableError("away", hint="wait")
    threads, found = in_threads(book, ["a", "b", "c"])
    for thread in threads:
        thread.join(20)
    assert {type(error) for error in found.values()} == {StoreUnavailableError}
    desk.fail = RuntimeError("a fault")
    with pytest.raises(RuntimeError):
        book("GET", "a", None, None)
    # And the next one works again.
    desk.fail = None
    assert book("GET", "a", None, None).url == "https://s/a"


def test_what_is_expected_comes_along() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    keys = [f"c{n}" for n in range(100)]
    book.expect([*keys, "no"])
    assert book("GET", "other", None, None)
    assert [len(batch) for batch in desk.batches] == [1]
    for key in keys:
        assert book("GET", key, None, None).url == f"https://s/{key}"
    assert [len(batch) for batch in desk.batches] == [1, 65, 36]
    assert book.requests == 3
    # What came along is given once: who asks again needs a fresh one.
    assert book("GET", "c7", None, None)
    assert len(desk.batches) == 4
    # A refusal that came along is told to who asks.
    with pytest.raises(AccessRefusedError):
        book("GET", "no", None, None)


def test_leave_that_is_about_to_end_is_not_used() -> None:
    desk = SlowDesk()
    desk.good_s = 30.0
    book = GrantBook(desk, "t")
    book.expect(["a", "b"])
    book("GET", "a", None, None)
    assert desk.batches == [[("GET", "a"), ("GET", "b")]]
    book("GET", "b", None, None)
    assert len(desk.batches) == 2


def test_only_leave_to_read_comes_along() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    book.expect(["a", "b"])
    book("HEAD", "a", None, None)
    book("PUT", "b", 1, "d" * 64)
    assert desk.batches == [[("HEAD", "a")], [("PUT", "b")]]
