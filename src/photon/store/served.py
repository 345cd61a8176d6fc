"""serve.json in the folder of a served run: its id, where its objects lie, and who serves it.

Written by `photon serve`, read by the process that runs the federation, by `photon status` and by
whoever frees what a run left in the store. No torch, so that all of them may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from photon.errors import AccessRefusedError, RunBusyError, RunNotFoundError
from photon.store.disk import held_alone, write_json

if TYPE_CHECKING:
    from photon.store.contract import Store

#: What `photon serve` leaves in the run folder, and the run file with whole paths beside it.
SERVE_FILE, RUN_FILE = "serve.json", "serve.toml"

#: In a run folder: held by the process that works in it, and by the `photon serve` that serves it,
#: whose loop is such a process and comes and goes.
LOCKS = LOCK_FILE, SERVE_LOCK_FILE = ".lock", ".serve.lock"


def hold_run(folder: Path, *, served: bool) -> AbstractContextManager[None]:
    """Be the only one that serves a run, or (else) that may replace what is served there.

    Raises (on entry):
        RunBusyError: another does.
    """
    what = "another `photon serve`, or another process," if served else "a `photon serve`"
    return held_alone(
        folder / SERVE_LOCK_FILE,
        RunBusyError(
            f"{what} has the run in {folder}",
            hint=f"See `photon status {folder}`; end it first (`photon stop {folder}`).",
        ),
    )


@dataclass(frozen=True)
class Serving:
    """RUN/serve.json: what the federation of a served run starts from.

    Attributes:
        run_id: 32 hexadecimal digits; names the run to silos, and its folder in the store.
        home: serve.home, whole.
        store: URL of the store, as this machine reaches it; empty until it was up once.
        store_options: for it, without secrets.
        secrets: file with the store's credentials; None where the environment has them.
    """

    run_id: str
    home: str
    store: str
    store_options: Mapping[str, str]
    secrets: str | None = None

    def write(self, folder: Path) -> None:
        """Into a run folder; raises as `photon.store.disk.write_json`."""
        write_json(folder / SERVE_FILE, asdict(self), "what is served")

    @classmethod
    def read(cls, folder: Path) -> Serving:
        """From a run folder.

        Raises:
            RunNotFoundError: it was not made by `photon serve`.
        """
        path = folder / SERVE_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunNotFoundError(
                f"no served run in {folder}: {path}: {error}",
                hint="Name a folder that `photon serve` made.",
            ) from error

    def open_store(self) -> Store:
        """The aggregator's own way to updates and states.

        Raises:
            AccessRefusedError: the store's credentials can't be read.
        """
        from photon.store.object_store import open_store  # not for who reads the record only

        options = dict(self.store_options)
        if self.secrets is not None:
            try:
                options |= json.loads(Path(self.secrets).read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise AccessRefusedError(
                    f"can't read the store's credentials {self.secrets}: {error}",
                    hint="`photon serve` writes them; start it again.",
                ) from error
        return open_store(self.store, options)
