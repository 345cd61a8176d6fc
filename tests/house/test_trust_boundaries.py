"""Every document that comes from outside: read as it was meant, or refused in words, nothing else.

Bodies of desk requests as a running desk meets them: tests/deploy/test_desk_fuzz.py. Replies and
manifests in a round: tests/engines/test_hostile_documents.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import tomli_w
from extremes import examples, spoiled
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from photon.config import load_node_config, load_run_config
from photon.config.node import NodeConfig
from photon.config.run import RunConfig
from photon.deploy.certificates import make_authority
from photon.errors import ConfigError, InvitationError, PhotonError, ProtocolError
from photon.federation.envelopes import (
    Ask,
    FitAnswer,
    FitPart,
    Reply,
    RunPart,
    dictated,
    encoded,
    node_config,
    parse_ask,
    parse_reply,
)
from photon.federation.norm_bound import lr_sum
from photon.federation.tasks import StateRef
from photon.link import Ref
from photon.membership.desk_documents import GrantsBody, JoinBody, ReplyBody, TaskBody, parse_body
from photon.membership.invitation import (
    Invitation,
    SharedTokenizer,
    certificate_fingerprint,
    read_invitation,
    write_invitation,
)
from photon.membership.keys import NodeKey
from photon.membership.records import Presence
from photon.silo.policy import check

SHA256, RUN_ID = "a" * 64, "0" * 32
REF = Ref(key="run/silos/red/a.json", bytes=10, sha256=SHA256, payload_bytes=10)


@pytest.fixture(scope="module")
def ask(make_config, three_silos) -> Ask:
    run = RunPart(
        id=RUN_ID,
        silos=["red", "blue", "green"],
        config=dictated(make_config(three_silos)),
        model=SHA256,
        tokenizer=SHA256,
        vocab_size=300,
        eos_id=0,
    )
    return Ask(
        photon_version="1",
        kind="fit",
        silo="red",
        run=run,
        state=StateRef(round=0, sha256=SHA256, whole=REF),
        fit=FitPart(round=1, global_step=0, steps=4),
        log_head=SHA256,
        within_s=60.0,
    )


@pytest.fixture(scope="module")
def reply(ask) -> Reply:
    return Reply(
        photon_version="1",
        kind="fit",
        silo="red",
        ask=ask.sha256,
        log_head=SHA256,
        run=RUN_ID,
        round=1,
        task=ask.task_id,
        state=SHA256,
        fit=FitAnswer(update=REF, tokens=8, loss=2.0, train_s=1.0),
    )


def numbers(value: Any) -> list[float]:
    """All of a document, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def require_words(error: PhotonError) -> None:
    """For the screen of who sees it: short, one line each, nothing that moves a cursor."""
    for text in (error.message, error.hint or "x"):
        assert 0 < len(text) < 5000
        assert text.replace("\n", " ").isprintable(), text


@examples(150)
@given(data=st.data())
def test_asks(ask, three_silos, data):
    content = json.dumps(data.draw(spoiled(Ask, ask.model_dump(mode="json")))).encode()
    policy = NodeConfig(data={"path": "x"}).policy
    try:
        found = parse_ask(content)
        assert all(math.isfinite(number) for number in numbers(found.model_dump()))
        assert parse_ask(encoded(found)) == found
        config = node_config(found.run, {"compute": {}, "data": {"path": str(three_silos)}})
        check(found, config, policy, config.privacy)
    except PhotonError as error:
        require_words(error)


@examples(150)
@given(data=st.data())
def test_replies(reply, data):
    content = json.dumps(data.draw(spoiled(Reply, reply.model_dump(mode="json")))).encode()
    try:
        found = parse_reply(content)
    except ProtocolError as error:
        require_words(error)
    else:
        assert all(math.isfinite(number) for number in numbers(found.model_dump()))
        assert parse_reply(encoded(found)) == found
        if found.fit is not None:
            receipt = found.fit.receipt(found.round, found.silo)
            assert math.isfinite(sum(vars(receipt.times).values(), receipt.train_s))


@dataclass(frozen=True)
class Body:
    kind: type
    valid: dict[str, Any]


FACTS = {"data_sha256": SHA256, "tokenizer_sha256": SHA256, "train_tokens": 1}
BODIES = [
    Body(
        JoinBody,
        {"token": "t", "name": "red", "public_key": "k", "facts": FACTS | {"photon_version": "1"}},
    ),
    Body(Presence, {"state": "idle", "run": RUN_ID, "round": 1, "detail": "well"}),
    Body(GrantsBody, {"task_id": "t", "wants": [{"verb": "GET", "key": "a"}]}),
    Body(TaskBody, {"boot": "b", "have": ["0" * 32]}),
    Body(ReplyBody, {"boot": "b", "letter": "0" * 32, "words": "away"}),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.kind.__name__)
@examples(60)
@given(data=st.data())
def test_what_members_ask_of_the_desk(body, data):
    content = json.dumps(data.draw(spoiled(body.kind, body.valid))).encode()
    try:
        found = parse_body(body.kind, content)
    except ProtocolError as error:
        require_words(error)
    else:
        told = TypeAdapter(body.kind).dump_python(found)
        assert all(math.isfinite(number) for number in numbers(told))
        if isinstance(found, Presence):
            assert found.detail.isprintable()


class _Tokenizer(BaseModel):
    sha256: str
    eos_token: str
    zstd_base64: str


class _Invitation(BaseModel):
    """As the file has it: there is no model, as it is TOML for people."""

    photon_invitation: int
    name: str
    host: str
    port: int
    expires_at: str
    token: str
    ca_fingerprint: str
    ca_pem: str
    aggregator_key: str
    key_fingerprint: str
    tokenizer: _Tokenizer


@pytest.fixture(scope="module")
def invitation(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("invitation")
    ca_pem = make_authority(folder).read_text()
    json_file = b'{"version": "1.0"}'
    made = Invitation(
        name="red",
        host="ai.example.org",
        port=443,
        ca_pem=ca_pem,
        ca_fingerprint=certificate_fingerprint(ca_pem),
        token="t" * 40,
        expires_at=datetime(2030, 1, 1, tzinfo=UTC).timestamp(),
        aggregator_key=NodeKey.create(folder / "key").public_pem,
        tokenizer=SharedTokenizer(hashlib.sha256(json_file).hexdigest(), "<end>", json_file),
    )
    write_invitation(folder / "red.toml", made)
    return tomllib.loads((folder / "red.toml").read_text())


@examples(100)
@given(data=st.data())
def test_invitations(invitation, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "spoiled.toml"
    try:
        file.write_text(tomli_w.dumps(without_none(data.draw(spoiled(_Invitation, invitation)))))
    except (TypeError, ValueError):  # no TOML could say it
        return
    try:
        found = read_invitation(file)
    except InvitationError as error:
        require_words(error)
    else:
        assert math.isfinite(found.expires_at)
        assert found.address.isprintable()


@pytest.mark.parametrize(
    ("kind", "load"), [(RunConfig, load_run_config), (NodeConfig, load_node_config)]
)
@examples(120)
@given(data=st.data())
def test_run_and_node_files(kind, load, make_config, three_silos, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "spoiled-run.toml"
    valid: dict[str, Any] = {"data": {"path": str(three_silos)}}
    if kind is RunConfig:
        valid = make_config(three_silos).model_dump(mode="json", exclude_none=True)
    try:
        file.write_text(tomli_w.dumps(without_none(data.draw(spoiled(kind, valid)))))
    except (TypeError, ValueError):
        return
    try:
        found = load(file)
    except ConfigError as error:
        require_words(error)
    else:
        assert all(math.isfinite(number) for number in numbers(found.model_dump()))
        if isinstance(found, RunConfig) and found.local.steps <= 10_000:
            assert math.isfinite(lr_sum(found, 0))


def without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value if inner is not None]
    return value
