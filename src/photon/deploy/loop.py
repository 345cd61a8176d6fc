"""`python -m photon.deploy.loop RUN`: the federation's loop of a served run, in its own process.

It ends with the run, or with what ended it: exit code and words, which `photon serve` asks for.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from photon.errors import PhotonError
from photon.membership.roster import ENDED_SETTING, ROSTER_FILE, Roster
from photon.runs.serving import continue_run
from photon.store.served import Serving

#: Of the last words.
_MOST_WORDS = 4000


def main(folder: Path) -> int:
    """Go on with a run until it is over or drained; the exit code."""
    try:
        continue_run(folder)
    except PhotonError as error:
        print(error, file=sys.stderr)  # noqa: T201
        last = {"exit_code": error.exit_code, "words": error.message[:_MOST_WORDS]}
        # On a full disk the exit code alone says it.
        with (
            contextlib.suppress(PhotonError),
            Roster(Path(Serving.read(folder).home) / ROSTER_FILE) as roster,
        ):
            roster.set_setting(ENDED_SETTING, last)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
