"""The federation of a `photon serve` run: silos that joined, reached through the desk.

Everything here starts from the run folder, serve.home and the store alone, so that another process,
or another machine that is given the three, takes over where this one stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from photon.config import RunConfig, load_run_config
from photon.data import PreparedData, open_data
from photon.engines.remote import Asker, Depot, Post, RemoteEngine
from photon.federation import CheckpointStore, Engine
from photon.federation.envelopes import RunPart, dictated
from photon.federation.layout import empty_model
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import ROSTER_FILE, Roster
from photon.models import model_fingerprint
from photon.runs.changes import config_to_go_on_with
from photon.runs.compliance import refused_by
from photon.runs.fleet import Draws, JoinedFleet
from photon.runs.folder import RunResult, finished_summary, with_own_model
from photon.runs.notary import Notary
from photon.runs.session import Guests, Session
from photon.store.run_folder import read_record
from photon.store.served import RUN_FILE, Serving
from photon.telemetry import Event


def continue_run(folder: Path, post: Post | None = None) -> RunResult:
    """Begin a served run, or go on with it, until it is over or drained.

    Args:
        folder: of the run, with serve.json and serve.toml.
        post: to silos; None: letters, which the desk hands out.

    Raises:
        PhotonError: as `photon.simulate`; QuorumLostError also where too few silos came.
    """
    serving = Serving.read(folder)
    begun = (folder / "run.json").exists()
    config = load_run_config(folder / RUN_FILE)
    if begun:  # what is trained stays as it was resolved; where things are may change
        resolved = config_to_go_on_with(folder)
        here = {"serve": config.serve, "comply": config.comply}
        config = resolved.having(data={"path": config.data.path}, **here)
        if (finished := finished_summary(folder, config)) is not None:
            return RunResult(folder, finished)
    with Roster(Path(serving.home) / ROSTER_FILE) as roster:

        def ending() -> bool:
            return any(roster.setting(word, False) for word in ("draining", "stopping"))

        key = NodeKey.load(Path(serving.home) / AGGREGATOR_KEY_FILE)
        notary = Notary(folder, roster, serving.run_id, key)
        fleet = JoinedFleet(
            roster,
            config,
            serving.run_id,
            Draws(folder),
            ending=ending,
            on_lost=notary.write_lost,
            refused=refused_by(config, notary.write_verdict),
        )
        rounds = CheckpointStore(folder / "checkpoints", 1).rounds() if begun else []
        silo_tokens = fleet.expected(1 + max(rounds, default=0))
        if silo_tokens is None:
            return RunResult(folder, {})
        data = open_data(config.data.path)

        def engine(evaluator: Engine, on_event: Callable[[Event], None]) -> RemoteEngine:
            return RemoteEngine(
                _run_part(serving.run_id, folder, config, data, sorted(silo_tokens)),
                config,
                post or roster.letters,
                roster,
                Depot(serving.run_id, config, serving.open_store(), folder / "arrivals"),
                Asker(key, notary.head),
                evaluator,
                on_event,
            )

        guests = Guests(fleet, silo_tokens, engine, notary, ending)
        session = Session("serve", config, None, folder, None, guests=guests, begun=begun)
        return session.execute(read_record(folder) if begun else None)


def _run_part(
    run_id: str, folder: Path, config: RunConfig, data: PreparedData, silos: list[str]
) -> RunPart:
    """What silos are told of the run, whose folder has its architecture by now."""
    own = with_own_model(config, folder)
    model = empty_model(own, vocab_size=data.vocab_size, eos_id=data.eos_id)
    return RunPart(
        id=run_id,
        silos=silos,
        config=dictated(config),
        model=model_fingerprint(model),
        tokenizer=data.tokenizer_sha256,
        vocab_size=data.vocab_size,
        eos_id=data.eos_id,
    )
