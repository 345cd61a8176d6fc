"""Finished tasks on disk: asked again, a site gives the same answer without training again.

    answers/RUN/fit-000012/answer.json     written last, renamed into place: the task is finished
    answers/RUN/fit-000012/parcel/...      the update's objects, by their keys in the store
    answers/RUN/fit-000012.trouble.json    how often the task was begun, and what ended the trainer

Invariant: an answer.json names an update that lies whole beside it. It breaks if the answer is
written before the parcel is on disk.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from photon.errors import CheckpointCorruptError, DiskFullError, PhotonError
from photon.federation.envelopes import Ask
from photon.membership.records import SignedReply
from photon.store.contract import Buffer, FolderStore
from photon.store.disk import write_whole

_ANSWER = "answer.json"
_TROUBLE = ".trouble.json"

_T = TypeVar("_T")


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
class Trouble:
    """What became of the attempts at a question that is not answered.

    Attributes:
        begun: attempts that ended in no good order, whatever ended them.
        where: the error's class and the line of code that ended the trainer: two of the same are
            the same failure.
        times: in a row, in the same way.
        code, message: of the last.
    """

    question: str
    begun: int = 0
    where: str = ""
    times: int = 0
    code: int = 0
    message: str = ""


_ANSWERS = TypeAdapter(Answer)  # a Reply's bytes are UTF-8
_TROUBLES = TypeAdapter(Trouble)


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
        found = _read(self._place(ask) / _ANSWER, _ANSWERS)
        return found if found is not None and found.question == ask.question_sha256 else None

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
        _write(self._place(ask) / _ANSWER, _ANSWERS, answer)
        self._trouble_file(ask).unlink(missing_ok=True)

    def objects(self, ask: Ask, *, chunks: bool) -> Iterator[tuple[str, Buffer]]:
        """Key and bytes of each object of a finished task's update.

        Args:
            chunks: else of its manifest, which belongs into the store once they are there.

        Raises:
            CheckpointCorruptError: the disk gave back other bytes than were written.
        """
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
        for path in self._folder.glob("*/*.json"):
            path.unlink(missing_ok=True)
        for run in self._folder.glob("*"):
            if run != mine.parent and not any(run.iterdir()):
                run.rmdir()

    def trouble(self, ask: Ask) -> Trouble:
        """What became of earlier attempts at this very question."""
        found = _read(self._trouble_file(ask), _TROUBLES)
        if found is None or found.question != ask.question_sha256:
            return Trouble(ask.question_sha256)
        return found

    @contextmanager
    def attempt(self, ask: Ask) -> Iterator[None]:
        """Work on a task. It counts where it ends with this process.

        Raises:
            DiskFullError: no room to note that it was begun.
        """
        self._note(ask, begun=self.trouble(ask).begun + 1)
        try:
            yield
        except PhotonError:
            self.not_begun(ask)
            raise

    def not_begun(self, ask: Ask) -> None:
        """It was left in good order: attempts so far don't count."""
        with suppress(DiskFullError):
            self._note(ask, begun=0)

    def note_failure(self, ask: Ask, where: str, *, code: int, message: str) -> Trouble:
        """Remember what is about to end the trainer."""
        before = self.trouble(ask)
        times = 1 + (before.times if before.where == where else 0)
        return self._note(ask, where=where, times=times, code=code, message=message[:2000])

    def _note(self, ask: Ask, **news: Any) -> Trouble:
        trouble = replace(self.trouble(ask), **news)
        _write(self._trouble_file(ask), _TROUBLES, trouble)
        return trouble

    def _place(self, ask: Ask) -> Path:
        return self._folder / ask.run.id / f"{ask.kind}-{ask.round:06d}"

    def _trouble_file(self, ask: Ask) -> Path:
        place = self._place(ask)
        return place.with_name(place.name + _TROUBLE)


def _finished_at(place: Path) -> float:
    try:
        return (place / _ANSWER).stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path, kind: TypeAdapter[_T]) -> _T | None:
    try:
        return kind.validate_json(path.read_bytes())
    except (OSError, ValueError):  # ValidationError among them
        return None


def _write(path: Path, kind: TypeAdapter[_T], record: _T) -> None:
    write_whole(path, kind.dump_json(record, indent=1), "a finished task")
