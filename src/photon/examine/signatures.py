"""Near-duplicates without text: MinHash in bands, each behind a key that only sites hold.

A document is the set of its runs of five words. Two of Jaccard similarity J agree in a band with
probability J^4 and are alike from 7 of 32 bands on: at 0.8 in 99 of 100 pairs, at 0.5 in 0.3.

Invariant: without the key, signatures tell which bands are equal and nothing else, so that no
guessed text can be tried. It breaks if anything that depends on text alone lies beside them.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from photon.errors import DataError, DataNotFoundError

BANDS, _ROWS, _ALIKE, _RUN, _CHUNK = 32, 4, 7, 5, 1024
_LEAST_KEY_BYTES, _LEAST_KEY_VALUES = 32, 8
# Scripts that put no spaces between words: each character is one.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def words_of(text: str) -> list[str]:
    """Of a text, in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def read_key(path: Path) -> bytes:
    """The sites' key; raises DataNotFoundError, or DataError for one that could be guessed."""
    make = "One site makes it, `openssl rand -hex 32 > sites.key`, for the other sites alone."
    if not path.is_file():
        raise DataNotFoundError(f"no key of the sites at {path}", hint=make)
    given = path.read_bytes().strip()
    if len(given) < _LEAST_KEY_BYTES or len({*given}) < _LEAST_KEY_VALUES:
        found = f"{path} has {len(given)} bytes, {len({*given})} of them different"
        raise DataError(f"{found}: a key has {_LEAST_KEY_BYTES} random ones or more", hint=make)
    return hashlib.blake2b(given).digest()


def _keyed(key: bytes, *parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), key=key, digest_size=8).digest()


def key_name(key: bytes) -> str:
    """Tells keys apart, and is no help in finding one."""
    return _keyed(key, b"name").hex()


class Signer:
    """Signatures under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        seeds = b"".join(_keyed(key, b"seed%d" % n) for n in range(BANDS * _ROWS))
        self._factors = np.frombuffer(seeds, dtype="<u8")[:, None] | np.uint64(1)

    def signature(self, parts: Sequence[list[str]]) -> np.ndarray:
        """uint64 [BANDS] of a document, given as the words of its pieces."""
        least = np.full(BANDS * _ROWS, 2**64 - 1, dtype=np.uint64)
        for words in parts:
            runs = _runs(np.array([zlib.crc32(one.encode()) for one in words], dtype=np.uint64))
            for start in range(0, len(runs), _CHUNK):
                found = runs[start : start + _CHUNK] * self._factors
                np.minimum(least, found.min(axis=1), out=least)
        bands = enumerate(least.reshape(BANDS, _ROWS))
        hashes = (_keyed(self._key, b"band%d:" % n, band.tobytes()) for n, band in bands)
        return np.frombuffer(b"".join(hashes), dtype="<u8")


def _runs(ids: np.ndarray) -> np.ndarray:
    """uint64: a well mixed number for each run of five words; one for a shorter text."""
    ids = np.pad(ids, (0, max(0, _RUN - len(ids))))
    mixed = np.zeros(len(ids) - _RUN + 1, dtype=np.uint64)
    for place in range(_RUN):
        mixed = (mixed ^ ids[place : place + len(mixed)]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


def alike(ours: np.ndarray, theirs: np.ndarray, *, earlier: bool = False) -> np.ndarray:
    """bool [documents]: which of ours have one alike among theirs; `earlier`, in both the same.

    Both are uint64 [documents, BANDS], under one key. Takes up to 260 bytes for each of ours.
    """
    pairs = [np.empty(0, dtype=np.int64)]
    for band in range(BANDS):
        order = np.argsort(theirs[:, band], kind="stable")
        ranked, wanted = theirs[order, band], ours[:, band]
        at = np.searchsorted(ranked, wanted)
        rows = np.flatnonzero(at < np.searchsorted(ranked, wanted, side="right"))
        partners = order[at[rows]]  # the first of several
        kept = partners < rows if earlier else slice(None)
        pairs.append(rows[kept] * len(theirs) + partners[kept])
    found, bands = np.unique(np.concatenate(pairs), return_counts=True)
    result = np.zeros(len(ours), dtype=bool)
    result[found[bands >= _ALIKE] // max(1, len(theirs))] = True
    return result
