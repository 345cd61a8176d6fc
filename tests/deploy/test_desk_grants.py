"""Leave for the store: for a member's own open task, its keys and its bytes alone."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from desk_place import DATA, RUN, SHA, Place, own, put, refused

from photon.deploy.desk import DeskLimits
from photon.link.parcel import update_keys
from photon.membership.records import OpenTask
from photon.store.presign import Grant, S3Presigner


def test_a_grant_is_what_the_store_wants(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    chunk = own("blue", f"chunks/{SHA}")
    wants = [put(chunk), {"verb": "GET", "key": f"{RUN}/global/state/a.json"}]
    wants += [{"verb": "HEAD", "key": chunk}, {"verb": "GET", "key": f"{RUN}/one-key.json"}]
    answer = place.wants(key, task.id, *wants).json()
    first, second, third, fourth = answer["grants"]
    assert [(one["verb"], one["key"]) for one in answer["grants"]] == [
        (want["verb"], want["key"]) for want in wants
    ]
    url = urlsplit(first["url"])
    assert (url.netloc, url.path) == ("store.example:8443", f"/photon/{chunk}")
    query = parse_qs(url.query)
    assert query["X-Amz-SignedHeaders"] == [
        "content-length;host;if-none-match;x-amz-checksum-sha256"
    ]
    assert query["X-Amz-Expires"] == ["300"]
    assert first["headers"]["content-length"] == str(len(DATA))
    assert 299 <= first["expires_at"] - answer["server_time"] <= 301
    assert second["headers"] == third["headers"] == fourth["headers"] == {}
    # It is the presigner's own signature, over what was asked.
    amz_date = query["X-Amz-Date"][0]
    signed = place.presigner().signed_query(
        "PUT",
        f"/photon/{chunk}",
        first["headers"],
        _moment(amz_date),
        int(query["X-Amz-Expires"][0]),
    )
    assert signed == url.query


def _moment(text: str) -> Any:
    from datetime import UTC, datetime

    return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


@pytest.mark.parametrize(("grant_s", "until_s"), [(60, 600), (300, 60)])
def test_a_grant_is_no_longer_than_grant_s_and_its_task(
    place: Place, grant_s: int, until_s: int
) -> None:
    place.open(limits=DeskLimits(grant_s=grant_s))
    key, task = place.member("blue"), place.task("blue", until_s=until_s)
    answer = place.wants(key, task.id, put(own("blue", "a"))).json()
    assert 58 <= answer["grants"][0]["expires_at"] - answer["server_time"] <= 60


def refusals(answer: httpx2.Response) -> list[str]:
    """The words for each want, none of which was granted."""
    assert answer.status_code == 200, answer.text
    parts = answer.json()["grants"]
    assert all(set(part) == {"error"} and part["error"]["code"] == 76 for part in parts), parts
    return [part["error"]["message"] for part in parts]


@pytest.mark.parametrize("verb", ["GET", "HEAD", "PUT"])
def test_keys_that_are_not_the_task_s(place: Place, verb: str) -> None:
    blue = place.member("blue")
    place.member("red")
    place.member("blue-2")
    task = place.task("blue", most_bytes=10**9)
    mine = f"{RUN}/silos/blue/"
    tricks = [
        *(f"{mine}../red/a", "../a", "..", "/etc/passwd", f"/{mine}a", f"{mine}", ""),
        *(f"{mine}%2e%2e/red/a", f"{mine}..%2fred/a", f"{mine}a?x=1", f"{mine}a#b"),
        *(f"{mine}\\..\\red", f"{mine}a\n", f"{mine}a\x00b", f"{mine}./a", f"{mine}//a"),
        *(f"{mine}.hidden", f"{mine}é", f"{mine}{'a' * 600}", f"{mine}a/../../red/a"),
        *(f"{RUN}/silos/red/a", f"{RUN}/silos/blue-2/a", f"{RUN}/silos/blue", f"{RUN}/silos"),
        *(f"{'1' * 32}/silos/blue/a", f"{'1' * 32}/global/a", RUN, "chunks/a"),
        *(f"{RUN}/globals/a", f"{RUN}/global", f"{RUN}/one-key.json/a", f"{RUN}/one-key.jso"),
        f"x/{mine}a",
        f"{RUN}/Silos/blue/a",
    ]
    wants = [put(key) | {"verb": verb} for key in tricks]
    answer = place.wants(blue, task.id, *wants)
    assert len(refusals(answer)) == len(tricks)
    assert "url" not in answer.text
    noted = [line for line in place.noted() if line.startswith("blue: refused grants")]
    assert len(noted) == 1
    assert f"and {len(tricks) - 1} more in this request" in noted[0]
    assert place.desks[0].status()["open_tasks"][0]["granted_bytes"] == 0


def test_what_is_readable_is_not_writable(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    wants = [put(f"{RUN}/global/state/a.json"), put(f"{RUN}/one-key.json")]
    assert all("not part of task" in words for words in refusals(place.wants(key, task.id, *wants)))


def test_an_update_is_written_under_its_own_round_s_keys(place: Place) -> None:
    """Exactly: what a silo might invent besides would be nobody's to remove."""
    key = place.member("blue")
    now, folder = time.time(), f"{RUN}/silos/blue"
    task = OpenTask(
        *(f"{RUN}/fit/12/blue", RUN, 12, "blue", "fit", now, now + 60, 10**6),
        readable=(f"{RUN}/global/chunks/",),
        writable=update_keys(folder, 12, "blue"),
    )
    place.roster.tasks.open(task)
    update = f"{folder}/update/round-000012/blue-{SHA[:16]}.json"
    invented = [
        f"{folder}/junk/round1.bin",
        f"{folder}/{SHA}",
        f"{folder}/chunks/{SHA}x",
        f"{folder}/chunks/{'0' * 64}",
        f"{folder}/update/round-999999999/blue-{SHA[:16]}.json",
        f"{folder}/update/round-000011/blue-{SHA[:16]}.json",
        f"{folder}/update/round-000012/red-{SHA[:16]}.json",
        f"{folder}/update/round-000012/blue-{'0' * 16}.json",
        f"{folder}/update/round-000012/blue-{SHA}.json",
        f"{folder}/state/round-000012/{SHA}.json",
        f"{folder}/update/round-000012/blue-{{sha256:.16}}.json",
    ]
    assert len(refusals(place.wants(key, task.id, *map(put, invented)))) == len(invented)
    for wanted in (update, f"{folder}/chunks/{SHA}"):
        for verb in ("PUT", "HEAD", "GET"):
            (part,) = place.wants(key, task.id, put(wanted) | {"verb": verb}).json()["grants"]
            assert "url" in part, part


def test_another_s_task(place: Place) -> None:
    blue, red = place.member("blue"), place.member("red")
    task = place.task("blue")
    for wants in ([put(own("blue", "a"))], [{"verb": "GET", "key": f"{RUN}/global/a"}]):
        words = refused(place.wants(red, task.id, *wants), 403, 76)
        assert words.startswith("red has no open task")
    # In the same words as a task that never was.
    never = refused(place.wants(red, "never", put(own("red", "a"))), 403, 76)
    assert never.startswith("red has no open task 'never'")
    assert any(line.startswith("red: refused grants: red has no open") for line in place.noted())
    assert place.wants(blue, task.id, put(own("blue", "a"))).json()["grants"][0]["url"]


def test_a_closed_task_and_one_whose_time_is_up(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    place.roster.tasks.close(task.id, None)
    refused(place.wants(key, task.id, put(own("blue", "a"))), 403, 76)
    late = place.task("blue", until_s=-1)
    words = refused(place.wants(key, late.id, put(own("blue", "a"))), 403, 76)
    assert "is up" in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bytes": None}, "bytes must be"),
        ({"bytes": 0}, "bytes must be"),
        ({"bytes": (64 << 20) + 1}, "bytes must be 1 to 67108864"),
        ({"sha256": None}, "sha256 must be"),
        ({"sha256": "A" * 64}, "sha256 must be"),
        ({"sha256": "ab"}, "sha256 must be"),
        ({"key": own("blue", "chunks/" + "0" * 64)}, "not part of task"),
        ({"key": own("blue", f"chunks/{SHA[:16]}")}, "not part of task"),
    ],
    ids=str,
)
def test_what_is_written_is_promised(place: Place, change: dict[str, Any], words: str) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=1 << 40)
    (said,) = refusals(place.wants(key, task.id, put(own("blue", "a")) | change))
    assert words in said


def test_no_more_than_the_task_may_write(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=1000)
    sizes = [400, 400, 300, 200, 1]
    wants = [put(own("blue", f"part-{n}"), size) for n, size in enumerate(sizes)]
    parts = place.wants(key, task.id, *wants).json()["grants"]
    assert ["url" in part for part in parts] == [True, True, False, True, False]
    assert "would write 1100; 1000 are allowed" in parts[2]["error"]["message"]
    # Asked again, what was granted does not count again ...
    again = place.wants(key, task.id, *wants[:2], wants[3]).json()["grants"]
    assert all("url" in part for part in again)
    # ... but another object under the same key does.
    other = put(own("blue", "part-0"), 400, "1" * 64)
    assert "would write 1400" in refusals(place.wants(key, task.id, other))[0]
    (shown,) = place.desks[0].status()["open_tasks"]
    assert (shown["granted_bytes"], shown["most_bytes"]) == (1000, 1000)


def test_sizes_are_counted_when_asked_in_parallel(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=1000)
    granted: list[bool] = []

    def ask(number: int) -> None:
        answer = place.wants(key, task.id, put(own("blue", f"part-{number}"), 100))
        granted.append("url" in answer.json()["grants"][0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 10
    assert place.desks[0].status()["open_tasks"][0]["granted_bytes"] == 1000


def test_a_task_that_is_opened_again_is_counted_anew(place: Place) -> None:
    """A node that was killed trains again, and its update may be another one."""
    key, task = place.member("blue"), place.task("blue", most_bytes=100)
    full = put(own("blue", "a"), 100)
    assert "url" in place.wants(key, task.id, full).json()["grants"][0]
    assert refusals(place.wants(key, task.id, put(own("blue", "b"), 100)))
    place.roster.tasks.open(replace(task, opened_at=task.opened_at + 1))
    assert "url" in place.wants(key, task.id, put(own("blue", "b"), 100)).json()["grants"][0]


def test_a_desk_that_restarts_does_not_count_twice(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=100)
    full = put(own("blue", "a"), 100)
    assert "url" in place.wants(key, task.id, full).json()["grants"][0]
    place.open()
    assert "url" in place.wants(key, task.id, full).json()["grants"][0]


def test_only_so_many_objects(place: Place) -> None:
    place.open(limits=DeskLimits(most_objects=3))
    key, task = place.member("blue"), place.task("blue")
    parts = place.wants(key, task.id, *(put(own("blue", f"p{n}"), 1) for n in range(5))).json()
    assert ["url" in part for part in parts["grants"]] == [True] * 3 + [False] * 2


def test_requests_for_grants_that_make_no_sense(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    want = {"verb": "GET", "key": f"{RUN}/global/a"}
    for body in (
        {"task_id": task.id, "wants": []},
        {"task_id": task.id, "wants": [want] * 257},
        {"task_id": task.id, "wants": [want | {"verb": "DELETE"}]},
        {"task_id": task.id, "wants": [want | {"verb": "get"}]},
        {"task_id": task.id, "wants": [want | {"bytes": -1}]},
        {"task_id": task.id, "wants": [want | {"bytes": True}]},
        {"task_id": task.id, "wants": [want | {"extra": 1}]},
        {"task_id": None, "wants": [want]},
        {"wants": [want]},
        [task.id, want],
    ):
        refused(place.post("grants", body, key), 400, 86)
    assert len(place.wants(key, task.id, *[want] * 256).json()["grants"]) == 256


def test_a_signer_that_fails_says_nothing_secret(place: Place) -> None:
    class Broken(S3Presigner):
        def grant(self, *_: Any, **__: Any) -> Grant:
            raise RuntimeError("token=hush")

    broken = Broken("https://s", "box", region="r", access_key_id="a", secret="b")
    place.open(presigner=broken)
    key, task = place.member("blue"), place.task("blue")
    answer = place.wants(key, task.id, put(own("blue", "a")))
    assert answer.json()["grants"][0]["error"]["code"] == 71
    assert "hush" not in answer.text + "".join(place.noted())
