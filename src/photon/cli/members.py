"""`photon invite`, `photon members`, `photon audit`: who takes part, proof of what was merged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from photon.cli.options import AsJson, taking
from photon.cli.screen import say, show, show_facts, show_json, show_table
from photon.dashboard.wording import coarse
from photon.errors import (
    CertificateError,
    ConfigError,
    InvalidValueError,
    MembershipError,
    ShardCorruptError,
)
from photon.membership.invitation import (
    Invitation,
    SharedTokenizer,
    certificate_fingerprint,
    require_writable,
    write_invitation,
)
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.records import utc
from photon.membership.roster import ROSTER_FILE, RUN_SETTING, Roster, roster_at
from photon.store.served import RUN_FILE

if TYPE_CHECKING:
    from photon.config import RunConfig, ServeConfig
    from photon.membership.verification import AuditReport

members_app = typer.Typer(
    help="Who takes part in this aggregator's runs; see also `photon invite`.",
    no_args_is_help=True,
)

_PROVE = typer.Option(metavar="LINE", help="Print that line's proof, for `photon verify`.")

#: Invitations are for the coming days, not for keeping.
_MOST_HOURS = 24 * 90

Name = Annotated[
    str, typer.Argument(help="The member's name: the silo's name in runs.", metavar="NAME")
]
RunFile = Annotated[
    Path | None,
    typer.Option(
        "--run-file",
        metavar="RUN.toml",
        help="The run's own file: its [serve] says where the aggregator lives, its [data] has the "
        "tokenizer; or that of a federation inside another. By default the run that was served "
        "last from --home.",
    ),
]
Home = Annotated[
    Path | None,
    typer.Option(
        "--home", help="The aggregator's home; serve.home of the run file, or photon-server."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask, even if the run may stop for it.")]


@dataclass
class _Asked:
    """What an invitation is to be, as it is typed."""

    name: Name
    run_file: RunFile = None
    home: Home = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The address that silos dial, if it is not serve.host and the port of "
            "serve.listen.",
        ),
    ] = None
    out: Annotated[
        Path | None, typer.Option(help="File to write; NAME.invitation.toml by default.")
    ] = None
    valid_hours: Annotated[
        float, typer.Option(help="Hours until it expires.", min=0.01, max=_MOST_HOURS)
    ] = 72.0
    key: Annotated[
        str | None,
        typer.Option(
            metavar="sha256:...", help="The only key that may use it, as its site told it."
        ),
    ] = None
    as_json: AsJson = False


@taking(_Asked)
def invite(
    asked: _Asked,
    new: Annotated[
        bool,
        typer.Option(
            "--new", help="Make the aggregator's home and authority, where there is none."
        ),
    ] = False,
) -> None:
    """Invite a silo: one file with this aggregator's address, its fingerprint and a one-time token.

    The run's tokenizer goes with it, as the silo's text must be cut by the same one: `photon data
    prepare --tokenizer FILE` takes it from there. A very large one is named only.

    Send the file over a channel that others can't read: whoever uses it first is NAME. On the node:
    `photon join --invite FILE --node node.toml`. An earlier invitation of that name is void. With
    --key a copy of it in other hands is worth nothing: `photon join --show-key` there prints it.

    Example: `photon invite hospital-a --run-file run.toml --valid-hours 24`
    """
    _invite(asked, _place(asked.run_file, asked.home, new=new), rotate=False)


@members_app.command("rotate")
@taking(_Asked)
def rotate_command(asked: _Asked) -> None:
    """Invite a member to come with a new key, or with other data than it registered.

    The node makes the key and uses the file as any invitation: `photon join --invite FILE`. At that
    moment the old key ends, and is never accepted again. Until then it works: if it may be in
    somebody else's hands, `photon members suspend NAME` first and `reinstate` afterwards.

    Example: `photon members rotate hospital-a --run-file run.toml`
    """
    _invite(asked, _place(asked.run_file, asked.home), rotate=True)


@members_app.command("list")
def list_command(run_file: RunFile = None, home: Home = None, as_json: AsJson = False) -> None:
    """All members and open invitations, and what each member said last.

    Example: `photon members list --home photon-server --json`
    """
    with Roster(_place(run_file, home).roster) as roster:
        members, invitations = roster.members(), roster.invitations()
        presences = roster.presences()
    if as_json:
        told = []
        for member in members:
            presence, seen_at = presences.get(member.name, (None, None))
            doing = asdict(presence) if presence is not None else None
            told.append({**asdict(member), "presence": doing, "seen_at": seen_at})
        show_json({"members": told, "invitations": [asdict(one) for one in invitations]})
        return
    rows = []
    for member in members:
        presence, seen_at = presences.get(member.name, (None, 0.0))
        seen = f"{coarse(time.time() - seen_at)} ago, {presence.state}" if presence else "never"
        joined, tokens = utc(member.joined_at), f"{member.facts.train_tokens:,}"
        version = member.facts.photon_version
        rows.append((member.name, member.status, joined, tokens, version, seen))
    for invitation in invitations:
        what = "invited, new key" if invitation.rotate else "invited"
        rows.append((invitation.name, what, "", "", "", f"until {utc(invitation.expires_at)}"))
    headings = ("name", "status", "joined", "tokens", "Photon", "seen")
    show_table(headings, rows, right=(3,))
    if members:
        show("Keys, to compare with what `photon join` prints at each silo:")
        show_facts((member.name, member.fingerprint) for member in members)


@members_app.command("suspend")
def suspend_command(
    name: Name, run_file: RunFile = None, home: Home = None, yes: Yes = False
) -> None:
    """Refuse everything a member asks, from now until it is reinstated.

    It asks first if fewer silos would be left than the run needs.

    Example: `photon members suspend hospital-a`
    """
    place = _place(run_file, home)
    with Roster(place.roster) as roster:
        _require_enough_left(roster, place, name, "suspended", yes)
        roster.suspend(name)
    say(f"{name} is suspended. `photon members reinstate {name}` takes it back.")


@members_app.command("reinstate")
def reinstate_command(name: Name, run_file: RunFile = None, home: Home = None) -> None:
    """End a suspension.

    Example: `photon members reinstate hospital-a`
    """
    with Roster(_place(run_file, home).roster) as roster:
        roster.reinstate(name)
    say(f"{name} may take part again.")


@members_app.command("expel")
def expel_command(
    name: Name, run_file: RunFile = None, home: Home = None, yes: Yes = False
) -> None:
    """Refuse a member from now on; its key is never accepted again.

    If NAME has not joined yet, its invitation is withdrawn.

    What it contributed to finished rounds stays in the model. An expelled name can be invited again
    (`photon invite NAME`), and then comes with another key. It asks first if
    fewer silos would be left than the run needs.

    Example: `photon members expel hospital-a`
    """
    place = _place(run_file, home)
    with Roster(place.roster) as roster:
        _require_enough_left(roster, place, name, "expelled", yes)
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
    prove: Annotated[int | None, _PROVE] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a run's log: no line changed, every update signed by its silo, none counted twice.

    Needs nothing but the log: a silo may run it on a copy. It compares the fingerprint that is
    printed with its own (`photon join` prints it). Exit code 84 if anything is wrong, 42 if
    there is no log.

    Example: `photon audit runs/med --json`
    """
    from photon.membership.proof import prove_line
    from photon.membership.verification import verify_audit

    report = verify_audit(run, head=head)
    if prove is not None:
        show_json(prove_line(report.path, prove))
    elif as_json:
        record = {**asdict(report), "path": str(report.path), "ok": not report.problems}
        show_json({name: record[name] for name in record if name not in ("keys", "trace")})
    else:
        _show_audit(report)
    report.require_good()


@dataclass(frozen=True)
class _Place:
    """Where an aggregator lives.

    Attributes:
        run: the run file that is known of, whose [serve] `serve` is; None if there is none.
        source: where that is from, for messages.
        made: whether the home is only to be made.
    """

    serve: ServeConfig
    run: RunConfig | None
    source: str
    made: bool

    @property
    def roster(self) -> Path:
        return Path(self.serve.home) / ROSTER_FILE


def _place(run_file: Path | None, home: Path | None, *, new: bool = False) -> _Place:
    """The aggregator's home, by what was named; it is there, or `new`.

    Raises:
        MembershipError: there is none.
    """
    from photon.config import ServeConfig, load_run_config, load_served

    run, source = None, ""
    if run_file is not None:
        run, source = load_served(run_file), str(run_file)
    serve = run.serve if run is not None else ServeConfig()
    at = Path(home) if home is not None else Path(serve.home)
    made = new and not (at / ROSTER_FILE).exists()
    if not made:
        with roster_at(at) as roster:
            served = roster.setting(RUN_SETTING)
        if run is None and served is not None:
            with contextlib.suppress(ConfigError):  # it has moved, or is gone
                run, source = load_run_config(Path(served) / RUN_FILE), f"{served}, served last"
                serve = run.serve
    return _Place(serve.model_copy(update={"home": str(at)}), run, source, made)


def _aggregator_key(place: _Place) -> NodeKey:
    """The key that silos pin; made for a home that nobody has joined yet.

    Raises:
        MembershipError: it is gone, and members know it.
    """
    path = Path(place.serve.home) / AGGREGATOR_KEY_FILE
    with Roster(place.roster) as roster:
        members = len(roster.members())
    if members and not path.exists():
        raise MembershipError(
            f"{path} is missing, and {members} members know that key",
            hint="Put it back from a backup. `photon serve` makes another one, with which all of "
            "them have to join again (`photon members rotate NAME`).",
        )
    return NodeKey.load_or_create(path)


def _invite(asked: _Asked, place: _Place, *, rotate: bool) -> None:
    serve, name, bound = place.serve, asked.name, asked.key
    host, port = _address(asked.address, serve)
    tokenizer = _tokenizer(place)
    ca_pem = _authority(serve, host)
    key = _aggregator_key(place)
    out = asked.out or Path(f"{name}.invitation.toml")
    require_writable(out)  # before the earlier invitation is void
    with Roster(place.roster) as roster:
        token = roster.invite(name, asked.valid_hours * 3600, rotate=rotate, key=bound)
    invitation = Invitation(
        name=name,
        host=host,
        port=port,
        ca_pem=ca_pem,
        ca_fingerprint=certificate_fingerprint(ca_pem),
        aggregator_key=key.public_pem,
        token=token,
        expires_at=float(int(time.time() + asked.valid_hours * 3600)),
        tokenizer=tokenizer,
        key_fingerprint=bound,
    )
    write_invitation(out, invitation)
    if serve.silos and name not in serve.silos:
        say(f"note: serve.silos does not name {name}; it will not be asked to train")
    carried = tokenizer is not None and tokenizer.packed is not None
    if asked.as_json:
        record = {
            "name": name,
            "file": str(out),
            "home": serve.home,
            "address": invitation.address,
            "ca_fingerprint": invitation.ca_fingerprint,
            "expires_at": invitation.expires_at,
            "rotate": rotate,
            "key_fingerprint": bound,
            "tokenizer_sha256": tokenizer.sha256 if tokenizer is not None else None,
            "tokenizer_carried": carried,
        }
        show_json(record)
        return
    began = "Made a new aggregator's home" if place.made else "The aggregator's home is"
    typer.echo(f"{began} {Path(serve.home).absolute()}.")
    typer.echo(f"Wrote {out}: works once, until {utc(invitation.expires_at)}.")
    typer.echo(f"It leads to {invitation.address}, fingerprint {invitation.ca_fingerprint}.")
    if bound is not None:
        typer.echo(f"Only the key {bound} can use it.")
    typer.echo(f"Send it to {name} over a channel that others can't read. There:")
    if not rotate:  # who has a key has text and a node.toml, too
        cut = f"--tokenizer {out.name}" if carried else "--tokenizer FOLDER"
        typer.echo(f"  photon data prepare --input texts/ --iid 1 {cut} --out data/{name}")
        typer.echo(f"  printf '[data]\\npath = \"data/{name}\"\\n' > node.toml")
    typer.echo(f"  photon join --invite {out.name} --node node.toml")
    if rotate:
        typer.echo(f"The key that {name} has now works until then.")


def _tokenizer(place: _Place) -> SharedTokenizer | None:
    """Of the run's data. Not by `open_data`, which would load for seconds.

    Raises:
        ShardCorruptError: it is not the one that the manifest names.
    """
    left_out = "note: the invitation does not name the tokenizer"
    if place.run is None:
        say(f"{left_out}: no run is known; --run-file RUN.toml names one")
        return None
    folder = Path(place.run.data.path)
    try:
        named = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
        data = (folder / "tokenizer" / "tokenizer.json").read_bytes()
        shared = SharedTokenizer(named["sha256"], named["eos_token"], data)
    except (OSError, ValueError, LookupError, TypeError) as error:
        say(f"{left_out}: no data can be read at {folder} (data.path of {place.source}): {error}")
        return None
    if hashlib.sha256(data).hexdigest() != shared.sha256:
        raise ShardCorruptError(
            f"{folder / 'tokenizer' / 'tokenizer.json'} is not the one that the data was made with",
            hint="Prepare the data again.",
        )
    if shared.packed is None:
        say(
            "note: the tokenizer is too large for an invitation, which only names it: send the "
            f"folder {folder / 'tokenizer'} too"
        )
    return shared


def _require_enough_left(roster: Roster, place: _Place, name: str, what: str, yes: bool) -> None:
    """Ask before a member is taken from a run that then has fewer than it needs.

    Raises:
        MembershipError: the answer was no, or nobody answered.
    """
    run, served = place.run, roster.setting(RUN_SETTING)
    if run is None or (served is not None and (Path(served) / "summary.json").exists()):
        return
    able = {
        one.name
        for one in roster.members()
        if one.status == "active" and (not run.serve.silos or one.name in run.serve.silos)
    }
    left = sorted(able - {name})
    if name not in able or len(left) >= run.silos_needed:
        return
    words = (
        f"run {run.run.name} needs {run.silos_needed} silos for a round; without {name} it has "
        f"{len(left)} ({', '.join(left) or 'none'}): a round under way may be lost, and the next "
        f"one waits for others, at most {run.serve.gather_s:g} s"
    )
    say(f"warning: {words}", style="yellow")
    sure = yes
    if not yes:
        with contextlib.suppress(typer.Abort):  # nobody there to answer
            sure = typer.confirm(f"Is {name} to be {what} all the same?", err=True)
    if not sure:
        raise MembershipError(f"{name} was not {what}", hint="With --yes it is, unasked.")


def _address(typed: str | None, serve: ServeConfig) -> tuple[str, int]:
    """Host and port that silos dial."""
    from photon.config.addresses import host_and_port
    from photon.deploy.front_door import public_host

    if not typed:
        return public_host(serve), serve.public_port or serve.port
    try:
        return host_and_port(typed)
    except ValueError as error:
        raise InvalidValueError(f"--address {error}") from None


def _authority(serve: ServeConfig, host: str) -> str:
    """Certificate of the authority that silos are to trust; made if there is none yet."""
    from photon.deploy.certificates import (
        check_certificate,
        given_files,
        make_authority,
        server_files,
    )

    if (files := given_files(serve)) is None:
        files = server_files(Path(serve.home))
        make_authority(Path(serve.home))
    if files.certificate.exists():
        for problem in check_certificate(files, host):
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
    signed = f"signed by the aggregator's key {report.aggregator}"
    typer.echo(signed if report.aggregator else "The lines are not signed by the aggregator.")
    typer.echo(f"head {report.head}")
    typer.echo(f"root {report.root}")
    for text in report.remarks:
        say(f"note: {text}")
    for text in report.problems:
        say(f"problem: {text}")
    if not report.problems:
        typer.echo("No line was changed, every update is signed, none counts twice.")
