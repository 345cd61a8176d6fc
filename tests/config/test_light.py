"""Reading a config or a run folder must not cost the seconds that importing torch takes."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    ["photon", "photon.config", "photon.telemetry", "photon.dashboard", "photon.cli.main"],
)
def test_import_brings_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "heavy = {'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
