"""Runs of tests/sites: their run file, and the same run on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PHOTON = (sys.executable, "-m", "photon.cli.main")

RUN = """
[run]
name = "sites"
seed = 11

[model]
preset = "tiny"

[data]
path = "{data}"
sequence_length = 32

[federation]
rounds = {rounds}
silence_s = 45
optimizer_state = "{optimizer_state}"

[local]
steps = {steps}
batch_size = 4
lr = 2e-3

[compute]
device = "cpu"
threads = 1

[outer]
name = "nesterov"
lr = 0.7

[link]
update_codec = "{codec}"

[eval]
every = 4
max_tokens = 2000
"""


def run_file(
    data: Path, *, rounds: int, steps: int, codec: str = "fp32", optimizer_state: str = "keep"
) -> str:
    return RUN.format(
        data=data, rounds=rounds, steps=steps, codec=codec, optimizer_state=optimizer_state
    )


def simulated(text: str, folder: Path) -> dict[str, Any]:
    """The same run on one machine."""
    folder.mkdir()
    (folder / "run.toml").write_text(text)
    done = subprocess.run(
        [
            *(*PHOTON, "simulate", str(folder / "run.toml")),
            *("--run-dir", str(folder / "run"), "--quiet", "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return json.loads(done.stdout)
