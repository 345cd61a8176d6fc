"""What a text has spent, through kills, resumes, repeated questions and other names."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from other_accountant import composed

from photon.config import PrivacyConfig
from photon.data.stream import TokenStream, _shuffled
from photon.errors import CheckpointCorruptError, PolicyError, ResumeMismatchError
from photon.federation.private import Purse, Spending, spans_of
from photon.federation.tasks import FitTask
from photon.privacy import SECRET_FILE, node_secret
from photon.privacy.epsilon import epsilon
from photon.privacy.ledger import LEDGERS, Entry, Ledger, mu_squared

TEXT, LENGTH = "ab" * 32, 4


def stream(sequences, seed=0):
    """Of one source with so many sequences, in the order that they are trained on."""
    return TokenStream([range(sequences * LENGTH + 1)], _shuffled(0, sequences, seed), LENGTH)


class Site:
    """A silo, and the mechanisms that each of its sequences went through, kept by brute force."""

    def __init__(self, folder, sequences=12, batch=3, z=2.0, **limits):
        self.folder, self.size, self.batch, self.z = folder, sequences, batch, z
        self.run, self.seed, self.silo = "run", 0, "red"
        self.most = limits.pop("max_epsilon", None)
        self.limits = limits
        self.seen = []

    def spending(self, number, cursor, steps, mechanism="dp_sgd"):
        sized = {} if "target_epsilon" in self.limits else {"noise_multiplier": self.z}
        privacy = PrivacyConfig(mechanism=mechanism, clip_norm=1.0, **sized, **self.limits)
        privacy = privacy.model_copy(update={"noise_multiplier": self.z})
        task = FitTask("name", number, self.silo, 0, steps, None, cursor=cursor)
        purse = Purse(self.folder, self.run, self.most)
        if mechanism == "client":
            return Spending(privacy, purse, task, TEXT)
        spans = spans_of(stream(self.size, self.seed), cursor, steps, self.batch)
        return Spending(privacy, purse, task, TEXT, "", LENGTH, f"seed {self.seed}", spans)

    def trains(self, number, cursor, steps, answer="same", killed=False):
        """A task, from its question to its answer, or to a kill before that."""
        one = self.spending(number, cursor, steps)
        one.begin()
        if killed:
            return
        one.answered(answer)
        if (number, cursor, steps, answer, self.run) not in self.seen:
            self.seen.append((number, cursor, steps, answer, self.run))

    def sends(self, number, answer="same"):
        one = self.spending(number, 0, 4, "client")
        one.begin()
        one.answered(answer)

    def entries(self):
        return Ledger(self.folder, TEXT).entries()

    def epsilon(self, unit="sequence"):
        return epsilon(mu_squared(self.entries(), unit), 1e-5)


def three_tasks_in_an_epoch(site):
    for number in range(3):
        site.trains(number, 3 * number, 1)
    return [2.0]


def two_epochs_and_a_half(site):
    for number in range(5):
        site.trains(number, 6 * number, 2)
    return [2.0] * 3


def killed_before_the_answer_and_asked_again(site):
    site.trains(1, 0, 4, killed=True)
    site.trains(1, 0, 4, killed=True)
    site.trains(1, 0, 4)
    return [2.0]


def the_same_question_three_times(site):
    for _ in range(3):
        site.trains(1, 0, 4)
    return [2.0]


def another_answer_to_a_question(site):
    """Another state under the same name, say; and again the first."""
    for answer in ("same", "other", "same"):
        site.trains(1, 0, 4, answer)
    return [2.0] * 2


def a_task_whose_answer_never_came(site):
    """It counts, as nobody knows; the round after reads on."""
    site.trains(1, 0, 2, killed=True)
    site.trains(2, 6, 2)
    site.trains(3, 12, 2)
    return [2.0] * 2


def one_stretch_in_two_rounds(site):
    site.trains(1, 0, 4)
    site.trains(2, 0, 2)
    return [2.0] * 2


def rounds_of_fewer_steps(site):
    """Partial rounds: who is slow takes one step of three."""
    for number, (cursor, steps) in enumerate([(0, 1), (3, 3), (12, 1), (15, 1)]):
        site.trains(number, cursor, steps)
    return [2.0] * 2


def a_second_run_with_other_noise(site):
    site.trains(1, 0, 8)
    site.run, site.seed, site.z = "second", 1, 0.8
    site.trains(1, 0, 4)
    return [2.0, 2.0, 0.8]


def another_name_on_the_same_text(site):
    site.trains(1, 0, 4)
    site.silo = "blue"
    site.trains(2, 12, 4)
    return [2.0] * 2


def a_sequence_twice_in_a_step(site):
    """The step across the end of the first epoch has one in both of its halves: twice as far."""
    site.size, site.batch = 7, 4
    for site.seed in range(50):
        if max(Counter(stream(7, site.seed).numbers(4, 4)).values()) == 2:
            break
    site.trains(1, 0, 3)
    return [1.0]  # z / 2: as four of z = 2


HISTORIES = [
    three_tasks_in_an_epoch,
    two_epochs_and_a_half,
    killed_before_the_answer_and_asked_again,
    the_same_question_three_times,
    another_answer_to_a_question,
    a_task_whose_answer_never_came,
    one_stretch_in_two_rounds,
    rounds_of_fewer_steps,
    a_second_run_with_other_noise,
    another_name_on_the_same_text,
    a_sequence_twice_in_a_step,
]


@pytest.mark.parametrize("history", HISTORIES)
def test_a_history_costs_what_another_accountant_says(history, tmp_path):
    site = Site(tmp_path)
    zs = history(site)
    found = site.epsilon()
    assert found == pytest.approx(composed(PLDAccountant, zs), rel=2e-3)
    assert found <= composed(RdpAccountant, zs)


def test_answers_of_a_silo_as_a_whole(tmp_path):
    """Ten rounds, one of them lost after its answer left, one asked twice, one of another state."""
    site = Site(tmp_path, z=5.0)
    for number in [1, 2, 3, 3, *range(4, 11)]:
        site.sends(number)
    site.sends(4, "other")
    assert site.epsilon("client") == pytest.approx(composed(PLDAccountant, [5.0] * 11), rel=2e-3)
    assert site.epsilon("client") <= composed(RdpAccountant, [5.0] * 11)
    # One sequence may turn each of them around.
    assert site.epsilon() == pytest.approx(composed(PLDAccountant, [2.5] * 11), rel=2e-3)
    site.run = "second"
    site.trains(1, 0, 4)
    noise = [2.5] * 11 + [5.0]
    assert site.epsilon() == pytest.approx(composed(PLDAccountant, noise), rel=2e-3)
    # Noise on sequences says nothing about a silo.
    assert site.epsilon("client") == pytest.approx(composed(PLDAccountant, [5.0] * 11), rel=2e-3)


TASKS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 30), st.integers(1, 9), st.sampled_from("ab")),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(tasks=TASKS, size=st.integers(1, 13), batch=st.integers(1, 9), seed=st.integers(0, 3))
def test_no_sequence_costs_more_than_the_ledger_says(tasks, size, batch, seed, tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"), sequences=size, batch=batch)
    site.seed = seed
    for number, cursor, steps, answer in tasks:
        site.trains(number, cursor, steps, answer)
    moved = Counter()
    for _, cursor, steps, _, _ in site.seen:
        for step in range(steps):
            numbers = stream(size, seed).numbers(cursor + step * batch, batch)
            for one, times in Counter(numbers).items():
                moved[one] += times**2 / site.z**2
    found = mu_squared(site.entries(), "sequence")
    assert max(moved.values()) <= found * (1 + 1e-9)
    epochs = sum(steps * batch // size + 2 for _, _, steps, _, _ in site.seen)
    assert batch >= size or found <= 2 * epochs / site.z**2


def test_longer_sequences_cover_shorter_ones():
    def entry(tokens):
        return Entry(
            run="run",
            question="q",
            unit="sequence",
            multiplier=2.0,
            tokens=tokens,
            stream=str(tokens),
            spans=[(0, 0, 5, 1)],
        )

    assert mu_squared([entry(128)], "sequence") == 0.25
    assert mu_squared([entry(128), entry(64)], "sequence") == 0.25 + 4 * 0.25
    assert mu_squared([entry(128), entry(100)], "sequence") == 0.25 + 9 * 0.25


# --- refusals -----------------------------------------------------------------------------------


def test_a_budget_stops_before_it_is_passed(tmp_path):
    """Target of the run, and the site's over all runs; nothing is written of what is refused."""
    site = Site(tmp_path, target_epsilon=composed(PLDAccountant, [2.0] * 3) * 1.01, delta=1e-5)
    for number in range(3):
        site.trains(number, 12 * number, 4)
    before = site.entries()
    with pytest.raises(PolicyError, match=r"epsilon spent: .*privacy\.target_epsilon"):
        site.trains(3, 36, 4)
    with pytest.raises(PolicyError, match="epsilon spent"):
        site.trains(2, 24, 4, "other")  # trained for nothing: its answer was to be the same
    assert site.entries() == before
    site.trains(2, 24, 4)  # what is paid stays paid
    # Another run begins anew, but for the site.
    site.run = "second"
    site.trains(3, 36, 4)
    site.run, site.most = "third", site.epsilon() * 1.01
    with pytest.raises(PolicyError, match=r"epsilon spent: .*policy\.max_epsilon, over all runs"):
        site.trains(4, 48, 4)


def test_a_silo_s_answers_stop_before_training_too(tmp_path):
    site = Site(tmp_path, z=5.0, max_epsilon=composed(PLDAccountant, [5.0] * 2) * 1.01)
    site.sends(1)
    site.sends(2)
    with pytest.raises(PolicyError, match="epsilon spent"):
        site.spending(3, 0, 4, "client").begin()
    site.spending(2, 0, 4, "client").begin()
    # A delta of its own choosing is no way round.
    loose = replace(
        site.spending(3, 0, 4, "client"),
        privacy=PrivacyConfig(mechanism="client", clip_norm=1, noise_multiplier=5.0, delta=0.9),
    )
    with pytest.raises(PolicyError, match="at delta 1e-05"):
        loose.begin()


def test_a_run_has_one_multiplier(tmp_path):
    site = Site(tmp_path)
    site.trains(1, 0, 4)
    site.z = 1.0
    with pytest.raises(ResumeMismatchError, match="is 1 for red, and was 2 in earlier tasks"):
        site.trains(2, 12, 4)
    site.run = "second"
    site.trains(2, 12, 4)


def test_what_is_lost_or_damaged_is_refused_by_name(tmp_path):
    site = Site(tmp_path)
    site.trains(1, 0, 4)
    node_secret(tmp_path)
    (ledger,) = tmp_path.glob("ledger-*.json")
    assert ledger.stat().st_mode & 0o777 == 0o600
    whole = ledger.read_bytes()
    for damage in (b"", whole[:-9], whole.replace(b"2.0", b"-2.0"), b'{"entries": 3}'):
        ledger.write_bytes(damage)
        with pytest.raises(CheckpointCorruptError, match=f"{ledger.name}: it can't be read"):
            site.trains(2, 12, 4)
        assert ledger.read_bytes() == damage
    ledger.unlink()
    with pytest.raises(CheckpointCorruptError, match=f"{ledger.name}: ledgers.json names it"):
        site.trains(2, 12, 4)
    ledger.write_bytes(whole)
    index = tmp_path / LEDGERS
    named = index.read_bytes()
    index.write_bytes(b"[]")
    with pytest.raises(CheckpointCorruptError, match=r"ledgers\.json: it can't be read"):
        site.trains(2, 12, 4)
    index.unlink()
    with pytest.raises(CheckpointCorruptError, match=f"{LEDGERS}: {SECRET_FILE} is there"):
        site.trains(2, 12, 4)
    index.write_bytes(named)
    site.trains(2, 12, 4)
    assert len(site.entries()) == 2


def test_a_kill_between_a_ledger_and_its_name_loses_nothing(tmp_path):
    site = Site(tmp_path)
    site.trains(1, 0, 4)
    record = json.loads((tmp_path / LEDGERS).read_text())
    (tmp_path / LEDGERS).write_text(json.dumps({"texts": ["other"]}))
    site.trains(2, 12, 4)
    assert len(site.entries()) == 2
    assert json.loads((tmp_path / LEDGERS).read_text())["texts"] == ["other", *record["texts"]]
