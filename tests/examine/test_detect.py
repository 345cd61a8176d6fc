"""Detectors, signatures and keys by themselves."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from examined_texts import sentences

from photon.errors import DataError, DataNotFoundError
from photon.examine.detect import FOUND, NOT, detect, personal, tables
from photon.examine.signatures import BANDS, Signer, alike, key_name, read_key, words_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to a.b+c@mail.example.org today", "e-mail"),
        ("call +49 30 1234567 or not", "phone"),
        ("call (212) 555-0147", "phone"),
        ("Tel.: 030 1234567", "phone"),
        ("paid with 4111 1111 1111 1111.", "payment card"),
        ("paid with 378282246310005", "payment card"),
        ("paid with 5555-5555-5555-4444", "payment card"),
        ("to DE89370400440532013000 please", "IBAN"),
        ("to GB82 WEST 1234 5698 7654 32 please", "IBAN"),
        ("from 8.8.8.8 at noon", "IP address"),
        ("from 2001:4860:4860::8888 at noon", "IP address"),
        ("SSN 078-05-1120", "national id"),
        ("DNI 12345678Z", "national id"),
        ("RSSMRA85T10A562S", "national id"),
    ],
)
def test_personal_data_is_found(text: str, kind: str) -> None:
    assert personal(text) == {kind}


@pytest.mark.parametrize(
    "text",
    [
        "paid with 4111 1111 1111 1112.",  # Luhn
        "1234567812345670 is no brand's",
        "to DE89370400440532013001 please",  # modulo 97
        "from 10.0.0.1 and 127.0.0.1",  # anybody's
        "version 1.2.3 of 2026-11-30, 12:34:56",
        "DNI 12345678A",  # its letter
        "a decorator @cached.property, or user @ home",
        "in 1914 and 1918 some 20,000,000 of 1,800,000,000",
        "",
    ],
)
def test_what_only_looks_alike_is_not(text: str) -> None:
    assert personal(text) == set()


def found(text: str) -> dict[str, str]:
    return dict(detect(text, [words_of(text)]))


def test_languages_domains_lengths_and_licences() -> None:
    german = "Der Patient klagt seit Wochen über Schmerzen; die Behandlung der Krankheit ist lang."
    assert found(german) == {"languages": "de", "domains": "medical", "lengths": "<500 B"}
    code = "def add(self, a):\n    if a is None:\n        return self\n    return self + a\n" * 40
    licensed = "# SPDX-License-Identifier: Apache-2.0\n" + code
    told = found(licensed)
    assert (told["domains"], told["lengths"]) == ("code", "<8 kB")
    assert told["licence Apache-2.0"] == FOUND
    wrapped = "This work is under the Creative Commons\n   Attribution-ShareAlike licence."
    assert found(wrapped)["licence CC-BY-SA"] == FOUND
    assert found(sentences(1))["domains"] == "general"


def test_abuse_takes_two_words_and_some_density() -> None:
    once = "You bastard. " + sentences(1)
    assert "abuse" not in found(once)
    assert found("You bastard, you stupid shit. " + sentences(1))["abuse"] == FOUND
    assert "abuse" not in found("You bastard, you stupid shit. " + sentences(1, words=3000))


def test_whatever_is_told_is_on_the_list() -> None:
    names = tables()
    for text in (sentences(1), "x@example.org", "", "\x00", "漢字かな交じり文", "😀" * 5000):
        for table, cell in detect(text, [words_of(text)]):
            assert cell in names[table]
    assert names["e-mail"] == [NOT, FOUND]


def changed(words: list[str], jaccard: float, draw: random.Random) -> list[str]:
    """Words whose runs of five have about this Jaccard similarity to those of `words`."""

    def runs(some: list[str]) -> set[tuple[str, ...]]:
        return {tuple(some[n : n + 5]) for n in range(len(some) - 4)}

    other, mine = list(words), runs(words)
    while len(mine & runs(other)) > jaccard * len(mine | runs(other)):
        other[draw.randrange(len(other))] = f"other{draw.random()}"
    return other


def test_alike_is_about_jaccard() -> None:
    draw, signer = random.Random(0), Signer(b"k" * 64)
    texts = [[f"w{draw.randrange(5000)}" for _ in range(200)] for _ in range(20)]
    ours = np.array([signer.signature([words]) for words in texts])
    for jaccard, least, most in ((0.9, 1.0, 1.0), (0.8, 0.9, 1.0), (0.5, 0, 0.05), (0.0, 0, 0)):
        theirs = np.array([signer.signature([changed(one, jaccard, draw)]) for one in texts])
        assert least <= alike(theirs, ours).mean() <= most, jaccard
    twice = np.concatenate([ours, ours[:7]])
    assert alike(twice, twice, earlier=True).tolist() == [False] * 20 + [True] * 7
    assert not alike(ours, ours[:0]).any()
    assert alike(ours[:0], ours).shape == (0,)


def test_pieces_of_a_document_count_as_one() -> None:
    signer, words = Signer(b"k" * 64), words_of(sentences(1, words=4000))
    whole, parted = signer.signature([words]), signer.signature([words[:1999], words[1999:]])
    assert np.count_nonzero(whole == parted) > BANDS * 0.9


def test_another_key_tells_nothing_in_common() -> None:
    words = words_of(sentences(1))
    one, other = (Signer(key).signature([words]) for key in (b"a" * 64, b"b" * 64))
    assert not np.intersect1d(one, other).size
    # Both the hash of a band and what is hashed depend on it.
    same = Signer(b"b" * 64)
    same._factors = Signer(b"a" * 64)._factors
    assert not np.intersect1d(one, same.signature([words])).size
    assert np.array_equal(one, Signer(b"a" * 64).signature([words]))
    assert key_name(b"a" * 64) != key_name(b"b" * 64)


def test_a_key_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "sites.key"
    with pytest.raises(DataNotFoundError, match=r"sites\.key"):
        read_key(file)
    for weak in (b"", b"0123456789abcdef\n", b"aaaaaaaabbbbbbbbccccccccdddddddd\n", b"x" * 20_000):
        file.write_bytes(weak)
        with pytest.raises(DataError, match="32 random ones"):
            read_key(file)
    file.write_text("0123456789abcdef" * 4 + "\n")
    known = read_key(file)
    file.write_text("0123456789abcdef" * 4)
    assert read_key(file) == known
