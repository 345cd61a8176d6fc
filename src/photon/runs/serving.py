"""The federation of a `photon serve` run: silos that joined, reached over a post.

Everything here starts from the run folder, serve.home and the store alone, so that another process,
or another machine that is given the three, takes over where this one stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from photon.config import RunConfig, load_run_config
from photon.data import PreparedData, open_data
from photon.engines.remote import Post, RemoteEngine
from photon.errors import AccessRefusedError, MembershipError, QuorumLostError, RunNotFoundError
from photon.federation import Engine
from photon.federation.envelopes import RunPart, dictated
from photon.federation.node import empty_model
from photon.link import open_store
from photon.membership.audit import (
    RESUMED,
    ROUND,
    AuditLog,
    DroppedSilo,
    MemberRecord,
    MergedUpdate,
    ResumedRecord,
    RoundRecord,
)
from photon.membership.roster import ROSTER_FILE, Roster, Signer
from photon.models import model_fingerprint
from photon.runs.folder import read_record
from photon.runs.session import Guests, RunResult, Session
from photon.store.contract import Store
from photon.telemetry import Event, read_history
from photon.telemetry.events import (
    RoundFinished,
    RoundMerged,
    RoundStarted,
    RunStarted,
    UpdateDropped,
)

#: What `photon serve` leaves in the run folder for the process that runs the federation.
SERVE_FILE = "serve.json"
#: Between two looks at who is here.
_LOOK_S = 0.5


@dataclass(frozen=True)
class Serving:
    """RUN/serve.json: what the federation of a served run starts from.

    Attributes:
        run_id: 32 hexadecimal digits; names the run to silos and in the store.
        home: serve.home, whole.
        store: URL of the store, as this machine reaches it.
        store_options: for it, without secrets.
        secrets: file with the store's credentials; None where the environment has them.
    """

    run_id: str
    home: str
    store: str
    store_options: Mapping[str, str]
    secrets: str | None = None

    def write(self, folder: Path) -> None:
        """Into a run folder."""
        partial_file = folder / f"{SERVE_FILE}.partial"
        partial_file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial_file.replace(folder / SERVE_FILE)

    @classmethod
    def read(cls, folder: Path) -> Serving:
        """From a run folder.

        Raises:
            RunNotFoundError: it was not made by `photon serve`.
        """
        path = folder / SERVE_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunNotFoundError(
                f"no served run in {folder}: {path}: {error}",
                hint="Name a folder that `photon serve` made.",
            ) from error

    @property
    def roster(self) -> Roster:
        """Who takes part."""
        return Roster(Path(self.home) / ROSTER_FILE)

    def open_store(self) -> Store:
        """The aggregator's own way to updates and states."""
        options = dict(self.store_options)
        if self.secrets is not None:
            try:
                options |= json.loads(Path(self.secrets).read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise AccessRefusedError(
                    f"can't read the store's credentials {self.secrets}: {error}",
                    hint="`photon serve` writes them; start it again.",
                ) from error
        return open_store(self.store, options)


def continue_run(folder: Path, post: Post) -> RunResult:
    """Begin a served run, or go on with it, until it is over or drained.

    Args:
        folder: of the run, with serve.json and serve.toml.
        post: to silos.

    Raises:
        PhotonError: as `photon.simulate`; QuorumLostError also where too few silos came.
    """
    serving = Serving.read(folder)
    begun = (folder / "run.json").exists()
    config = load_run_config(folder / "serve.toml")
    if begun:  # what is trained stays as it was resolved; [serve] may change from start to start
        resolved = load_run_config(folder / "config.resolved.toml")
        config = resolved.model_copy(update={"serve": config.serve})
    with serving.roster as roster:
        fleet = JoinedFleet(roster, config, serving.run_id)
        data = open_data(config.data.path)

        def engine(evaluator: Engine, on_event: Callable[[Event], None]) -> RemoteEngine:
            return RemoteEngine(
                _run_part(serving.run_id, config, data, sorted(fleet.drawn_from(1))),
                config,
                post,
                roster,
                serving.open_store(),
                folder / "arrivals",
                evaluator,
                on_event,
            )

        guests = Guests(
            fleet,
            engine,
            Notary(folder, roster, serving.run_id),
            draining=lambda: bool(roster.setting("draining", False)),
        )
        session = Session("serve", config, None, folder, None, guests=guests)
        return session.execute(read_record(folder) if begun else None)


class JoinedFleet:
    """The members that are here.

    Args:
        roster: members, and when each was heard of.
        config: which members may take part, how many must, how long silence may last.
        run_id: of the run; tasks of a round that was begun say who takes part in it.
    """

    def __init__(self, roster: Roster, config: RunConfig, run_id: str) -> None:
        self._roster = roster
        self._config = config
        self._run_id = run_id

    def drawn_from(self, round_number: int) -> Mapping[str, int]:
        """Tokens of those who are here, or of those a begun round was given to.

        Raises:
            QuorumLostError: fewer than serve.min_silos came within serve.gather_s.
        """
        begun = self._begun(round_number)
        if begun:
            # Also who was suspended since: asked again, the round has the same participants, and
            # the engine names those that it leaves out.
            members = {member.name: member for member in self._roster.members()}
            return {name: members[name].facts.train_tokens for name in begun if name in members}
        config = self._config
        needed = max(config.serve.min_silos, config.federation.sample or 1)
        until, told = time.time() + config.serve.gather_s, None
        while len(here := self._here()) < needed:
            waiting = {"for_silos": needed, "here": sorted(here), "until": until}
            if waiting != told:
                self._roster.set_setting("waiting", told := waiting)
            if time.time() > until:
                self._roster.set_setting("waiting", None)
                raise QuorumLostError(
                    f"{len(here)} silos are here ({', '.join(sorted(here)) or 'none'}), round "
                    f"{round_number} needs {needed}; waited {config.serve.gather_s:g} s",
                    hint="See `photon status`; invite more silos or lower serve.min_silos.",
                )
            time.sleep(_LOOK_S)
        self._roster.set_setting("waiting", None)
        return here

    def present(self) -> list[str]:
        return sorted(self._here())

    def _tokens(self) -> dict[str, int]:
        wanted = self._config.serve.silos
        return {
            member.name: member.facts.train_tokens
            for member in self._roster.members()
            if member.status == "active" and (not wanted or member.name in wanted)
        }

    def _here(self) -> dict[str, int]:
        seen, now = self._roster.presences(), time.time()
        silence_s = self._config.federation.silence_s
        return {
            name: tokens
            for name, tokens in self._tokens().items()
            if name in seen
            and now - seen[name][1] < min(60.0, silence_s)
            and seen[name][0].state != "stopping"
        }

    def _begun(self, round_number: int) -> set[str]:
        return self._roster.asked(self._run_id, round_number)


class Notary:
    """Writes RUN/audit.jsonl: who sent what, signed, and what became of it, once it is on disk.

    Args:
        folder: of the run.
        roster: has the silos' signed replies.
        run_id: of the run.
    """

    def __init__(self, folder: Path, roster: Roster, run_id: str) -> None:
        self._folder = folder
        self._roster = roster
        self._run_id = run_id
        self._log = AuditLog(folder / "audit.jsonl")
        self._named: set[str] = set()
        self._merged: list[str] = []
        self._dropped: list[DroppedSilo] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            if event.resumed_from_round is not None:
                self._settle(event.resumed_from_round)
        elif isinstance(event, RoundStarted):
            self._merged, self._dropped = [], []
        elif isinstance(event, UpdateDropped):
            self._dropped.append(DroppedSilo(silo=event.silo, reason=event.reason))
        elif isinstance(event, RoundMerged):
            self._merged = list(event.participants)
        elif isinstance(event, RoundFinished):
            self._close_round(event.round)

    def close(self) -> None:
        """Nothing is open between two lines."""

    def _close_round(self, number: int) -> None:
        replies = {
            reply.task_id.rpartition("/")[2]: reply
            for reply in self._roster.replies(self._run_id, number)
            if f"/fit/{number}/" in reply.task_id
        }
        for name in self._merged:
            if name not in replies:
                raise MembershipError(f"round {number} merged {name}, whose receipt is not there")
            # The key that signed: the member may have another by now.
            self._name(self._roster.signer(replies[name].fingerprint))
        record = RoundRecord(
            run=self._run_id,
            round=number,
            checkpoint=self._checkpoint(number),
            merged=[
                MergedUpdate(
                    silo=name,
                    reply=replies[name].text.decode(),
                    signature=replies[name].signature,
                    fingerprint=replies[name].fingerprint,
                )
                for name in self._merged
            ],
            dropped=self._dropped,
        )
        self._log.append("round", record)
        self._roster.prune_tasks(self._run_id, before_round=number - 1)

    def _settle(self, checkpoint: int) -> None:
        """Make the log end where the run goes on.

        A round is written down after its checkpoint: one whose process died in between is missing.
        Where the newest checkpoint could not be read, there are more rounds than count.

        Args:
            checkpoint: round that the run goes on from.
        """
        written = self._written()
        if written > checkpoint:
            self._log.append("resumed", ResumedRecord(run=self._run_id, round=checkpoint))
        elif written == checkpoint - 1:
            self._merged = self._merged_in(checkpoint)
            self._dropped = self._dropped_in(checkpoint)
            self._close_round(checkpoint)

    def _written(self) -> int:
        """The round that the log stands after: restarts take back what is after theirs."""
        after = 0
        with self._log.path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if record["kind"] in (ROUND, RESUMED) and record["body"]["run"] == self._run_id:
                    after = record["body"]["round"]
        return after

    def _merged_in(self, number: int) -> list[str]:
        """Who was merged in a round of an earlier process: those whose node state it committed."""
        rounds = self._state(number)["node_rounds"]
        return sorted(silo for silo, last in rounds.items() if last == number)

    def _dropped_in(self, number: int) -> list[DroppedSilo]:
        """Who an earlier process's events say was dropped."""
        dropped: list[DroppedSilo] = []
        for event in read_history(self._folder).events:
            if isinstance(event, RoundStarted) and event.round == number:
                dropped = []
            elif isinstance(event, UpdateDropped) and event.round == number:
                dropped.append(DroppedSilo(silo=event.silo, reason=event.reason))
        return dropped

    def _name(self, signer: Signer) -> None:
        """A member's key, once for each process and key, before the first use of it."""
        if signer.fingerprint not in self._named:
            self._named.add(signer.fingerprint)
            self._log.append("member", MemberRecord.of(signer))

    def _checkpoint(self, number: int) -> dict[str, Any]:
        """The hashes of the state that the round led to, as its checkpoint has them."""
        return self._state(number)["files"]

    def _state(self, number: int) -> dict[str, Any]:
        path = self._folder / "checkpoints" / f"round-{number:06d}" / "state.json"
        return json.loads(path.read_text(encoding="utf-8"))


def _run_part(run_id: str, config: RunConfig, data: PreparedData, silos: list[str]) -> RunPart:
    """What silos are told of the run."""
    model = empty_model(config, vocab_size=data.vocab_size, eos_id=data.eos_id)
    return RunPart(
        id=run_id,
        silos=silos,
        config=dictated(config),
        model=model_fingerprint(model),
        tokenizer=data.tokenizer_sha256,
        vocab_size=data.vocab_size,
        eos_id=data.eos_id,
    )
