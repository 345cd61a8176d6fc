"""Is a release what was signed, and what does it come from? Everything from its folder alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from photon.errors import AuditError, MembershipError, PhotonError, RunNotFoundError, some
from photon.membership.audit import AUDIT_FILE
from photon.membership.keys import fingerprint_of
from photon.membership.records import printable
from photon.membership.signing import signer_of
from photon.membership.verification import AuditReport, verify_audit
from photon.release.statement import SIGNATURE_FILE, signed_files
from photon.store.disk import file_sha256
from photon.telemetry import read_history
from photon.telemetry.events import RoundMerged

MANIFEST_FILE, KEY_FILE, EVENTS_FILE, CARDS = "release.json", "signer.pem", "events.jsonl", "cards"

#: safetensors says F32 where torch says float32.
_KINDS = {"F": "float", "I": "int", "U": "uint", "B": "bool"}


@dataclass
class ReleaseReport:
    """What `verify_release` found.

    Attributes:
        manifest: release.json (docs/release.md); empty if it can't be trusted.
        signer: fingerprint of the key that signed; `known` as the one that was asked for, if so.
        files: path -> sha256, as signed.
        rounds: {"round", "line" of the log, "updates": [{"silo", "update", "key"}]}; of a run that
            was not served, rounds and silos only. They began from a state as silos signed it.
        members: fingerprint -> name, as the log has them.
        cards: path -> name of the silo whose key signed it; None: only the release's did.
        problems, remarks: what must not be; what is worth knowing.
    """

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    signer: str | None = None
    known: bool | None = None
    files: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    began_from: str | None = None
    members: dict[str, str] = field(default_factory=dict)
    cards: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def wrong(self, name: str, what: str) -> None:
        self.problems.append(printable(f"{name}: {what}"))

    def require_good(self) -> None:
        """Raises AuditError if there are problems; names the first."""
        if self.problems:
            text = f"{self.path}: {self.problems[0]} ({len(self.problems)} in all)"
            raise AuditError(text, hint="Not what was signed: get it again; use nothing of it.")


def verify_release(
    folder: str | Path, key: str | None = None, on_bytes: Callable[[int], None] = lambda _: None
) -> ReleaseReport:
    """Check every file, the signature, the log, the weights' way into it, and the cards.

    Args:
        key: fingerprint that the signer must have.
        on_bytes: is told how many were read, again and again.

    Raises:
        RunNotFoundError: there is no release.
        OSError: a file can't be read. What is wrong in it is in the report.
    """
    path = Path(folder)
    if not (path / SIGNATURE_FILE).exists() and not (path / MANIFEST_FILE).exists():
        text = f"no release in {path}: neither {SIGNATURE_FILE} nor {MANIFEST_FILE} is there"
        raise RunNotFoundError(text, hint="Name a folder that `photon release` made, or a copy.")
    report = ReleaseReport(path)
    found = digests_in(path, on_bytes)
    _check_signature(report, key)
    for name in sorted(report.files.keys() | found.keys()) if report.signer else ():
        if found.get(name) != report.files.get(name):
            lost, added = name not in found, name not in report.files
            what = "is missing" if lost else "is not of this release" if added else "was changed"
            report.wrong(name, f"the file {what}")
    whole, log = not report.problems, None
    if found.get(AUDIT_FILE):
        log = verify_audit(path / AUDIT_FILE)
        report.problems += [text.replace(f"{log.path}", AUDIT_FILE) for text in log.problems]
    if whole:
        try:
            report.manifest = json.loads((path / MANIFEST_FILE).read_bytes())
            _check_history(report, log)
            _check_weights(report)
            _check_cards(report, log)
        except (OSError, ValueError, LookupError, TypeError, RecursionError, PhotonError) as error:
            report.wrong(MANIFEST_FILE, f"signed, but it can't be true: {str(error)[:300]}")
    return report


def digests_in(folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """sha256 by path of all files but the signature; "" of what is no plain file."""
    digests = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            digests[name] = ""
        elif path.is_file() and name != SIGNATURE_FILE:
            digests[name] = file_sha256(path)
            on_bytes(path.stat().st_size)
    return digests


def _check_signature(report: ReleaseReport, key: str | None) -> None:
    key_file, signature_file = report.path / KEY_FILE, report.path / SIGNATURE_FILE
    for path in (key_file, signature_file):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 28:
            return report.wrong(path.name, "the file is missing, or is none")
    name = KEY_FILE
    try:
        pem = key_file.read_bytes().decode("ascii")
        signer, name = fingerprint_of(pem), f"{SIGNATURE_FILE} or {KEY_FILE}"
        report.files = signed_files(signature_file.read_bytes(), pem)
    except (UnicodeError, MembershipError) as error:
        return report.wrong(name, getattr(error, "message", "the file was changed"))
    report.signer, report.known = signer, None if key is None else key == signer
    if report.known is False:
        report.wrong(SIGNATURE_FILE, f"signed by the key {signer}, not by {key}")
    return None


def _check_history(report: ReleaseReport, log: AuditReport | None) -> None:
    """Follow the rounds: in the log that is signed, or in a run's own events."""
    served, last = report.manifest["kind"] == "serve", report.manifest["round"]
    if log is None:
        for event in read_history(report.path).of(RoundMerged) if not served else ():
            updates = [{"silo": silo} for silo in event.participants]
            report.rounds.append({"round": event.round, "updates": updates})
        numbers = [one["round"] for one in report.rounds]
        if numbers != list(range(1, len(numbers) + 1)) or len(numbers) != last:
            name = AUDIT_FILE if served else EVENTS_FILE
            report.wrong(name, f"it must tell of rounds 1 to {last}, each once")
        return
    report.began_from = log.began_from
    report.members = {mark: one.name for mark, one in log.keys.items()}
    weights, where = None, AUDIT_FILE
    for line, one in log.trace.items():
        weights, where = one.weights_sha256, f"{AUDIT_FILE} line {line}"
        updates = [{"silo": u.silo, "update": u.update, "key": u.fingerprint} for u in one.merged]
        report.rounds.append({"round": one.round, "line": line, "updates": updates})
    if report.manifest["log"] != {"lines": log.lines, "head": log.head, "root": log.root}:
        report.wrong(AUDIT_FILE, "its head is not the one that was released: lines were cut off")
    elif len({one.run for one in log.trace.values()}) != 1 or log.last_round != last or not served:
        report.wrong(AUDIT_FILE, f"it is not one served run's, up to the released round {last}")
    elif log.aggregator != report.signer:
        report.wrong(AUDIT_FILE, f"another key signed it than the release: {log.aggregator}")
    elif weights is None:
        told = "is an earlier Photon's, which did not note the weights: only the release's signer"
        report.remarks.append(f"{AUDIT_FILE} {told} says that they are those of the last round")
    elif weights != report.manifest["weights_sha256"]:
        report.wrong(where, "the run had other weights after the released round")


def _check_weights(report: ReleaseReport) -> None:
    files, beside = sorted(report.path.glob("*.safetensors")), report.manifest["beside"]
    if weights_sha256(files, without=beside)[0] != report.manifest["weights_sha256"]:
        report.wrong("*.safetensors", f"not the weights that {MANIFEST_FILE} has the sha256 of")
    if beside:
        report.remarks.append(printable(f"not merged, so not in the run's hash: {some(beside)}"))


def _check_cards(report: ReleaseReport, log: AuditReport | None) -> None:
    """A card NAME.toml may have a silo's signature beside it, NAME.toml.sig."""
    cards = [name for name in report.files if name.startswith(f"{CARDS}/")]
    for name in [name for name in cards if name.endswith(".toml")]:
        report.cards[name] = None
        if log is None or f"{name}.sig" not in cards:
            continue
        signer = log.keys.get(signer_of(report.path / name)[0] or "")
        if signer is None:
            report.wrong(f"{name}.sig", "no key in the log signed this card so")
        report.cards[name] = signer and signer.name


def weights_sha256(
    files: Collection[Path], prefix: str = "", without: Collection[str] = ()
) -> tuple[str, set[str]]:
    """As photon.link.tensors_sha256 of the tensors in all files, without torch, and their names.

    Names with that prefix count; it is taken off. ValueError: a file can't be read, or holds
    what this hash is not made for.
    """
    digest, found = hashlib.sha256(), dict[str, tuple[Any, str]]()
    try:
        for path in files:
            file: Any = safe_open(path, framework="numpy")
            mine = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name.removeprefix(prefix): (file, name) for name in mine}
        names = found.keys() - set(without)
        for name in sorted(names):
            file, full = found[name]
            told, values = file.get_slice(full), file.get_tensor(full)
            kind = _KINDS[told.get_dtype()[0]] + told.get_dtype().lstrip("FIUBOL")
            digest.update(f"{name} torch.{kind} {tuple(told.get_shape())}\n".encode())
            digest.update(values.reshape(-1).data)
    except (OSError, SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"the weights can't be read: {error}") from error
    return digest.hexdigest(), names
