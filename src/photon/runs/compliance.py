"""[comply] of a served run: what is predicted of it, each time that its members or cards change."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from photon.cards.bundle import Cards
from photon.cards.filling import Known
from photon.cards.folder import PLANNED, read_cards_in
from photon.config import RunConfig
from photon.data import open_data
from photon.errors import NotCompliantError, some
from photon.federation.layout import empty_model
from photon.law.claims import read_claims
from photon.law.prediction import NOTE, VERDICTS, Claim, Prediction, changes, predict, with_children
from photon.law.rules import load_law
from photon.membership.records import Member
from photon.training.flops import count_flops

#: Findings in one line of the log; it says how many there are.
_MOST_CHANGES = 1000


def planned(config: RunConfig) -> Known:
    """What is known of a run before it begins, and of the model that it is to make.

    Its FLOP are those of all rounds, of as many participants as serve.silos names, or at least
    take part.

    Raises:
        DataError: the prepared folder, which says how large the vocabulary is, can't be read.
    """
    data = open_data(config.data.path)
    model = empty_model(config, vocab_size=data.vocab_size, eos_id=data.eos_id)
    length, flops = config.data.sequence_length, count_flops(model, config.data.sequence_length)
    participants = config.federation.sample or len(config.serve.silos) or config.silos_needed
    tokens = config.total_steps * config.local.batch_size * length * participants
    facts = {
        "name": PLANNED,
        "what": "checkpoint",
        "architecture": f"{config.model.family}, {config.model.preset or config.model.path}",
        "parameters": sum(one.numel() for one in model.parameters()),
        "vocab_size": data.vocab_size,
        "sequence_length": length,
        "tokens": tokens,
        "flops_per_token": float(flops.per_token),
        "training_flops": float(flops.per_token) * tokens,
        "flops_method": flops.explain(),
    }
    project = {"run": config.run.name, "how": "serve", "silos": sorted(config.serve.silos)}
    return Known(project, {PLANNED: facts})


def refused_by(
    config: RunConfig, write: Callable[[dict[str, Any]], None] = lambda body: None
) -> Callable[[Sequence[Member]], Mapping[str, str]]:
    """As `Compliance.refused`; nobody where comply.cards is not said."""
    if config.comply.cards is None:
        return lambda members: {}
    # What is trained in a federation inside another its parent says.
    models = planned(config).models if config.serve.child is None else {}
    return Compliance(config, models, write).refused


def verdict_alone(config: RunConfig) -> str:
    """What the cards come to before anybody joined, in words; raises as `Compliance.refused`."""
    told: list[dict[str, Any]] = []
    refused_by(config, told.append)([])
    return f"{told[0]['verdict']} on {told[0]['law']}, before anybody joins. {NOTE}"


class Compliance:
    """Who may take part, by the cards in comply.cards.

    Args:
        config: the run file.
        models: facts of `planned`, which stand for those in models/planned.toml; none where another
            says what is trained.
        write: what changed, into the audit log.
        today: the law date.
    """

    def __init__(
        self,
        config: RunConfig,
        models: Mapping[str, Mapping[str, Any]],
        write: Callable[[dict[str, Any]], None] = lambda body: None,
        today: Callable[[], datetime.date] = lambda: datetime.datetime.now(datetime.UTC).date(),
    ) -> None:
        assert config.comply.cards is not None
        self._config, self._models, self._write, self._today = config, models, write, today
        self._folder = Path(config.comply.cards)
        self._require = config.comply.require
        #: Statuses that are not put up with.
        self._bad = ("not_met", "unknown") if self._require == "met" else ("not_met",)
        self._law = load_law(Path(config.comply.law) if config.comply.law else None)
        self._seen: object = None
        self._refused: dict[str, str] = {}
        self._claims: Mapping[str, Claim | None] = {}
        self._before: Prediction | None = None

    def refused(self, members: Sequence[Member]) -> Mapping[str, str]:
        """Those with whom the verdict would be worse than comply.require, each with the reason.

        Of several, those who joined first are looked at first.

        Raises:
            NotCompliantError: it is worse with nobody.
            CardError: there is no project card, or it or a model's can't be read. A data card that
                can't be read counts as none.
        """
        seen = (self._today(), tuple(members), self._stamps())
        if seen != self._seen:
            self._refused = self._look(members)
            self._seen = seen
        return self._refused

    def _look(self, members: Sequence[Member]) -> dict[str, str]:
        damaged: dict[str, str] = {}
        known = Known(
            project={"run": self._config.run.name, "how": "serve"},
            models=self._models,
            trained_on={one.name: one.facts.data_sha256 for one in members},
            keys={one.name: one.fingerprint for one in members},
        )
        cards = read_cards_in(self._folder, known, damaged)
        self._claims = read_claims(self._folder, self._config.own_jurisdictions)
        names = [one.name for one in sorted(members, key=lambda one: one.joined_at)]
        here, refused, found = list[str](), dict[str, str](), self._of(cards, [])

        def admit(more: list[str]) -> None:
            """All of them, or else one half after the other."""
            nonlocal found
            with_them, half = self._of(cards, [*here, *more]), len(more) // 2
            if self._bearable(with_them):
                here.extend(more)
                found = with_them
            elif half:
                admit(more[:half])
                admit(more[half:])
            else:
                why = self._reason(more[0], cards, changes(found, with_them))
                refused[more[0]] = f"{why}{damaged.get(more[0], '')}"

        if names:
            admit(names)
        if not self._bearable(found):
            bad = [f"{one.id} ({one.subject})" for one in found.findings if one.status in self._bad]
            told = f"comply.require is {self._require}, and the verdict on {found.law} is "
            told += f"{found.verdict}, whoever takes part: {some(bad, 5)}"
            hint = f"Answer in {self._folder}, or lower comply.require. {NOTE}."
            raise NotCompliantError(told, hint=hint)
        self._tell(found, refused)
        return refused

    def _reason(self, name: str, cards: Cards, moved: Mapping[tuple[str, str], Any]) -> str:
        if name not in cards.data:
            return "it has no data card"
        bad = [f"{of} ({subject})" for (of, subject), (_, now) in moved.items() if now in self._bad]
        return f"comply.require = {self._require}, and with it there would be open: {some(bad)}"

    def _of(self, cards: Cards, silos: Iterable[str]) -> Prediction:
        """With these silos. An entity with silos comes with them, but for the provider."""
        here = set(silos)
        entities = [
            one
            for one in cards.project.entities
            if not one.about.silos
            or here & set(one.about.silos)
            or "provider" in (one.about.roles or ())
        ]
        facts = cards.project.facts.model_copy(update={"silos": sorted(here)})
        project = cards.project.model_copy(update={"entities": entities, "facts": facts})
        data = {name: card for name, card in cards.data.items() if name in here}
        company = Cards(project, data, cards.models, cards.standings)
        claims = {name: one for name, one in self._claims.items() if name in here}
        return with_children(predict(company, self._law, self._today()), claims)

    def _bearable(self, found: Prediction) -> bool:
        least = self._require or VERDICTS[0]
        return VERDICTS.index(found.verdict) >= VERDICTS.index(least)

    def _tell(self, found: Prediction, refused: dict[str, str]) -> None:
        """Log what changed; the first time, what is open."""
        moved = changes(self._before, found)
        if self._before is None:
            moved = {key: one for key, one in moved.items() if one[1] in ("not_met", "unknown")}
        elif not moved and refused == self._refused:
            return
        self._before = found
        body = {
            "law": found.law.isoformat(),
            "rules": found.rules,
            "verdict": found.verdict,
            "require": self._require,
            "refused": refused,
            "changes": [[*key, *one] for key, one in moved.items()][:_MOST_CHANGES],
            "changed": len(moved),
            "note": NOTE,
        }
        self._write(body)

    def _stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Of each file of the folder: what tells that somebody changed it."""
        stats = ((one, one.stat()) for one in sorted(self._folder.rglob("*")) if one.is_file())
        return tuple((str(path), one.st_mtime_ns, one.st_size) for path, one in stats)
