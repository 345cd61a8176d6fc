"""`python -m photon.silo --home DIR --node node.toml`: a site's trainer, started by `photon join`.

Under torchrun each rank runs this; rank 0 answers questions, the others train with it:

    torchrun --nnodes=2 ... -m photon.silo --home DIR --site node.toml
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from photon.config import load_node_config
from photon.errors import PhotonError
from photon.membership.keys import NodeKey
from photon.silo.gateway import Gateway
from photon.silo.held_node import follow
from photon.silo.narrator import Narrator
from photon.silo.outside import outside
from photon.silo.policy import read_membership
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.service import end_on_signals, only_trainer, say_goodbye, serve
from photon.silo.site import Site
from photon.silo.trainer import SiloTrainer

log = logging.getLogger("photon.silo")


def main(words: Sequence[str] | None = None) -> int:
    """Serve until a signal comes.

    Returns:
        The exit code of the error that kept the trainer from serving, or ended it.
    """
    parser = argparse.ArgumentParser(prog="python -m photon.silo", description="A site's trainer.")
    parser.add_argument("--home", type=Path, required=True, help="the node's folder")
    # torchrun takes --node for an abbreviation of an option of its own.
    parser.add_argument(
        *("--node", "--site"), dest="node", type=Path, required=True, help="the site's node.toml"
    )
    parser.add_argument(
        "--gateway",
        action="store_true",
        help="another machine, which shares the folder, has the key and the network",
    )
    chosen = parser.parse_args(words)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Indented("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("httpx2", "httpcore2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        _run(chosen.home, chosen.node, behind_gateway=chosen.gateway)
    except PhotonError as error:
        log.error("[%d] %s", error.exit_code, error)
        # Not `return`: threads of a lost process group may wait for ever.
        sys.stderr.flush()
        os._exit(error.exit_code)
    return 0


def _run(home: Path, node_file: Path, *, behind_gateway: bool) -> None:
    trainer: list[SiloTrainer] = []

    def lost(rank: int, code: int) -> None:
        words = f"rank {rank} ended with exit code {code}"
        log.error("%s: this trainer ends, to start again with all its ranks", words)
        for one in trainer:
            # Killed from outside, it says nothing about the task.
            if code not in (-signal.SIGKILL, -signal.SIGTERM):
                one.note_end(words)
        os._exit(1)

    node = load_node_config(node_file)
    membership = read_membership(home)
    membership.require_key()
    site = Site(home, node, membership)
    command = [sys.executable, *sys.orig_argv[1:]]
    team = Team.gather(node.compute, command, lost)
    if not team.leader:
        end_on_signals(lambda: None)
        follow(site, team)
        return
    with only_trainer(home):
        if behind_gateway:
            key, desk = None, Gateway(home, "trainer")
            carriers = desk.carrier
        else:
            key = NodeKey.load(home / "node.key")
            desk, carriers = outside(home / "ca.crt", node, membership, key)
        reporter = Reporter(desk, narrator=Narrator(_show))
        trainer.append(SiloTrainer(site, key, carriers, reporter, team))

        def last_words() -> None:
            trainer[0].note_stop()
            say_goodbye(home, reporter)

        end_on_signals(last_words)
        serve(home, trainer[0], reporter)


class _Indented(logging.Formatter):
    """Only a record's first line begins a line: what others wrote can't look like one of ours."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")


def _show(line: str) -> None:
    # One write: lines of the log go to the same pipe.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
