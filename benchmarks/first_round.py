"""From `photon serve` to the first round: an aggregator and new silos on one machine.

    python benchmarks/first_round.py [--silos 2] [--out FILE.md]

What a person would type, by a script: `photon serve`, an invitation for each silo, `photon join
--invite`, each as soon as the one before has done its part. The time that a process takes to import
PyTorch and Photon is measured by itself, as it comes once for the loop and once for each trainer,
and is the machine's own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deployment.federation import EventFile, Federation, Plan, prepare_text

IMPORTS = "import photon.runs, photon.silo.trainer, transformers"


def seconds(*command: str) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def first_round(folder: Path, silos: int) -> list[tuple[str, float]]:
    """What was done, and when, in seconds since `photon serve` was typed."""
    data, names = prepare_text(folder, silos, vocabulary=512, text=None)
    done: list[tuple[str, float]] = []
    with Federation(folder / "federation", data, names, Plan("tiny", rounds=2)) as federation:
        began = time.monotonic()

        def note(what: str) -> None:
            done.append((what, time.monotonic() - began))

        federation.serve()
        note("the aggregator is up")
        for name in names:
            invitation = federation.invite(name)
            note(f"an invitation for {name}")
            federation.join(name, invitation)
        events, seen = EventFile(federation.run), list[str]()
        for wanted, words in (
            ("round_started", "the first round begins"),
            ("round_finished", "the first round is over"),
        ):

            def happened(wanted: str = wanted) -> bool:
                seen.extend(event["event"] for event in events.new())
                return wanted in seen

            federation.wait(words, happened, within_s=300)
            note(words)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seconds(sys.executable, "-c", IMPORTS)  # from the disk, the first time
    imports_s = min(seconds(sys.executable, "-c", IMPORTS) for _ in range(2))
    with tempfile.TemporaryDirectory() as scratch:
        done = first_round(Path(scratch), options.silos)
    lines = ["| | s |", "|---|---|", f"| a process imports PyTorch and Photon | {imports_s:.1f} |"]
    lines += [f"| {what} | {at_s:.1f} |" for what, at_s in done]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
