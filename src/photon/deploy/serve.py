"""`photon serve`: brings up what an aggregator needs, keeps it up, and ends with its run.

    store  the embedded object store, unless serve.store names another
    desk   in this process: invitations, presence, tasks and answers, presigned URLs; the operator's
           socket
    door   Caddy, the one public port
    loop   the federation's (photon.deploy.loop)

The loop lives in a process of its own and starts from the run folder: where it dies it is started
again, and goes on in the round it was in. Nothing of it is in this process, which holds no model.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from photon.config import RunConfig, write_resolved
from photon.config.serve import ServeConfig
from photon.deploy.attempts import Attempts
from photon.deploy.certificates import keep_member_authority
from photon.deploy.desk import Desk, DeskLimits
from photon.deploy.embedded_store import EmbeddedStore
from photon.deploy.figures import Reader, figures_served, tell_desk, tell_machine
from photon.deploy.freeing import free_leftovers, note_leftover
from photon.deploy.front_door import READ_AGAIN, DoorSettings, front_door, public_url
from photon.deploy.front_door import SERVICE as DOOR
from photon.deploy.logs import readable
from photon.deploy.renewal import DoorCertificate
from photon.deploy.served_run import how_it_ended, prepare_run, progress_of, with_whole_paths
from photon.deploy.service import Service, troubles_to
from photon.deploy.supervisor import Supervisor
from photon.environment import given
from photon.errors import DeployError, PhotonError, error_of
from photon.membership.bulletin import tell_all, whom_and_what_for
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.records import utc
from photon.membership.roster import ENDED_SETTING, ROSTER_FILE, RUN_SETTING, Roster
from photon.silo.narrator import SAYS
from photon.store.disk import write_json
from photon.store.granted_store import require_origin
from photon.store.object_store import open_store, presigner_for
from photon.store.presign import Presigner
from photon.store.served import RUN_FILE, Serving, hold_run

if TYPE_CHECKING:
    from photon.telemetry.metrics import Page

#: In serve.home: where `photon status` and `photon stop` ask.
OPERATOR_SOCKET = "operator.sock"
#: In serve.home: who runs there (Supervisor's record).
RECORD = "serve.json"

_LOOP = "loop"

#: Between two looks at the run.
_LOOK_S = 1.0
#: For removals in a store that are under way when serving ends.
_LAST_DELETION_S = 10.0
#: Silos say that they are here every few seconds; so long they are given to hear of the end.
_LAST_WORDS_S = 12.0


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
        self._config = config = with_whole_paths(config)
        self._serve: ServeConfig = config.serve
        self._folder = folder.absolute()
        self._home = Path(config.serve.home)
        self._log = log
        self._on_event = on_event or (lambda _: None)
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = self._home / AGGREGATOR_KEY_FILE
        lost = not key.exists()
        NodeKey.load_or_create(key)  # the loop asks with it
        self._roster = Roster(self._home / ROSTER_FILE)
        if lost and (members := self._roster.members()):
            self._on_event(
                f"warning: {key} was missing and was made anew: {len(members)} members know "
                "another key and refuse its tasks. Put the old file back from a backup and start "
                "again, or have each join again (`photon members rotate NAME`)"
            )
        self._certificate: DoorCertificate | None = None
        self._embedded: EmbeddedStore | None = None
        #: Why a round is to be drawn again, and when; what was told last of waiting.
        self._lost: dict[str, Any] | None = None
        self._told = ""
        #: Requests refused at the desk, by the error's class.
        self._refusals: Counter[str] = Counter()
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
        fresh: bool,
        overwrite: bool,
        on_ready: Callable[[], None],
    ) -> bool:
        """Serve until the run is over, or somebody stops it.

        Nothing is written to the run's folder, or removed, before home and run are held.

        Args:
            fresh: begin a new run in the folder; else go on with the one there.
            overwrite: a fresh one may replace another.
            on_ready: called once silos can join.

        Returns:
            Whether the run reached its end; else it was stopped or drained.

        Raises:
            PhotonError: what can't be brought up or kept up, or what ended the run.
        """
        with contextlib.ExitStack() as ends:
            supervisor = self._hold(ends, fresh=fresh, overwrite=overwrite)
            self._certificate = DoorCertificate(self._serve, self._home, tell=self._on_event)
            door, members = self._certificate.files, keep_member_authority(self._home)
            presigner, store_port = self._store(supervisor)
            ends.enter_context(self._freeing(supervisor))
            desk = self._desk(presigner, door.ca, members)
            desk.start(0, self._home / OPERATOR_SOCKET, control=self._serve.control)
            ends.callback(desk.stop)
            self._start(
                supervisor,
                front_door(
                    DoorSettings(
                        address=self._serve.address,
                        port=self._serve.port,
                        certificate=door.certificate,
                        key=door.key,
                        members_ca=members / "ca.crt",
                        desk_port=desk.port,
                        store_port=store_port,
                    ),
                    self._home / "door",
                ),
            )
            ends.enter_context(figures_served(self._serve.metrics, lambda: self._figures(desk)))
            on_ready()
            try:
                finished = self._see_through(supervisor, desk)
            except PhotonError as error:
                # Not the message: it may quote other silos, or files of this machine.
                ended = f"ended with exit code {error.exit_code}; its operator can resume it"
                tell_all(self._roster, f"{self._config.run.name} {ended}")
                self._tell_end(desk)
                raise
            if not supervisor.stopping:
                self._tell_end(desk)
            if finished:
                self._free_finished(supervisor)
            self._on_event("stopping the services; the store may take half a minute")
            return finished

    def status(self) -> dict[str, Any]:
        """What `photon status` shows of the run."""
        return {
            "name": self._config.run.name,
            "folder": str(self._folder),
            "rounds": self._config.federation.rounds if self._serve.child is None else None,
            "waiting": self._roster.setting("waiting", None),
            "lost": self._lost,
            "certificate": self._certificate.status() if self._certificate is not None else None,
            **progress_of(self._folder),
        }

    # --- bringing up -------------------------------------------------------------------------

    def _hold(self, ends: contextlib.ExitStack, *, fresh: bool, overwrite: bool) -> Supervisor:
        """Hold home and run, and only then change either."""
        ends.callback(self._roster.close)
        supervisor = ends.enter_context(self._supervisor)
        ends.enter_context(supervisor.ending_on_signals())
        self._folder.mkdir(parents=True, exist_ok=True)
        ends.enter_context(hold_run(self._folder, served=True))
        if fresh:
            prepare_run(self._config, self._folder, overwrite=overwrite)
        else:
            write_resolved(self._config, self._folder / RUN_FILE)
        self._roster.letters.withdraw()
        self._roster.set_setting("draining", False)
        self._roster.set_setting("stopping", False)
        self._roster.set_setting("waiting", None)
        tell_all(self._roster, f"{self._config.run.name} starts")
        self._roster.set_setting(RUN_SETTING, str(self._folder))
        return supervisor

    def _start(self, supervisor: Supervisor, service: Service) -> None:
        ready = f", at most {service.ready_s:.0f} s" if service.ready is not None else ""
        self._on_event(f"starting {service.name}{ready}")
        supervisor.start(service)

    def _store(self, supervisor: Supervisor) -> tuple[Presigner, int | None]:
        serving = replace(Serving.read(self._folder), home=str(self._home))
        if self._serve.store is not None:
            own = replace(serving, store=self._serve.store, store_options={}, secrets=None)
            presigner = presigner_for(open_store(self._serve.store))
            own.write(self._folder)
            return presigner, None
        store = EmbeddedStore(self._home / "store", self._serve.min_free_gib)
        store.require_room()
        store.move_if_taken()
        self._start(supervisor, store.service())
        self._embedded = store
        secrets = self._home / "store" / "aggregator.json"
        write_json(secrets, store.credentials, "the store's credentials", mode=0o600)
        replace(serving, store=store.url, store_options=store.place, secrets=str(secrets)).write(
            self._folder
        )
        return store.presigner(public_url(self._serve)), store.port

    def _desk(self, presigner: Presigner, ca: Path, authority: Path) -> Desk:
        store = self._serve.store
        return Desk(
            self._roster,
            presigner,
            limits=DeskLimits(grant_s=self._serve.grant_s),
            about=lambda: {
                "run": self.status(),
                "services": [vars(one) for one in self._supervisor.status()],
            },
            on_event=self._desk_told,
            store_origin=_origin_of(presigner) if store is not None else None,
            audience=certificate_fingerprint(ca.read_text(encoding="ascii")),
            authority=authority,
        )

    def _figures(self, desk: Desk) -> list[Reader]:
        """Who is asked at each scrape of /metrics."""
        from photon.telemetry.metrics import RunFigures  # costs memory

        folders = {"home": self._home, "run": self._folder}
        if self._embedded is not None:
            folders["store"] = self._home / "store"

        def tell_of_desk(page: Page) -> None:
            letters = self._roster.letters.unanswered()
            needed = self._config.silos_needed
            tell_desk(page, desk.status(), needed, letters, desk.polls_held, self._refusals)

        return [
            lambda page: tell_machine(
                page, folders, self._serve.min_free_gib, self._supervisor.status()
            ),
            tell_of_desk,
            RunFigures(self._folder / "events.jsonl"),
        ]

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

    def _see_through(self, supervisor: Supervisor, desk: Desk) -> bool:
        """Start the loop, and again where it died, until the run is over; as `run` returns."""
        log = str(self._home / "logs" / f"{_LOOP}.log")
        attempts = Attempts(self._serve.gather_s, str(self._folder), log)
        self._begin(supervisor)
        going, again_s = True, 0.0
        while not supervisor.wait(_LOOK_S):
            if self._certificate is not None:
                self._certificate.look(lambda: supervisor.signal_one(DOOR, READ_AGAIN))
            self._look_after_desk(desk)
            self._tell()
            if not going:
                if self._roster.setting("draining", False):
                    return self._over("the run is drained; it can be resumed")
                if time.monotonic() >= again_s:
                    self._lost = None
                    self._begin(supervisor)
                    going = True
                continue
            (loop,) = (one for one in supervisor.status() if one.name == _LOOP)
            if loop.state != "stopped":
                continue
            if loop.exit_code == 0:
                finished = (self._folder / "summary.json").exists()
                words = "the run is drained; it can be resumed"
                return self._over(how_it_ended(self._folder) if finished else words, finished)
            last = self._roster.setting(ENDED_SETTING) or {"exit_code": None, "words": loop.detail}
            again = attempts.after(
                **last, progress=progress_of(self._folder), now_s=time.monotonic()
            )
            self._on_event(again.words)
            going, again_s = False, time.monotonic() + again.pause_s
            if again.lost:
                self._lost = {"why": again.words, "until": time.time() + again.pause_s}
        return self._over("the run is stopped; it can be resumed")

    def _begin(self, supervisor: Supervisor) -> None:
        """Start the loop."""
        self._roster.set_setting(ENDED_SETTING, None)
        command = (sys.executable, "-m", "photon.deploy.loop", str(self._folder))
        environment = given(store=self._serve.store is not None) | {"PYTHONUNBUFFERED": "1"}
        own = {"environment": environment, "wording": self._wording}
        self._start(supervisor, Service(_LOOP, command, once=True, **own))

    def _wording(self, line: str) -> str | None:
        """Of the loop's output; what a federation hears of its parent is for the screen."""
        if not line.startswith(SAYS):
            return readable(line)
        self._on_event(f"as a member: {line.removeprefix(SAYS)}")
        return None

    def _over(self, words: str, finished: bool = False) -> bool:
        self._on_event(words)
        over = "finished" if finished else "drained"
        tell_all(self._roster, f"{self._config.run.name}: {words}", over=over)
        return finished

    def _tell(self) -> None:
        """Say what is waited for, here and to silos, when that has changed."""
        name, waiting, lost = self._config.run.name, self._roster.setting("waiting"), self._lost
        words, here_too = f"{name} goes on", ""
        if lost is not None:
            # Why others were dropped is between them and the operator.
            words = f"{name} had too few good updates; it tries again at {utc(lost['until'])}"
        elif waiting is not None:
            waits = f"waits for {whom_and_what_for(waiting)}, {len(waiting['here'])} here"
            until = f", until {utc(waiting['until'])}"
            names = f" ({', '.join(waiting['here'])})" if waiting["here"] else ""
            words, here_too = f"{name} {waits}{until}", f"{waits}{names}{until}"
        if words == self._told:
            return
        self._told = words
        tell_all(self._roster, words)
        if here_too:
            self._on_event(here_too)

    def _tell_end(self, desk: Desk) -> None:
        """Let silos that are here hear how it ended, before the desk goes."""
        self._on_event(f"the silos that are here hear of it (at most {_LAST_WORDS_S:.0f} s)")
        desk.polls.close()  # who waits in one counts as seen, and would not have heard
        began, until = time.time(), time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < until and not self._supervisor.stopping:
            here = [one["presence"] for one in desk.status()["members"] if one["here"]]
            if all(one["seen_at"] > began for one in here if one["state"] != "stopping"):
                return
            time.sleep(0.2)

    def _look_after_desk(self, desk: Desk) -> None:
        """The desk is a thread of this process: nobody else would miss it."""
        if desk.alive:
            return
        self._on_event("the desk ended; starting it again (see serve.log)")
        with contextlib.suppress(DeployError):
            desk.stop()
        # Where the door looks for it; what it raises ends serve.
        desk.start(desk.port, self._home / OPERATOR_SOCKET, control=self._serve.control)

    def _desk_told(self, kind: str, detail: dict[str, Any]) -> None:
        if kind == "refused":
            self._refusals[error_of(detail["code"]).__name__] += 1
        if kind == "stop":
            self._supervisor.ask_to_stop()
        if kind in ("joined", "drain", "stop"):
            words = ", ".join(f"{name} {value}" for name, value in detail.items())
            self._on_event(f"{kind}: {words}" if words else kind)


def _origin_of(presigner: Presigner) -> str:
    """Scheme, host and port that grants of this presigner name; such as silos speak to."""
    url = presigner.grant("HEAD", "origin", 60).url
    require_origin(url)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
