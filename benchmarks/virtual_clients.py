"""Aggregator memory: 64 virtual clients, 8 sampled a round, against 8 clients, all sampled.

    python benchmarks/virtual_clients.py --text FOLDER_OR_FILE [--rounds 6]

Each run is a process of its own; peak resident memory is the kernel's (ru_maxrss). The aggregator
runs with one worker process, so that its own memory is what is measured; with --in-process the
trainer's is included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
from pathlib import Path

from photon.config import parse_run_config
from photon.data import PrepareOptions, prepare
from photon.runs import simulate


def run(data: Path, folder: Path, sample: int, rounds: int, workers: int, pipe) -> None:
    config = parse_run_config(
        {
            "model": {"preset": "tiny"},
            "data": {"path": str(data), "sequence_length": 128},
            "federation": {
                "rounds": rounds,
                "sample": sample,
                "workers": workers,
                "optimizer_state": "keep",
            },
            "local": {"steps": 2, "batch_size": 4},
            "eval": {"every": 0, "max_tokens": 2000, "per_silo": False},
        }
    )
    simulate(config, run_dir=folder)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--in-process", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        for clients in (8, 64):
            data = Path(scratch) / f"data-{clients}"
            prepare(PrepareOptions(input=options.text, out=data, iid=clients, vocab_size=2048))
            ours, theirs = context.Pipe()
            arguments = (
                data,
                Path(scratch) / f"run-{clients}",
                8,
                options.rounds,
                0 if options.in_process else 1,
                theirs,
            )
            process = context.Process(target=run, args=arguments)
            process.start()
            peaks[clients] = ours.recv()
            process.join()
    ratio = peaks[64] / peaks[8]
    print(json.dumps({"peak_bytes": peaks, "ratio_64_to_8": ratio}, indent=1))


if __name__ == "__main__":
    main()
