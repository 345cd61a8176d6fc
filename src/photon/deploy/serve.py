"""`photon serve`: brings up what an aggregator needs, keeps it up, and ends with its run.

    store      the embedded object store, unless serve.store names another
    superlink  Flower's, on loopback: registered keys, tasks and receipts, in a database
    desk       in this process: invitations, presence, presigned URLs; the operator's socket
    door       Caddy, the one public port
    superexec  starts the federation's loop (photon.deploy.aggregator) for each submitted run

The loop lives in a process of its own and starts from the run folder: where it dies it is submitted
again, and goes on in the round it was in. Nothing of it is in this process, which holds no model.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from photon.config import RunConfig, load_run_config, write_resolved
from photon.config.serve import ServeConfig
from photon.deploy.certificates import CertificateFiles, make_authority, make_certificate
from photon.deploy.desk import Desk, DeskLimits
from photon.deploy.embedded_store import REGION, EmbeddedStore, StoreOptions
from photon.deploy.freeing import free_leftovers, note_leftover
from photon.deploy.front_door import READ_AGAIN, DoorSettings, front_door, public_url
from photon.deploy.front_door import SERVICE as DOOR
from photon.deploy.ports import free_ports
from photon.deploy.renewal import DoorCertificate
from photon.deploy.service import troubles_to
from photon.deploy.supervisor import RestartPolicy, Service, Supervisor
from photon.engines.flower import commands
from photon.engines.flower.bundle import build_bundle, digest
from photon.engines.flower.control import Control, RunState
from photon.errors import (
    DeployError,
    PhotonError,
    RunExistsError,
    RunNotFoundError,
    ServiceLostError,
    UnreachableError,
    error_of,
)
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import ROSTER_FILE, RUN_SETTING, Member, Roster
from photon.store.disk import write_json
from photon.store.granted_store import require_origin
from photon.store.object_store import open_store, presigner_for
from photon.store.presign import Presigner
from photon.store.served import LOCKS, RUN_FILE, SERVE_FILE, Serving, hold_run

#: In serve.home: where `photon status` and `photon stop` ask.
OPERATOR_SOCKET = "operator.sock"
#: In serve.home: who runs there (Supervisor's record).
RECORD = "serve.json"

#: Between two looks at the run.
_LOOK_S = 1.0
#: For removals in a store that are under way when serving ends.
_LAST_DELETION_S = 10.0
#: A loop that dies so often within so many seconds, without a round finished, is given up.
_MOST_DEATHS, _WITHIN_S = 10, 900.0
#: How much of the end of events.jsonl is read for the round that a run is in.
_TAIL_BYTES = 1 << 18


@dataclass(frozen=True)
class Outcome:
    """How serving ended.

    Attributes:
        finished: the run reached its end (else it was stopped or drained).
    """

    folder: Path
    finished: bool


def prepare_run(config: RunConfig, folder: Path, *, overwrite: bool = False) -> RunConfig:
    """Make a run folder for a new run: the run file with whole paths, and its id.

    Called while the run is held (`Aggregator.run`): what is there may be another's, at work.

    Raises:
        RunExistsError: the folder holds a run, or something else.
    """
    if (folder / "run.json").exists() or (folder / SERVE_FILE).exists():
        if not overwrite:
            raise RunExistsError(
                f"{folder} already holds a run",
                hint=f"Go on with it: `photon serve --resume {folder}`; or choose another "
                "--run-dir, or replace it with --overwrite.",
            )
        # Before the folder goes, which alone says what is its in the store.
        with contextlib.suppress(RunNotFoundError):
            note_leftover(
                Path(config.serve.home).absolute(),
                Serving.read(folder),
                keep_last_state=False,
                grant_s=config.serve.grant_s,
            )
        for path in folder.iterdir():
            if path.name not in LOCKS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif folder.exists() and any(path.name not in LOCKS for path in folder.iterdir()):
        raise RunExistsError(
            f"{folder} is not empty and holds no run", hint="Choose another --run-dir."
        )
    config = _with_whole_paths(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config, folder / RUN_FILE)
    Serving(secrets.token_hex(16), config.serve.home, "", {}).write(folder)
    return config


def reopen_run(folder: Path, overrides: list[str] | None = None) -> RunConfig:
    """The run file of a run that was served before; [serve] may change from start to start.

    It is read only; what changed is written once the run is held (`Aggregator.run`).

    Raises:
        RunNotFoundError: no served run there.
    """
    if not (folder / SERVE_FILE).exists():
        raise RunNotFoundError(
            f"no served run in {folder}: there is no {folder / SERVE_FILE}",
            hint="Name the run folder of an earlier `photon serve`.",
        )
    changed = [one for one in overrides or [] if not one.strip().startswith("serve.")]
    if changed:
        raise RunExistsError(
            f"{changed[0].partition('=')[0].strip()} can't change in a run that has begun",
            hint="Only keys of [serve] can; for anything else start a new run.",
        )
    return _with_whole_paths(load_run_config(folder / RUN_FILE, overrides or []))


class Aggregator:
    """All services of one served run.

    Args:
        config: the run file; of a run that goes on, as `reopen_run` gave it.
        folder: of the run.
        log: told each line of every service.
        on_event: told what happens to services and at the desk, in words.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        log: Callable[[str], None],
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config = _with_whole_paths(config)
        self._serve: ServeConfig = config.serve
        self._folder = folder.absolute()
        self._home = Path(config.serve.home)
        self._log = log
        self._on_event = on_event or (lambda _: None)
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        NodeKey.load_or_create(self._home / AGGREGATOR_KEY_FILE)  # the loop asks with it
        self._roster = Roster(self._home / ROSTER_FILE)
        self._control: Control | None = None
        self._certificate: DoorCertificate | None = None
        self._embedded: EmbeddedStore | None = None
        self._registering = threading.Lock()
        self._supervisor = Supervisor(
            self._home / RECORD,
            self._home / "logs",
            log=log,
            events=troubles_to(self._on_event),
            facts={"run": str(self._folder), "address": public_url(self._serve)},
        )

    def run(
        self,
        *,
        fresh: bool = False,
        overwrite: bool = False,
        on_ready: Callable[[], None] | None = None,
    ) -> Outcome:
        """Serve until the run is over, or somebody stops it.

        Nothing is written to the run's folder, or removed, before home and run are held.

        Args:
            fresh: begin a new run in the folder; else go on with the one there.
            overwrite: a fresh one may replace another.
            on_ready: called once silos can join.

        Raises:
            PhotonError: what can't be brought up or kept up, or what ended the run.
        """
        with contextlib.ExitStack() as ends:
            ends.callback(self._roster.close)
            supervisor = ends.enter_context(self._supervisor)
            ends.enter_context(supervisor.ending_on_signals())
            self._folder.mkdir(parents=True, exist_ok=True)
            ends.enter_context(hold_run(self._folder, served=True))
            if fresh:
                prepare_run(self._config, self._folder, overwrite=overwrite)
            else:
                write_resolved(self._config, self._folder / RUN_FILE)
            self._roster.set_setting("draining", False)
            self._roster.set_setting("stopping", False)
            self._roster.set_setting("waiting", None)
            self._roster.set_setting(RUN_SETTING, str(self._folder))
            self._certificate = DoorCertificate(self._serve, self._home, tell=self._on_event)
            door = self._certificate.files
            presigner, store_port = self._store(supervisor)
            ends.enter_context(self._freeing(supervisor))
            superlink_port, inner, secret = self._superlink(supervisor)
            control = self._control = ends.enter_context(
                Control(f"127.0.0.1:{superlink_port}", inner.ca)
            )
            desk = self._desk(presigner)
            desk.start()
            ends.callback(desk.stop)
            supervisor.start(
                front_door(
                    DoorSettings(
                        address=self._serve.address,
                        port=self._serve.port,
                        certificate=door.certificate,
                        key=door.key,
                        superlink_port=superlink_port,
                        superlink_ca=inner.ca,
                        desk_port=desk.port,
                        store_port=store_port,
                    ),
                    self._home / "door",
                )
            )
            bundle = build_bundle()
            superexec = commands.superexec(
                home=self._home,
                superlink_port=superlink_port,
                ca=inner.ca,
                secret=secret,
                bundle=digest(bundle),
                run_folder=self._folder,
            )
            supervisor.start(
                Service("superexec", superexec.argv, environment=superexec.env, stop_s=8.0)
            )
            if on_ready is not None:
                on_ready()
            outcome = self._see_through(supervisor, control, bundle)
            if outcome.finished:
                self._free_finished(supervisor)
            return outcome

    def status(self) -> dict[str, Any]:
        """What `photon status` shows of the run."""
        return {
            "name": self._config.run.name,
            "folder": str(self._folder),
            "rounds": self._config.federation.rounds,
            "waiting": self._roster.setting("waiting", None),
            "certificate": self._certificate.status() if self._certificate is not None else None,
            **_progress_of(self._folder),
        }

    # --- bringing up -------------------------------------------------------------------------

    def _store(self, supervisor: Supervisor) -> tuple[Presigner, int | None]:
        serving = replace(Serving.read(self._folder), home=str(self._home))
        if self._serve.store is not None:
            store = open_store(self._serve.store)
            replace(serving, store=self._serve.store, store_options={}, secrets=None).write(
                self._folder
            )
            return presigner_for(store), None
        options = StoreOptions(min_free_gib=self._serve.min_free_gib)
        store = EmbeddedStore(self._home / "store", options)
        store.require_room()
        store.move_if_taken()
        supervisor.start(store.service())
        self._embedded = store
        secrets_file = self._home / "store" / "aggregator.json"
        write_json(
            secrets_file,
            {"access_key_id": store.access_key_id, "secret_access_key": store.secret},
            "the store's credentials",
            mode=0o600,
        )
        replace(
            serving,
            store=store.url,
            store_options={"endpoint": store.endpoint, "region": REGION},
            secrets=str(secrets_file),
        ).write(self._folder)
        return store.presigner(public_url(self._serve)), store.port

    def _superlink(self, supervisor: Supervisor) -> tuple[int, CertificateFiles, Path]:
        """Flower's server, with a certificate of its own for loopback."""
        # Anew at each start: it is not renewed while this runs, and is valid for two years.
        make_authority(self._home / "inner")
        inner = make_certificate(self._home / "inner", ["localhost"])
        secret = commands.write_secret(self._home / "superexec.secret")
        port = self._kept_port("superlink")
        command = commands.superlink(
            home=self._home,
            port=port,
            certificate=inner.certificate,
            key=inner.key,
            ca=inner.ca,
            secret=secret,
        )

        def healthy() -> bool:
            with Control(f"127.0.0.1:{port}", inner.ca, timeout_s=5.0) as control:
                return control.healthy()

        supervisor.start(
            Service(
                "superlink",
                command.argv,
                environment=command.env,
                ready=healthy,
                ready_s=90.0,
                healthy=healthy,
                silence_s=90.0,
                restarts=RestartPolicy(first_pause_s=0.5, longest_pause_s=30.0, most_deaths=20),
                ports=(("127.0.0.1", port),),
            )
        )
        return port, inner, secret

    def _desk(self, presigner: Presigner) -> Desk:
        store = self._serve.store
        return Desk(
            self._roster,
            presigner,
            register=self._register,
            operator_socket=self._home / OPERATOR_SOCKET,
            limits=DeskLimits(grant_s=self._serve.grant_s),
            services=lambda: [vars(one) for one in self._supervisor.status()],
            progress=self.status,
            on_event=self._desk_told,
            store_origin=_origin_of(presigner) if store is not None else None,
        )

    def _kept_port(self, name: str) -> int:
        """The port of last time, so that what waits for it finds it again; free ones at first."""
        path = self._home / "ports.json"
        kept: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(path.read_text(encoding="utf-8"))
        if name not in kept:
            kept[name] = free_ports(1)[0]
            write_json(path, kept, "the ports")
        return kept[name]

    # --- what runs leave in the store --------------------------------------------------------

    @contextlib.contextmanager
    def _freeing(self, supervisor: Supervisor) -> Iterator[None]:
        """Free what earlier runs left, beside everything else."""
        over = threading.Event()
        run_id = Serving.read(self._folder).run_id

        def free() -> None:
            self._free(lambda: not (over.is_set() or supervisor.stopping), but=run_id)

        thread = threading.Thread(target=free, name="photon-freeing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(_LAST_DELETION_S)

    def _free_finished(self, supervisor: Supervisor) -> None:
        """Free what the run that is over has in the store, but its last global state."""
        try:
            note_leftover(
                self._home,
                Serving.read(self._folder),
                keep_last_state=True,
                grant_s=self._serve.grant_s,
            )
        except PhotonError as error:
            self._on_event(f"what the run left in the store stays: {error.message}")
            return
        self._free(lambda: not supervisor.stopping)

    def _free(self, go_on: Callable[[], bool], *, but: str | None = None) -> None:
        embedded = self._embedded.open() if self._embedded is not None else None
        free_leftovers(self._home, embedded, tell=self._on_event, but=but, go_on=go_on)

    # --- while it runs -----------------------------------------------------------------------

    def _see_through(self, supervisor: Supervisor, control: Control, bundle: bytes) -> Outcome:
        """Submit the run, and again where its loop died, until it is over."""
        deaths: list[float] = []
        run_id, last_round = self._submit(control, bundle), -1
        while not supervisor.wait(_LOOK_S):
            self._look_after_certificate(supervisor)
            self._let_go(control)
            try:
                state = control.run(run_id)
            except UnreachableError:  # the superlink is being started again
                continue
            if not state.over:
                continue
            if state.outcome == "completed":
                finished = (self._folder / "summary.json").exists()
                self._on_event("the run is over" if finished else "the run is drained")
                return Outcome(self._folder, finished)
            self._require_worth_it(state)
            reached = _progress_of(self._folder).get("round", 0)
            now_s = time.monotonic()
            deaths = [] if reached > last_round else [at for at in deaths if now_s - at < _WITHIN_S]
            last_round = reached
            deaths.append(now_s)
            if len(deaths) >= _MOST_DEATHS:
                raise ServiceLostError(
                    f"the federation's loop died {len(deaths)} times in round {reached + 1}: "
                    f"{state.details[-500:]}",
                    hint=f"See {self._home / 'logs' / 'superexec.log'}; then `photon serve "
                    f"--resume {self._folder}`.",
                )
            self._on_event(f"the federation's loop died ({state.details[-200:]}); it goes on")
            run_id = self._submit(control, bundle)
        with contextlib.suppress(PhotonError):
            control.stop_run(run_id)
        return Outcome(self._folder, finished=False)

    def _look_after_certificate(self, supervisor: Supervisor) -> None:
        if self._certificate is not None:
            self._certificate.look(lambda: supervisor.signal_one(DOOR, READ_AGAIN))

    def _submit(self, control: Control, bundle: bytes) -> int:
        """Submit the run; one that an earlier serve left in the superlink's database is ended."""
        for earlier in control.runs():
            if not earlier.over:
                with contextlib.suppress(PhotonError):
                    control.stop_run(earlier.run_id)
        return control.start_run(bundle)

    def _require_worth_it(self, state: RunState) -> None:
        """Raise what ended the loop, if trying again would end it again."""
        code = state.exit_code
        if code is None or 70 <= code < 80 or code >= 90:  # killed; or link and services: may pass
            return
        words = state.details.partition(f"photon-exit-{code}: ")[2] or state.details
        raise error_of(code)(
            words.strip(),
            hint=f"Mend it, then `photon serve --resume {self._folder}` goes on.",
        )

    def _let_go(self, control: Control) -> None:
        """Tell Flower whose keys are no longer let in."""
        for node_id in self._roster.leaving_flower_nodes():
            with contextlib.suppress(PhotonError):
                control.unregister(node_id)
                self._roster.left_flower(node_id)

    def _register(self, member: Member) -> int:
        if self._control is None:
            raise DeployError("the control engine is not up yet", hint="Try again in a minute.")
        with self._registering:
            return self._control.register(member.public_key, member.name)

    def _desk_told(self, kind: str, detail: dict[str, Any]) -> None:
        if kind == "stop":
            self._supervisor.ask_to_stop()
        if kind in ("joined", "drain", "stop"):
            words = ", ".join(f"{name} {value}" for name, value in detail.items())
            self._on_event(f"{kind}: {words}" if words else kind)


def _progress_of(folder: Path) -> dict[str, Any]:
    """The newest round of a run and its last evaluation, from the end of its events."""
    found: dict[str, Any] = {}
    try:
        with (folder / "events.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return found
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            name = event.get("event")
            if name == "round_started":
                found["in_round"] = event["round"]
                found["participants"] = event["participants"]
            elif name == "round_finished":
                found["round"] = event["round"]
                found["in_round"] = None
                found["dropped"] = event.get("dropped", [])
            elif name == "evaluated" and event.get("silo") is None:
                found["perplexity"] = event["perplexity"]
            elif name in ("run_stopped", "run_finished"):
                found["last"] = event.get("reason", "finished")
    return found


def _with_whole_paths(config: RunConfig) -> RunConfig:
    data = config.data.model_copy(update={"path": str(Path(config.data.path).absolute())})
    paths = ("home", "certificate", "key", "ca")
    whole = {
        name: str(Path(value).absolute())
        for name in paths
        if (value := getattr(config.serve, name)) is not None
    }
    serve = config.serve.model_copy(update=whole)
    return config.model_copy(update={"data": data, "serve": serve})


def _origin_of(presigner: Presigner) -> str:
    """Scheme, host and port that grants of this presigner name; such as silos speak to."""
    url = presigner.head("origin", 60).url
    require_origin(url)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
