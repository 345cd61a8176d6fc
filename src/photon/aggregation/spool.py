"""The updates of one round on disk, read back across all of them a few values at a time."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from photon.aggregation.check import Named, matching, require_shape
from photon.errors import DiskFullError, ModelMismatchError, QuorumLostError, RunError

#: Values read back at once, over all updates: 16 MiB of fp32, whatever their number.
_BLOCK = 1 << 22
#: Values of one update that are converted, written or read back at once.
_PIECE = 1 << 18

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Spool:
    """Keeps K updates as fp32 in an unnamed file, for rules that must see all of them together.

    The file lies in `folder` (or where `tempfile` puts it: often a tmpfs, where rows take memory
    after all), takes 4 K bytes per parameter and is gone with the process, however that ends. A row
    of it is one update: its tensors one after another in the order of the first.

    Memory: a piece of a tensor while adding; the result and about 20 MiB while reducing, for any K.
    Rows are read, not mapped: pages of a map would count as this process's memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = str(folder or tempfile.gettempdir())
        self._file: BinaryIO | None = None
        self.shapes: dict[str, torch.Tensor] = {}
        self._starts: dict[str, int] = {}
        self._width = 0
        self._rows = 0
        self._broken = False

    def add(self, tensors: Named) -> None:
        """Append one update.

        Args:
            tensors: named tensors, any order, any floating dtype, on any device.

        Raises:
            ModelMismatchError: names or shapes differ from the round's first update.
            DiskFullError: no room for it.
            RunError: an earlier update broke off; `discard` first.
        """
        self._require_whole()
        self._broken = True
        if self._file is None:
            with self._naming_full_disk():
                self._file = tempfile.TemporaryFile(  # noqa: SIM115
                    prefix="photon-", buffering=0, dir=self._folder
                )
        tensors = self._laid_out(tensors) if self._rows == 0 else matching(tensors, self.shapes)
        for name, tensor in tensors:
            self._write(tensor, self._rows * self._width + self._starts[name])
        self._rows += 1
        self._broken = False

    def reduce(
        self, across: Callable[[str, list[torch.Tensor]], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """One value for each coordinate, from its K values; the spool is empty afterwards.

        Args:
            across: gets a tensor's name and the same n coordinates of each update, K tensors (n,)
                fp32 in order of arrival, which it may overwrite; gives a tensor (n,) of any
                floating dtype.

        Returns:
            fp32 tensors on the CPU, in the first update's shapes and order.

        Raises:
            QuorumLostError: nothing was added.
            RunError: an `add` broke off; `discard` first.
        """
        self._require_whole()
        if self._rows == 0:
            raise QuorumLostError("no update was merged, so there is nothing to merge them into")
        most = max(1, min(_PIECE, _BLOCK // self._rows))
        block = torch.empty(self._rows, min(most, max(self._width, 1)))
        merged = {name: torch.empty(shape.shape) for name, shape in self.shapes.items()}
        for name, tensor in merged.items():
            start = self._starts[name]
            for piece in tensor.view(-1).split(most):
                rows = [row[: piece.numel()] for row in block]
                for number, row in enumerate(rows):
                    self._read(row, number * self._width + start)
                piece.copy_(across(name, rows))
                start += piece.numel()
        self.discard()
        return merged

    def discard(self) -> None:
        """Forget what was added and give the room on the disk back."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self.shapes, self._starts, self._width = {}, {}, 0
        self._rows = 0
        self._broken = False

    def _laid_out(self, tensors: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """The first update as it passes; it decides names, shapes and order of a row."""
        for name, tensor in tensors:
            if name in self._starts:
                raise ModelMismatchError(f"tensor {name!r} comes twice in the update")
            require_shape(name, tensor, tensor)
            self.shapes[name] = torch.empty(tensor.shape, device="meta")
            self._starts[name] = self._width
            yield name, tensor
            # After the yield: the first row starts at 0, and is written as rows x width + start.
            self._width += tensor.numel()

    def _write(self, tensor: torch.Tensor, start: int) -> None:
        assert self._file is not None
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            values = piece.to("cpu", torch.float32)
            left, offset = _bytes_of(values), 4 * start
            while left:
                with self._naming_full_disk():
                    done = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[done:], offset + done
            start += values.numel()

    def _read(self, row: torch.Tensor, start: int) -> None:
        assert self._file is not None
        left, offset = _bytes_of(row), 4 * start
        while left:
            done = os.preadv(self._file.fileno(), [left], offset)
            if done == 0:
                raise RunError(
                    f"a temporary file under {self._folder} lost its end while updates were merged",
                    hint="Something else truncated it. Continue with `photon resume DIR`.",
                )
            left, offset = left[done:], offset + done

    @contextmanager
    def _naming_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise DiskFullError(
                f"no room in {self._folder} for the round's update number {self._rows + 1}, kept "
                f"there until all are merged: {error}",
                hint="This merging rule needs 4 bytes per parameter and participant there. Free "
                "space; then `photon resume DIR`.",
            ) from error

    def _require_whole(self) -> None:
        if self._broken:
            raise RunError(
                "an update broke off while it was kept for merging, so this round's are lost",
                hint="Discard the round's updates and merge them again.",
            )


def _bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    # memoryview can't cast what has no elements.
    return values.numpy().data.cast("B") if values.numel() else memoryview(b"")
