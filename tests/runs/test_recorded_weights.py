"""A change that should not change the maths changes no bit of what eight short runs end with.

    PHOTON_RECORD_WEIGHTS=1 pytest tests/runs/test_recorded_weights.py

writes them down anew for this machine. Another CPU, PyTorch or number of threads rounds otherwise:
where nothing was recorded for it, the same run is made along another path and the two are compared.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from photon.runs import simulate

RECORDED = Path(__file__).parent / "recorded_weights.json"
RECORD = "PHOTON_RECORD_WEIGHTS"

SHORT = ("federation.rounds=3", "local.steps=2", "eval.every=0", "eval.max_tokens=300")
RUNS = {
    "adamw, kept": ("federation.optimizer_state=keep", "local.weight_decay=0.1"),
    "muon, averaged": ("federation.optimizer_state=average", "local.optimizer=muon"),
    "adopt": ("local.optimizer=adopt", "federation.optimizer_state=keep"),
    "int8 with feedback": ("link.update_codec=int8", "link.error_feedback=true"),
    "lossy broadcast": ("link.broadcast_codec=int8", "federation.sample=2"),
    "nesterov": ("outer.name=nesterov", "local.warmup_steps=2"),
    "two workers": ("federation.workers=2", "federation.merging_rule=median"),
    "two ranks": ("compute.processes=2", "local.batch_size=4"),
}


def _here() -> str:
    """What decides how sums are rounded."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else 'CPU'}, {capability}, torch {torch.__version__}, 1 thread"


def _weights(config, folder) -> str:
    return simulate(config, run_dir=folder).summary["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_short_run_ends_with_the_recorded_weights(name, three_silos, make_config, tmp_path):
    config = make_config(three_silos, *SHORT, *RUNS[name], preset="tiny")
    found = _weights(config, tmp_path / "run")
    recorded = json.loads(RECORDED.read_text())
    if os.environ.get(RECORD):
        recorded.setdefault(_here(), {})[name] = found
        RECORDED.write_text(json.dumps(recorded, indent=2) + "\n")
    if _here() in recorded:
        assert found == recorded[_here()][name], (
            f"{name}: other weights than recorded on {_here()}; if the maths was to change, "
            f"record them anew with {RECORD}=1"
        )
        return
    workers = 0 if config.federation.workers else 1
    other = config.model_copy(
        update={"federation": config.federation.model_copy(update={"workers": workers})}
    )
    assert found == _weights(other, tmp_path / "other"), (
        f"{name}: {config.federation.workers} and {workers} workers come to other weights "
        f"(nothing is recorded for {_here()}: {', '.join(recorded)})"
    )
