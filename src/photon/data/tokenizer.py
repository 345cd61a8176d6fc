"""A byte-level BPE trained here, or any tokenizer.json; one comes out, with its hash."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from photon.errors import DataError, DataNotFoundError, PhotonError, VocabularyMismatchError
from photon.membership.invitation import is_invitation, read_invitation
from photon.store.disk import file_sha256

END_OF_TEXT = "<|endoftext|>"
_T = TypeVar("_T")
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[EOS]")


#: Settings of a given tokenizer that are kept for transformers; never code (auto_map).
_KEPT = ("bos_token", "pad_token", "unk_token", "chat_template")


_PARALLELISM = "TOKENIZERS_PARALLELISM"
_set_by_us = False


@contextmanager
def parallel() -> Iterator[None]:
    """Let `tokenizers` use all cores, unless TOKENIZERS_PARALLELISM says otherwise.

    Afterwards the variable says "false": the library's threads don't survive a fork, and processes
    started later would either warn of it or hang.
    """
    global _set_by_us
    if _PARALLELISM in os.environ and not _set_by_us:
        yield
        return
    os.environ[_PARALLELISM], _set_by_us = "true", True
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = "false"


def interruptible(call: Callable[[], _T]) -> _T:
    """`call`, which may take minutes in native code, so that Ctrl-C is heard at once.

    It runs in a thread; one that nobody waits for any more goes on until it is done, or the process
    ends.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not done.done():  # a signal just before a wait does not end that wait
        wait([done], timeout=0.5)
    return done.result()


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the token that ends a document.

    Attributes:
        eos_token, eos_id: the end-of-text token.
        vocab_size: largest token id + 1, which a model's embedding must hold.
        settings: of a given tokenizer_config.json; empty without one.
    """

    tokenizer: Tokenizer
    eos_token: str
    eos_id: int
    vocab_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> str:
        """Write tokenizer.json, whose sha256 this returns, and tokenizer_config.json.

        `AutoTokenizer` reads them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tokenizer.json"
        file.write_bytes(self.tokenizer.to_str(pretty=True).encode("utf-8"))
        settings = {
            "bos_token": self.eos_token,
            **{key: self.settings[key] for key in _KEPT if key in self.settings},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**9,
        }
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_bytes(text.encode("utf-8"))
        return file_sha256(file)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text.

        No special token is added, and none is read out of a text: a document that spells the
        end-of-text token does not end there.
        """
        encodings = interruptible(
            lambda: self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        )
        return [encoding.ids for encoding in encodings]


def byte_level(model: BPE) -> Tokenizer:
    """A byte-level BPE; of an empty model, what `train_tokenizer` trains."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens; little text gives fewer.

    The same texts give the same tokenizer.

    Raises:
        DataError: vocab_size does not hold the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257",
            hint="4096 suits a few megabytes of text, 32768 a few gigabytes.",
        )
    tokenizer, stopped = byte_level(BPE()), threading.Event()
    heard = itertools.takewhile(lambda _: not stopped.is_set(), texts)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        interruptible(lambda: tokenizer.train_from_iterator(heard, trainer=trainer))
    finally:
        stopped.set()
    return _finished(tokenizer, END_OF_TEXT, {})


def load_tokenizer(path: str | os.PathLike[str], eos_token: str | None = None) -> TextTokenizer:
    """Load a tokenizer.json, or a Hugging Face folder with one (or with vocab.json, merges.txt).

    An invitation (`photon invite`) has its federation's tokenizer in it.

    Args:
        path: the file or folder; or an invitation.
        eos_token: its end-of-text token; by default eos_token of tokenizer_config.json or
            special_tokens_map.json, or the first of the usual ones that it has.

    Raises:
        DataNotFoundError: nothing there.
        DataError: unreadable, or its end-of-text token can't be told.
        VocabularyMismatchError: it has no such token.
    """
    given = Path(path)
    if given.is_file() and is_invitation(given):
        return _invited(given, eos_token)
    folder = given if given.is_dir() else given.parent
    file = given / "tokenizer.json" if given.is_dir() else given
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif (
            given.is_dir()  # a misspelt file name must not load what lies beside it
            and (folder / "vocab.json").is_file()
            and (folder / "merges.txt").is_file()
        ):
            names = (str(folder / name) for name in ("vocab.json", "merges.txt"))
            tokenizer = byte_level(BPE.from_file(*names))
            # Nothing in these two files says which token is special.
            named = [eos_token] if eos_token is not None else [*_KNOWN_ENDS]
            tokenizer.add_special_tokens([t for t in named if tokenizer.token_to_id(t) is not None])
        elif not given.exists() or given.is_dir():
            raise DataNotFoundError(
                f"no tokenizer at {given}",
                hint="Name a tokenizer.json, or a folder with tokenizer.json, or with vocab.json "
                "and merges.txt. (A SentencePiece tokenizer.model must be converted first.)",
            )
        else:
            raise DataError(f"{given} is not a file that holds a tokenizer")
    except PhotonError:
        raise
    except Exception as error:
        raise DataError(f"{given} is not a readable tokenizer: {error}") from error
    settings = _settings(folder)
    return _finished(tokenizer, eos_token or _eos_of(tokenizer, settings, given), settings)


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json as it is; raises DataError where it is none."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise DataError(f"{file} is not a readable tokenizer: {error}") from error


def tokenizer_identity(file: Path) -> str:
    """sha256 of how a tokenizer.json cuts text: the same however the file is laid out.

    What it would pad, truncate or add around a text is no part of it; `encode` never asks for that.

    Raises:
        DataError: not a readable tokenizer.
    """
    tokenizer = read_tokenizer(file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    record = json.loads(tokenizer.to_str())
    record["post_processor"] = None
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _invited(path: Path, eos_token: str | None) -> TextTokenizer:
    shared = read_invitation(path).tokenizer
    if shared is None or shared.json is None:
        what = "names no tokenizer" if shared is None else "only names its tokenizer, a large file"
        raise DataNotFoundError(
            f"{path} {what}",
            hint="Ask the aggregator's operator for the folder tokenizer/ of the run's data.",
        )
    try:
        tokenizer = Tokenizer.from_str(shared.json.decode())
    except Exception as error:
        raise DataError(f"{path} has no readable tokenizer: {error}") from error
    return _finished(tokenizer, eos_token or shared.eos_token, {})


def _settings(folder: Path) -> dict[str, Any]:
    """What lies beside a tokenizer; special_tokens_map.json is the older of the two files."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not JSON: {error}", hint="Fetch it again.") from error
        if isinstance(found, dict):
            settings |= {key: value for key, value in found.items() if value is not None}
    return settings


def _eos_of(tokenizer: Tokenizer, settings: Mapping[str, Any], given: Path) -> str:
    named = settings.get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    for token in (named, *_KNOWN_ENDS):
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"{given} has none of the usual end-of-text tokens ({', '.join(_KNOWN_ENDS)})",
        hint="Name its token with --eos.",
    )


def _finished(tokenizer: Tokenizer, eos_token: str, settings: Mapping[str, Any]) -> TextTokenizer:
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise VocabularyMismatchError(
            f"the tokenizer has no token {eos_token!r}", hint="Name another with --eos."
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return TextTokenizer(tokenizer, eos_token, eos_id, max(vocabulary.values()) + 1, settings)
