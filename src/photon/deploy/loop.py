"""`python -m photon.deploy.loop RUN`: the federation's loop of a served run, in its own process.

It ends with the run, or with what ended it: exit code and words, which `photon serve` asks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from photon.config import (
    NodeConfig,
    RunConfig,
    ServeConfig,
    load_node_config,
    load_run_config,
)
from photon.deploy.join import CA_FILE, INVITATION_FILE, KEY_FILE, accept_invitation
from photon.errors import PhotonError
from photon.membership.invitation import read_invitation
from photon.membership.keys import NodeKey
from photon.membership.roster import ENDED_SETTING, ROSTER_FILE, Roster
from photon.runs.child import ServedFederation, totals_inside
from photon.runs.serving import continue_run
from photon.silo.courier import Courier
from photon.silo.narrator import SAYS, Narrator
from photon.silo.outside import outside
from photon.silo.policy import read_membership
from photon.silo.presence import BOOT, Reporter
from photon.silo.ranks import Team
from photon.silo.service import end_on_signals, only_trainer, say_goodbye
from photon.silo.service import serve as answer_questions
from photon.silo.site import Site
from photon.silo.socket import SOCKET_FILE
from photon.silo.trainer import SiloTrainer
from photon.store.disk import write_json
from photon.store.served import RUN_FILE, Serving
from photon.training import Seat

#: Of the last words.
_MOST_WORDS = 4000
#: Between two looks at who has joined, and at whether the parent's run is over.
_LOOK_S = 1.0


def main(folder: Path) -> int:
    """Go on with a run until it is over or drained; the exit code."""
    try:
        config = load_run_config(folder / RUN_FILE)
        if config.serve.child is not None:
            take_part(folder, config)
        else:
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


def take_part(folder: Path, config: RunConfig) -> None:
    """Be the member that a federation is inside another, until that one's run is over.

    Raises:
        PhotonError: it can't join, or what it keeps can't be read.
    """
    serve = config.serve
    home = Path(serve.home) / "parent"
    node = load_node_config(str(serve.parent), [f"data.path={home}"])
    os.environ[BOOT] = f"{os.getppid():016x}"  # of all loops of this `photon serve`
    with Roster(Path(serve.home) / ROSTER_FILE) as roster, only_trainer(home):
        if (home / INVITATION_FILE).exists():
            _join(home, node, serve, roster)
        membership, key = read_membership(home), NodeKey.load(home / KEY_FILE)
        desk, carriers = outside(home / CA_FILE, node, membership, key)
        reporter = Reporter(desk, narrator=Narrator(_show))
        own = ServedFederation(membership.name, folder, serve, roster, comply=config.comply)
        site = Site(home, node, membership, own)
        trainer = SiloTrainer(site, key, carriers, reporter, Team(Seat()))
        end_on_signals(lambda: say_goodbye(home, reporter))
        Courier(desk, home / SOCKET_FILE, reporter.now.boot, _show).start()
        threading.Thread(target=_until_over, args=(own, home, reporter), daemon=True).start()
        answer_questions(home, trainer, reporter)


def _join(home: Path, node: NodeConfig, serve: ServeConfig, roster: Roster) -> None:
    """Redeem the invitation, once those have joined whose text the parent is told of."""
    _show(f"{SAYS}joins once {', '.join(serve.silos)} have joined here")
    while len(members := [one for one in roster.members() if one.name in serve.silos]) < len(
        serve.silos
    ):
        time.sleep(_LOOK_S)
    texts = "".join(sorted(one.facts.data_sha256 for one in members))
    facts = replace(
        members[0].facts,
        data_sha256=hashlib.sha256(texts.encode()).hexdigest(),
        train_tokens=sum(one.facts.train_tokens for one in members),
    )
    invitation, tell = read_invitation(home / INVITATION_FILE), lambda words: _show(SAYS + words)
    accept_invitation(invitation, node, home, facts=facts, tell=tell)
    (home / INVITATION_FILE).unlink()


def _until_over(own: ServedFederation, home: Path, reporter: Reporter) -> None:
    """End this process once the parent's run is over, or it or this one is drained."""
    while True:
        time.sleep(_LOOK_S)
        if reporter.now.state not in ("idle", "refused"):
            continue
        if reporter.over or own.roster.setting("draining", False):
            if reporter.over == "finished":
                write_json(own.folder / "summary.json", totals_inside(own.folder))
            say_goodbye(home, reporter)
            os._exit(0)


def _show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
