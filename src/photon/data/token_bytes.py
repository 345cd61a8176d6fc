"""How many UTF-8 bytes of text each token stands for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from photon.data.tokenizer import read_tokenizer

#: Parts of a tokenizer.json that may turn text into one character for each byte.
_CUTTING = ("normalizer", "pre_tokenizer", "decoder")
_FALLBACK_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TokenBytes:
    """Bytes by token id.

    Attributes:
        sizes: int64 [vocab_size]; 0 for special tokens, which no text is cut into.
        unknown: the token that stands for whatever the tokenizer has no token for; -1 without one.
    """

    sizes: np.ndarray
    unknown: int


@lru_cache(maxsize=4)
def token_bytes(file: Path, sha256: str, vocab_size: int, eos_id: int) -> TokenBytes:
    """Of a tokenizer.json. Exact where tokens are pieces of the text's bytes (byte-level BPE).

    Elsewhere it is the length that a token adds to decoded text, whose spaces and case may differ
    from those of the text that was cut.

    Args:
        sha256: its hash, so that another file under its name is read anew.
        eos_id: ends documents; no part of any text.

    Raises:
        DataError: not a readable tokenizer.
    """
    tokenizer = read_tokenizer(file)
    record = json.loads(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in json.dumps([record[part] for part in _CUTTING])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocab_size, 1 + max(vocabulary.values())), dtype=np.int64)
    others: list[int] = []
    for token, number in vocabulary.items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        elif byte_level:  # one character for each byte
            sizes[number] = len(token)
        elif _FALLBACK_BYTE.fullmatch(token):
            sizes[number] = 1
        else:
            others.append(number)
    if others:
        # Behind another token, as the first of a text may lose its space.
        first = others[0]
        alone = len(tokenizer.decode([first], skip_special_tokens=False).encode())
        pairs = [[first, number] for number in others]
        texts = tokenizer.decode_batch(pairs, skip_special_tokens=False)
        sizes[others] = [max(0, len(text.encode()) - alone) for text in texts]
    unknown = record["model"].get("unk_id")
    if unknown is None and record["model"].get("unk_token") is not None:
        unknown = tokenizer.token_to_id(record["model"]["unk_token"])
    unknown = -1 if unknown is None else int(unknown)
    sizes[[number for number in (eos_id, unknown) if number >= 0]] = 0
    return TokenBytes(sizes, unknown)
