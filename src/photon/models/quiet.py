"""transformers says much on stderr; while we call it, only its errors are heard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_transformers(*, progress: bool = False) -> Iterator[None]:
    """Log only errors and draw no progress bars inside the block; then as it was before.

    What it would have warned about (weights missing from a checkpoint, say) the caller checks
    and raises. Exceptions pass.

    Args:
        progress: keep progress bars, for a download the user waits for.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars and not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and not progress:
            logging.enable_progress_bar()
