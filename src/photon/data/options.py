"""What `photon data prepare` takes, and whether it makes sense."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from photon.data.ingest import Source
from photon.data.partition import (
    ByField,
    ByFolder,
    Contiguous,
    Dirichlet,
    Everything,
    Iid,
    Partitioner,
)
from photon.data.readers import HUB_PREFIX
from photon.errors import DataError, IncompatibleConfigError, PluginError
from photon.plugins import PARTITIONERS, load_plugin


@dataclass(frozen=True)
class PrepareOptions:
    """What `photon data prepare` takes; at most one way to partition.

    Attributes:
        input: file, folder, saved Hugging Face dataset, or "hf:OWNER/NAME[/CONFIG][:SPLIT]".
        out: folder to make.
        text_key: of the text in JSONL, parquet and datasets.
        metadata: CSV joined to text files by file name or stem.
        metadata_key: its column that holds them; the first by default.
        separator: parts a text file into documents; by default a file is one document.
        silo_field, iid, dirichlet, contiguous, silo_folders, partitioner: how documents become
            silos; none makes one silo, "all". dirichlet is (silos, alpha).
        partitioner_options: keyword arguments of a plugin's partitioner.
        label_field: whose values dirichlet skews; the document's source (file or folder) by
            default.
        min_documents: silos with fewer are folded into "other".
        source_field: makes several sources inside each silo, for mixtures.
        tokenizer: tokenizer.json, its folder, or an invitation; trained on the training text by
            default.
        eos: end-of-text token of that tokenizer, where it can't be told.
        vocab_size: of the tokenizer that is trained.
        train_bytes: most text it is trained on.
        global_fraction, silo_fraction: of documents held out, globally and per silo.
        shard_tokens: a token file is closed once it holds as many.
        seed: of splits and of random partitions.
        overwrite: replace a prepared folder at `out`.
    """

    input: str | os.PathLike[str]
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
    partitioner: str | None = None
    partitioner_options: Mapping[str, str] = field(default_factory=dict)
    label_field: str | None = None
    min_documents: int = 1
    source_field: str | None = None
    tokenizer: str | os.PathLike[str] | None = None
    eos: str | None = None
    vocab_size: int = 4096
    train_bytes: int = 50_000_000
    global_fraction: float = 0.03
    silo_fraction: float = 0.03
    shard_tokens: int = 2**26
    seed: int = 0
    overwrite: bool = False

    def source(self) -> Source:
        """The input these options name."""
        metadata = Path(self.metadata) if self.metadata is not None else None
        return Source(
            os.fspath(self.input), self.text_key, metadata, self.metadata_key, self.separator
        )

    def build_partitioner(self) -> Partitioner:
        """The partitioner these options name.

        Raises:
            IncompatibleConfigError: more than one is named.
            PluginError: a plugin that can't be loaded, or does not take the options given.
            DataError: a count or alpha out of bounds.
        """
        named = self._named()
        if len(named) > 1:
            raise IncompatibleConfigError(
                f"{' and '.join(named)} each say how to make silos", hint="Name one of them."
            )
        return next(iter(named.values()))() if named else Everything()

    def _named(self) -> dict[str, Callable[[], Partitioner]]:
        named: dict[str, Callable[[], Partitioner]] = {}
        if (silo_field := self.silo_field) is not None:
            named["--silo-field"] = lambda: ByField(silo_field)
        if (iid := self.iid) is not None:
            named["--iid"] = lambda: Iid(iid)
        if (dirichlet := self.dirichlet) is not None:
            named["--dirichlet"] = lambda: Dirichlet(*dirichlet, self.label_field)
        if (contiguous := self.contiguous) is not None:
            named["--contiguous"] = lambda: Contiguous(contiguous)
        if self.silo_folders:
            named["--silo-folders"] = ByFolder
        if (plugin := self.partitioner) is not None:
            named["--partitioner"] = lambda: _plugin(plugin, self.partitioner_options)
        return named

    def partition_in_words(self) -> str:
        """How documents became silos, for the data card."""
        said = "one, of all documents"
        if self.silo_field is not None:
            said = f"one for each value of the field `{self.silo_field}`"
        elif self.iid is not None:
            said = f"{self.iid}, documents dealt out at random"
        elif self.dirichlet is not None:
            label = f"the field `{self.label_field}`" if self.label_field else "the source"
            count, alpha = self.dirichlet
            said = f"{count}, each value of {label} shared out by Dirichlet({alpha:g})"
        elif self.contiguous is not None:
            said = f"{self.contiguous} consecutive slices of the input, alike in bytes"
        elif self.silo_folders:
            said = "one for each first-level folder of the input"
        elif self.partitioner is not None:
            said = f"as the plugin `{self.partitioner}` named them"
        if self.min_documents > 1:
            said += (
                f"; those with fewer than {self.min_documents} documents are folded into `other`"
            )
        return said

    @property
    def fields_read(self) -> set[str] | None:
        """Fields that decide anything; None when a plugin may look at all of them."""
        if self.partitioner is not None:
            return None
        named = {self.silo_field, self.label_field, self.source_field, "folder", "file"}
        return {name for name in named if name is not None}

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
        for name in ("min_documents", "train_bytes", "shard_tokens"):
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
        self._check_out()

    def _check_out(self) -> None:
        out, given = Path(self.out), os.fspath(self.input)
        if not given.startswith(HUB_PREFIX):
            inside, outside = out.resolve(), Path(given).resolve()
            if inside == outside or inside in outside.parents or outside in inside.parents:
                raise DataError(
                    f"--out {out} and --input {given} lie inside one another",
                    hint="Choose an --out beside the input.",
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
        for name in ("input", "metadata", "tokenizer"):
            value = record[name]
            if value is not None and not os.fspath(value).startswith(HUB_PREFIX):
                record[name] = Path(value).resolve().name
        return record


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
