"""A run from start to summary; the same functions serve the command line and `import photon`."""

from photon.runs.folder import (
    RunResult,
    load_weights,
    read_summary,
    require_same_tokenizer,
    tokenizer_folder,
)
from photon.runs.start import resume, simulate, train

__all__ = [
    "RunResult",
    "load_weights",
    "read_summary",
    "require_same_tokenizer",
    "resume",
    "simulate",
    "tokenizer_folder",
    "train",
]
