"""What every test runs under: no network access by libraries, no display, reproducible examples."""

from __future__ import annotations

import os

from hypothesis import settings

# Set before any test module imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# The same examples on every machine, and no failure because a shared one was slow.
settings.register_profile("photon", deadline=None, derandomize=True)
settings.load_profile("photon")
