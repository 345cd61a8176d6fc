"""Invariant 6: the aggregator's peak memory does not grow with the number of clients."""

import subprocess
import sys
from pathlib import Path

import pytest
import waiting_fork_server

from photon.data import PrepareOptions, prepare

SCRIPT = """
import sys
from photon.config import parse_run_config
from photon.runs import simulate
sys.path.append(sys.argv[1])
import waiting_fork_server
waiting_fork_server.stand_by()  # the worker's: it would import all of this once more
for data in sys.argv[2:]:
    config = parse_run_config({
        "compute": {"threads": 1},
        "model": {"preset": "tiny"},
        "data": {"path": data, "sequence_length": 32},
        "federation": {"rounds": 3, "sample": 8, "workers": 1, "optimizer_state": "keep"},
        "local": {"steps": 1, "batch_size": 2},
        "eval": {"every": 0, "max_tokens": 300},
    })
    simulate(config, run_dir=data + "-run")
    # VmHWM, not ru_maxrss, which starts at the peak of the process that forked this one.
    with open("/proc/self/status") as file:
        print(int(file.read().split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.slow
def test_64_virtual_clients_take_no_more_memory_than_8(tmp_path, write_corpus):
    text = write_corpus(tmp_path / "text", {"any": 448})
    folders = []
    for clients in (8, 64):
        out = tmp_path / f"data-{clients}"
        data = prepare(PrepareOptions(input=text, out=out, iid=clients, vocab_size=300))
        assert len(data.silos) == clients
        folders.append(data.path)
    shared = Path(waiting_fork_server.__file__).parent
    words = [sys.executable, "-c", SCRIPT, *map(str, (shared, *folders))]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    few, many = map(int, done.stdout.split())
    assert many == pytest.approx(few, rel=0.05)
