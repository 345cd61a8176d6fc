"""torchrun whose ranks are forked from it: each would take five seconds to import what is here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch.distributed.run import main as torchrun

RANK = Path(__file__).with_name("torchrun_rank.py")


def main() -> None:
    os.setsid()
    options = ["--nproc-per-node=2", "--run-path", "--start-method=fork"]
    torchrun([*options, sys.argv[1], str(RANK), *sys.argv[2:]])


if __name__ == "__main__":
    main()
