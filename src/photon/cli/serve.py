"""`photon serve`, `photon join`, `photon status`, `photon stop`: a federation across sites."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.status import Status
from rich.text import Text

from photon.cli.following import following, waits_for
from photon.cli.options import AsJson, Overwrite, Quiet, RunDir, ServedFolder, set_option
from photon.cli.outcome import show_outcome
from photon.cli.screen import console, say, show, show_json, show_table, view_of_run
from photon.dashboard.wording import coarse
from photon.errors import (
    DeployError,
    IncompatibleConfigError,
    InvalidValueError,
    InvitationError,
    RunNotFoundError,
    UnreachableError,
)

if TYPE_CHECKING:
    from photon.config import NodeConfig, RunConfig
    from photon.deploy.checks import Check

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what each service says, too.")]

_STATUS = ("GET", "/operator/status")


def serve(
    run_file: Annotated[
        Path | None, typer.Argument(help="The run file, TOML.", metavar="[RUN.toml]")
    ] = None,
    overrides: Annotated[list[str] | None, set_option("serve.host=ai.example.org")] = None,
    run_dir: RunDir = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Go on with the served run in this folder."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only look at data, certificates, port, disk, store."),
    ] = False,
    overwrite: Overwrite = False,
    parent: Annotated[
        Path | None,
        typer.Option(
            metavar="NODE.toml",
            help="RUN.toml is a federation's that is a member elsewhere, by this.",
        ),
    ] = None,
    invite: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its invitation; the first time.")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train RUN.toml with silos on other machines: the aggregator, behind one public port.

    Starts what the aggregator needs (an object store unless serve.store names yours, the desk, the
    public port), waits for serve.min_silos, trains, and ends when the run is over.
    Ctrl-C stops everything; `photon serve --resume DIR` goes on in the round it was in.

    Examples: `photon serve run.toml --check` and `photon serve run.toml --set serve.min_silos=4`

    Invite silos with `photon invite NAME`, see who is here with `photon status`.

    A federation inside another: `photon serve eu.toml --parent node.toml --invite FILE`, later
    without --invite. It goes on where it was (docs/worldlm.md).
    """
    from photon.store.dialling import keep_to_this_machine
    from photon.store.served import RUN_FILE

    if (run_file is None) == (resume is None):
        raise typer.BadParameter("name a run file, or a run folder with --resume")
    keep_to_this_machine(os.environ)
    if check:
        _check(run_file or Path(resume or "") / RUN_FILE, overrides or [], parent, as_json=as_json)
        return
    from photon.deploy.serve import Aggregator

    config, folder, begun = _begun(run_file, resume, overrides, run_dir, parent, overwrite)
    _require_data(config, invite)
    log = Path(config.serve.home) / "logs" / "serve.log"
    lines = _Lines(log, config.serve.log, verbose=verbose)
    aggregator = Aggregator(config, folder, log=lines.service, on_event=lines.event)
    with contextlib.ExitStack() as view:

        def ready() -> None:
            # Not before: an events.jsonl may be there that is replaced.
            shown = view_of_run(quiet=quiet or verbose, label=_clock_now)
            look = functools.partial(_operator, folder, *_STATUS)
            view.enter_context(following(folder, shown, look, lines.event))
            _welcome(config, folder, lines)

        finished = aggregator.run(fresh=not begun, overwrite=overwrite, on_ready=ready)
    if not finished:
        say(f"Stopped. `photon serve --resume {folder}` goes on.")
        return
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if config.serve.child is not None:
        show_json(summary)
        return
    show_outcome(folder, summary, as_json=as_json)


def _check(path: Path, overrides: list[str], parent: Path | None, *, as_json: bool) -> None:
    from photon.config import load_served
    from photon.deploy.checks import checked, look_at_data, preflight

    config = load_served(path, parent, overrides)
    checks = [] if parent else [checked("data", lambda: look_at_data(config.data.path))]
    if config.comply.cards is not None:
        from photon.runs.compliance import verdict_alone

        checks.append(checked("comply", lambda: verdict_alone(config)))
    _show_checks([*checks, *preflight(config.serve)], as_json)


def _begun(
    run_file: Path | None,
    resume: Path | None,
    overrides: list[str] | None,
    run_dir: Path | None,
    parent: Path | None,
    overwrite: bool,
) -> tuple[RunConfig, Path, bool]:
    """Run file and folder, and whether the run goes on there, as one inside another does."""
    from photon.config import load_served
    from photon.deploy.served_run import reopen_run
    from photon.store.served import SERVE_FILE

    if run_file is None:
        assert resume is not None
        return reopen_run(resume, overrides), resume, True
    config = load_served(run_file, parent, overrides or [])
    if config.serve.child is not None and parent is None:
        raise IncompatibleConfigError(
            f"{run_file} is the file of a federation that is a member elsewhere",
            hint="Name the node file by which it is one: --parent NODE.toml (docs/worldlm.md).",
        )
    folder = run_dir or Path("runs") / config.run.name
    begun = parent is not None and (folder / SERVE_FILE).exists() and not overwrite
    return config, folder, begun


def _require_data(config: RunConfig, invite: Path | None) -> None:
    """Before silos are waited for, and then sent away."""
    from photon.config.children import check_served
    from photon.data import open_data
    from photon.deploy.join import keep_invitation

    if config.serve.child is None:
        check_served(config)
        open_data(config.data.path)
    elif invite is not None:
        keep_invitation(invite, Path(config.data.path))


def _welcome(config: RunConfig, folder: Path, lines: _Lines) -> None:
    from photon.deploy.front_door import public_url
    from photon.silo.policy import few_silos

    lines.event(f"silos can join at {public_url(config.serve)}; run folder {folder}")
    least = config.quorum_of(config.silos_needed)
    if least < 3:
        prevent = "serve.min_silos = 3 and federation.quorum = 3 prevent it"
        lines.event(f"warning: {few_silos(least)}; {prevent}")


def join(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[HOST:PORT]", help="The aggregator's new address, where it has moved."
        ),
    ] = None,
    node_file: Annotated[
        Path, typer.Option("--node", metavar="NODE.toml", help="What this site decides, TOML.")
    ] = Path("node.toml"),
    invite: Annotated[
        Path | None, typer.Option("--invite", metavar="FILE", help="Invitation; the first time.")
    ] = None,
    home: Annotated[Path, typer.Option("--home", help="This node's folder.")] = Path("photon-node"),
    check: Annotated[
        bool,
        typer.Option("--check", help="Only look: key, data, machine, aggregator, clock, store."),
    ] = False,
    show_key: Annotated[
        bool,
        typer.Option(
            "--show-key", help="Only print what the key is called that this home joins with."
        ),
    ] = False,
    gateway: Annotated[
        bool,
        typer.Option("--gateway", help="Be the one with the way out, of a site that has two."),
    ] = False,
    trainer: Annotated[
        bool,
        typer.Option("--trainer", help="Be the machine with the GPUs, of a site that has two."),
    ] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Take part as a silo, with the text and hardware here. Text stays; all connections go out.

    The first time it needs an invitation. The key is made here, and only its public half leaves.
    After that `photon join` alone is enough, or the systemd unit in deploy/. Ctrl-C stops it;
    finished work is kept on disk, and given when it is asked for again.

    Examples: `photon join --invite hospital-a.invitation.toml --node node.toml`, later
    `photon join --node node.toml`

    `photon join --check`, with an invitation or without, tells what would go wrong. It changes
    nothing and does not use the invitation up. Its exit code is that of the first failure.

    `photon join --show-key` makes the key before there is an invitation, for `photon invite --key`.

    Where the GPUs have no way out, `photon join --gateway` runs on a machine that has one and
    `photon join --trainer` (under SLURM, say) beside them; node.toml names the folder that both
    share. The invitation is the gateway's.
    """
    if trainer and (gateway or check or invite is not None or url is not None):
        raise IncompatibleConfigError(
            "--trainer goes with none of --gateway, --check, --invite and HOST:PORT",
            hint="What concerns the aggregator is the gateway's: `photon join --gateway`.",
        )
    from photon.store.dialling import keep_to_this_machine

    keep_to_this_machine(os.environ)
    if show_key:
        from photon.deploy.join import joining_key

        typer.echo(joining_key(home).fingerprint)
        return
    if check:
        from photon.deploy.join_checks import preflight

        address = _address(url) if url is not None else None
        about = {"invitation": invite, "address": address, "gateway": gateway}
        _show_checks(preflight(home, node_file, **about), as_json)
        return
    part = "gateway" if gateway else "trainer" if trainer else ""
    _take_part(node_file, home, part, invite, url, verbose=verbose)


def _take_part(
    node_file: Path,
    home: Path,
    part: Literal["", "gateway", "trainer"],
    invite: Path | None,
    url: str | None,
    *,
    verbose: bool,
) -> None:
    from photon.config import load_node_config
    from photon.deploy.join import Node, moved, require_registered, shared_folder
    from photon.silo.policy import MEMBERSHIP_FILE

    node = load_node_config(node_file)
    if part:
        folder = shared_folder(node)
        home = folder if part == "trainer" else home
    if invite is not None:
        _become_member(invite, node, home)
    elif part == "trainer" and not (home / MEMBERSHIP_FILE).exists():
        raise DeployError(
            f"there has been no gateway with gateway.folder = {home} yet",
            hint="Start it first, where the way out is: `photon join --gateway --node NODE.toml`.",
        )
    elif not (home / MEMBERSHIP_FILE).exists():
        raise InvitationError(
            f"{home} is no member's home yet",
            hint="The first time: `photon join --invite FILE --node node.toml`.",
        )
    elif url is not None:
        moved(home, _address(url))
    require_registered(home, node)
    lines = _Lines(home / "logs" / "join.log", node.watch.log, verbose=verbose)
    told = {"log": lines.service, "on_event": lines.event, "on_live": lines.live}
    if part != "gateway":
        lines.event("starting the trainer, at most 180 s")
    try:
        Node(home, node_file, part=part, **told).run(
            on_ready=lambda: lines.event("ready to take part; Ctrl-C stops")
        )
    finally:
        lines.close()


def _become_member(invite: Path, node: NodeConfig, home: Path) -> None:
    from photon.deploy.join import KEY_FILE, accept_invitation
    from photon.membership.invitation import read_invitation
    from photon.membership.keys import NodeKey

    membership = accept_invitation(read_invitation(invite), node, home, tell=say)
    key = NodeKey.load(home / KEY_FILE)
    say(f"{membership.name} is a member at {membership.address}; its key is {key.fingerprint}")
    say(f"its updates go to the store at {membership.store_origin}")


def status(
    folder: ServedFolder = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds.")] = False,
) -> None:
    """Who is here, what each is doing, since when and until when.

    Example: `photon status runs/med --watch`
    """
    show_status = show_json if as_json else _show_status
    while True:
        found = _operator(folder, *_STATUS)
        if watch and not as_json:
            console(stderr=False).clear()  # of a terminal; a log gets one after the other
        show_status(found)
        if not watch:
            return
        time.sleep(2.0)


def stop(
    folder: ServedFolder = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="Let the round finish first, and begin no other.")
    ] = False,
) -> None:
    """Stop a `photon serve` on this machine; the run can be resumed.

    Example: `photon stop runs/med --drain`
    """
    if drain:
        _operator(folder, "POST", "/operator/drain", {"draining": True})
        typer.echo("The round under way will be finished, and no other begun.")
    else:
        _operator(folder, "POST", "/operator/stop", {})
        typer.echo("Stopping.")


class _Lines:
    """One readable log: a file that has everything, and the console, which has what matters.

    Args:
        form: "json" has the same lines in a file for programs, too.
    """

    def __init__(self, path: Path, form: str, *, verbose: bool) -> None:
        from photon.deploy.logs import BoundedLog

        self._log = BoundedLog(path)
        self._json = BoundedLog(path.with_suffix(".jsonl")) if form == "json" else None
        self._verbose = verbose
        self._lock = threading.Lock()
        self._live: Status | None = None

    def service(self, line: str) -> None:
        """A service's own line, already stamped."""
        self._write(line)
        if self._verbose:
            say(line)

    def event(self, words: str) -> None:
        """What the operator should see."""
        line = _clock_now() + words
        self._write(line)
        self.close()
        say(line)

    def live(self, words: str) -> None:
        """How far what goes on has come: on a terminal, in place, until the next event."""
        if self._verbose or not console().is_interactive:
            return
        shown = Text(words)  # a plain str would be markup there
        if self._live is None:
            self._live = console().status(shown)
            self._live.start()
        else:
            self._live.update(shown)

    def close(self) -> None:
        """Put the live line away."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _write(self, line: str) -> None:
        with self._lock:
            self._log.write(f"{time.strftime('%Y-%m-%d')} {line}")
            if self._json is not None:
                service, _, text = line.partition(" ")[2].partition(" | ")
                at = datetime.now(UTC).isoformat(timespec="milliseconds")
                self._json.write(json.dumps({"at": at, "service": service, "text": text}))


def _show_checks(findings: list[Check], as_json: bool) -> None:
    """What was looked at; ends with the exit code of the first failure."""
    from photon.deploy.checks import worst

    if as_json:
        show_json([vars(one) for one in findings])
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}
        rows = [
            (
                one.name,
                Text(one.verdict, style=colours[one.verdict]),
                f"{one.found}\n{one.hint}" if one.hint else one.found,
            )
            for one in findings
        ]
        show_table(("looked at", "verdict", "found"), rows, frame=False)
    if worst(findings):
        raise typer.Exit(worst(findings))


def _operator(
    folder: Path | None, method: str, what: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    from photon.deploy.desk_server import ask_operator

    try:
        return ask_operator(_home_of(folder) / "operator.sock", method, what, body)
    except UnreachableError as error:
        if folder is None or not (folder / "summary.json").exists():
            raise
        over = f"The run in {folder} is over: `photon report {folder}` shows what came of it."
        raise UnreachableError(error.message, hint=over) from error


def _home_of(folder: Path | None) -> Path:
    """serve.home of a run folder, or the folder itself."""
    from photon.store.served import Serving

    if folder is None:
        return Path("photon-server")
    try:
        return Path(Serving.read(folder).home)
    except RunNotFoundError:
        return folder


def _show_status(found: dict[str, Any]) -> None:
    run = found.get("run", {})
    at = f"round {run.get('in_round') or run.get('round', 0)} of {run.get('rounds', '?')}"
    show(f"{run.get('name', '?')}: {at}")
    if what := waits_for(run):
        show(f"waits {what}")
    if warning := (run.get("certificate") or {}).get("warning"):
        say(f"warning: {warning}", style="yellow")
    rows, now = [], found["server_time"]
    for member in found["members"]:
        doing = member.get("presence") or {}
        state = doing.get("state", "never seen") if member["here"] else "away"
        step = f"{doing['step']}/{doing['of']}" if doing.get("of") else ""
        spans = (_ago(doing.get(name), now) for name in ("since", "seen_at"))
        end, detail = _clock(doing.get("until")), doing.get("detail", "")
        round_ = str(doing.get("round") or "")
        rows.append((member["name"], member["status"], state, round_, step, *spans, end, detail))
    headings = ("member", "key", "doing", "round", "step", "since", "seen", "until", "")
    show_table(headings, rows, frame=False)
    services = []
    for one in found["services"]:
        pid, since, restarts = str(one["pid"] or ""), _ago(one["since"], now), str(one["restarts"])
        services.append((one["name"], one["state"], pid, since, restarts, one["detail"]))
    show_table(("service", "state", "pid", "since", "restarts", ""), services, frame=False)


def _clock_now() -> str:
    """What a line of the readable log begins with."""
    return f"{time.strftime('%H:%M:%S')} photon | "


def _ago(at: float | None, now: float) -> str:
    return coarse(now - at) if at else ""


def _clock(at: float | None) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%m-%d %H:%M") if at else ""


def _address(url: str) -> str:
    """host:port out of what a person may give: with https://, with a slash."""
    from photon.config.addresses import host_and_port, joined

    try:
        return joined(*host_and_port(url.removeprefix("https://").rstrip("/")))
    except ValueError as error:
        raise InvalidValueError(f"the aggregator's address {error}") from None
