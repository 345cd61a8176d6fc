"""The protocol as a whole: what comes out of a sum, whoever drops out when, and who learns what."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_cohort import SHAPES, Round, names_of, same, update_of

from photon.compression import build_codec
from photon.errors import PolicyError, ProtocolError, QuorumLostError
from photon.secure.aggregator import SecureSum, require_advert
from photon.secure.documents import Call
from photon.secure.graph import holds_together, mask_graph
from photon.secure.masks import Masks, derived, unboxed
from photon.secure.member import Party, pair_keys

PHASES = ("advertise", "share", "collect", "unmask")


def run_with_drops(round_, drops):
    """The mean, where these members leave before each phase; and whose updates are in it."""
    here = list(round_.names)
    for phase in PHASES:
        here = [name for name in here if name not in drops.get(phase, ())]
        if phase == "unmask":
            mean = round_.unmask(here)
        else:
            getattr(round_, phase)(here)
    return mean, round_.sum.survivors


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_sum_is_the_plain_fixed_point_mean_bit_for_bit(phase, count, tmp_path):
    names = names_of(8)
    round_ = Round(
        tmp_path, names, weights=dict(zip(names, (1, 2, 3, 7, 255, 4, 4, 9), strict=True))
    )
    mean, survivors = run_with_drops(round_, {phase: names[3 : 3 + count]})
    gone = 0 if phase == "unmask" else count
    assert survivors == [name for name in names if name not in names[3 : 3 + gone]]
    assert same(mean, round_.plain(survivors))
    assert round_.told == []


@pytest.mark.parametrize("phase", PHASES)
def test_beyond_the_threshold_it_stays_closed(phase, tmp_path):
    names = names_of(8)
    round_ = Round(tmp_path, names, floor=6)
    words = "stays closed|unmasks no sum|at least 6 are to be"
    with pytest.raises((QuorumLostError, PolicyError, ValueError), match=words):
        run_with_drops(round_, {phase: names[:3]})


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_cohort_any_drops(tmp_path_factory, data):
    count = data.draw(st.integers(3, 12))
    names = names_of(count)
    leave = st.dictionaries(st.sampled_from(PHASES), st.lists(st.sampled_from(names), max_size=2))
    weights = {name: data.draw(st.integers(1, 255)) for name in names}
    round_ = Round(tmp_path_factory.mktemp("any"), names, weights=weights)
    try:
        mean, survivors = run_with_drops(round_, data.draw(leave))
    except (QuorumLostError, PolicyError, ValueError):  # fewer than three advertise
        return
    assert same(mean, round_.plain(survivors))


def test_the_mean_is_that_of_the_updates_up_to_rounding(tmp_path):
    round_ = Round(tmp_path, names_of(8))
    mean, survivors = run_with_drops(round_, {})
    bounded = [update_of(name)["weights/vector"].clamp(-1.5, 1.5) for name in survivors]
    expected = torch.stack(bounded).mean(0)
    step = 1.5 * 8 / 2047
    assert float((mean["weights/vector"] - expected).abs().max()) <= step / 2 + 1e-6


def test_a_large_cohort_is_a_sparse_graph_that_nobody_can_part(tmp_path):
    names = names_of(32)
    round_ = Round(tmp_path, names)
    mean, survivors = run_with_drops(
        round_, {"share": names[:2], "collect": names[5:9], "unmask": names[20:24]}
    )
    assert {len(near) for near in round_.cohort.masks.values()} == {10}
    assert same(mean, round_.plain(survivors))
    graph = mask_graph(names, "seed")
    assert all(one in graph[other] for one in names for other in graph[one])
    draw = np.random.default_rng(1)
    for _ in range(300):
        left = set(names) - set(draw.choice(names, 9, replace=False))
        assert holds_together(graph, left)


# --- who learns what ------------------------------------------------------------------------------


def secret_of(round_, name):
    found = Party(round_.folder / name, name).read(round_.number)
    assert found is not None
    return found


def known_masks(round_, colluders):
    """Every key that an aggregator with these members' secrets has after an opening.

    Returns:
        own: members whose own masks it can draw; pairs: of members, whose common mask it can.
    """
    cohort, survivors = round_.cohort, set(round_.sum.survivors)
    dropped = set(cohort.names) - survivors
    own = survivors | set(colluders)
    pairs = {
        frozenset((one, other)) for one in dropped | set(colluders) for other in cohort.masks[one]
    }
    return own, pairs


@pytest.mark.parametrize("drops", [(), ("silo-05",)])
def test_two_colluders_and_the_aggregator_learn_the_sum_of_the_rest_alone(drops, tmp_path):
    names = names_of(8)
    round_, colluders = Round(tmp_path, names), names[:2]
    round_.advertise()
    round_.share()
    sealed = {name: round_.sealed(name) for name in names if name not in drops}
    for name, update in sealed.items():
        round_.sum.add(name, update.items())
    round_.unmask()
    own, pairs = known_masks(round_, colluders)
    honest = [name for name in names if name not in (*colluders, *drops)]
    # All they hold of an honest update: its words, less the masks that they can draw.
    left = {name: sealed[name]["weights/vector"].int().numpy().astype(np.uint16) for name in honest}
    for name in honest:
        private = secret_of(round_, name)
        own_mask = derived(private.derived("own"), "own mask", round_.cohort.id)
        keys = {own_mask: -1} if name in own else {}
        for other in round_.cohort.masks[name]:
            if frozenset((name, other)) in pairs:
                found = pair_keys(private.derived("mask"), name, [other], round_.cohort)
                keys |= {key: -sign for key, sign in found.items()}
        Masks(keys).add(left[name], "weights/vector")
    # Masks that are unknown are independent and uniform: a combination of updates says something
    # only if they cancel in it. The incidence matrix of what is unknown has them as its left null
    # space, and all ones is the only one: the sum.
    unknown = [
        (one, other)
        for one, other in itertools.combinations(honest, 2)
        if frozenset((one, other)) not in pairs
    ]
    incidence = np.zeros((len(honest), len(unknown)))
    for column, (one, other) in enumerate(unknown):
        incidence[honest.index(one), column], incidence[honest.index(other), column] = 1, -1
    assert np.linalg.matrix_rank(incidence) == len(honest) - 1
    assert not np.ones(len(honest)) @ incidence @ np.ones(len(unknown))
    numbers = round_.cohort
    mask = (1 << numbers.bits) - 1

    def spread(members):
        """How far from uniform the words are that these members' sum comes to, in sigmas."""
        words = sum(left[name] for name in members) & mask
        counts = np.bincount(words >> (numbers.bits - 3), minlength=8)
        expected = len(words) / 8
        return float(((counts - expected) ** 2 / expected).sum())

    for count in range(1, len(honest)):
        for some in itertools.combinations(honest, count):
            assert spread(some) < 40  # chi-square of 7 degrees: 40 is one in 10^6
    assert spread(honest) > 200  # the sum of the rest is what they learn
    # Nor do boxes with shares of an honest survivor's key open, or of a dropped one's own mask.
    assert len(colluders) < round_.cohort.threshold
    for name in (*honest, *drops):
        told = {
            holder: [unboxed(bytes.fromhex(one.keys[name]), box) is not None for box in boxes]
            for holder, one in round_.revealed.items()
            if holder != name
            for boxes in [round_.dealt[name].boxes[holder]]
        }
        assert len(told) >= round_.cohort.threshold
        assert set(map(tuple, told.values())) == {(name in drops, name not in drops)}


def test_masked_words_are_uniform_and_fresh(tmp_path):
    first, second = Round(tmp_path, names_of(3)), Round(tmp_path, names_of(3), number=2)
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for one in (first, second):
        one.advertise()
        one.share()
    words = first.sealed("silo-01", zeros)["weights/vector"]
    assert len(words.unique()) > 300
    assert not torch.equal(words, second.sealed("silo-01", zeros)["weights/vector"])


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path) -> Round:
    """A round whose updates are all there; silo-07 is to send its own."""
    round_ = Round(tmp_path, names_of(8))
    round_.advertise()
    round_.share()
    round_.collect(round_.names[:-1])
    return round_


def test_another_members_update_is_refused_by_name(closed):
    copied = closed.sealed("silo-03")
    said = closed.sum.add("silo-07", copied.items())
    assert said == "it sent the masked update of silo-03 once more"
    assert same(closed.unmask(), closed.plain(closed.names[:-1]))


def test_an_update_of_another_round_is_found_when_the_sum_is_open(closed):
    later = Round(closed.folder, closed.names, number=2)
    later.advertise()
    later.share()
    mixed = later.sealed("silo-07")
    assert closed.sum.add("silo-07", mixed.items()) is None
    with pytest.raises(QuorumLostError, match="beyond what 8 honest updates come to"):
        closed.unmask()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one | {"weights/more": torch.zeros(2)}, "'weights/more' is none"),
        (lambda one: one | {"weights/vector": torch.zeros(7)}, "'weights/vector' is none"),
        (lambda one: {"weights/vector": one["weights/vector"]}, "lacks weights/matrix"),
        (lambda one: one | {"weights/vector": one["weights/vector"] - 5000}, "no masked one"),
        (lambda one: one | {"weights/vector": one["weights/vector"] * torch.nan}, "no masked one"),
    ],
)
def test_what_is_no_masked_update_leaves_no_trace(closed, change, words):
    changed = change(closed.sealed("silo-07"))
    assert words in closed.sum.add("silo-07", changed.items())
    assert same(closed.unmask(), closed.plain(closed.names[:-1]))


def test_a_wrong_share_is_told_and_not_used(closed):
    closed.unmask(closed.names[:-1])
    closed.sum = SecureSum(closed.cohort, SHAPES)
    closed.collect(closed.names[:-1])
    wrong = closed.revealed["silo-02"]
    keys = dict(wrong.keys, **{"silo-04": wrong.keys["silo-05"]})
    closed.revealed["silo-02"] = wrong.model_copy(update={"keys": keys})
    assert same(closed.opened(), closed.plain(closed.names[:-1]))
    words = "silo-02 gave no key to its share of what silo-04 dealt, or silo-04 dealt none"
    assert closed.told == [words]


def test_shares_that_do_not_give_their_secret_are_their_dealers(closed):
    dealt = closed.dealt["silo-02"]
    closed.dealt["silo-02"] = dealt.model_copy(update={"own": "0" * 64})
    with pytest.raises(QuorumLostError, match="silo-02 dealt shares that do not give"):
        closed.unmask()
    assert closed.sum.suspects == ("silo-02",)


def test_both_shares_of_one_member_are_never_given(closed):
    asked = closed.ask
    closed.unmask()
    for survivors in (closed.names[:-2], closed.names):
        document = closed.closing(survivors)
        kind = type(closed.revealed["silo-00"])
        with pytest.raises(ProtocolError, match=r"both shares of silo-0[67]"):
            asked("silo-00", "unmask", document, kind)
    assert closed.revealed["silo-00"] == asked("silo-00", "unmask", closed.closing(), kind)


def test_a_member_is_in_one_cohort_of_an_attempt(closed):
    other = closed.cohort_of({name: closed.adverts[name] for name in closed.names[:-1]})
    with pytest.raises(ProtocolError, match="second cohort of round 1, attempt 1"):
        closed.ask("silo-00", "share", other, type(closed.dealt["silo-00"]))
    louder = closed.cohort_of(closed.adverts, ranges=dict.fromkeys(SHAPES, 9.0))
    with pytest.raises(ProtocolError, match="second cohort"):
        closed.ask("silo-00", "share", louder, type(closed.dealt["silo-00"]))
    closed.cohort = other
    with pytest.raises(ProtocolError, match="has dealt no shares for this cohort"):
        closed.sealed("silo-00")


def test_masks_cover_one_update_only(closed):
    assert same(closed.sealed("silo-00"), closed.sealed("silo-00"))
    with pytest.raises(PolicyError, match="another update of round 1 than the one that left"):
        closed.sealed("silo-00", update_of("silo-01"))


@pytest.mark.parametrize("few", [2, 1])
def test_a_sum_of_few_is_never_unmasked(few, tmp_path):
    round_ = Round(tmp_path, names_of(3))
    round_.advertise()
    round_.share()
    round_.collect(round_.names[:few])
    with pytest.raises(PolicyError, match=f"unmasks no sum of {few} updates"):
        round_.unmask()


def test_another_attempt_is_made_until_an_update_has_left(tmp_path):
    first = Round(tmp_path, names_of(8))
    first.advertise()
    first.share()
    again = Round(tmp_path, first.names, attempt=2)
    mean, survivors = run_with_drops(again, {"advertise": first.names[6:]})
    assert same(mean, again.plain(survivors))
    with pytest.raises(ProtocolError, match="has dealt no shares for this cohort"):
        first.sealed("silo-00")  # its secrets are gone
    with pytest.raises(PolicyError, match="silo-00 has left in attempt 2 at round 1"):
        Round(tmp_path, first.names, attempt=3).advertise()
    with pytest.raises(ProtocolError, match="attempt 1 at round 1 after attempt 2"):
        first.advertise()


def test_keys_with_which_everybody_agrees_are_their_members_fault(closed):
    call = Call(run="run", round=1, attempt=1)
    for name, advert in closed.adverts.items():
        require_advert(call, name, advert)
    for change in ({"mask_key": "0" * 64}, {"box_key": "01" + "0" * 62}):
        weak = closed.adverts["silo-03"].model_copy(update=change)
        with pytest.raises(ProtocolError, match="none that keeps a secret"):
            require_advert(call, "silo-03", weak)


def test_rounds_long_over_are_not_asked_again(tmp_path):
    for number in (1, 3, 17):
        run_with_drops(Round(tmp_path, names_of(3), number=number), {})
    Round(tmp_path, names_of(3), number=2).advertise()
    with pytest.raises(PolicyError, match="no keys for round 1: it was in round 17"):
        Round(tmp_path, names_of(3), number=1).advertise()


def test_a_killed_member_gives_the_same_answers(tmp_path):
    """Nothing is in memory between calls: all of the others' tests are of restarts, too."""
    round_ = Round(tmp_path, names_of(8))
    round_.advertise()
    before = dict(round_.adverts)
    round_.advertise()
    assert before == round_.adverts
    round_.share()
    dealt = dict(round_.dealt)
    round_.share()
    assert dealt == round_.dealt
    for path in Path(tmp_path).glob("*/*/secure-*.json"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_wire_is_12_bits_a_value_for_eight(closed):
    codec = build_codec("ring(bits=12)")
    parts = codec.encode(torch.randint(0, 4096, (1000,)).float())
    assert sum(part.nbytes for part in parts.values()) == 1500
