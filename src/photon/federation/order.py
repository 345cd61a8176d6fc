"""The order in which a round's updates were merged: a resume has to merge them so again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from photon.federation.tasks import FitTask


class Order:
    """RUN/order.jsonl: a line an update, written before it is merged; of the newest round only.

    Args:
        path: None: nothing is kept, as where the order is that of tasks.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._number = 0

    def of(self, number: int, tasks: Sequence[FitTask]) -> list[FitTask]:
        """Those of the tasks whose updates round `number` is known to have begun with, in order."""
        if self._path is None or not self._path.is_file():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        named = {_line(number, task): task for task in tasks}
        return list(dict.fromkeys(named[line] for line in lines if line in named))

    def note(self, number: int, task: FitTask) -> None:
        """The update of this task is merged next into round `number`."""
        if self._path is None:
            return
        mode = "a" if number == self._number or self._of(number) else "w"
        self._number = number
        with self._path.open(mode, encoding="utf-8") as file:
            file.write(_line(number, task) + "\n")

    def _of(self, number: int) -> bool:
        """Whether what is on disk is of this round."""
        assert self._path is not None
        if not self._path.is_file():
            return False
        first = self._path.read_text(encoding="utf-8").partition("\n")[0]
        return first.startswith(f"[{number},")


def _line(number: int, task: FitTask) -> str:
    return json.dumps([number, task.round, task.silo])
