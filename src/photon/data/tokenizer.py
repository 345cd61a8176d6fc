"""A byte-level BPE trained here, or any tokenizer.json; one comes out, with its hash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from photon.data.shards import sha256_of
from photon.errors import DataError, DataNotFoundError, VocabularyMismatchError

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the token that ends a document.

    Attributes:
        vocab_size: largest token id + 1.
    """

    tokenizer: Tokenizer
    eos_token: str
    eos_id: int
    vocab_size: int
    source_folder: Path | None = None

    def save(self, folder: Path) -> str:
        """Write tokenizer.json and what transformers needs beside it; returns its sha256."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "bos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**9,
        }
        given = self.source_folder and self.source_folder / "tokenizer_config.json"
        if given and given.is_file():
            shutil.copy(given, folder / "tokenizer_config.json")
        else:
            text = json.dumps(settings, indent=1) + "\n"
            (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        return sha256_of(folder / "tokenizer.json")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Raises:
        DataError: vocab_size does not hold the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise DataError(
            f"--vocab-size = {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _finished(tokenizer, END_OF_TEXT, None)


def load_tokenizer(path: str | os.PathLike[str], eos_token: str | None = None) -> TextTokenizer:
    """Load a tokenizer.json, or a Hugging Face folder with one (or with vocab.json, merges.txt).

    Raises:
        DataNotFoundError: nothing there.
        DataError: unreadable, or its end-of-text token can't be told.
    """
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    file = given / "tokenizer.json" if given.is_dir() else given
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            tokenizer = Tokenizer(model)
            tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
            tokenizer.decoder = ByteLevelDecoder()
        else:
            raise DataNotFoundError(
                f"no tokenizer at {given}",
                hint="Name a tokenizer.json, or a folder with tokenizer.json or vocab.json and "
                "merges.txt.",
            )
    except DataNotFoundError:
        raise
    except Exception as error:
        raise DataError(f"{given} is not a readable tokenizer: {error}") from error
    return _finished(tokenizer, eos_token or _eos_of(tokenizer, folder, given), folder)


def _eos_of(tokenizer: Tokenizer, folder: Path, given: Path) -> str:
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        try:
            named = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        except ValueError as error:
            raise DataError(f"{settings} is not JSON: {error}") from error
        if isinstance(named, dict):
            named = named.get("content")
        if isinstance(named, str):
            return named
    for token in _KNOWN_ENDS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"{given} has none of the usual end-of-text tokens ({', '.join(_KNOWN_ENDS)})",
        hint="Name its token with --eos.",
    )


def _finished(tokenizer: Tokenizer, eos_token: str, folder: Path | None) -> TextTokenizer:
    eos_id = tokenizer.token_to_id(eos_token)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if eos_id is None:
        raise VocabularyMismatchError(
            f"the tokenizer has no token {eos_token!r}", hint="Name another with --eos."
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextTokenizer(tokenizer, eos_token, eos_id, max(vocabulary.values()) + 1, folder)
