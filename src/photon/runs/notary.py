"""A served run's record: who sent what, signed, and what became of it; the silos are told too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from photon.errors import MembershipError
from photon.federation.tasks import WEIGHTS
from photon.link import TensorFile
from photon.membership import audit
from photon.membership.bulletin import tell_silos
from photon.membership.keys import NodeKey
from photon.membership.roster import Roster, Signer
from photon.telemetry import Event, Listener, events, read_history


class Notary(Listener):
    """Writes RUN/audit.jsonl: who sent what, signed, and what became of it, once it is on disk.

    Silos are told in words what became of their updates (photon.membership.bulletin).

    Args:
        folder: of the run.
        roster: has the silos' signed replies.
        run_id: of the run.
        key: the aggregator's, which signs each line.
    """

    def __init__(self, folder: Path, roster: Roster, run_id: str, key: NodeKey) -> None:
        self._folder = folder
        self._roster = roster
        self._run_id = run_id
        self._log = audit.AuditLog(folder / "audit.jsonl", key)
        self._named: set[str] = set()
        self._asked: list[str] = []
        self._dropped: list[audit.DroppedSilo] = []

    def head(self) -> str:
        """sha256 of the log's last line."""
        return self._log.head

    def on_event(self, event: Event) -> None:
        match event:
            case events.RunStarted(resumed_from_round=int(number)):
                self._settle(number)
            case events.RunChanged():
                self._log.append("changed", {"run": self._run_id, **event.model_dump(mode="json")})
            case events.RoundStarted():
                self._asked, self._dropped = list(event.participants), []
            case events.UpdateDropped():
                self._dropped.append(audit.DroppedSilo(silo=event.silo, reason=event.reason))
                words = f"round {event.round}: this silo's update was dropped: {event.reason}"
                tell_silos(self._roster, [event.silo], words)
            case events.RoundMerged():
                words = f"round {event.round}: this silo's update was merged"
                tell_silos(self._roster, event.participants, words)
            case events.RoundFinished():
                self._close_round(event.round)

    def write_lost(self, number: int, attempt: int) -> None:
        """Too few of those asked gave good updates: none of this attempt's is merged.

        Written before the loss is: an attempt whose process dies in between is made, and written
        down, twice.
        """
        body = audit.LostRecord(
            run=self._run_id,
            round=number,
            attempt=attempt,
            asked=self._asked,
            dropped=self._dropped,
        )
        self._log.append(audit.LOST, body)

    def write_verdict(self, body: dict[str, Any]) -> None:
        """What is predicted of the cards has changed, and who takes no part for it."""
        for silo, why in body["refused"].items():
            tell_silos(self._roster, [silo], f"this silo is not asked: {why}")
        self._log.append(audit.VERDICT, {"run": self._run_id, **body})

    def write_asked(self, number: int, sha256: str) -> None:
        """The level above begins a task: round `number` starts from its state."""
        self._log.append(
            audit.ASKED, {"run": self._run_id, "round": number - 1, "state_sha256": sha256}
        )

    def _close_round(self, number: int) -> None:
        text = (self._checkpoint(number) / "state.json").read_text(encoding="utf-8")
        state = json.loads(text)
        self.write_round(number, state["merged"], self._state_sha256(number), state["files"])
        # Who is still at work may be merged later.
        going = [one["task"]["round"] for one in state["in_flight"]]
        self._roster.tasks.prune(self._run_id, before_round=min([number - 1, *going]))

    def write_round(
        self, number: int, silos: dict[str, int], sha256: str, files: dict[str, str] | None = None
    ) -> None:
        """A round has merged these silos' tasks, of the rounds named; sha256 is the next state's,
        `files` those of a checkpoint.
        """
        merged = []
        for name, begun in silos.items():
            reply = self._roster.tasks.reply(f"{self._run_id}/fit/{begun}/{name}")
            if reply is None:
                raise MembershipError(f"round {number} merged {name}, whose receipt is not there")
            # The key that signed: the member may have another by now.
            self._name(self._roster.signer(reply.fingerprint))
            merged.append(
                audit.MergedUpdate(
                    silo=name,
                    begun=None if begun == number else begun,
                    reply=reply.text.decode(),
                    signature=reply.signature,
                    fingerprint=reply.fingerprint,
                )
            )
        record = audit.RoundRecord(
            run=self._run_id,
            round=number,
            state_sha256=sha256,
            weights_sha256=self._state_sha256(number, WEIGHTS) if files else None,
            checkpoint=files,
            merged=merged,
            dropped=self._dropped,
        )
        self._log.append(audit.ROUND, record)

    def _settle(self, checkpoint: int) -> None:
        """Make the log end where the run goes on.

        A round is written down after its checkpoint: one whose process died in between is missing.
        Where the newest checkpoint could not be read, there are more rounds than count.

        Args:
            checkpoint: round that the run goes on from.
        """
        written = self._written()
        if written > checkpoint:
            record = audit.ResumedRecord(
                run=self._run_id, round=checkpoint, state_sha256=self._state_sha256(checkpoint)
            )
            self._log.append(audit.RESUMED, record)
        elif written == checkpoint - 1:
            self._dropped = self._dropped_in(checkpoint)
            self._close_round(checkpoint)

    def _written(self) -> int:
        """The round that the log stands after: restarts take back what is after theirs."""
        after = 0
        with self._log.path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if (
                    record["kind"] in (audit.ROUND, audit.RESUMED)
                    and record["body"]["run"] == self._run_id
                ):
                    after = record["body"]["round"]
        return after

    def _dropped_in(self, number: int) -> list[audit.DroppedSilo]:
        """Who an earlier process's events say was dropped."""
        dropped: list[audit.DroppedSilo] = []
        for event in read_history(self._folder).events:
            if isinstance(event, events.RoundStarted) and event.round == number:
                dropped = []
            elif isinstance(event, events.UpdateDropped) and event.round == number:
                dropped.append(audit.DroppedSilo(silo=event.silo, reason=event.reason))
        return dropped

    def _name(self, signer: Signer) -> None:
        """A member's key, once for each process and key, before the first use of it."""
        if signer.fingerprint not in self._named:
            self._named.add(signer.fingerprint)
            self._log.append("member", signer)

    def _state_sha256(self, number: int, section: str = "") -> str:
        """Of the global state in a checkpoint, as Asks and Replies call it, or of one section."""
        with TensorFile(self._checkpoint(number) / "global.safetensors") as file:
            return file.sha256(section)

    def _checkpoint(self, number: int) -> Path:
        return self._folder / "checkpoints" / f"round-{number:06d}"
