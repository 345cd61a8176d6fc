"""One hostile member of four: whatever it answers, the run loses that member's update and no more.

The run ends, its weights are finite, everything it leaves can be read, and its weights are those of
a run in which that member refused every task: to the bit, unless the lie is one that leaves a good
update standing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from remote_bench import ask_again_at_once

from photon.dashboard.report import write_report
from photon.engines.remote.messenger import Messenger
from photon.errors import PolicyError
from photon.federation.envelopes import RefPart, Refusal, Reply, parse_reply
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
        kind: of hostility.
        shapes: of the model's tensors.
        first: its answers to the first round, to be played again.
        fired: tasks that were answered with the lie.
    """

    kind: str
    shapes: dict[str, torch.Size]
    first: list = field(default_factory=list)
    fired: list[str] = field(default_factory=list)

    def answer(self, silo, ask):
        """The lie, signed by the member's own key; honest where it is only to score."""
        if ask.fit is None:
            return silo.answer(ask)
        self.fired.append(ask.task_id)
        return getattr(self, self.kind)(silo, ask)

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
        turn = len(self.fired) - 1
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
        if self.kind == "wrong_shapes":  # under the fingerprint of the true ones
            header = update_header(ask.fit_task("test"), self.shapes)
        place = f"{ask.run.id}/silos/{silo.name}"
        entries = self._spoiled(plain_entries(tensors.items()))
        ref = write_parcel(Transfer(silo.store), place, header, entries)
        fit = parse_reply(silo.answer(ask).text).fit
        lie = {"update": RefPart.of(ref), "failure": None, "tokens": fit.tokens or 1}
        return self._say(silo, ask, fit=fit.model_copy(update=lie))

    def _spoiled(self, entries):
        """No codec takes what is not a number: it is put in afterwards."""
        for entry in entries:
            if self.kind == "not_a_number":
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
    """Runs a federation of which one member does what a kind of Attack says."""
    config = make_config(
        four_silos,
        "local.steps=2",
        f"federation.rounds={_ROUNDS}",
        f"eval.every={_ROUNDS}",
        "eval.max_tokens=500",
        "serve.min_silos=3",
        f"serve.round_deadline_s={_DEADLINE_S}",
    )

    def run(kind: str, patch: pytest.MonkeyPatch):
        served = served_run(config, tmp_path_factory.mktemp(kind), [*HONEST, HOSTILE])
        attack = Attack(kind, _shapes(config, served))
        served.wire.fault = lambda silo, ask, _: (
            attack.answer(silo, ask) if silo.name == HOSTILE else silo.answer(ask)
        )
        ask_again_at_once(patch)
        if kind in ("silence", "slowness"):
            _let_time_pass(served, attack, patch)
        try:
            return served, attack, served.go_on()
        finally:
            served.roster.close()

    return run


def _shapes(config, served) -> dict[str, torch.Size]:
    from photon.data import open_data
    from photon.federation.node import empty_model
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
        elif attack.kind == "silence":
            served.wire.quiet.add(HOSTILE)
        elif attack.fired:
            task = attack.fired[-1]
            served.wire.be_here(HOSTILE, state="training", task=task, step=1, of=2)
        return found

    patch.setattr(Messenger, "begin", begun)
    served.wire.pull = pulled


@pytest.fixture(scope="module")
def without(attacked):
    """The run without that member: it refuses every task."""
    with pytest.MonkeyPatch.context() as patch:
        _, attack, result = attacked("refuses", patch)
    assert attack.fired
    return result.summary


REFUSED = [
    "huge_norm",
    "not_a_number",
    "zero_tokens",
    "more_tokens",
    "huge_times",
    "endless_times",
    "wrong_shapes",
    "garbage",
    "silence",
    "slowness",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_it_costs_the_run_that_member_and_nothing_else(kind, attacked, without, monkeypatch):
    served, attack, result = attacked(kind, monkeypatch)
    assert attack.fired
    assert result.summary["weights_sha256"] == without["weights_sha256"]
    assert result.summary["global_loss"] == without["global_loss"]
    _require_sound(served, result)
    dropped = read_history(served.folder).of(UpdateDropped)
    assert {one.silo for one in dropped} == {HOSTILE}
    assert dropped[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replay", "fewer_tokens"])
def test_a_lie_that_leaves_a_good_update_standing_moves_nothing(
    kind, attacked, without, monkeypatch
):
    """A replay is merged in its own round and refused in the next; fewer tokens weigh less."""
    served, attack, result = attacked(kind, monkeypatch)
    assert attack.fired
    assert result.summary["global_loss"] == pytest.approx(without["global_loss"], rel=0.02)
    _require_sound(served, result)
    if kind == "replay":
        (dropped,) = read_history(served.folder).of(UpdateDropped)
        assert (dropped.round, dropped.silo) == (2, HOSTILE)


def _require_sound(served, result) -> None:
    """The run is over, honest members were merged in every round, and all it leaves can be read."""
    history = read_history(served.folder)
    merged = history.of(RoundMerged)
    assert [one.round for one in merged] == list(range(1, _ROUNDS + 1))
    assert all(set(HONEST) <= set(one.participants) for one in merged)
    model, _ = load_weights(served.folder)
    assert all(torch.isfinite(one).all() for one in model.parameters())
    summary = json.loads((served.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["rounds"] == _ROUNDS
    served.audit()
    page = Path(write_report(served.folder)).read_text(encoding="utf-8")
    assert "<script>" not in page.partition("[/x]")[2][:200]
    assert "\x1b" not in page
