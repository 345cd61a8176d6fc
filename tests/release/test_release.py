"""`photon release` and `photon verify`: whatever was changed is named, whoever signed it anew."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served_in_process import SMALL, Served

from photon import products
from photon.link import TensorFile, write_tensors
from photon.membership.audit import AuditLog
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.verification import verify_audit
from photon.release.check import digests_in, verify_release
from photon.release.statement import sign_files
from photon.runs.notary import Notary


def aggregator(served):
    return NodeKey.load(served.folder.parent / "home" / AGGREGATOR_KEY_FILE)


def sign_again(folder, key):
    """As somebody would who has that key and changed something."""
    (folder / "signer.pem").write_text(key.public_pem)
    (folder / "model.sig").write_bytes(sign_files(key, "test", digests_in(folder)))


def change_manifest(folder, **fields):
    told = json.loads((folder / "release.json").read_text())
    (folder / "release.json").write_text(json.dumps(told | fields))


def problem(folder):
    """The only one."""
    (found,) = verify_release(folder).problems
    return found


# --- what is good -------------------------------------------------------------------------------


def test_a_served_release_is_followed_back_to_every_update(photon, releases, served):
    told = json.loads(photon("verify", releases["serve"], "--json").stdout)
    assert told["ok"]
    assert told["known"] is None
    assert told["signer"] == aggregator(served).fingerprint
    lines = served.lines()
    assert [one["round"] for one in told["rounds"]] == [1, 2, 3]
    for one in told["rounds"]:
        line = lines[one["line"] - 1]
        replies = [json.loads(part["reply"]) for part in line["body"]["merged"]]
        assert line["body"]["round"] == one["round"]
        assert one["updates"] == [
            {
                "silo": reply["silo"],
                "update": reply["fit"]["update"]["sha256"],
                "key": served.silos[reply["silo"]].key.fingerprint,
            }
            for reply in replies
        ]
    first = json.loads(lines[told["rounds"][0]["line"] - 1]["body"]["merged"][0]["reply"])
    assert told["began_from"] == first["state"]
    keys = {silo.key.fingerprint: name for name, silo in served.silos.items()}
    assert told["members"] == keys
    assert told["cards"] == {"cards/blue.toml": "blue", "cards/red.toml": None}
    weights = json.loads((served.folder / "summary.json").read_text())["weights_sha256"]
    assert told["manifest"]["weights_sha256"] == weights
    shown = photon("verify", releases["serve"]).output
    assert "intact, signer unknown" in shown
    assert "round 1 (log line 5) <- 3 updates <- blue, green, red" in shown


def test_a_key_makes_the_signer_known(photon, releases, served, stranger):
    right = aggregator(served).fingerprint
    shown = photon("verify", releases["serve"], "--key", right).output
    assert f"intact, signed by {right}" in shown
    shown = photon("verify", releases["serve"], "--key", stranger.fingerprint, code=84).output
    assert f"not by {stranger.fingerprint}" in shown
    assert "intact" not in shown
    photon("verify", releases["serve"], "--key", "sha256:5", code=2)


def test_a_simulated_release_says_what_it_can_prove(photon, releases):
    shown = photon("verify", releases["simulate"]).output
    assert "no silo signed anything" in shown
    assert "round 3 <- 3 updates <- blue, green, red" in shown
    told = json.loads((releases["simulate"] / "release.json").read_text())
    assert told["log"] is None


def test_the_signature_is_in_the_published_format(releases):
    """Read once more by hand, as docs/release.md has it; `model_signing verify key` does so."""
    folder = releases["serve"]
    bundle = json.loads((folder / "model.sig").read_bytes())
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    pem = (folder / "signer.pem").read_bytes()
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    assert hint == hashlib.sha256(pem).hexdigest()
    envelope = bundle["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    kind = b"application/vnd.in-toto+json"
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    public = load_pem_public_key(pem)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, pae, ec.ECDSA(hashes.SHA384()))
    statement = json.loads(payload)
    assert statement["predicateType"] == "https://model_signing/signature/v1.0"
    resources = statement["predicate"]["resources"]
    files = {one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()}
    assert {one["name"] for one in resources} == files - {"model.sig"}
    whole = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in resources))
    assert statement["subject"][0]["digest"] == {"sha256": whole.hexdigest()}


# --- what was changed ---------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["serve", "simulate"]))
def test_whatever_is_changed_is_named(releases, tmp_path, data, kind):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(releases[kind], folder)
    names = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
    name = other = data.draw(st.sampled_from(names))
    file = folder / name
    raw = file.read_bytes()
    match data.draw(
        st.sampled_from(["flip", "flip", "flip", "cut", "more", "delete", "add", "swap"])
    ):
        case "flip":
            place = data.draw(st.integers(0, len(raw) - 1))
            bit = 1 << data.draw(st.integers(0, 7))
            file.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
        case "cut":
            file.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        case "more":
            file.write_bytes(raw + data.draw(st.binary(min_size=1, max_size=9)))
        case "delete":
            file.unlink()
        case "add":
            file = file.with_name(
                data.draw(st.sampled_from([".gitattributes", "x", "model-2.bin"]))
            )
            file.write_bytes(data.draw(st.binary(max_size=9)))
            name = other = file.relative_to(folder).as_posix()
        case "swap":
            other = data.draw(st.sampled_from([one for one in names if one != name]))
            file.write_bytes((folder / other).read_bytes())
            (folder / other).write_bytes(raw)
    found = verify_release(folder).problems
    without = {name, other} & {"model.sig", "signer.pem"}  # nothing can be judged without these
    named = {one for one in {name, other} if any(one in text for text in found)}
    assert named & without if without else named == {name, other}, found


def test_two_lines_of_the_log_that_change_places_are_named(copy):
    file = copy() / "audit.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
    found = verify_release(file.parent).problems
    assert found[0].startswith("audit.jsonl: the file was changed")
    assert any(text.startswith("audit.jsonl line 4: ") for text in found)


@pytest.mark.parametrize("name", ["model.safetensors", "cards", "audit.jsonl", "signer.pem"])
def test_links_and_pipes_are_not_followed(copy, releases, name):
    folder = copy()
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(folder.parent / "moved")
    os.mkfifo(folder / "pipe")
    found = verify_release(folder).problems
    assert any(text.startswith(name) for text in found)
    if name != "signer.pem":
        assert "pipe: the file is not of this release" in found


def test_no_release_is_said(photon, simulated, tmp_path):
    assert "no release in" in photon("verify", simulated, code=42).output
    assert "no release in" in photon("verify", tmp_path / "nowhere", code=42).output


# --- signed anew by somebody --------------------------------------------------------------------


def test_a_stranger_can_not_sign_another_models_history(copy, stranger):
    folder = copy()
    with TensorFile(folder / "model.safetensors") as file:
        tensors = file.read()
    next(iter(tensors.values())).view(-1)[0] += 1
    write_tensors(folder / "model.safetensors", tensors)
    sign_again(folder, stranger)
    found = verify_release(folder).problems
    assert found[0].startswith("audit.jsonl: another key signed it than the release: sha256:")
    assert found[1] == "*.safetensors: not the weights that release.json has the sha256 of"


def test_the_aggregator_can_not_release_other_weights_than_its_log_has(copy, served):
    folder = copy()
    with TensorFile(folder / "model.safetensors") as file:
        tensors = file.read()
    next(iter(tensors.values())).view(-1)[0] += 1
    write_tensors(folder / "model.safetensors", tensors)
    with TensorFile(folder / "model.safetensors") as file:
        change_manifest(folder, weights_sha256=file.sha256())
    sign_again(folder, aggregator(served))
    assert (
        problem(folder) == "audit.jsonl line 7: the run had other weights after the released round"
    )


def test_a_log_that_was_cut_or_is_another_runs_is_named(copy, served, tmp_path):
    folder, key = copy(), aggregator(served)
    log = folder / "audit.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    sign_again(folder, key)
    assert "its head is not the one that was released" in problem(folder)
    log.unlink()
    sign_again(folder, key)
    assert problem(folder) == "audit.jsonl: it must tell of rounds 1 to 3, each once"
    other = AuditLog(tmp_path / "other.jsonl", key)
    other.append("note", {})
    shutil.copyfile(other.path, log)
    head = {"lines": 2, "head": other.head, "root": verify_audit(log).root}
    change_manifest(folder, log=head)
    sign_again(folder, key)
    found = verify_release(folder).problems
    assert found[0] == "audit.jsonl: it is not one served run's, up to the released round 3"


def test_a_card_that_its_silo_did_not_sign_so_is_named(copy, served, stranger):
    folder = copy()
    card = folder / "cards" / "blue.toml"
    card.write_text('title = "green"\n')
    sign_again(folder, aggregator(served))
    assert problem(folder) == "cards/blue.toml.sig: no key in the log signed this card so"
    for text in ("", "[]", '{"public_key": 5}', json.dumps({"public_key": stranger.public_pem})):
        (folder / "cards" / "blue.toml.sig").write_text(text)
        sign_again(folder, aggregator(served))
        assert problem(folder).startswith("cards/blue.toml.sig: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "{}",
        "[" * 100_000,
        '{"kind": "serve", "round": "3"}',
        '{"kind": [], "round": 3}',
    ],
)
def test_any_manifest_that_somebody_signed_is_judged(copy, stranger, text):
    folder = copy("simulate")
    (folder / "release.json").write_text(text)
    sign_again(folder, stranger)
    found = verify_release(folder).problems
    assert found[0].startswith(("release.json: ", "audit.jsonl: "))


@pytest.mark.parametrize("field", ["kind", "name", "round", "weights_sha256", "beside", "log"])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.none()
    | st.integers()
    | st.text(max_size=5)
    | st.lists(st.integers() | st.lists(st.none()), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
def test_any_field_of_a_manifest_is_judged(releases, tmp_path, stranger, field, value):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(releases["simulate"], folder)
    change_manifest(folder, **{field: value})
    sign_again(folder, stranger)
    report = verify_release(folder)
    assert all(text.isprintable() for text in (*report.problems, *report.remarks))


# --- `photon release` ---------------------------------------------------------------------------


def test_it_holds_the_model_and_its_history(releases, served, simulated):
    names = {kind: {one.name for one in folder.iterdir()} for kind, folder in releases.items()}
    both = {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "model.sig",
        "release.json", "run.toml", "signer.pem", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert names == {
        "serve": both | {"audit.jsonl", "cards"},
        "simulate": both | {"events.jsonl"},
    }
    log = (releases["serve"] / "audit.jsonl").read_bytes()
    assert log == (served.folder / "audit.jsonl").read_bytes()
    for folder in releases.values():
        texts = [one.read_bytes() for one in folder.rglob("*") if one.is_file()]
        assert not any(
            str(simulated.parents[2]).encode() in text for text in texts
        )  # no place here
        assert not any(b"PRIVATE KEY" in text for text in texts)


def test_a_key_of_ones_own_is_made_once_and_said(photon, simulated, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = photon("release", simulated, "--out", tmp_path / "one").output
    key = tmp_path / ".config" / "photon" / "release.key"
    assert "makes a new key" in shown
    fingerprint = NodeKey.load(key).fingerprint
    assert fingerprint in shown
    shown = photon("release", simulated, "--out", tmp_path / "two").output
    assert "makes a new key" not in shown
    photon("verify", tmp_path / "two", "--key", fingerprint)
    assert (
        "already exists" in photon("release", simulated, "--out", tmp_path / "two", code=30).output
    )


def test_a_served_run_is_released_by_its_aggregator_only(photon, served, stranger, tmp_path):
    out = tmp_path / "out"
    stranger_key = tmp_path / "key"
    shown = photon("release", served.folder, "--out", out, "--key", stranger_key, code=84).output
    assert "another key signed it than the release" in shown
    assert not out.exists()
    assert [one.name for one in tmp_path.iterdir()] == ["key"]


def test_a_run_that_went_on_meanwhile_is_not_released(photon, simulated, tmp_path, monkeypatch):
    real = products.export

    def older(run, out, **others):
        made = real(run, out, **others)
        file = made / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        return made

    monkeypatch.setattr(products, "export", older)
    shown = photon("release", simulated, "--out", tmp_path / "o", "--key", tmp_path / "k", code=40)
    assert "is not that of round-000003" in shown.output
    assert not (tmp_path / "o").exists()


def test_a_run_without_a_round_has_nothing_to_release(photon, tmp_path):
    photon("release", tmp_path, "--out", tmp_path / "o", "--key", tmp_path / "k", code=42)


def test_the_log_notes_the_weights_of_each_round(served):
    told = [line["body"] for line in served.lines() if line["kind"] == "round"]
    summary = json.loads((served.folder / "summary.json").read_text())
    assert told[-1]["weights_sha256"] == summary["weights_sha256"]
    assert len({one["weights_sha256"] for one in told}) == 3
    assert AuditLog(served.folder / "audit.jsonl").head == served.lines()[-1]["sha256"]


def test_an_earlier_photons_log_is_released_with_a_note(
    photon, three_silos, make_config, tmp_path, monkeypatch
):
    """Whose rounds have no hash of the weights."""
    real = Notary._state_sha256

    def earlier(self, number, section=""):
        return None if section else real(self, number)

    monkeypatch.setattr(Notary, "_state_sha256", earlier)
    run = Served(make_config(three_silos, *SMALL, "federation.rounds=1"), tmp_path)
    run.go_on()
    run.roster.close()
    photon("release", run.folder, "--out", tmp_path / "out")
    assert "which did not note the weights" in photon("verify", tmp_path / "out").output
