"""Who takes part in a served run's rounds: the members that are here, or those already drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from photon.config import RunConfig
from photon.errors import QuorumLostError
from photon.federation import Candidates
from photon.membership.refusals import refusing
from photon.membership.roster import Roster
from photon.runs.draws import Drawn, Draws

#: Between two looks at who is here.
_LOOK_S = 0.5


class JoinedFleet:
    """The members that are here.

    Args:
        roster: members, and when each was heard of.
        config: which members may take part, how many must, how long silence may last.
        run_id: of the run.
        draws: what earlier processes drew, and this one.
        ending: whether the run is to end once its round is over: nobody is waited for then.
        on_lost: told of a round, and which attempt at it, that lost its quorum, before another
            draw may follow.
    """

    def __init__(
        self,
        roster: Roster,
        config: RunConfig,
        run_id: str,
        draws: Draws,
        *,
        ending: Callable[[], bool] = lambda: False,
        on_lost: Callable[[int, int], None] = lambda number, attempt: None,
    ) -> None:
        self._roster = roster
        self._config = config
        self._run_id = run_id
        self._draws = draws
        self._ending = ending
        self._on_lost = on_lost

    def expected(self, round_number: int) -> Mapping[str, int] | None:
        """Tokens of those that a round will be drawn from, as far as can be known before it.

        Waits and raises as `drawn_from` does, and draws nobody.
        """
        begun = self._begun(round_number)
        return begun.tokens if begun is not None else self._gathered(round_number)

    def drawn_from(self, round_number: int) -> Candidates | None:
        """Those who are here, or those whom a round that was begun was drawn from.

        Of a round that was begun also who is silent, suspended or expelled by now: the round is
        the same one, and the engine names those that it leaves out. Of a round that was lost,
        those who are here now, as the next attempt. Its silos are asked again, also who had
        answered: the company is another, which a site may refuse. They answer from their disks.

        Returns:
            None where the run is to end, and fewer than needed are here.

        Raises:
            QuorumLostError: fewer than needed came within serve.gather_s.
            CheckpointCorruptError: what was drawn before can't be read.
        """
        begun = self._begun(round_number)
        if begun is None:
            here = self._gathered(round_number)
            if here is None:
                return None
            before = self._draws.of(round_number)
            if self._roster.tasks.asked(self._run_id, round_number):
                # Answers to an earlier attempt, before the draw that they are no answers to.
                self._roster.tasks.prune(self._run_id, before_round=round_number + 1)
            begun = Drawn(1 + (before.attempt if before is not None else 0), dict(here))
            self._draws.keep(round_number, begun)
        return Candidates(begun.tokens, begun.attempt)

    def lost(self, round_number: int) -> bool:
        drawn = self._begun(round_number)
        if drawn is None:
            return False
        self._on_lost(round_number, drawn.attempt)
        self._draws.lose(round_number)
        # Without those who will not, another draw is another round; else it would end as this one.
        return bool(refusing(self._roster, self._run_id).keys() & drawn.tokens.keys())

    def present(self) -> list[str]:
        return sorted(self._here())

    def _begun(self, round_number: int) -> Drawn | None:
        """The draw that a round goes on with, if there is one."""
        drawn = self._draws.of(round_number)
        return drawn if drawn is not None and not drawn.lost else None

    def _gathered(self, round_number: int) -> dict[str, int] | None:
        """Those who are here, once they are enough; None where the run is to end before that."""
        config = self._config
        needed = config.silos_needed
        until, told = time.time() + config.serve.gather_s, None
        try:
            while len(here := self._here()) < needed:
                if self._ending():
                    return None
                waiting = {
                    "for_silos": needed,
                    "round": round_number,
                    "here": sorted(here),
                    "refusing": refusing(self._roster, self._run_id),
                    "until": until,
                }
                if waiting != told:
                    self._roster.set_setting("waiting", told := waiting)
                if time.time() > until:
                    raise QuorumLostError(
                        f"{len(here)} silos are here ({', '.join(sorted(here)) or 'none'}), round "
                        f"{round_number} needs {needed}; waited {config.serve.gather_s:g} s",
                        hint="See `photon status`; invite more silos or lower serve.min_silos.",
                    )
                time.sleep(_LOOK_S)
        finally:
            self._roster.set_setting("waiting", None)  # also what a killed process left there
        return here

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
        out = refusing(self._roster, self._run_id)
        return {
            name: tokens
            for name, tokens in self._tokens().items()
            if name in seen
            and name not in out
            and now - seen[name][1] < min(60.0, silence_s)
            and seen[name][0].state != "stopping"
        }
