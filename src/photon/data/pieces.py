"""A long document in pieces that are tokenised one by one, to the tokens of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from photon.errors import DataError

#: Characters of a piece. A document takes about 220 bytes of memory a byte while it is tokenised.
_PIECE = 200_000
#: Characters that are tokenised at a time.
_BATCH = 1_000_000
#: Characters on each side that decide whether a place to cut is safe.
_CONTEXT = 1000
_TRIES = 50


def pieces(text: str, tokenizer: Tokenizer, most_bytes: int, place: str) -> Iterator[str]:
    """`text` in pieces whose tokens, one after another, are those of `text`.

    It is cut where the tokenizer's own pre-tokenizer cuts: models see nothing beyond such a place.
    A pre-tokenizer decides by the characters around; that it does, and that normalizer and added
    tokens agree, is checked at each cut: both sides by themselves give what they give together.

    Args:
        tokenizer: with a pre-tokenizer, or nothing is cut.
        most_bytes: of a stretch without a place to cut, if it is longer than a piece.
        place: of the document, for the error.

    Raises:
        DataError: a longer stretch.
    """
    start = 0
    while len(text) - start > _PIECE:
        low, high = start + _PIECE // 2, start + _PIECE
        while (cut := _cut(text, low, high, tokenizer)) is None and high < len(text):
            low, high = high, min(high + _PIECE, len(text))
            if (size := len(text[start:high].encode())) > most_bytes:
                raise DataError(
                    f"{place}: {size:,} bytes or more without a place where the tokenizer lets a "
                    f"document be cut are beyond --max-document-bytes {most_bytes:,}",
                    hint="Part the text into documents (--separator, for text files), or raise "
                    "that bound: it takes about 220 bytes of memory for each byte.",
                )
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def batches(
    documents: Iterable[tuple[int, str, str]], tokenizer: Tokenizer, most_bytes: int
) -> Iterator[list[tuple[int, str, bool]]]:
    """(document, piece, whether it ends there) of (document, text, place): runs for the tokenizer.

    `most_bytes` is as of `pieces`.
    """
    batch: list[tuple[int, str, bool]] = []
    size = 0
    for number, text, place in documents:
        left = len(text)
        for piece in pieces(text, tokenizer, most_bytes, place):
            left -= len(piece)
            size += len(piece)
            batch.append((number, piece, not left))
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _cut(text: str, low: int, high: int, tokenizer: Tokenizer) -> int | None:
    """The last safe place in [low, high), of those that are tried."""
    if tokenizer.pre_tokenizer is None:
        return None
    for mark in (" ", "\n", ""):
        at = high
        for _ in range(_TRIES):
            at = text.rfind(mark, low, at) if mark else at - 1
            if at < low:
                break
            before, after = text[max(0, at - _CONTEXT) : at], text[at : at + _CONTEXT]
            if _safe(before, after, tokenizer):
                return at
    return None


def _safe(left: str, right: str, tokenizer: Tokenizer) -> bool:
    def words(part: str) -> list[str]:
        if tokenizer.normalizer is not None:
            part = tokenizer.normalizer.normalize_str(part)
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(part)]

    def ids(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False).ids

    if left[-1:].isspace() or right[1:2].isspace():
        return False  # inside white space, what a run of it becomes depends on its end
    return words(left) + words(right) == words(left + right) and (
        ids(left) + ids(right) == ids(left + right)
    )
