"""What `photon data prepare` takes, and whether it makes sense."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from photon.data.ingest import Source
from photon.data.partition import (
    ByField,
    ByFolder,
    ByTree,
    Contiguous,
    Dirichlet,
    Everything,
    Iid,
    Partitioner,
)
from photon.data.readers import HUB_PREFIX, PROVENANCE
from photon.errors import DataError, IncompatibleConfigError, PluginError
from photon.plugins import PARTITIONERS, load_plugin


@dataclass(frozen=True)
class PrepareOptions:
    """What `photon data prepare` takes; at most one way to partition.

    Attributes:
        input: file, folder, saved Hugging Face dataset, or "hf:OWNER/NAME[/CONFIG][:SPLIT]"; or
            several, which are read as if they lay side by side in one folder.
        out: folder to make.
        text_key: of the text in JSONL, parquet and datasets.
        metadata: CSV joined to text files by file name or stem.
        metadata_key: its column that holds them; the first by default.
        separator: parts a text file into documents; by default a file is one document.
        silo_field, iid, dirichlet, contiguous, silo_folders, silo_tree, partitioner: how documents
            become silos; none makes one silo, "all". dirichlet is (silos, alpha).
        partitioner_options: keyword arguments of a plugin's partitioner.
        label_field: whose values dirichlet skews; the document's source (file or folder) by
            default.
        min_documents: silos with fewer are folded into "other".
        source_field: makes several sources inside each silo, for mixtures.
        tokenizer: tokenizer.json, its folder, or an invitation; trained on the training text by
            default.
        eos: end-of-text token of that tokenizer, where it can't be told.
        vocab_size: of the tokenizer that is trained.
        own_vocabulary: train one for each silo, on its own text (DEPT, arXiv 2410.05021).
        train_bytes: most text it is trained on.
        max_document_bytes: a longer stretch of a document must have a place where it can be cut for
            the tokenizer; memory is about 220 times as much.
        global_fraction, silo_fraction: of documents held out, globally and per silo.
        stratify_field: the global held-out set takes something of each of its values, as it does of
            each source and folder.
        ignore_splits: treat the input's own validation and test splits like the rest; they are the
            global held-out set by default.
        held_out_only: all text to score models with, none to train on; needs `tokenizer`.
        shard_tokens: a token file is closed once it holds as many.
        seed: of splits and of random partitions.
        overwrite: replace a prepared folder at `out`.
    """

    input: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    out: str | os.PathLike[str]
    text_key: str = "text"
    metadata: str | os.PathLike[str] | None = None
    metadata_key: str | None = None
    separator: str | None = None
    silo_field: str | None = None
    iid: int | None = None
    dirichlet: tuple[int, float] | None = None
    contiguous: int | None = None
    silo_folders: bool = False
    silo_tree: bool = False
    partitioner: str | None = None
    partitioner_options: Mapping[str, str] = field(default_factory=dict)
    label_field: str | None = None
    min_documents: int = 1
    source_field: str | None = None
    tokenizer: str | os.PathLike[str] | None = None
    eos: str | None = None
    vocab_size: int = 4096
    own_vocabulary: bool = False
    train_bytes: int = 50_000_000
    max_document_bytes: int = 16_000_000
    global_fraction: float = 0.03
    silo_fraction: float = 0.03
    stratify_field: str | None = None
    ignore_splits: bool = False
    held_out_only: bool = False
    shard_tokens: int = 2**26
    seed: int = 0
    overwrite: bool = False

    def source(self) -> Source:
        """The input these options name."""
        metadata = Path(self.metadata) if self.metadata is not None else None
        return Source(
            self.inputs,
            self.text_key,
            metadata,
            self.metadata_key,
            self.separator,
            self._fields_read,
        )

    @property
    def inputs(self) -> list[str]:
        """Each input."""
        given = self.input
        return [
            os.fspath(each) for each in ([given] if isinstance(given, str | os.PathLike) else given)
        ]

    def build_partitioner(self) -> Partitioner:
        """The partitioner these options name.

        Raises:
            IncompatibleConfigError: more than one is named.
            PluginError: a plugin that can't be loaded, or does not take the options given.
            DataError: a count or alpha out of bounds.
        """
        named = self._ways()
        if len(named) > 1:
            raise IncompatibleConfigError(
                f"{' and '.join(named)} each say how to make silos", hint="Name one of them."
            )
        if named and self.held_out_only:
            raise IncompatibleConfigError(
                f"{next(iter(named))} makes silos, and --held-out-only makes none",
                hint="Leave one of them away.",
            )
        return next(iter(named.values()))[0]() if named else Everything()

    def _ways(self) -> dict[str, tuple[Callable[[], Partitioner], str]]:
        """The options that make silos, as they were given: what each builds, and does in words."""
        ways: dict[str, tuple[Callable[[], Partitioner], str]] = {}
        if (name := self.silo_field) is not None:
            words = f"one for each value of the field `{name}`"
            ways["--silo-field"] = partial(ByField, name), words
        if (count := self.iid) is not None:
            ways["--iid"] = partial(Iid, count), f"{count}, documents dealt out at random"
        if self.dirichlet is not None:
            label = f"the field `{self.label_field}`" if self.label_field else "the source"
            count, alpha = self.dirichlet
            words = f"{count}, each value of {label} shared out by Dirichlet({alpha:g})"
            ways["--dirichlet"] = partial(Dirichlet, count, alpha, self.label_field), words
        if (count := self.contiguous) is not None:
            words = f"{count} consecutive slices of the input, alike in bytes"
            ways["--contiguous"] = partial(Contiguous, count), words
        if self.silo_folders:
            ways["--silo-folders"] = ByFolder, "one for each first-level folder of the input"
        if self.silo_tree:
            ways["--silo-tree"] = ByTree, "one for each folder of the input, at any depth"
        if (name := self.partitioner) is not None:
            words = f"as the plugin `{name}` named them"
            ways["--partitioner"] = partial(_plugin, name, self.partitioner_options), words
        return ways

    def partition_in_words(self) -> str:
        """How documents became silos, for the data card."""
        if self.held_out_only:
            return "none, as all text is held out"
        said = next((words for _, words in self._ways().values()), "one, of all documents")
        if self.min_documents > 1:
            said += (
                f"; those with fewer than {self.min_documents} documents are folded into `other`"
            )
        return said

    @property
    def _fields_read(self) -> dict[str, str] | None:
        """Fields that decide anything, and by which option; None when a plugin may see them all."""
        if self.partitioner is not None:
            return None
        named = {
            getattr(self, name): _option(name)
            for name in ("silo_field", "label_field", "source_field", "stratify_field")
        }
        return {name: named[name] for name in named if name not in (None, *PROVENANCE)}

    def check(self) -> None:
        """Whether values are in bounds and `out` may be written.

        Raises:
            DataError: a value out of bounds, or `out` holds something or overlaps the input.
            IncompatibleConfigError: an option that needs another one.
        """
        for name in ("global_fraction", "silo_fraction"):
            value = getattr(self, name)
            if not 0 < value < 0.5:
                raise DataError(
                    f"{_option(name)} {value} must lie between 0 and 0.5, both excluded",
                    hint="0.03 holds out about one document in thirty.",
                )
        for name in ("min_documents", "train_bytes", "shard_tokens", "max_document_bytes"):
            if getattr(self, name) < 1:
                raise DataError(f"{_option(name)} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise DataError(f"--seed {self.seed} must be at least 0")
        if self.separator == "":
            raise DataError("--separator is empty", hint="Leave it away to keep files whole.")
        needs = {
            "eos": "tokenizer",
            "metadata_key": "metadata",
            "label_field": "dirichlet",
            "partitioner_options": "partitioner",
        }
        for name, needed in needs.items():
            if getattr(self, name) not in (None, {}) and getattr(self, needed) is None:
                raise IncompatibleConfigError(
                    f"{_option(name)} means nothing without {_option(needed)}",
                    hint=f"Add {_option(needed)}, or leave {_option(name)} away.",
                )
        if self.own_vocabulary and (self.tokenizer is not None or self.held_out_only):
            raise IncompatibleConfigError(
                "--own-vocabulary trains a tokenizer for each silo, so neither --tokenizer nor "
                "--held-out-only goes with it"
            )
        if self.held_out_only and self.tokenizer is None:
            raise IncompatibleConfigError(
                "--held-out-only needs a --tokenizer: a model is scored on text as its own cuts it",
                hint="Name the model's, for example --tokenizer RUN/tokenizer.",
            )
        self._check_out()

    def _check_out(self) -> None:
        out = Path(self.out)
        if not self.inputs:
            raise DataError("no input is named", hint="Name a file or a folder: --input PATH.")
        local = [given for given in self.inputs if not given.startswith(HUB_PREFIX)]
        for number, given in enumerate(local):
            others = [("--out", os.fspath(out)), *(("--input", path) for path in local[:number])]
            for option, other in others:
                one, two = Path(os.path.realpath(other)), Path(os.path.realpath(given))
                if one == two or one in two.parents or two in one.parents:
                    raise DataError(
                        f"{option} {other} and --input {given} lie inside one another",
                        hint="Choose an --out beside the input, and name no text twice.",
                    )
        names = [_last_part(given) for given in local]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(
                f"several inputs are called {min(twice)!r}: what lies in them can't be told apart",
                hint="Rename them, or name the folder that holds them all.",
            )
        if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
            if not self.overwrite:
                raise DataError(
                    f"{out} already exists",
                    hint="Choose another --out, or replace it: --overwrite.",
                )
            if not (out / "manifest.json").is_file():
                raise DataError(
                    f"{out} is not a prepared data folder, so --overwrite does not touch it",
                    hint="Choose another --out.",
                )

    def recorded(self) -> dict[str, Any]:
        """The options that shaped the data, as JSON; paths by their last part only.

        A manifest must be the same wherever it is made, and say nothing of the machine.
        """
        record = asdict(self)
        for name in ("out", "overwrite"):
            record.pop(name)
        inputs = [_last_part(given) for given in self.inputs]
        record["input"] = inputs if len(inputs) > 1 else inputs[0]
        for name in ("metadata", "tokenizer"):
            if record[name] is not None:
                record[name] = _last_part(os.fspath(record[name]))
        return record


def _last_part(given: str) -> str:
    return given if given.startswith(HUB_PREFIX) else os.path.basename(os.path.realpath(given))


def _plugin(name: str, options: Mapping[str, str]) -> Partitioner:
    kind = load_plugin(PARTITIONERS, name, Partitioner)
    try:
        return kind(**options)
    except TypeError as error:
        raise PluginError(
            f"partitioner {name!r} does not take the options {dict(options)}: {error}",
            hint="Give its options as --partitioner-option KEY=VALUE.",
        ) from error


def _option(name: str) -> str:
    return (
        "--partitioner-option" if name == "partitioner_options" else f"--{name.replace('_', '-')}"
    )
