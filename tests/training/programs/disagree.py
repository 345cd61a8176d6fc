"""A node whose ranks were given what the arguments say; prints who refused and why."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed

from photon.config import load_run_config
from photon.errors import PhotonError
from photon.federation import Node, NodeSettings
from photon.training import Seat


def main() -> None:
    options = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    config = load_run_config(Path(options["run"]), options["overrides"][rank])
    settings = NodeSettings(config, Path(options["folder"]), seat=Seat.from_environment())
    try:
        node = Node(settings, lambda event: None)
    except PhotonError as error:
        left = not torch.distributed.is_initialized()
        print(json.dumps({"code": error.exit_code, "message": error.message, "left": left}))
        return
    if rank:
        node.follow()
    else:
        node.close()
    left = not torch.distributed.is_initialized()
    print(json.dumps({"code": 0, "message": "", "left": left}))


if __name__ == "__main__":
    main()
