"""One ServerApp: `python -m photon.engines.flower.serverapp ...`, its token on standard input.

Flower's own command also sends everything that is printed to the superlink's database, for ever;
this one leaves it to the supervisor's log.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial
from pathlib import Path
from queue import Queue

from photon.engines.flower import pace
from photon.engines.flower.pinned import change, check_flower


def main() -> None:
    """Run the ServerApp of the run that the token stands for.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    parser = argparse.ArgumentParser(prog="serverapp", allow_abbrev=False)
    parser.add_argument("--runtime-api-address", required=True)
    parser.add_argument("--root-certificates", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args()
    token = sys.stdin.readline().strip()

    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supercore.retry import http_retry
    from flwr.superlink.grid import http_grid

    # The package has a function of the module's name.
    runtime = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    change(http_retry, "MAX_RETRY_DELAY", pace.RETRY_S)
    # A silo that announces an answer and does not send it holds up all others for so long.
    change(
        http_grid,
        "pull_objects",
        partial(
            inflatable_utils.pull_objects,
            initial_backoff=pace.PART_FIRST_S,
            backoff_cap=pace.PART_LAST_S,
            max_time=pace.PARTS_S,
        ),
    )
    change(runtime, "start_log_uploader", lambda **_: None)
    runtime.run_serverapp(
        runtime_api_address=options.runtime_api_address,
        log_queue=Queue(),
        token=token,
        insecure=False,
        certificates=options.root_certificates.read_bytes(),
        parent_pid=options.parent_pid,
        runtime_dependency_install=False,
    )


if __name__ == "__main__":
    main()
