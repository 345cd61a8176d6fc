"""Whatever arrives at the desk, the answer is an error in JSON: never a fault, never a hang.

Members sign what is sent here, unless a test says otherwise: garbage gets as far as it can.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon.deploy.desk import Desk, DeskLimits
from photon.deploy.desk_requests import caller_address
from photon.errors import ProtocolError
from photon.membership.desk_documents import GrantsBody, JoinBody, ReplyBody, TaskBody, parse_body
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask, Presence, printable
from photon.membership.roster import Facts, Roster
from photon.membership.signing import sign_request
from photon.store.presign import S3Presigner

RUN = "0" * 32
MINE = f"{RUN}/silos/blue/"
TASK = f"{RUN}/fit/1/blue"
FACTS = {
    "data_sha256": "a" * 64,
    "tokenizer_sha256": "b" * 64,
    "train_tokens": 1,
    "photon_version": "1",
}
WITHOUT_LIMITS = DeskLimits(
    joins_per_minute=10**6,
    strangers_per_minute=10**6,
    requests_per_minute=10**6,
    poll_s=0.01,
)

some = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


class Target:
    """One desk with one member, for all examples."""

    def __init__(self, folder: Path) -> None:
        self.roster = Roster(folder / "members.sqlite")
        self.key = NodeKey.create(folder / "node.key")
        token = self.roster.invite("blue", 60)
        self.roster.redeem(token, "blue", self.key.public_pem, Facts(**FACTS))
        now = time.time()
        task = OpenTask(
            *(TASK, RUN, 1, "blue", "fit", now, now + 3600, 1 << 40),
            readable=(f"{RUN}/global/",),
            writable=(f"{MINE}a", f"{MINE}chunks/{{sha256}}"),
        )
        self.roster.tasks.open(task)
        self.letter = self.roster.letters.push(TASK, b"an ask")
        presigner = S3Presigner("https://s", "box", region="r", access_key_id="a", secret="b")
        self.desk = Desk(self.roster, presigner, limits=WITHOUT_LIMITS)
        self.desk.start()
        self.client = httpx2.Client(
            base_url=f"http://127.0.0.1:{self.desk.port}", trust_env=False, timeout=20
        )

    def close(self) -> None:
        self.client.close()
        self.desk.stop()
        self.roster.close()

    def send(self, what: str, content: bytes) -> httpx2.Response:
        path = f"/photon/v2/{what}"
        headers = sign_request(self.key, "POST", path, content, now=time.time())
        return self.client.post(path, content=content, headers=headers)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("desk"))
    try:
        yield made
    finally:
        made.close()


def a_refusal(answer: httpx2.Response) -> int:
    """The status of an answer that must be an error of the caller's, in JSON."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "hint"}
    assert isinstance(error["code"], int)
    assert 0 < len(error["message"]) < 1000
    assert error["message"].isprintable()
    return answer.status_code


EVERYWHERE = pytest.mark.parametrize("what", ["join", "presence", "grants", "task", "reply"])

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=50)
    | st.sampled_from(["PUT", "GET", MINE + "a", TASK, "blue", "idle", "\ud800", "\x00", "../a"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5)
    ),
    max_leaves=20,
)


def encoded(value: Any) -> bytes:
    """JSON, also of what is none: NaN, lone surrogates."""
    return json.dumps(value).encode()


def valid(what: str, target: Target) -> dict[str, Any]:
    """A request that would be answered."""
    if what == "join":
        pem = target.key.public_pem
        return {"token": "t", "name": "blue", "public_key": pem, "facts": dict(FACTS)}
    if what == "presence":
        return {"state": "idle", "run": RUN, "round": 1, "step": 1, "of": 2, "task": TASK} | {
            "detail": "",
            "boot": "b",
        }
    if what == "task":
        return {"boot": "b", "have": ["0" * 32]}
    if what == "reply":
        answer = {"text": "YQ==", "signature": "YQ==", "fingerprint": "sha256:" + "0" * 64}
        return {"boot": "b", "letter": target.letter, "answer": answer}
    return {"task_id": TASK, "wants": [{"verb": "GET", "key": f"{RUN}/global/a"}]}


@EVERYWHERE
def test_the_valid_ones_are_answered(target: Target, what: str) -> None:
    """Or else the tests below would refuse for another reason than they mean to."""
    answer = target.send(what, encoded(valid(what, target)))
    assert answer.status_code == 200, answer.text


@EVERYWHERE
@some
@given(content=st.binary(max_size=300))
def test_bytes(target: Target, what: str, content: bytes) -> None:
    a_refusal(target.send(what, content))


@EVERYWHERE
@some
@given(value=JSON)
def test_json_of_any_shape(target: Target, what: str, value: Any) -> None:
    a_refusal(target.send(what, encoded(value)))


@EVERYWHERE
@some
@given(data=st.data())
def test_one_field_of_a_valid_request_changed(target: Target, what: str, data: Any) -> None:
    body = valid(what, target)
    place = body
    if what == "join" and data.draw(st.booleans()):
        place = body["facts"]
    if what == "grants" and data.draw(st.booleans()):
        place = body["wants"][0]
    if what == "reply" and data.draw(st.booleans()):
        place = body["answer"]
    name = data.draw(st.sampled_from(sorted(place)))
    place[name] = data.draw(JSON)
    answer = target.send(what, encoded(body))
    if answer.status_code == 200:
        # Some values are as good; but then nothing was granted beyond the task's own.
        for part in answer.json().get("grants", []):
            assert "error" in part or part["key"].startswith((f"{RUN}/global/", MINE))
    else:
        a_refusal(answer)


@some
@given(
    verb=st.sampled_from(["GET", "HEAD", "PUT"]),
    pieces=st.lists(
        st.sampled_from(
            [
                *("..", ".", "/", "//", "\\", "%2e%2e", "%2f", "\n", "\x00", "a", "A", "é", RUN),
                *("silos", "blue", "red", "global", "globals", MINE, f"{RUN}/global/"),
                *("?", "#", " ", "~", "*"),
            ]
        ),
        max_size=8,
    ),
)
def test_keys_lead_nowhere_else(target: Target, verb: str, pieces: list[str]) -> None:
    key = "".join(pieces)
    want = {"verb": verb, "key": key, "bytes": 1, "sha256": "a" * 64}
    answer = target.send("grants", encoded({"task_id": TASK, "wants": [want]}))
    assert answer.status_code == 200, answer.text
    (part,) = answer.json()["grants"]
    if "error" in part:
        assert part["error"]["code"] == 76
        return
    path = httpx2.URL(part["url"]).raw_path.decode().partition("?")[0]
    allowed = (MINE,) if verb == "PUT" else (MINE, f"{RUN}/global/")
    assert path.startswith(tuple(f"/box/{folder}" for folder in allowed))
    assert not any(trick in path for trick in ("..", "%", "\\", "//"))


@EVERYWHERE
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"[" * 20_000 + b"]" * 20_000,
        b'{"wants":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"task_id": "t", "wants": [' + b"null," * 10_000 + b"null]}",
        b'{"round": ' + b"9" * 50_000 + b"}",
        b'{"round": 1' + b"0" * 4000 + b', "state": "idle"}',
        b'{"step": 1e999999, "state": "idle"}',
        b'"' + b"\\ud800" * 1000 + b'"',
        b'{"state": "\\ud800"}',
        b'{"state": "idle", "detail": "\\udfff\\ud800"}',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b"NaN",
        b"",
        b"\x00" * 60_000,
        b'{"state": "idle", "state": "training", "x": 1}',
    ],
    ids=lambda content: f"{content[:12]!r}-{len(content)}",
)
def test_what_parsers_stumble_over(target: Target, what: str, content: bytes) -> None:
    start = time.monotonic()
    a_refusal(target.send(what, content))
    assert time.monotonic() - start < 10


HEADER_NAMES = ["photon-key", "photon-time", "photon-nonce", "photon-signature"]


@some
@given(data=st.data())
def test_headers_of_a_signature_changed(target: Target, data: Any) -> None:
    body = encoded({"state": "idle"})
    path = "/photon/v2/presence"
    made = sign_request(target.key, "POST", path, body, now=time.time())
    signed = {name.lower(): value for name, value in made.items()}
    assert set(signed) == set(HEADER_NAMES)
    name = data.draw(st.sampled_from(HEADER_NAMES))
    text = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))
    new = data.draw(text | st.sampled_from(["", "0", "1e400", "inf", "-1", "9" * 400]))
    if new.strip() == signed[name]:
        return
    signed[name] = new
    headers = [(key.encode(), value.encode("latin-1")) for key, value in signed.items()]
    answer = target.client.post(path, content=body, headers=headers)
    assert a_refusal(answer) in (401, 403)


@some
@given(noise=st.binary(min_size=1, max_size=200))
def test_bytes_that_are_no_http(target: Target, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", target.desk.port), timeout=10) as line:
        line.sendall(noise + b"\r\n\r\n")
        line.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer


def test_headers_without_end(target: Target) -> None:
    with socket.create_connection(("127.0.0.1", target.desk.port), timeout=10) as line:
        sent, answer = 0, b""
        try:
            line.sendall(b"GET /photon/v2/health HTTP/1.1\r\n")
            while sent < 8 << 20:
                line.sendall(b"x-a: " + b"a" * 8000 + b"\r\n")
                sent += 8007
            answer = line.recv(100)
        except OSError:
            pass
    assert sent < 8 << 20 or answer.startswith(b"HTTP/1.1 4")


def test_it_is_there_still(target: Target) -> None:
    """After all of the above: and nothing of it was the desk's own fault."""
    assert target.client.get("/photon/v2/health").status_code == 200
    assert target.send("presence", encoded({"state": "idle"})).status_code == 200
    assert target.desk.alive
    assert not any("log says why" in one.detail for one in target.roster.journal.events(20_000))
    assert [member.name for member in target.roster.members()] == ["blue"]


# --- without HTTP: many more examples ---


@settings(max_examples=400)
@given(content=st.binary(max_size=200) | JSON.map(encoded))
def test_parsing(content: bytes) -> None:
    for kind in (JoinBody, Presence, GrantsBody, TaskBody, ReplyBody):
        with pytest.raises(ProtocolError) as caught:
            parse_body(kind, content)
        assert len(caught.value.message) < 600
        assert caught.value.message.isprintable()


@given(secret=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=12))
def test_complaints_quote_no_value(secret: str) -> None:
    for body in ({"token": {"x": secret}}, {"token": secret + "\n"}, {"name": [secret]}, [secret]):
        with pytest.raises(ProtocolError) as caught:
            parse_body(JoinBody, encoded(body))
        assert secret not in str(caught.value)


@given(text=st.text())
def test_text_of_strangers_moves_no_cursor(text: str) -> None:
    assert printable(text).isprintable()
    assert len(printable(text)) == len(text)


@given(peer=st.none() | st.text(), forwarded=st.none() | st.text())
def test_any_address(peer: str | None, forwarded: str | None) -> None:
    assert caller_address(peer, forwarded).isprintable()
