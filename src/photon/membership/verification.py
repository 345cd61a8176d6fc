"""Is a run's audit log true? Every link, every signature, one state a round, no update twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from photon.errors import AuditError, MembershipError, RunNotFoundError, first_fault
from photon.membership.audit import (
    AGGREGATOR,
    ASKED,
    AUDIT_FILE,
    DAMAGE_HINT,
    LOST,
    MEMBER,
    RESUMED,
    ROUND,
    TORN,
    AggregatorRecord,
    LostRecord,
    MergedUpdate,
    ResumedRecord,
    RoundRecord,
)
from photon.membership.chain import BEGINNING, Chain, raw_lines
from photon.membership.keys import fingerprint_of
from photon.membership.records import Signer
from photon.membership.signing import LOG, RECEIPT, verify_document

_MOST_PROBLEMS = 100


@dataclass
class AuditReport:
    """What `verify_audit` found.

    Attributes:
        lines: whole lines.
        rounds: that count, without those that a restart took back.
        updates: merged in those.
        last_round: the newest one; 0 if there is none.
        aggregator: fingerprint of the key that signed the last line; None: it is not signed. Silos
            compare it with the one that they pinned.
        members: name -> fingerprint of the key recorded last. Silos compare it with their own.
        keys: fingerprint -> whose it is or was.
        trace: line -> a round that counts, without the texts of replies; in order.
        began_from: state before the first round, as silos signed it.
        root: Merkle root of all lines (photon.membership.merkle); None if one is wrong.
        head: sha256 of the last line: whoever keeps it can tell later that nothing before it
            changed, and that it was not cut off.
        problems: what must not be; empty if all is well. The first hundred.
        remarks: what is worth knowing, and no problem.
    """

    path: Path
    lines: int = 0
    rounds: int = 0
    updates: int = 0
    last_round: int = 0
    aggregator: str | None = None
    members: dict[str, str] = field(default_factory=dict)
    keys: dict[str, Signer] = field(default_factory=dict)
    trace: dict[int, RoundRecord] = field(default_factory=dict)
    began_from: str | None = None
    root: str | None = None
    head: str = BEGINNING
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def require_good(self) -> None:
        """Raises:
        AuditError: there are problems; names the first.
        """
        if self.problems:
            more = len(self.problems) - 1
            others = f" (and {more} more)" if more else ""
            raise AuditError(f"{self.problems[0]}{others}", hint=DAMAGE_HINT)


def verify_audit(path: str | os.PathLike[str], *, head: str | None = None) -> AuditReport:
    """Check every link, every signature, one state a round, and that no update counts twice.

    Args:
        path: the log, or a run folder.
        head: sha256 of a line that must be there: the head noted at an earlier time.

    Raises:
        RunNotFoundError: there is no log.
        AuditError: it can't be read. Whatever is wrong inside it is in the report.
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    file = path / AUDIT_FILE if folder else path
    report = AuditReport(file)
    story = _Story(report)
    seen_head = head is None
    chain = Chain()
    try:
        with file.open("rb") as lines:
            for raw in raw_lines(lines):
                if not raw.endswith(b"\n"):
                    report.remarks.append(
                        f"{file}: the last line is cut short ({len(raw)} bytes); it was never "
                        "acknowledged, and is removed when the run is resumed"
                    )
                    break
                report.lines += 1
                where = f"{file} line {report.lines}"
                try:
                    record = chain.next(raw)
                except ValueError as error:
                    _add(report.problems, f"{where}: {error}")
                    record = chain.skip(raw)
                else:
                    seen_head = seen_head or record["sha256"] == head
                if record is not None:
                    story.tell(where, record)
    except FileNotFoundError:
        raise RunNotFoundError(
            f"there is no {file}",
            hint="Name the run folder of a run that `photon serve` made, or its audit.jsonl.",
        ) from None
    except OSError as error:
        raise AuditError(f"can't read {file}: {error.strerror}") from error
    if not seen_head:
        _add(report.problems, f"{file}: no line has the sha256 {head!r}")
    report.head, report.root = chain.head, chain.root
    story.finish()
    if folder is not None:
        story.compare_with(folder / "checkpoints")
    return report


class _Story:
    """What the records say, one after another, and whether it can be true."""

    def __init__(self, report: AuditReport) -> None:
        self._report = report
        self._keys: dict[tuple[str, str], Signer] = {}  # by name and fingerprint
        #: By run and number: its line, and the record without texts of replies.
        self._rounds: dict[str, dict[int, tuple[int, RoundRecord]]] = {}
        self._after: dict[str, int] = {}  # the round that a run stands after
        #: By run and round: the state that it led to, where told.
        self._states: dict[str, dict[int, str | None]] = {}
        #: By run, silo and round of the task: the round that merged it.
        self._counted: dict[tuple[str, str, int], int] = {}
        self._heads = {BEGINNING}
        self._signer: AggregatorRecord | None = None

    def tell(self, where: str, record: dict[str, Any]) -> None:
        self._tell(where, record)
        self._signed_line(where, record)
        self._heads.add(record["sha256"])

    def _tell(self, where: str, record: dict[str, Any]) -> None:
        kinds: dict[str, tuple[type[BaseModel] | type[Signer], Callable[[str, Any], None]]] = {
            AGGREGATOR: (AggregatorRecord, self._aggregator),
            MEMBER: (Signer, self._member),
            ROUND: (RoundRecord, self._round),
            LOST: (LostRecord, self._lost),
            RESUMED: (ResumedRecord, self._resumed),
            ASKED: (ResumedRecord, self._asked),
        }
        if record["kind"] == TORN:
            _add(self._report.remarks, f"{where}: a line cut short was removed before it")
        if record["kind"] not in kinds:
            return
        kind, told = kinds[record["kind"]]
        try:
            body = TypeAdapter(kind).validate_python(record["body"])
        except ValidationError as error:
            self._problem(where, f"no record of a {record['kind']}: {first_fault(error)}")
        else:
            told(where, body)

    def finish(self) -> None:
        for run, rounds in self._rounds.items():
            self._report.trace |= dict(sorted(rounds.values(), key=lambda one: one[0]))
            self._report.began_from = self._states[run].get(0)
            self._report.last_round = max(self._report.last_round, self._after.get(run, 0))
        self._report.rounds = len(self._report.trace)
        self._report.updates = sum(len(one.merged) for one in self._report.trace.values())

    def compare_with(self, checkpoints: Path) -> None:
        """Hold the log against the checkpoints that are kept.

        A log whose end was cut off is a good chain; the checkpoints tell that there was more.
        """
        report = self._report
        kept = {
            int(entry.name.removeprefix("round-")): entry / "state.json"
            for entry in checkpoints.glob("round-*")
            if entry.name.removeprefix("round-").isdecimal()
        }
        newest = max(kept, default=0)
        if newest > report.last_round:
            _add(
                report.problems,
                f"{report.path} ends at round {report.last_round}, but there is a checkpoint of "
                f"round {newest}",
            )
        for number, path in sorted(kept.items()):
            found = _files_of(path)
            told = [rounds[number] for rounds in self._rounds.values() if number in rounds]
            if told and not any(_led_to(one, None, found) for _, one in told):
                _add(report.problems, f"{path} is not the state that the log tells of")

    def _aggregator(self, where: str, body: AggregatorRecord) -> None:
        if not self._is_key_of(where, "the aggregator", body):
            return
        if self._signer is not None and self._signer != body:
            _add(self._report.remarks, f"{where}: from here on another key signs the log")
        self._signer, self._report.aggregator = body, body.fingerprint

    def _signed_line(self, where: str, record: dict[str, Any]) -> None:
        """Hold a line against the key that signs since its record."""
        if self._signer is None:
            return
        try:
            signature = record.get("signature", "")  # none: the line is not signed
            verify_document(self._signer.public_key, LOG, record["sha256"].encode(), signature)
        except MembershipError:
            self._problem(where, "the aggregator's signature does not hold")

    def _is_key_of(self, where: str, name: str, body: AggregatorRecord | Signer) -> bool:
        try:
            found = fingerprint_of(body.public_key)
        except MembershipError as error:
            self._problem(where, f"{name}: {error.message}")
            return False
        if found != body.fingerprint:
            self._problem(where, f"the key of {name} has another fingerprint: {found}")
        return found == body.fingerprint

    def _member(self, where: str, body: Signer) -> None:
        if not self._is_key_of(where, body.name, body):
            return
        self._keys[body.name, body.fingerprint] = self._report.keys[body.fingerprint] = body
        self._report.members[body.name] = body.fingerprint

    def _round(self, where: str, body: RoundRecord) -> None:
        wanted = self._after.get(body.run, 0) + 1
        if body.round != wanted:
            self._problem(where, f"round {body.round} where round {wanted} must follow")
        rounds = self._rounds.setdefault(body.run, {})
        if body.round in rounds:
            self._problem(where, f"round {body.round} was merged before")
        merged: list[MergedUpdate] = []
        rounds[body.round] = self._report.lines, body.model_copy(update={"merged": merged})
        self._after[body.run] = body.round
        silos: set[str] = set()
        states = self._states.setdefault(body.run, {})
        for update in body.merged:
            begun = update.begun or body.round
            task = (body.run, update.silo, begun)
            if begun > body.round or self._counted.get(task, body.round) != body.round:
                self._problem(
                    where, f"the update of {update.silo} to round {begun} can't count here"
                )
            self._counted[task] = body.round
            if update.silo in silos:
                self._problem(
                    where, f"an update of {update.silo} counts twice in round {body.round}"
                )
            silos.add(update.silo)
            state, sent = self._update(where, body, update)
            merged.append(update.model_copy(update={"reply": "", "update": sent}))
            known = states.get(begun - 1)
            if state is not None and known not in (None, state):
                self._problem(
                    where,
                    f"{update.silo} signed that it trained from state {state[:12]}..., not from "
                    f"{known[:12]}... as the log has it",
                )
            states[begun - 1] = known or state
        states[body.round] = body.state_sha256
        for dropped in body.dropped:
            if dropped.silo in silos:
                self._problem(where, f"{dropped.silo} is both merged and dropped")

    def _update(
        self, where: str, body: RoundRecord, update: MergedUpdate
    ) -> tuple[str | None, str | None]:
        """Check an update; returns the state that it was trained from and its hash, as signed."""
        silo = update.silo
        member = self._keys.get((silo, update.fingerprint))
        if member is None:
            self._problem(
                where,
                f"no key {update.fingerprint[:80]} of {silo} is recorded before this round",
            )
            return None, None
        text = update.reply.encode()
        try:
            verify_document(member.public_key, RECEIPT, text, update.signature)
        except MembershipError:
            self._problem(where, f"the signature of {silo} does not hold")
            return None, None
        signed = _signed(text)
        if signed is None:
            self._problem(where, f"the reply of {silo} is no answer to a training task")
            return None, None
        said, told = signed
        for name, value in _counted(body, update).items():
            if value is None:
                continue
            if said[name] != value or type(said[name]) is not type(value):
                self._problem(
                    where,
                    f"{silo} signed {name} {repr(said[name])[:80]}, but {value!r} is "
                    "what was counted",
                )
        if told["data"] is not None and member.data_sha256 not in (None, told["data"]):
            self._problem(where, f"{silo} trained on other data than it registered")
        if told["log_head"] is not None and told["log_head"] not in self._heads:
            self._problem(
                where,
                f"{silo} was told that the log's head is {repr(told['log_head'])[:20]}, which it "
                "never was: this log was changed since, or it is not the only one",
            )
        return told["state"] if isinstance(told["state"], str) else None, said["update"]

    def _lost(self, where: str, body: LostRecord) -> None:
        wanted = self._after.get(body.run, 0) + 1
        if body.round != wanted:
            self._problem(where, f"round {body.round} was lost where round {wanted} must follow")
        asked, dropped = len(body.asked), ", ".join(one.silo for one in body.dropped)
        _add(
            self._report.remarks,
            f"{where}: round {body.round} lost its quorum (attempt {body.attempt}, {asked} silos; "
            f"dropped: {dropped or 'none'}), and none of it was merged",
        )

    def _resumed(self, where: str, body: ResumedRecord) -> None:
        after = self._after.get(body.run)
        rounds = self._rounds.setdefault(body.run, {})
        if after is not None and body.round > after:
            self._problem(
                where, f"resumed after round {body.round}, but the log ends at round {after}"
            )
        _, before = rounds.get(body.round, (0, None))
        if before and not _led_to(before, body.state_sha256, body.checkpoint):
            self._problem(
                where, f"resumed from another state than the one after round {body.round}"
            )
        states = self._states.setdefault(body.run, {})
        states[body.round] = body.state_sha256 or (before.state_sha256 if before else None)
        for task in [task for task, at in self._counted.items() if at > body.round]:
            if task[0] == body.run:
                del self._counted[task]
        for later in [number for number in rounds if number > body.round]:
            del rounds[later]
            _add(self._report.remarks, f"{where}: round {later} was taken back by a restart")
        self._after[body.run] = body.round

    def _asked(self, where: str, body: ResumedRecord) -> None:
        """The state is the parent's, whose rounds need not all be this federation's too."""
        self._after[body.run] = max(body.round, self._after.get(body.run, 0))
        self._resumed(where, body.model_copy(update={"state_sha256": None}))
        self._states[body.run][body.round] = body.state_sha256

    def _problem(self, where: str, text: str) -> None:
        _add(self._report.problems, f"{where}: {text}")


def _led_to(one: RoundRecord, state_sha256: str | None, checkpoint: dict[str, str] | None) -> bool:
    """Whether that is the state after a round, as far as both sides say anything."""
    pairs = ((one.state_sha256, state_sha256), (one.checkpoint, checkpoint))
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _signed(reply: bytes) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What a signed reply says of what is counted; and of data, state and log, where it does.

    None: it is no answer to a training task.
    """
    try:
        told = json.loads(reply)
        fit = told["fit"]
        said = {name: told[name] for name in ("kind", "run", "round", "silo")}
        said |= {"update": fit["update"]["sha256"], "tokens": fit["tokens"]}
        rest = {name: told.get(name) for name in ("data", "state", "log_head")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    right = isinstance(said["update"], str) and isinstance(said["tokens"], int)
    return (said, rest) if right else None


def _counted(body: RoundRecord, update: MergedUpdate) -> dict[str, Any]:
    """The same, as the round counted it; None leaves a thing to the reply."""
    return {
        "kind": "fit",
        "run": body.run,
        "round": update.begun or body.round,
        "silo": update.silo,
        "update": update.update,
        "tokens": update.tokens,
    }


def _files_of(path: Path) -> dict[str, str] | None:
    """Hashes of a checkpoint's files, as its state.json has them; None if it has none."""
    try:
        files = json.loads(path.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return files if isinstance(files, dict) else None


def _add(texts: list[str], text: str) -> None:
    if len(texts) < _MOST_PROBLEMS:
        # What a log says may hold anything; it is shown on a terminal.
        texts.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
