"""Whether the federation's loop is begun again after it ended, and after which pause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from photon.errors import QuorumLostError, ServiceLostError, error_of

#: A loop that dies so often within so many seconds, without a round finished, is given up.
_MOST_DEATHS, _WITHIN_S = 10, 900.0
#: Before a round that lost its quorum is drawn again; doubled each time, up to the last.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 1800.0


@dataclass(frozen=True)
class Again:
    """What follows.

    Attributes:
        pause_s: before the loop is begun again.
        words: why, for the screen.
        lost: whether the pause is for silos to come back.
    """

    pause_s: float
    words: str
    lost: bool = False


class Attempts:
    """Decides after each end of the loop.

    A loop that died goes on at once. One whose round lost its quorum goes on after a pause that
    grows: silos come back, and serve is the one who waits for them, not whoever restarts serve.

    Args:
        gather_s: silos are waited for so long (serve.gather_s), from the first loss on.
        folder: of the run, for hints.
        log: where a death is written down, for hints.
    """

    def __init__(self, gather_s: float, folder: str, log: str) -> None:
        self._gather_s = gather_s
        self._folder = folder
        self._log = log
        self._last_round = -1
        self._deaths: list[float] = []
        self._lost_since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def after(
        self, exit_code: int | None, words: str, progress: Mapping[str, Any], now_s: float
    ) -> Again:
        """What follows an end that was not in order.

        Args:
            exit_code: of the PhotonError that ended it; None: it died otherwise, by being killed,
                say.
            words: why.
            progress: as `progress_of` says.
            now_s: of a clock that never goes back.

        Raises:
            PhotonError: what ended the loop, where another attempt would end the same; of a lost
                quorum, once gather_s is over.
            ServiceLostError: it died too often.
        """
        reached = progress.get("round", 0)
        if reached > self._last_round:
            self._last_round, self._deaths = reached, []
            self._lost_since_s, self._pause_s = None, _FIRST_PAUSE_S
        if exit_code == QuorumLostError.exit_code and progress.get("in_round") is not None:
            return self._after_loss(words, now_s)
        # Killed; or the link and services, whose trouble may pass.
        if exit_code is not None and not (70 <= exit_code < 80 or 90 <= exit_code < 100):
            raise error_of(exit_code)(
                words, hint=f"Mend it, then `photon serve --resume {self._folder}` goes on."
            )
        self._deaths = [at for at in self._deaths if now_s - at < _WITHIN_S] + [now_s]
        if len(self._deaths) >= _MOST_DEATHS:
            raise ServiceLostError(
                f"the federation's loop died {len(self._deaths)} times in round {reached + 1}: "
                f"{words[-500:]}",
                hint=f"See {self._log}; then `photon serve --resume {self._folder}`.",
            )
        return Again(0.0, f"the federation's loop died ({words[-200:]}); it goes on")

    def _after_loss(self, words: str, now_s: float) -> Again:
        if self._lost_since_s is None:
            self._lost_since_s = now_s
        pause_s, waited_s = self._pause_s, now_s - self._lost_since_s
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if waited_s + pause_s > self._gather_s:
            raise QuorumLostError(
                f"{words}; tried for {waited_s:.0f} s (serve.gather_s = {self._gather_s:g})",
                hint="See why each was dropped above, or in events.jsonl; mend the silo, then "
                f"`photon serve --resume {self._folder}` draws the round again.",
            )
        return Again(pause_s, f"{words}; the round is drawn again in {pause_s:.0f} s", lost=True)
