"""One ServerApp, which gives the federation's loop a post, and lets it run.

`python -m photon.engines.flower.server_app ...` is its process, with its token on standard input.
Flower's own command also sends everything that is printed to the superlink's database, for ever;
this one leaves it to the supervisor's log.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Queue

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from photon.engines.flower import pace
from photon.engines.flower.commands import RUN_FOLDER_VARIABLE
from photon.engines.flower.pinned import change, check_flower
from photon.engines.flower.post import FlowerPost
from photon.errors import DeployError, PhotonError
from photon.membership.roster import ROSTER_FILE, Roster
from photon.store.served import SERVE_FILE


class EndedError(Exception):
    """The loop's last words, as Flower keeps them; `control.RunState.exit_code` reads them."""


def make_app(run: Callable[[FlowerPost], None]) -> ServerApp:
    """The app that a bundle names.

    Args:
        run: the loop; it returns when the run is over.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            run(FlowerPost(grid, served_roster()))
        except PhotonError as error:
            raise EndedError(f"photon-exit-{error.exit_code}: {error.message[:4000]}") from error

    return app


def run_folder() -> Path:
    """The run folder that this ServerApp continues.

    Raises:
        DeployError: `photon serve` did not say which.
    """
    folder = os.environ.get(RUN_FOLDER_VARIABLE)
    if not folder:
        raise DeployError(
            f"{RUN_FOLDER_VARIABLE} is not set: no run folder to continue",
            hint="ServerApps are started by `photon serve`.",
        )
    return Path(folder)


def served_roster() -> Roster:
    """The roster of the `photon serve` that serves the run folder (its serve.json says where).

    Raises:
        DeployError: no such file, or it does not say.
    """
    path = run_folder() / SERVE_FILE
    try:
        home = Path(json.loads(path.read_text())["home"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeployError(
            f"{path} does not name the home of `photon serve`: {error}",
            hint="It is written by `photon serve`; start that instead.",
        ) from error
    return Roster(home / ROSTER_FILE)


def main() -> None:
    """Run the ServerApp of the run that the token stands for.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    parser = argparse.ArgumentParser(prog="server_app", allow_abbrev=False)
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
