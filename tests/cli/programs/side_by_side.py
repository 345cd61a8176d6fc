"""Trains silos side by side, as the demo does, in a process that a test may interrupt."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import waiting_fork_server

from photon.cli.side_by_side import Training, train_side_by_side
from photon.config import load_run_config


def main() -> None:
    waiting_fork_server.stand_by()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    recipe, out, *silos = sys.argv[1:]
    config = load_run_config(Path(recipe))
    trainings = [Training(Path(out) / silo, config, (silo,)) for silo in silos]
    try:
        train_side_by_side(trainings, at_once=2, listeners={})
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
