"""Numbers as people read them."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from photon.dashboard import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (987, "987"), (999.7, "1.0k"), (12_345, "12.3k"), (123_456, "123k"),
     (999_960, "1.0M"), (1_100_000, "1.1M"), (6.657e9, "6.7B"), (2e13, "20.0T")],
)  # fmt: skip
def test_counts(value, text):
    assert wording.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (812, "812 B"), (4_400_000, "4.4 MB"), (999_990, "1.0 MB"), (211e6, "211 MB"),
     (1.3e9, "1.3 GB"), (4e13, "40.0 TB")],
)  # fmt: skip
def test_sizes(value, text):
    assert wording.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12 ms"), (3.21, "3.2 s"), (9.96, "10 s"), (48.2, "48 s"), (59.7, "1 min 00 s"),
     (260, "4 min 20 s"), (760, "13 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min"),
     (100 * 3600, "4 d 4 h")],
)  # fmt: skip
def test_durations(value, text):
    assert wording.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("inf"), "–"), (float("nan"), "–"), (50_368.4, "50,368"),
     (1e7, "1e+07"), (812.4, "812"), (99.96, "100"), (96.34, "96.3"), (9.996, "10.0"),
     (3.14159, "3.14")],
)  # fmt: skip
def test_perplexities(value, text):
    assert wording.perplexity(value) == text


def test_the_rest():
    assert [wording.clock(s) for s in (0, 7.9, 260, 7509)] == ["0:00", "0:07", "4:20", "2:05:09"]
    assert wording.signed_percent(-0.134) == "−13.4%"
    assert wording.signed_percent(0.042) == "+4.2%"
    assert wording.signed_percent(0.0001) == "±0.0%"
    assert wording.signed_percent(float("inf")) == "–"
    assert wording.several(1, "silo") == "one silo"
    assert wording.several(64, "silo") == "64 silos"
    assert wording.several(2, "silo") == "two silos"
    assert wording.times_less(31.99, 1) == "32× less than"
    assert wording.times_less(1, 2) == "2.0× more than"
    assert wording.times_less(1, 1.04) == "as much as"
    assert wording.decimal(None) == "–"
    assert wording.decimal(float("nan")) == "–"
    assert [wording.count(n) for n in (None, float("nan"), float("inf"))] == ["–", "–", "–"]
    assert wording.one_line("a\nb\x1b[0m\u200b") == "a b [0m"


@pytest.mark.parametrize("most", [10, 14, 20])
@pytest.mark.parametrize(
    "names",
    [
        [f"debian-description-{code}" for code in ("de", "en", "fr", "ja", "pt", "zh")],
        ["a-long-name-of-" + "x" * i + "-silos" for i in range(30)],
        ["東京大学病院東京大学病院" + end for end in ("東", "西", "")],
        ["x" * 60, "x" * 61, "short"],
    ],
)
def test_names_that_are_cut_still_differ(names, most):
    short = wording.distinct(names, most)
    assert list(short) == names
    assert len(set(short.values())) == len(names)
    assert all(cell_len(name) <= most for name in short.values())


def test_a_name_that_fits_is_left_alone():
    assert wording.distinct(["north", "x" * 30], 8) == {"north": "north", "x" * 30: "xxxxxxx…"}
    assert wording.distinct(["debian-fr", "debian-de"], 7)["debian-fr"] == "deb…-fr"
