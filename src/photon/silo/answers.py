"""Finished tasks on disk: asked again, a site gives the same answer without training again.

    answers/RUN/fit-000012/answer.json     written last, renamed into place: the task is finished
    answers/RUN/fit-000012/parcel/...      the update's objects, by their keys in the store
    answers/RUN/fit-000012.begun.json      how often the task was begun
    answers/RUN/fit-000012.failed.json     what ended the trainer while it worked on the task

Invariant: an answer.json names an update that lies whole beside it. It breaks if the answer is
written before the parcel is on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.errors import CheckpointCorruptError, PhotonError
from photon.federation.envelopes import Ask
from photon.membership.roster import SignedReply
from photon.store.contract import Buffer, FolderStore
from photon.store.disk import write_json

_ANSWER = "answer.json"
_BEGUN = ".begun.json"
_FAILED = ".failed.json"
_WHAT = "a finished task"


@dataclass(frozen=True)
class Answer:
    """A finished task.

    Attributes:
        question: `question_sha256` of the Ask that it answers.
        reply: as it is given; its publish_s grows once, when the update has been sent.
        sent: whether the store had all of the update once.
    """

    question: str
    reply: SignedReply
    sent: bool


@dataclass(frozen=True)
class Failure:
    """What ended the trainer during a task.

    Attributes:
        where: the error's class and the line of code: two of the same are the same failure.
        times: in a row, in the same way.
        code, message: of the last.
    """

    question: str
    where: str
    times: int
    code: int
    message: str


class Answers:
    """The finished tasks of a home.

    Args:
        folder: of the home.
        keep: finished tasks of each kind.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def find(self, ask: Ask) -> Answer | None:
        """The answer to this very question, if it is finished."""
        record = _read(self._place(ask) / _ANSWER)
        try:
            if record is None or record["question"] != ask.question_sha256:
                return None
            reply = SignedReply(
                ask.task_id,
                base64.b64decode(record["reply"]),
                str(record["signature"]),
                str(record["fingerprint"]),
            )
            return Answer(record["question"], reply, bool(record["sent"]))
        except (KeyError, TypeError, ValueError):
            return None

    def begin(self, ask: Ask) -> FolderStore:
        """Where the update's objects go. What an earlier attempt left there is removed."""
        place = self._place(ask)
        # The answer first: without it, what is left of the rest is of no consequence.
        (place / _ANSWER).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        return FolderStore(place / "parcel")

    def finish(self, ask: Ask, answer: Answer) -> None:
        """Write an answer; from now on the task is finished.

        Raises:
            DiskFullError: no room.
        """
        record = {
            "question": answer.question,
            "task": ask.task_id,
            "reply": base64.b64encode(answer.reply.text).decode(),
            "signature": answer.reply.signature,
            "fingerprint": answer.reply.fingerprint,
            "sent": answer.sent,
        }
        write_json(self._place(ask) / _ANSWER, record, _WHAT)
        self._beside(ask, _FAILED).unlink(missing_ok=True)
        self._beside(ask, _BEGUN).unlink(missing_ok=True)

    def chunks(self, ask: Ask) -> Iterator[tuple[str, Buffer]]:
        """Key and bytes of each chunk of a finished task's update.

        Raises:
            CheckpointCorruptError: the disk gave back other bytes than were written.
        """
        return self._objects(ask, chunks=True)

    def manifest(self, ask: Ask) -> Iterator[tuple[str, Buffer]]:
        """As `chunks`, of the manifest, which belongs into the store once they are there."""
        return self._objects(ask, chunks=False)

    def forget(self, ask: Ask) -> None:
        """A finished task that can't be used after all."""
        self.begin(ask)

    def prune(self, ask: Ask) -> None:
        """Remove the oldest finished tasks of this kind, beyond as many as are kept."""
        mine = self._place(ask)
        others = [
            place
            for place in self._folder.glob(f"*/{ask.kind}-*")
            if place.is_dir() and place != mine
        ]
        others.sort(key=_finished_at, reverse=True)
        for place in others[self._keep - 1 :]:
            (place / _ANSWER).unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)
        for path in [*self._folder.glob(f"*/*{_FAILED}"), *self._folder.glob(f"*/*{_BEGUN}")]:
            path.unlink(missing_ok=True)
        for run in self._folder.glob("*"):
            if run != mine.parent and not any(run.iterdir()):
                run.rmdir()

    def begun(self, ask: Ask) -> int:
        """How often this very question was begun, and neither answered nor refused."""
        record = _read(self._beside(ask, _BEGUN)) or {}
        times = record.get("times") if record.get("question") == ask.question_sha256 else 0
        return times if isinstance(times, int) else 0

    @contextmanager
    def attempt(self, ask: Ask) -> Iterator[None]:
        """Work on a task. It counts where it ends with this process.

        Raises:
            DiskFullError: no room to note that it was begun.
        """
        times = self.begun(ask) + 1
        write_json(
            self._beside(ask, _BEGUN), {"question": ask.question_sha256, "times": times}, _WHAT
        )
        try:
            yield
        except PhotonError:
            self.not_begun(ask)
            raise

    def not_begun(self, ask: Ask) -> None:
        """It was left in good order: attempts so far don't count."""
        self._beside(ask, _BEGUN).unlink(missing_ok=True)

    def failure(self, ask: Ask) -> Failure | None:
        """What ended the trainer when it last worked on this very question."""
        record = _read(self._beside(ask, _FAILED))
        try:
            failure = Failure(**record) if record is not None else None
        except TypeError:
            return None
        return failure if failure is not None and failure.question == ask.question_sha256 else None

    def note_failure(self, ask: Ask, where: str, *, code: int, message: str) -> Failure:
        """Remember what is about to end the trainer."""
        before = self.failure(ask)
        times = 1 + (before.times if before is not None and before.where == where else 0)
        failure = Failure(ask.question_sha256, where, times, code, message[:2000])
        write_json(self._beside(ask, _FAILED), vars(failure), _WHAT)
        return failure

    def _objects(self, ask: Ask, *, chunks: bool) -> Iterator[tuple[str, Buffer]]:
        store = FolderStore(self._place(ask) / "parcel")
        for key, size in list(store.keys()):
            folder, _, name = key.rpartition("/")
            if folder.endswith("/chunks") != chunks:
                continue
            data = store.get(key, max_bytes=size)
            found = hashlib.sha256(data).hexdigest()
            # A chunk is called by its sha256, a manifest ends in the first digits of its own.
            promised = name if chunks else name.removesuffix(".json").rpartition("-")[2]
            if not found.startswith(promised):
                raise CheckpointCorruptError(
                    f"{key} of the finished task {ask.task_id} has sha256 {found[:12]}..., not "
                    f"{promised[:12]}...",
                    hint="The disk lost it; the task is done again.",
                )
            yield key, data

    def _place(self, ask: Ask) -> Path:
        return self._folder / ask.run.id / f"{ask.kind}-{ask.round:06d}"

    def _beside(self, ask: Ask, suffix: str) -> Path:
        place = self._place(ask)
        return place.with_name(place.name + suffix)


def _finished_at(place: Path) -> float:
    try:
        return (place / _ANSWER).stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
