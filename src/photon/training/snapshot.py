"""What a trainer keeps between tasks, on disk: each rank writes its own part, in the background.

torch.distributed.checkpoint does the work, so a snapshot written by four ranks is read by two, or
by one. There is no random-number state in it: data order and dropout are functions of seed, cursor
and step. Named tensors may be anything that must survive: optimizer state, weights, the residual
of error feedback.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from photon.store.disk import sync_to_disk
from photon.training.ranks import Ranks

#: How many tensors there are.
_COUNT = "numbers.json"

# torch warns, also from its own threads, that a process alone saves alone. It is meant to.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

#: (name, shape, dtype) -> a tensor of that shape as this rank holds it: what a part is read into.
Allocate = Callable[[str, torch.Size, torch.dtype], Tensor]


@dataclass
class PendingSnapshot:
    """A snapshot on its way to disk; it exists under its name only once `finish` returned."""

    path: Path
    ranks: Ranks
    writing: Future[Any] | None

    def finish(self) -> None:
        """Wait until every rank's part is on disk, then give the folder its name (rank 0).

        Raises OSError if it could not be written; nothing of that name is left.
        """
        partial = _partial(self.path)
        try:
            if self.writing is not None:
                with _as_written():
                    self.writing.result()
            if self.ranks.leader:
                shutil.rmtree(self.path, ignore_errors=True)
                partial.rename(self.path)
                sync_to_disk(self.path.parent)
        except BaseException:
            if self.ranks.leader:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def write_snapshot(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> PendingSnapshot:
    """Copy tensors to host memory and begin to write them; every rank calls this alike.

    Args:
        path: the folder to be; it lies on storage that all ranks of the node see.
        tensors: as this rank holds them, whole or cut; they may change as soon as this returns.

    Raises:
        OSError: the folder can't be made.
    """
    partial = _partial(path)
    if ranks.leader:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / _COUNT).open("w", encoding="utf-8") as file:
            json.dump({"tensors": len(tensors)}, file)
            file.flush()
            os.fsync(file.fileno())
    if not tensors:
        return PendingSnapshot(path, ranks, None)
    ranks.announce(None)  # the folder is there
    alone = ranks.size == 1
    with _as_written():
        writing = async_save(
            dict(tensors),
            storage_writer=FileSystemWriter(partial, sync_files=True, overwrite=True),
            process_group=None if alone else ranks.checkpoints,
            no_dist=alone,
        )
    assert isinstance(writing, Future)
    return PendingSnapshot(path, ranks, writing)


def read_snapshot(path: Path, allocate: Allocate, ranks: Ranks) -> dict[str, Tensor]:
    """A snapshot's tensors as this rank holds them; every rank calls this alike.

    It may have been written by any number of ranks.

    Raises:
        OSError, ValueError: it is missing, or can't be read.
    """
    count = json.loads((path / _COUNT).read_text(encoding="utf-8"))["tensors"]
    if not count:
        return {}
    reader = FileSystemReader(path)
    try:
        wanted = {
            name: allocate(name, entry.size, entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        if len(wanted) != count:
            raise ValueError(f"{path} lists {len(wanted)} tensors, not {count}")
        load(
            wanted,
            storage_reader=reader,
            process_group=None if ranks.size == 1 else ranks.checkpoints,
            no_dist=ranks.size == 1,
        )
    except CheckpointException as error:
        raise ValueError(f"{path} can't be read: {_cause(error)}") from None
    except (RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    return wanted


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _as_written() -> Iterator[None]:
    """Raise what stopped the write, out of the exception that gathers the ranks' failures."""
    try:
        yield
    except CheckpointException as error:  # derives from BaseException
        cause = behind = _cause(error)
        # torch's serialiser only says "failed": the operating system's error lies behind its own.
        while behind is not None and not isinstance(behind, OSError):
            behind = behind.__cause__ or behind.__context__
        raise behind or OSError(str(cause)) from None


def _cause(gathered: CheckpointException) -> BaseException:
    """The first rank's failure. Ctrl-C and the like, which torch gathers too, are raised again."""
    cause = next(iter(gathered.failures.values()))[0]
    if not isinstance(cause, Exception):
        raise cause from None
    return cause
