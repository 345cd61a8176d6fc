"""`photon invite`, `photon members`, `photon audit`: who takes part, proof of what was merged."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from photon.cli.screen import say, show_table
from photon.errors import CertificateError, InvalidValueError
from photon.membership.invitation import (
    Invitation,
    certificate_fingerprint,
    require_writable,
    write_invitation,
)
from photon.membership.roster import ROSTER_FILE, Roster, roster_at

if TYPE_CHECKING:
    from photon.config import ServeConfig
    from photon.membership.verification import AuditReport

members_app = typer.Typer(
    help="Who takes part in this aggregator's runs; see also `photon invite`.",
    no_args_is_help=True,
)

#: Invitations are for the coming days, not for keeping.
_MOST_HOURS = 24 * 90

Name = Annotated[
    str, typer.Argument(help="The member's name: the silo's name in runs.", metavar="NAME")
]
RunFile = Annotated[
    Path | None,
    typer.Option(
        "--run-file", metavar="RUN.toml", help="Its [serve] says where the aggregator lives."
    ),
]
Home = Annotated[
    Path | None,
    typer.Option(
        "--home", help="The aggregator's home; serve.home of the run file, or photon-server."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="What silos dial, where it is not serve.host and the port of serve.listen.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="File to write; NAME.invitation.toml by default.")]
ValidHours = Annotated[
    float, typer.Option(help="Hours until it expires.", min=0.01, max=_MOST_HOURS)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def invite(
    name: Name,
    run_file: RunFile = None,
    home: Home = None,
    address: Address = None,
    out: Out = None,
    valid_hours: ValidHours = 72.0,
    as_json: AsJson = False,
) -> None:
    """Invite a silo: one file with this aggregator's address, its fingerprint and a one-time token.

    Send the file over a channel that others can't read: whoever uses it first is NAME. On the node:
    `photon join --invite FILE --node node.toml`. An earlier invitation of that name is void.

    Example: `photon invite hospital-a --run-file run.toml --valid-hours 24`
    """
    _invite(name, run_file, home, address, out, valid_hours, as_json, rotate=False)


@members_app.command("rotate")
def rotate_command(
    name: Name,
    run_file: RunFile = None,
    home: Home = None,
    address: Address = None,
    out: Out = None,
    valid_hours: ValidHours = 72.0,
    as_json: AsJson = False,
) -> None:
    """Invite a member to come with a new key, or with other data than it registered.

    The node makes the key and uses the file as any invitation: `photon join --invite FILE`. At that
    moment the old key ends, and is never accepted again. Until then it works: if it may be in
    somebody else's hands, `photon members suspend NAME` first and `reinstate` afterwards.

    Example: `photon members rotate hospital-a --run-file run.toml`
    """
    _invite(name, run_file, home, address, out, valid_hours, as_json, rotate=True)


@members_app.command("list")
def list_command(run_file: RunFile = None, home: Home = None, as_json: AsJson = False) -> None:
    """All members and open invitations, and what each member said last.

    Example: `photon members list --home photon-server --json`
    """
    with _roster(run_file, home) as roster:
        members, invitations = roster.members(), roster.invitations()
        presences = roster.presences()
    if as_json:
        record = {
            "members": [
                {
                    **asdict(member),
                    "presence": asdict(presences[member.name][0])
                    if member.name in presences
                    else None,
                    "seen_at": presences[member.name][1] if member.name in presences else None,
                }
                for member in members
            ],
            "invitations": [asdict(invitation) for invitation in invitations],
        }
        typer.echo(json.dumps(record, indent=1))
        return
    rows = []
    for member in members:
        presence, seen_at = presences.get(member.name, (None, 0.0))
        seen = f"{_ago(time.time() - seen_at)} ago, {presence.state}" if presence else "never"
        rows.append(
            (
                member.name,
                member.status,
                _utc(member.joined_at),
                f"{member.facts.train_tokens:,}",
                member.facts.photon_version,
                seen,
                member.fingerprint[:23] + "...",
            )
        )
    for invitation in invitations:
        what = "invited, new key" if invitation.rotate else "invited"
        rows.append((invitation.name, what, "", "", "", f"until {_utc(invitation.expires_at)}", ""))
    headings = ("name", "status", "joined (UTC)", "tokens", "Photon", "seen", "key")
    show_table(headings, rows, right=(3,))


@members_app.command("suspend")
def suspend_command(name: Name, run_file: RunFile = None, home: Home = None) -> None:
    """Refuse everything a member asks, from now until it is reinstated.

    Example: `photon members suspend hospital-a`
    """
    with _roster(run_file, home) as roster:
        roster.suspend(name)
    say(f"{name} is suspended. `photon members reinstate {name}` takes it back.")


@members_app.command("reinstate")
def reinstate_command(name: Name, run_file: RunFile = None, home: Home = None) -> None:
    """End a suspension.

    Example: `photon members reinstate hospital-a`
    """
    with _roster(run_file, home) as roster:
        roster.reinstate(name)
    say(f"{name} may take part again.")


@members_app.command("expel")
def expel_command(name: Name, run_file: RunFile = None, home: Home = None) -> None:
    """Refuse a member from now on; its key is never accepted again.

    Of somebody who has not joined yet, the invitation is withdrawn.

    What it contributed to finished rounds stays in the model. An expelled name can be invited again
    (`photon invite NAME`), and then comes with another key.

    Example: `photon members expel hospital-a`
    """
    with _roster(run_file, home) as roster:
        roster.expel(name)
    say(f"{name} is expelled: neither a key nor an invitation of that name is accepted.")


def audit(
    run: Annotated[Path, typer.Argument(help="Run folder, or its audit.jsonl.", metavar="RUN")],
    head: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256",
            help="Head noted at an earlier audit: the log must still hold that line.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a run's log: no line changed, every update signed by its silo, none counted twice.

    Needs nothing but the log: a silo may run it on a copy. It compares the fingerprint that is
    printed with its own (`photon join` prints it). Exit code 84 if anything is wrong, 42 if
    there is no log.

    Example: `photon audit runs/med --json`
    """
    from photon.membership.verification import verify_audit

    report = verify_audit(run, head=head)
    if as_json:
        record = {**asdict(report), "path": str(report.path), "ok": not report.problems}
        typer.echo(json.dumps(record, indent=1))
    else:
        _show_audit(report)
    report.require_good()


def _invite(
    name: str,
    run_file: Path | None,
    home: Path | None,
    address: str | None,
    out: Path | None,
    valid_hours: float,
    as_json: bool,
    *,
    rotate: bool,
) -> None:
    serve = _settings(run_file, home)
    host, port = _host_and_port(address) if address else _public_address(serve)
    ca_pem = _authority(serve, host)
    out = out or Path(f"{name}.invitation.toml")
    require_writable(out)  # before the earlier invitation is void
    with Roster(Path(serve.home) / ROSTER_FILE) as roster:
        token = roster.invite(name, valid_hours * 3600, rotate=rotate)
    invitation = Invitation(
        name=name,
        host=host,
        port=port,
        ca_pem=ca_pem,
        ca_fingerprint=certificate_fingerprint(ca_pem),
        token=token,
        expires_at=float(int(time.time() + valid_hours * 3600)),
    )
    write_invitation(out, invitation)
    if serve.silos and name not in serve.silos:
        say(f"note: serve.silos does not name {name}; it will not be asked to train")
    if as_json:
        record = {
            "name": name,
            "file": str(out),
            "address": invitation.address,
            "ca_fingerprint": invitation.ca_fingerprint,
            "expires_at": invitation.expires_at,
            "rotate": rotate,
        }
        typer.echo(json.dumps(record, indent=1))
        return
    typer.echo(f"Wrote {out}: works once, until {_utc(invitation.expires_at)} UTC.")
    typer.echo(f"It leads to {invitation.address}, fingerprint {invitation.ca_fingerprint}.")
    typer.echo(
        f"Send it to {name} over a channel that others can't read. There:\n"
        f"  photon join --invite {out.name} --node node.toml"
    )
    if rotate:
        typer.echo(f"The key that {name} has now works until then.")


def _settings(run_file: Path | None, home: Path | None) -> ServeConfig:
    from photon.config import ServeConfig, load_run_config

    serve = load_run_config(run_file).serve if run_file is not None else ServeConfig()
    return serve.model_copy(update={"home": str(home)}) if home is not None else serve


def _roster(run_file: Path | None, home: Path | None) -> Roster:
    return roster_at(home if home is not None else _settings(run_file, None).home)


def _public_address(serve: ServeConfig) -> tuple[str, int]:
    from photon.deploy.front_door import public_host

    return public_host(serve), serve.public_port or serve.port


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65_536):
        raise InvalidValueError(
            f"--address {address!r} is not HOST:PORT, for example fed.example.org:8443"
        )
    return host.strip("[]"), int(port)


def _authority(serve: ServeConfig, host: str) -> str:
    """Certificate of the authority that silos are to trust; made if there is none yet."""
    from photon.deploy.certificates import (
        CertificateFiles,
        check_certificate,
        make_authority,
        server_files,
    )

    if serve.ca and serve.certificate and serve.key:
        files = CertificateFiles(Path(serve.certificate), Path(serve.key), Path(serve.ca))
    else:
        files = server_files(Path(serve.home))
        make_authority(Path(serve.home))
    if files.certificate.exists():
        for problem in check_certificate(files.certificate, files.key, files.ca, host):
            say(f"note: {problem}; `photon serve` will not start with it, or makes another")
    try:
        return files.ca.read_text(encoding="ascii")
    except (OSError, UnicodeError) as error:
        raise CertificateError(f"can't read {files.ca}: {error}") from error


def _show_audit(report: AuditReport) -> None:
    typer.echo(
        f"{report.path}: {report.lines} lines, {report.rounds} rounds, {report.updates} updates, "
        f"the last one of round {report.last_round}"
    )
    if report.members:
        show_table(("silo", "key"), sorted(report.members.items()))
    typer.echo(f"head {report.head}")
    for text in report.remarks:
        say(f"note: {text}")
    for text in report.problems:
        say(f"problem: {text}")
    if not report.problems:
        typer.echo("No line was changed, every update is signed, none counts twice.")


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
