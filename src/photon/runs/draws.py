"""RUN/draws.json: from whom each round's silos were drawn, on disk before any of them is asked.

    {"rounds": {"12": {"attempt": 2, "tokens": {"clinic": 100, "bank": 300}, "lost": false}}}

Invariant: a round that was begun has the same silos for every process that goes on with it, until
it is lost. It breaks if a silo is asked before the draw is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from photon.errors import CheckpointCorruptError
from photon.store.disk import write_json

DRAWS_FILE = "draws.json"
#: Rounds before the newest that a run may go back to, where its newest checkpoint is damaged.
_KEPT = 2


@dataclass(frozen=True)
class Drawn:
    """From whom a round's silos were drawn.

    Attributes:
        attempt: at the round, counted from 1.
        tokens: of each silo that was here.
        lost: too few of them gave good updates: the next attempt has another draw.
    """

    attempt: int
    tokens: Mapping[str, int]
    lost: bool = False


class Draws:
    """The newest rounds' draws.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / DRAWS_FILE

    def of(self, number: int) -> Drawn | None:
        """The newest draw of a round; None before the first.

        Raises:
            CheckpointCorruptError: the file can't be read.
        """
        return self._read().get(number)

    def keep(self, number: int, drawn: Drawn) -> None:
        """Write a round's draw down; it is on disk when this returns.

        Raises:
            CheckpointCorruptError: the file can't be read.
            DiskFullError: no room; the draws are as they were.
        """
        rounds = {old: one for old, one in self._read().items() if old >= number - _KEPT}
        rounds[number] = drawn
        record = {str(each): asdict(rounds[each]) for each in sorted(rounds)}
        write_json(self._path, {"rounds": record}, "a round's draw")

    def lose(self, number: int) -> None:
        """A round's newest draw came to nothing; raises as `keep` does."""
        drawn = self.of(number)
        assert drawn is not None
        self.keep(number, replace(drawn, lost=True))

    def _read(self) -> dict[int, Drawn]:
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            return {int(number): Drawn(**one) for number, one in record["rounds"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"can't read {self._path}: {str(error)[:200]}",
                hint="Remove it: the silos of the round under way are then drawn again, from "
                "those who are here.",
            ) from error
