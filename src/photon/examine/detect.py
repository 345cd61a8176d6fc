"""Small detectors that need no network: language, domain, personal data, abuse, licences.

What they tell is only ever a name of `tables`, nothing of a text: of what looks like it, roughly.
"""

import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from photon.examine.signatures import words_of

#: Goes up when a detector finds something else than before.
_METHOD = 1
#: Characters from a text's middle that tell its language, and words that tell its domain.
_CHARACTERS, _WORDS, _AROUND = 800, 2000, 12
#: Different words of the list of abuse that make a text count: this many, and one in so many words.
_LEAST_ABUSIVE, _WORDS_AN_ABUSIVE = 2, 300
FOUND, NOT, GENERAL = "found", "not found", "general"


def method() -> str:
    """Which detectors these are: figures of others can't be compared with theirs."""
    return f"{_METHOD}, py3langid {version('py3langid')}, lists {version('glin-profanity')}"


@cache
def _lists() -> dict[str, Any]:
    found = tomllib.loads(files("photon.examine").joinpath("detectors.toml").read_text("utf-8"))
    for kind in ("stretches", "personal"):
        found[kind] = {name: [*map(re.compile, one)] for name, one in found[kind].items()}
    found["domains"] = {name: frozenset(one.split()) for name, one in found["domains"].items()}
    return found


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


@cache
def _abuse(language: str) -> frozenset[str]:
    """Single words of its list; the English one where there is none."""
    from glin_profanity.data.dictionary import DictionaryLoader

    listed = DictionaryLoader().get_words(_lists()["abuse"].get(language, "english"))
    return frozenset(words[0] for words in map(words_of, listed) if len(words) == 1)


def tables() -> dict[str, list[str]]:
    """Names of all tables and of all their cells, whatever the text."""
    # The last of a table are the last to be joined: most text is in English.
    languages = sorted(_identifier().labels, key=lambda name: (name == "en", name))
    found = {"languages": languages, "domains": [*_lists()["domains"], GENERAL]}
    flags = (*_lists()["personal"], "abuse", *_lists()["licences"])
    return found | {"lengths": [*_lists()["lengths"]]} | {flag: [NOT, FOUND] for flag in flags}


def detect(text: str, parts: Sequence[list[str]]) -> Iterator[tuple[str, str]]:
    """(table, cell) of a document, whose words are given by piece; what is not found is not."""
    middle, size = max(0, (len(text) - _CHARACTERS) // 2), len(text.encode())
    language = _identifier().classify(text[middle : middle + _CHARACTERS])[0]
    yield "languages", language
    yield "lengths", next(name for name, end in _lists()["lengths"].items() if size < end)
    words = parts[len(parts) // 2]
    yield "domains", _domain(words[max(0, (len(words) - _WORDS) // 2) :][:_WORDS])
    yield from ((name, FOUND) for name in personal(text))
    abusive = set().union(*map(_abuse(language).intersection, parts))
    if len(abusive) >= max(_LEAST_ABUSIVE, sum(map(len, parts)) / _WORDS_AN_ABUSIVE):
        yield "abuse", FOUND
    lowered = " ".join(text.lower().split())
    licences = _lists()["licences"].items()
    yield from ((name, FOUND) for name, one in licences if any(map(lowered.__contains__, one)))


def _domain(words: Sequence[str]) -> str:
    domains = _lists()["domains"].items()
    cues = {name: sum(map(one.__contains__, words)) for name, one in domains}
    best = max(cues, key=cues.__getitem__)
    return best if cues[best] * 1000 >= _lists()["least_per_thousand"] * len(words) > 0 else GENERAL


def personal(text: str) -> set[str]:
    """Kinds of personal data in a text, by what they look like and their check digits."""
    found: set[str] = set()
    for at in (at for one in _lists()["stretches"]["any"] for at in one.finditer(text)):
        near = text[max(0, at.start() - _AROUND) : at.end() + _AROUND]
        for name in _lists()["personal"].keys() - found:
            matches = (m for one in _lists()["personal"][name] for m in one.finditer(near))
            if any(all(_CHECKS[k](one) for k, one in m.groupdict().items()) for m in matches):
                found.add(name)
    return found


def _luhn(number: str) -> bool:
    digits = [int(one) for one in number if one.isdigit()][::-1]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * one, 10)) for one in digits[1::2]) % 10


def _iban(number: str) -> bool:
    plain = number[4:] + number[:4]
    return int("".join(str(int(one, 36)) for one in plain if one != " ")) % 97 == 1


def _address(number: str) -> bool:
    try:
        return ipaddress.ip_address(number).is_global
    except ValueError:
        return False


_CHECKS: dict[str, Callable[[str], bool]] = {
    "luhn": _luhn,
    "iban": _iban,
    "address": _address,
    "dni": lambda number: "TRWAGMYFPDXBNJZSQVHLCKE"[int(number[:8]) % 23] == number[-1],
}
