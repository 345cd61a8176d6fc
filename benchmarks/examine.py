"""What `photon data examine` finds of what was planted, what leaves, and minutes for a GB of text.

    python benchmarks/examine.py --corpus DIR [--megabytes 24] [--out FILE.md] [--quick]

DIR holds *.jsonl.zst with a text a line, English but in lang/NAME-CODE.jsonl.zst. Some of each file
becomes two silos and a held-out set. Into the silos go near-duplicates whose runs of five words
have a Jaccard similarity of 0.8 to another document of the same silo, of the other silo or of the
held-out set, as many of 0.5, and e-mail addresses, card numbers, IBANs and phone numbers at a word
boundary each. Both are prepared and examined as a site would, with a cell size of 10, on one core.

Recall and precision are counted document by document, with the functions that `examine` counts by.
A flagged document is right if its exact similarity to the nearest is 0.6 or more.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from photon.data import PrepareOptions, open_data, prepare
from photon.examine.detect import detect, personal
from photon.examine.examination import examine
from photon.examine.exchange import compare, read_examination, write_examination
from photon.examine.signatures import Signer, alike, words_of
from trainer import machine, table

_KEY = bytes(range(64))
_CELL = 10
#: Documents that near-duplicates are made of, in words: shorter ones can't have every similarity.
_WORDS = range(120, 2000)


@dataclass(frozen=True)
class Document:
    """A text of the corpus, and what its file says that it is."""

    text: str
    language: str
    genre: str


def read(corpus: Path, most_bytes: int) -> list[Document]:
    """The same number of bytes of every file, or all that it has."""
    files = sorted(corpus.rglob("*.jsonl.zst"))
    found = []
    for file in files:
        genre, _, code = file.name.removesuffix(".jsonl.zst").partition("-")
        left = most_bytes // len(files)
        with file.open("rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw)
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                text = json.loads(line)["text"]
                left -= len(text.encode())
                found.append(Document(text, code[:2] if code else "en", genre))
                if left < 0:
                    break
    return found


def runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[n : n + 5]) for n in range(max(1, len(words) - 4))}


def jaccard(one: str, other: str) -> float:
    mine, theirs = runs(words_of(one)), runs(words_of(other))
    return len(mine & theirs) / len(mine | theirs)


def changed(text: str, wanted: float, draw: random.Random) -> str:
    """The text with words replaced until the similarity is `wanted` or just below."""
    words = text.split(" ")
    order = draw.sample(range(len(words)), len(words))
    while order and (found := jaccard(text, " ".join(words))) > wanted:
        for _ in range(max(1, int((found - wanted) * len(words) / 12))):
            if order:
                words[order.pop()] = f"word{draw.randrange(10**6)}"
    return " ".join(words)


def inserted(text: str, what: str, draw: random.Random) -> str:
    words = text.split(" ")
    words.insert(draw.randrange(len(words) + 1), what)
    return " ".join(words)


def email(draw: random.Random) -> str:
    names = ("anna", "j.doe", "info", "m_rossi", "x9", "first.last+list")
    hosts = ("example.org", "mail.example.co.uk", "uni-beispiel.de", "EXAMPLE.COM")
    return draw.choice(("{}@{}", "<{}@{}>", "mailto:{}@{},", "({}@{}).")).format(
        draw.choice(names) + str(draw.randrange(10**6)), draw.choice(hosts)
    )


def luhn(digits: str) -> str:
    numbers = [int(one) for one in reversed(digits + "0")]
    total = sum(numbers[::2]) + sum(sum(divmod(2 * one, 10)) for one in numbers[1::2])
    return digits + str(-total % 10)


def card(draw: random.Random) -> str:
    brand, length = draw.choice((("4", 16), ("53", 16), ("37", 15), ("6011", 16), ("2221", 16)))
    number = luhn(brand + "".join(draw.choices("0123456789", k=length - len(brand) - 1)))
    gap = draw.choice(("", " ", "-"))
    return gap.join(number[at : at + 4] for at in range(0, length, 4)) + draw.choice(("", ".", ","))


def iban(draw: random.Random) -> str:
    country, length = draw.choice((("DE", 18), ("FR", 23), ("ES", 20), ("NL", 14)))
    rest = "".join(draw.choices("0123456789", k=length))
    number = int("".join(str(int(one, 36)) for one in rest + country + "00"))
    whole = f"{country}{98 - number % 97:02d}{rest}"
    groups = (whole[at : at + 4] for at in range(0, len(whole), 4))
    return draw.choice(("", " ")).join(groups)


def phone(draw: random.Random) -> str:
    digits = "".join(draw.choices("23456789", k=10))
    one, two, three = digits[:3], digits[3:6], digits[6:]
    forms = (f"+49 {one} {two}{three}", f"({one}) {two}-{three}", f"{one}-{two}-{three}")
    return draw.choice((*forms, f"+1{digits}", f"Tel. {one} {two} {three}"))


PERSONAL: dict[str, Callable[[random.Random], str]] = {
    "e-mail": email,
    "payment card": card,
    "IBAN": iban,
    "phone": phone,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="2 MB, a tenth of what is planted")
    given = parser.parse_args()
    megabytes, each = (2.0, 20) if given.quick else (given.megabytes, 200)
    text = report(read(given.corpus, int(megabytes * 1e6)), each)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")
    print(text, end="")


def report(documents: list[Document], each: int) -> str:
    draw = random.Random(0)
    draw.shuffle(documents)
    silos = {"north": documents[::2], "south": documents[1::2]}
    texts = {silo: [one.text for one in some] for silo, some in silos.items()}
    held = [one.text for one in silos["north"][-each:]]
    texts["north"] = texts["north"][:-each]
    copies, personal_rows = plant_copies(texts, held, each, draw), plant_personal(texts, each, draw)
    lines = [
        f"# What examinations find, {machine()}",
        "",
        "`benchmarks/examine.py`, on some of each file of a corpus of thirteen genres in English "
        f"and ten other languages: {sum(map(len, texts.values())):,} documents, "
        f"{sum(len(t.encode()) for some in texts.values() for t in some) / 1e6:.1f} MB.",
        "",
        "## Near-duplicates",
        "",
        table(("planted", "pairs", "found", "recall"), copies[0]),
        "",
        copies[1],
        "",
        "## Personal data, a piece in each of some documents",
        "",
        table(("kind", "planted", "found", "recall", "in documents as they were"), personal_rows),
        "",
        "## Languages and domains, document by document, of what their files say",
        "",
        table(("what", "documents", "as expected", "otherwise, most often"), kinds(documents)),
        "",
        "## The whole, as two sites do it",
        "",
        *as_sites_do(texts, held),
    ]
    return "\n".join(lines) + "\n"


def plant_copies(
    texts: dict[str, list[str]], held: list[str], each: int, draw: random.Random
) -> tuple[list[tuple[str, ...]], str]:
    """Adds changed copies; (rows, precision in words)."""
    signer = Signer(_KEY)

    def signed(some: list[str]) -> np.ndarray:
        return np.array([signer.signature([words_of(text)]) for text in some])

    fit = [text for text in texts["north"] if len(text.split(" ")) in _WORDS]
    held_fit = [text for text in held if len(text.split(" ")) in _WORDS]
    draw.shuffle(fit)
    original = {"north": signed(texts["north"]), "held": signed(held)}
    rows, planted = [], []
    for similarity in (0.8, 0.5):
        for where, source, silo in (
            ("in the same silo", fit, "north"),
            ("in the other silo", fit, "south"),
            ("of held-out text", held_fit, "north"),
        ):
            chosen = [source.pop() for _ in range(min(each // 3, len(source) // 2 + 1))]
            made = [changed(text, similarity, draw) for text in chosen]
            against = original["held" if source is held_fit else "north"]
            found = int(alike(signed(made), against).sum())
            name = f"Jaccard {similarity}, {where}"
            rows.append((name, str(len(made)), str(found), f"{found / len(made):.1%}"))
            planted.append((silo, made))
    for silo, made in planted:
        texts[silo] += made
    everything = [*texts["north"], *texts["south"]]
    all_signed = signed(everything)
    flagged = np.flatnonzero(alike(all_signed, all_signed, earlier=True))
    right = 0
    for row in flagged.tolist():
        before = all_signed[:row]
        other = int((before == all_signed[row]).sum(axis=1).argmax())
        right += jaccard(everything[row], everything[other]) >= 0.6
    words = (
        f"Of {len(everything):,} documents of both silos {len(flagged)} are flagged as copies of "
        f"an earlier one; {right} ({right / max(1, len(flagged)):.1%}: precision) have an exact "
        "similarity of 0.6 or more to it."
    )
    return rows, words


def plant_personal(
    texts: dict[str, list[str]], each: int, draw: random.Random
) -> list[tuple[str, ...]]:
    rows = []
    every = [(silo, n) for silo, some in texts.items() for n in range(len(some))]
    for kind, make in PERSONAL.items():
        before = sum(kind in personal(text) for some in texts.values() for text in some)
        clean = [(silo, n) for silo, n in every if kind not in personal(texts[silo][n])]
        chosen = draw.sample(clean, min(each, len(clean)))
        for silo, n in chosen:
            texts[silo][n] = inserted(texts[silo][n], make(draw), draw)
        found = sum(kind in personal(texts[silo][n]) for silo, n in chosen)
        share = f"{found / len(chosen):.1%}"
        rows.append((kind, str(len(chosen)), str(found), share, f"{before} of {len(every):,}"))
    return rows


def kinds(documents: list[Document]) -> list[tuple[str, ...]]:
    genres = {"code": "code", "legal": "legal", "religious": "religion", "packages": "software"}
    told: dict[str, Counter[str]] = {}
    for one in documents:
        found = dict(detect(one.text, [words_of(one.text)]))
        told.setdefault(f"language {one.language}", Counter())[found["languages"]] += 1
        if one.genre in genres and one.language == "en":
            told.setdefault(f"domain {genres[one.genre]}", Counter())[found["domains"]] += 1
    rows = []
    for name, counts in sorted(told.items()):
        total, good = sum(counts.values()), counts.pop(name.split()[1], 0)
        worst = f"{counts.most_common(1)[0][0]}" if counts else "-"
        rows.append((name, str(total), f"{good / total:.1%}", worst))
    return rows


def as_sites_do(texts: dict[str, list[str]], held: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "texts").mkdir()
        for split, some in (("train", texts), ("test", {"held": held})):
            rows = [
                {"silo": silo, "text": text} for silo, all_of in some.items() for text in all_of
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "texts" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        options = PrepareOptions(
            input=[str(folder / "texts")], out=folder / "data", silo_field="silo"
        )
        prepare(options)
        data, told = open_data(folder / "data"), []
        for silo in texts:
            begun = time.process_time()
            record, signatures = examine(data, silo, key=_KEY, min_cell=_CELL)
            took, size = time.process_time() - begun, data.silo(silo).train_bytes
            minutes = took / 60 / size * 1e9
            told.append(f"- {silo}: {size / 1e6:.1f} MB in {took:.1f} s of one core's time: ")
            told[-1] += f"{minutes:.0f} minutes a GB, divided by the cores used."
            write_examination(folder / f"{silo}.json", record, signatures)
        files = [folder / f"{silo}.json" for silo in texts]
        _, findings = compare(files)
        told += [f"- {of}: {what}." for of, what in findings if of.startswith("copies")]
        told += [leaves(files, texts)]
    return told


def leaves(files: list[Path], texts: dict[str, list[str]]) -> str:
    """In words; raises AssertionError where something left that must not."""
    smallest, words = (
        2**60,
        {word for some in texts.values() for text in some for word in text.split()},
    )
    long = {word for word in words if len(word) > 12}
    for file in files:
        record, left = read_examination(file), file.read_text(encoding="utf-8")
        for one in record.tables.values():
            counts = [*one.cells.values(), *([one.joined_documents] if one.joined else [])]
            smallest = min(smallest, *counts)
        assert not [word for word in long if word in left], "a word of the text left"
    assert smallest >= _CELL
    return (
        f"- The smallest count that left is {smallest}; none of {len(long):,} different words of "
        "more than 12 characters did."
    )


if __name__ == "__main__":
    main()
