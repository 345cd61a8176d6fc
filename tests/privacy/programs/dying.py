"""A run that is killed, as by kill -9, at one moment of what a ledger goes through."""

from __future__ import annotations

import os
import signal

from photon.config import load_run_config
from photon.federation.private import Spending
from photon.runs import simulate

# Given by the one who forked: run file, run folder, which method, how many calls of it are let by.
_given = globals()


def main() -> None:
    method, left = getattr(Spending, _given["method"]), _given["calls"]

    def dying(self, *words):
        nonlocal left
        method(self, *words)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(Spending, _given["method"], dying)
    simulate(load_run_config(_given["file"]), run_dir=_given["folder"])


if __name__ == "__main__":
    main()
