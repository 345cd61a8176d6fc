"""One hostile member of four: whatever it answers, the run loses that member's update and no more.

The run ends, its weights are finite, everything it leaves can be read, and its weights are those of
a run in which that member refused every task: to the bit, unless the lie is one that leaves a good
update standing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from remote_bench import ask_again_at_once

from photon.dashboard.report import write_report
from photon.engines.remote.messenger import Messenger
from photon.errors import PolicyError
from photon.federation.envelopes import Refusal, Reply, parse_reply
from photon.federation.tasks import update_header
from photon.link import plain_entries, write_parcel
from photon.runs import load_weights
from photon.store.transfer import Transfer
from photon.telemetry import read_history
from photon.telemetry.events import RoundMerged, UpdateDropped

HOSTILE, HONEST = "grey", ["blue", "green", "red"]
_DEADLINE_S = 600.0
_ROUNDS = 2


@dataclass
class Attack:
    """What the hostile member knows and does.

    Attributes:
        kinds: of hostility, one for each round.
        shapes: of the model's tensors.
        first: its answers to the first round, to be played again.
        fired: tasks that were answered with the lie.
        garbled: how many of them with garbage.
    """

    kinds: list[str]
    shapes: dict[str, torch.Size]
    first: list = field(default_factory=list)
    fired: list[str] = field(default_factory=list)
    garbled: int = 0

    def answer(self, silo, ask):
        """The lie, signed by the member's own key; honest where it is only to score."""
        if ask.fit is None:
            return silo.answer(ask)
        self.fired.append(ask.task_id)
        return getattr(self, self.kinds[ask.round - 1])(silo, ask)

    # --- the update's values -------------------------------------------------------------------

    def refuses(self, silo, ask):
        error = PolicyError("not today")
        return self._say(silo, ask, fit=None, refused=Refusal.of(error))

    def huge_norm(self, silo, ask):
        return self._send(silo, ask, {name: torch.full(s, 1e30) for name, s in self.shapes.items()})

    def not_a_number(self, silo, ask):
        return self._send(silo, ask, {name: torch.zeros(s) for name, s in self.shapes.items()})

    def wrong_shapes(self, silo, ask):
        tensors = {name: torch.zeros(*shape, 2) for name, shape in self.shapes.items()}
        return self._send(silo, ask, tensors)

    # --- its figures ---------------------------------------------------------------------------

    def zero_tokens(self, silo, ask):
        return self._figures(silo, ask, tokens=0)

    def more_tokens(self, silo, ask):
        return self._figures(silo, ask, tokens=2**52)

    def fewer_tokens(self, silo, ask):
        return self._figures(silo, ask, tokens=1)

    def huge_times(self, silo, ask):
        return self._figures(silo, ask, train_s=1.7e308, load_s=1.7e308, publish_s=1.7e308)

    def endless_times(self, silo, ask):
        return self._figures(silo, ask, train_s=math.inf, times=[math.nan] * 4)

    def garbage(self, silo, ask):
        """In every text field of an answer; asked again, in those of a failure; then in another."""
        text = "[/x][link=file:///etc/passwd]\x1b[2J\u202e\x00<script>" + "\ud800" + "x" * 5000
        record = json.loads(silo.answer(ask).text)
        fields = [name for name, value in record.items() if isinstance(value, str)]
        turn, self.garbled = self.garbled, self.garbled + 1
        if turn == 0:
            record = {name: text if name in fields else value for name, value in record.items()}
        elif turn == 1:
            record["fit"] = {"failure": text, "failure_hint": text}
        else:
            record[fields[turn % len(fields)]] = text
        return silo.sign(json.dumps(record).encode())

    # --- its conduct ---------------------------------------------------------------------------

    def replay(self, silo, ask):
        """The answer to the first round, again and again."""
        self.first.append(silo.answer(ask))
        return self.first[0]

    def silence(self, silo, ask):
        return None

    def slowness(self, silo, ask):
        return None

    def _figures(self, silo, ask, **figures):
        """As bytes: the models that write answers refuse such figures."""
        record = json.loads(silo.answer(ask).text)
        record["fit"] |= figures
        return silo.sign(json.dumps(record).encode())

    def _send(self, silo, ask, tensors):
        header = update_header(ask.fit_task("test"), tensors)
        if self.kinds[ask.round - 1] == "wrong_shapes":  # under the fingerprint of the true ones
            header = update_header(ask.fit_task("test"), self.shapes)
        place = f"{ask.run.id}/silos/{silo.name}"
        entries = plain_entries(tensors.items())
        if self.kinds[ask.round - 1] == "not_a_number":
            entries = self._spoiled(entries)
        ref = write_parcel(Transfer(silo.store), place, header, entries)
        fit = parse_reply(silo.answer(ask).text).fit
        lie = {"update": ref, "failure": None, "tokens": fit.tokens or 1}
        return self._say(silo, ask, fit=replace(fit, **lie))

    def _spoiled(self, entries):
        """No codec takes what is not a number: it is put in afterwards."""
        for entry in entries:
            next(iter(entry.parts.values())).view(-1)[-1] = math.nan
            yield entry

    def _say(self, silo, ask, **fields):
        reply = parse_reply(silo.answer(ask).text)
        return silo.sign(Reply.model_validate(reply.model_copy(update=fields).model_dump()))


@pytest.fixture(scope="module")
def four_silos(prepare_text, tmp_path_factory):
    sizes = {"red": 16, "green": 12, "blue": 20, HOSTILE: 12}
    return prepare_text(tmp_path_factory.mktemp("four"), sizes)


@pytest.fixture(scope="module")
def attacked(four_silos, make_config, served_run, tmp_path_factory):
    """Runs a federation of which one member does in each round what a kind of Attack says."""

    def run(kinds: list[str], patch: pytest.MonkeyPatch):
        config = make_config(
            four_silos,
            "local.steps=2",
            f"federation.rounds={len(kinds)}",
            f"eval.every={len(kinds)}",
            "eval.max_tokens=500",
            "serve.min_silos=3",
            f"federation.deadline_s={_DEADLINE_S}",
        )
        served = served_run(config, tmp_path_factory.mktemp(kinds[0]), [*HONEST, HOSTILE])
        attack = Attack(kinds, _shapes(config, served))
        served.wire.fault = lambda silo, ask, _: (
            attack.answer(silo, ask) if silo.name == HOSTILE else silo.answer(ask)
        )
        ask_again_at_once(patch)
        if {"silence", "slowness"} & set(kinds):
            _let_time_pass(served, attack, patch)
        try:
            return served, attack, served.go_on()
        finally:
            served.roster.close()

    return run


def _shapes(config, served) -> dict[str, torch.Size]:
    from photon.data import open_data
    from photon.federation.layout import empty_model
    from photon.federation.tasks import WEIGHTS
    from photon.models import trainable_parameters

    data = open_data(config.data.path)
    model = empty_model(config, vocab_size=data.vocab_size, eos_id=data.eos_id)
    return {WEIGHTS + name: one.shape for name, one in trainable_parameters(model).items()}


def _let_time_pass(served, attack: Attack, patch: pytest.MonkeyPatch) -> None:
    """Once all others have answered, its deadline has come; before, the slow one is at work."""
    begin, pull, open_errands = Messenger.begin, served.wire.pull, []

    def begun(messenger, one):
        open_errands.append(one)
        return begin(messenger, one)

    def pulled(ids):
        found = pull(ids)
        waited_for = [one for one in open_errands if one.ask.fit and not one.over]
        if [one.ask.silo for one in waited_for] == [HOSTILE] and attack.fired:
            waited_for[0].begun_s -= _DEADLINE_S
        elif "silence" in attack.kinds:
            served.wire.quiet.add(HOSTILE)
        elif attack.fired:
            task = attack.fired[-1]
            served.wire.be_here(HOSTILE, state="training", task=task, step=1, of=2)
        return found

    patch.setattr(Messenger, "begin", begun)
    served.wire.pull = pulled


@pytest.fixture(scope="module")
def without(attacked):
    """By rounds, the run without that member: it refuses every task."""
    found = {}
    for rounds in (_ROUNDS, len(REFUSED)):
        with pytest.MonkeyPatch.context() as patch:
            _, attack, result = attacked(["refuses"] * rounds, patch)
        assert attack.fired  # once: who refuses is asked no more
        found[rounds] = result.summary
    return found


#: One for each round of one run, and words of why it is refused; garbage is in other fields the
#: second time.
REFUSED = [
    ("huge_norm", "its norm 2.002e+32 exceeds"),
    ("not_a_number", "1 NaN or infinite values"),
    ("zero_tokens", "no tokens"),
    ("more_tokens", "answered tokens = 4503599627370496"),
    ("huge_times", "fit.train_s: Input should be less than"),
    ("endless_times", "fit.train_s: Input should be a finite number"),
    ("wrong_shapes", "has shape [304, 32, 2], expected [304, 32]"),
    ("garbage", "no Reply: "),
    ("garbage", "no Reply: "),
]


def _require_the_run_without(served, attack, result, without) -> list[UpdateDropped]:
    """That it ended as the run without that member; returns what was dropped."""
    rounds = len(attack.kinds)
    assert attack.fired
    assert result.summary["weights_sha256"] == without[rounds]["weights_sha256"]
    assert result.summary["global_loss"] == without[rounds]["global_loss"]
    _require_sound(served, result, rounds)
    dropped = read_history(served.folder).of(UpdateDropped)
    assert {one.silo for one in dropped} == {HOSTILE}
    assert all(one.reason for one in dropped)
    return dropped


@pytest.mark.slow
def test_lies_cost_the_run_that_member_and_nothing_else(attacked, without, monkeypatch):
    """Of any kind, each in a round of its own: none is merged, so none helps another."""
    served, attack, result = attacked([kind for kind, _ in REFUSED], monkeypatch)
    dropped = _require_the_run_without(served, attack, result, without)
    assert len(set(attack.fired)) == len(REFUSED)
    assert [one.round for one in dropped] == list(range(1, len(REFUSED) + 1))
    for one, (kind, words) in zip(dropped, REFUSED, strict=True):
        assert words in one.reason, kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["silence", "slowness"])
def test_no_answer_costs_the_run_that_member_and_nothing_else(kind, attacked, without, monkeypatch):
    _require_the_run_without(*attacked([kind] * _ROUNDS, monkeypatch), without)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replay", "fewer_tokens"])
def test_a_lie_that_leaves_a_good_update_standing_moves_nothing(
    kind, attacked, without, monkeypatch
):
    """A replay is merged in its own round and refused in the next; fewer tokens weigh less."""
    served, attack, result = attacked([kind] * _ROUNDS, monkeypatch)
    assert attack.fired
    loss = without[_ROUNDS]["global_loss"]
    assert result.summary["global_loss"] == pytest.approx(loss, rel=0.02)
    _require_sound(served, result, _ROUNDS)
    if kind == "replay":
        (dropped,) = read_history(served.folder).of(UpdateDropped)
        assert (dropped.round, dropped.silo) == (2, HOSTILE)


def _require_sound(served, result, rounds: int) -> None:
    """The run is over, honest members were merged in every round, and all it leaves can be read."""
    history = read_history(served.folder)
    merged = history.of(RoundMerged)
    assert [one.round for one in merged] == list(range(1, rounds + 1))
    assert all(set(HONEST) <= set(one.participants) for one in merged)
    model, _ = load_weights(served.folder)
    assert all(torch.isfinite(one).all() for one in model.parameters())
    summary = json.loads((served.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["rounds"] == rounds
    served.audit()
    page = Path(write_report(served.folder)).read_text(encoding="utf-8")
    assert "<script>" not in page.partition("[/x]")[2][:200]
    assert "\x1b" not in page
