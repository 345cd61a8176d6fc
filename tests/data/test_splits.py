"""Held-out text is nobody's training text, whatever the silos share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.data.splits import split_documents
from photon.errors import EmptySiloError

TEXTS = st.integers(0, 30).map(lambda n: n / 31)
FRACTIONS = st.sampled_from([1e-9, 0.05, 0.2, 0.45])


@given(
    documents=st.lists(st.tuples(TEXTS, st.sampled_from("abc")), min_size=1, max_size=60),
    global_fraction=FRACTIONS,
    silo_fraction=FRACTIONS,
)
def test_a_text_has_one_place_in_the_whole_federation(documents, global_fraction, silo_fraction):
    positions, silos = zip(*documents, strict=True)
    try:
        splits, remarks = split_documents(
            positions, silos, global_fraction=global_fraction, silo_fraction=silo_fraction
        )
    except EmptySiloError as refused:
        message = refused.message
    else:
        message = None
    if message is not None:
        assert any(f"'{silo}'" in message for silo in silos)
        return
    where = {}
    for position, split in zip(positions, splits, strict=True):
        assert where.setdefault(position, split) == split  # copies never part, across silos too
    for silo in set(silos):
        own = {split for split, home in zip(splits, silos, strict=True) if home == silo}
        assert {"local", "train"} <= own
    assert "global" in splits
    plain = [
        "global" if p < global_fraction else "local" if p < global_fraction + silo_fraction else
        "train" for p in positions
    ]  # fmt: skip
    if not remarks:
        assert splits == plain


def test_what_a_silo_takes_to_hold_out_is_taken_from_its_neighbours_training():
    # Both silos have texts 0.5 and 0.7; only "small" is without held-out text.
    positions = [0.01, 0.5, 0.7, 0.15, 0.5, 0.7, 0.9]
    silos = ["small"] * 3 + ["large"] * 4
    splits, remarks = split_documents(positions, silos, global_fraction=0.1, silo_fraction=0.1)
    assert splits == ["global", "local", "train", "local", "local", "train", "train"]
    assert remarks == ["silo 'small' had no held-out text: it takes the one of lowest hash"]


def test_silos_that_share_all_their_texts_in_a_ring_are_refused():
    positions = [0.5, 0.6, 0.6, 0.7, 0.7, 0.5, 0.01]
    silos = ["a", "a", "b", "b", "c", "c", "a"]
    with pytest.raises(EmptySiloError, match="'b' can hold out none of its 2 different texts"):
        split_documents(positions, silos, global_fraction=0.1, silo_fraction=0.1)
