"""Who takes part in a served run's rounds: the members that are here, or those already drawn.

RUN/draws.json says from whom, on disk before any of them is asked:

    {"rounds": {"12": {"attempt": 2, "tokens": {"clinic": 100, "bank": 300}, "lost": false}}}

Invariant: a round that was begun has the same silos for every process that goes on with it, until
it is lost. It breaks if a silo is asked before the draw is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from photon.config import RunConfig
from photon.errors import CheckpointCorruptError, QuorumLostError
from photon.federation import Candidates
from photon.membership.records import Member
from photon.membership.refusals import refusing
from photon.membership.roster import Roster
from photon.store.disk import write_json

DRAWS_FILE = "draws.json"
#: Rounds before the newest that a run may go back to, where its newest checkpoint is damaged.
_KEPT = 2
#: Between two looks at who is here.
_LOOK_S = 0.5
#: How long a run whose rounds are done waits for silos, for the scores of their own text.
_SCORES_S = 60.0


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
        kept: rounds before the newest that the run may go back to.
    """

    def __init__(self, folder: Path, kept: int = _KEPT) -> None:
        self._path, self._kept = folder / DRAWS_FILE, kept

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
        rounds = {old: one for old, one in self._read().items() if old >= number - self._kept}
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


@dataclass(frozen=True)
class JoinedFleet:
    """The members that are here.

    Attributes:
        roster: members, and when each was heard of.
        config: which members may take part, how many must, how long silence may last.
        run_id: of the run.
        draws: what earlier processes drew, and this one.
        ending: whether the run is to end once its round is over: nobody is waited for then.
        on_lost: told of a round, and which attempt at it, that lost its quorum, before another
            draw may follow.
        refused: of these members, those who may not take part, each with the reason.
    """

    roster: Roster
    config: RunConfig
    run_id: str
    draws: Draws
    ending: Callable[[], bool] = lambda: False
    on_lost: Callable[[int, int], None] = lambda number, attempt: None
    refused: Callable[[Sequence[Member]], Mapping[str, str]] = lambda members: {}

    def expected(self, round_number: int) -> Mapping[str, int] | None:
        """Tokens of those that a round will be drawn from, as far as can be known before it.

        Waits and raises as `drawn_from` does, and draws nobody. Where all rounds are done and only
        their scores are missing, nobody is needed: those of the last round are waited for a while.
        """
        if (begun := self._begun(round_number)) is not None:
            return begun.tokens
        over = round_number > self.config.federation.rounds
        return self._scored() if over else self._gathered(round_number)

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
            before = self.draws.of(round_number)
            if self.roster.tasks.asked(self.run_id, round_number):
                # Answers to an earlier attempt, before the draw that they are no answers to.
                self.roster.tasks.prune(self.run_id, before_round=round_number + 1)
            begun = Drawn(1 + (before.attempt if before is not None else 0), dict(here))
            self.draws.keep(round_number, begun)
        return Candidates(begun.tokens, begun.attempt)

    def lost(self, round_number: int) -> bool:
        drawn = self._begun(round_number)
        if drawn is None:
            return False
        self.on_lost(round_number, drawn.attempt)
        self.draws.lose(round_number)
        # Without those who will not, another draw is another round; else it would end as this one.
        return bool(refusing(self.roster, self.run_id).keys() & drawn.tokens.keys())

    def present(self) -> list[str]:
        return sorted(self._here())

    def _begun(self, round_number: int) -> Drawn | None:
        """The draw that a round goes on with, if there is one."""
        drawn = self.draws.of(round_number)
        return drawn if drawn is not None and not drawn.lost else None

    def _gathered(self, round_number: int) -> dict[str, int] | None:
        """Those who are here, once they are enough; None where the run is to end before that."""
        needed, gather_s = self.config.silos_needed, self.config.serve.gather_s
        here = self._awaited(round_number, needed, gather_s, self._here)
        if len(here) >= needed:
            return here
        if self.ending():
            return None
        raise QuorumLostError(
            f"{len(here)} silos are here ({', '.join(sorted(here)) or 'none'}), round "
            f"{round_number} needs {needed}; waited {gather_s:g} s",
            hint="See `photon status`; invite more silos or lower serve.min_silos.",
        )

    def _scored(self) -> Mapping[str, int]:
        """Those whom the last round was drawn from, after a short wait for the ones still here."""
        config, members = self.config, self._tokens()
        last = self.draws.of(config.federation.rounds)
        tokens = last.tokens if last is not None else members
        wanted = tokens.keys() & members.keys() - refusing(self.roster, self.run_id).keys()
        if config.eval.per_silo:
            self._awaited(
                None,
                len(wanted),
                min(_SCORES_S, config.serve.gather_s),
                lambda: {name: tokens[name] for name in self._here() if name in wanted},
            )
        return tokens

    def _awaited(
        self,
        round_number: int | None,
        needed: int,
        wait_s: float,
        look: Callable[[], dict[str, int]],
    ) -> dict[str, int]:
        """Who is here once they are enough, the time is up or the run is to end; says so.

        Args:
            round_number: what they are waited for; None: the last scores.
        """
        until, told = time.time() + wait_s, None
        try:
            while len(here := look()) < needed and not self.ending() and time.time() <= until:
                waiting = {
                    "for_silos": needed,
                    "round": round_number,
                    "here": sorted(here),
                    "refusing": refusing(self.roster, self.run_id),
                    "refused": self.refused(self._members()),
                    "until": until,
                }
                if waiting != told:
                    self.roster.set_setting("waiting", told := waiting)
                time.sleep(_LOOK_S)
            return here
        finally:
            self.roster.set_setting("waiting", None)  # also what a killed process left there

    def _members(self) -> list[Member]:
        wanted = self.config.serve.silos
        return [
            member
            for member in self.roster.members()
            if member.status == "active" and (not wanted or member.name in wanted)
        ]

    def _tokens(self) -> dict[str, int]:
        members = self._members()
        out = self.refused(members)
        return {one.name: one.facts.train_tokens for one in members if one.name not in out}

    def _here(self) -> dict[str, int]:
        seen, now = self.roster.presences(), time.time()
        silence_s = self.config.federation.silence_s
        out = refusing(self.roster, self.run_id)
        return {
            name: tokens
            for name, tokens in self._tokens().items()
            if name in seen
            and name not in out
            and now - seen[name][1] < min(60.0, silence_s)
            and seen[name][0].state != "stopping"
        }
