"""What the ServerApp does: gives the federation's loop a post, and lets it run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from photon.engines.flower.commands import RUN_FOLDER_VARIABLE
from photon.engines.flower.pinned import check_flower
from photon.engines.flower.post import FlowerPost
from photon.errors import DeployError, PhotonError
from photon.membership.roster import ROSTER_FILE, Roster
from photon.store.served import SERVE_FILE


class EndedError(Exception):
    """The loop's last words, as Flower keeps them; `control.RunState.exit_code` reads them."""


def make_app(
    run: Callable[[FlowerPost], None], *, roster: Callable[[], Roster] | None = None
) -> ServerApp:
    """The app that a bundle names.

    Args:
        run: the loop; it returns when the run is over.
        roster: of the members; `served_roster` by default.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            run(FlowerPost(grid, (roster or served_roster)()))
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
