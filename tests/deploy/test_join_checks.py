"""`photon join --check`: against a real door, desk and store; what can be wrong is named."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_node_config
from photon.data import open_data
from photon.deploy import desk as desk_module
from photon.deploy import join as join_module
from photon.deploy import join_checks
from photon.deploy.certificates import CertificateFiles, keep_certificate, keep_member_authority
from photon.deploy.checks import Check, worst
from photon.deploy.desk import Desk, DeskLimits
from photon.deploy.front_door import DoorSettings, front_door
from photon.deploy.join import accept_invitation
from photon.deploy.join_checks import preflight
from photon.deploy.ports import free_ports
from photon.errors import (
    AccessRefusedError,
    CertificateError,
    ClockSkewError,
    DataChangedError,
    DataNotFoundError,
    DeviceError,
    DiskFullError,
    InvitationError,
    MembershipError,
    PhotonError,
    ProtocolError,
    StoreUnavailableError,
    UnknownKeyError,
    UnknownMemberError,
    UnreachableError,
    VocabularyMismatchError,
)
from photon.membership.invitation import (
    Invitation,
    SharedTokenizer,
    certificate_fingerprint,
    read_invitation,
    write_invitation,
)
from photon.membership.keys import NodeKey
from photon.membership.roster import Roster
from photon.silo.desk_client import DeskClient
from photon.store.presign import S3Presigner

LINES = [
    *("node.toml", "membership", "key", "data", "disk", "compute"),
    *("authority", "address", "door", "version", "clock", "member", "store"),
]


@dataclass
class Aggregator:
    """Door, desk and store as `photon serve` brings them up."""

    folder: Path
    roster: Roster
    files: CertificateFiles
    presigner: S3Presigner
    desk: Desk
    settings: DoorSettings
    tokenizer: SharedTokenizer

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings.port}"

    def invite(self, name: str, hours: float = 24.0, key: str | None = None, **changed) -> Path:
        pem = self.files.ca.read_text()
        invitation = Invitation(
            name=name,
            host="127.0.0.1",
            port=self.settings.port,
            ca_pem=pem,
            ca_fingerprint=certificate_fingerprint(pem),
            aggregator_key=NodeKey.load_or_create(self.folder / "aggregator.key").public_pem,
            token=self.roster.invite(name, max(60.0, hours * 3600), key=key),
            key_fingerprint=key,
            expires_at=float(int(time.time() + hours * 3600)),
            tokenizer=self.tokenizer,
        )
        path = self.folder / f"{name}.toml"
        write_invitation(path, replace(invitation, **changed))
        return path

    def state(self):
        """All that a check could change over here."""
        return (
            self.roster.members(),
            self.roster.invitations(),
            self.roster.presences(),
            self.roster.journal.events(1000),
        )


@pytest.fixture(scope="module")
def aggregator(short_folder, running_store, watch, three_silos) -> Iterator[Aggregator]:
    folder = short_folder("aggregator")
    files = keep_certificate(folder / "home", "127.0.0.1")
    roster = Roster(folder / "members.sqlite")
    (port,) = free_ports(1)
    presigner = running_store.store.presigner(f"https://127.0.0.1:{port}", "checked")
    limits = DeskLimits(joins_per_minute=1000)
    members = keep_member_authority(folder / "home")
    audience = certificate_fingerprint(files.ca.read_text())
    desk = Desk(roster, presigner, limits=limits, audience=audience, authority=members)
    desk.start()
    settings = DoorSettings(
        *("127.0.0.1", port, files.certificate, files.key, members / "ca.crt"),
        desk_port=desk.port,
        store_port=running_store.store.port,
    )
    watched = watch(folder / "watched")
    try:
        with watched.supervisor as supervisor:
            supervisor.start(front_door(settings, folder / "door"))
            tokenizer = SharedTokenizer(open_data(three_silos).tokenizer_sha256, "</s>", None)
            yield Aggregator(folder, roster, files, presigner, desk, settings, tokenizer)
    finally:
        desk.stop()
        roster.close()


class Site:
    """A node's home and files."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.home, self.file = folder / "node", folder / "node.toml"
        self.data = data
        self.say("")

    def say(self, more: str, data: Path | None = None) -> None:
        text = f'[data]\npath = "{data or self.data}"\nsilo = "red"\n{more}\n'
        if "[disk]" not in more:
            text += "[disk]\nmin_free_gib = 0.1\n"
        self.file.write_text(text)

    def look(self, **how) -> dict[str, Check]:
        found = preflight(self.home, self.file, **how)
        return {one.name: one for one in found}

    def join(self, aggregator: Aggregator, name: str) -> None:
        invitation = read_invitation(aggregator.invite(name))
        accept_invitation(invitation, load_node_config(self.file), self.home)


@pytest.fixture
def site(tmp_path, three_silos) -> Site:
    return Site(tmp_path, three_silos)


@pytest.fixture
def member(site, aggregator, request) -> Site:
    """A site that has joined, under a name of its own."""
    site.join(aggregator, name_of(request))
    return site


def name_of(request) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:60]


def failed(check: Check, error: type[PhotonError], *words: str) -> bool:
    assert check.verdict == "fail", check
    assert check.exit_code == error.exit_code, check
    assert check.hint
    for each in words:
        assert each in check.found, check
    return True


def well(found: dict[str, Check], *but: str) -> bool:
    """All is well but these."""
    wrong = [one for one in found.values() if one.verdict == "fail" and one.name not in but]
    assert not wrong, wrong
    return True


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- nothing is changed ---


def test_with_an_invitation_nothing_is_used_up(site, aggregator) -> None:
    file = aggregator.invite("fresh")
    before, text = aggregator.state(), file.read_bytes()
    found = site.look(invitation=file)
    assert list(found) == ["invitation" if name == "membership" else name for name in LINES]
    assert well(found)
    assert "fresh at 127.0.0.1" in found["invitation"].found
    assert "is made when this node joins" in found["key"].found
    assert "joining registers it" in found["data"].found
    assert found["member"].verdict == found["store"].verdict == "skip"
    assert "once this node is a member" in found["store"].found
    assert aggregator.state() == before
    assert file.read_bytes() == text
    assert not site.home.exists()
    # And the invitation still works.
    site.join(aggregator, "fresh")
    assert well(site.look())


def test_a_member_looks_at_everything_and_changes_nothing(member, aggregator) -> None:
    before, files = aggregator.state(), files_of(member.home)
    found = member.look()
    assert list(found) == LINES
    assert {one.verdict for one in found.values()} <= {"ok", "warn"}, found
    assert worst(list(found.values())) == 0
    assert "as registered" in found["data"].found
    assert "is active" in found["member"].found
    assert "answers, in" in found["store"].found
    assert "runs *" in found["node.toml"].found
    assert "1 x cpu" in found["compute"].found or torch.cuda.is_available()
    assert aggregator.state() == before, "not even that it was here"
    assert files_of(member.home) == files


# --- what is wrong here ---


def test_node_files(member) -> None:
    member.say("[policy]\nrunz = []")
    found = member.look()
    assert failed(found["node.toml"], UnknownKeyError, "runz")
    assert found["data"].verdict == found["disk"].verdict == found["compute"].verdict == "skip"
    assert well(found, "node.toml"), "the rest is looked at all the same"
    member.say('[policy]\nruns = ["med-*"]\nmin_participants = 3\nmax_parameters = 2_000_000')
    words = member.look()["node.toml"].found
    for each in ("runs med-*", "3 participants", "max_parameters 2,000,000", "model paths none"):
        assert each in words
    member.say("[policy]\nmax_epsilon = 3.0")
    assert member.look()["node.toml"].verdict == "warn"
    assert "policy.max_epsilon refuses every run" in member.look()["node.toml"].hint


def test_data(member, tmp_path) -> None:
    member.say("", data=tmp_path / "none")
    assert failed(member.look()["data"], DataNotFoundError, "none")
    changed = shutil.copytree(member.data, tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest, indent=7))
    member.say("", data=changed)
    assert failed(member.look()["data"], DataChangedError, "it registered")


def test_text_that_another_tokenizer_cut_is_told_before_the_invitation_is_used_up(
    site, aggregator, request
) -> None:
    name = name_of(request)
    other = SharedTokenizer("f" * 64, "</s>", None)
    invitation = aggregator.invite(name, tokenizer=other)
    said = site.look(invitation=invitation)["data"]
    assert failed(said, VocabularyMismatchError, "cut by another tokenizer")
    assert "photon data prepare --tokenizer" in said.hint
    assert "ffffffffffff" in said.found
    before = aggregator.state()
    with pytest.raises(VocabularyMismatchError, match="cut by another tokenizer"):
        accept_invitation(read_invitation(invitation), load_node_config(site.file), site.home)
    assert aggregator.state() == before
    assert not (site.home / "node.key.new").exists()
    # An invitation from before there was a run says nothing of it, and that is said.
    unnamed = site.look(invitation=aggregator.invite(name, tokenizer=None))["data"]
    assert unnamed.verdict == "warn"
    assert "does not name the federation's tokenizer" in unnamed.found
    site.join(aggregator, name)


def forward(port: int, to: int, over: contextlib.ExitStack) -> None:
    """One connection that comes to a port goes on to another, until all is over."""
    listener = over.enter_context(socket.create_server(("127.0.0.1", port)))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)

    def serve() -> None:
        ours, _ = listener.accept()
        theirs = socket.create_connection(("127.0.0.1", to))
        back = threading.Thread(target=pump, args=(theirs, ours), daemon=True)
        with ours, theirs:
            back.start()
            pump(ours, theirs)
            theirs.shutdown(socket.SHUT_RDWR)
            back.join()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    over.callback(thread.join, 30)


def test_an_aggregator_that_is_still_starting_is_waited_for_and_that_is_said(
    site, aggregator, request, monkeypatch
) -> None:
    name = name_of(request)
    invitation = read_invitation(aggregator.invite(name))
    away = replace(invitation, port=free_ports(1)[0])
    node, said, naps = load_node_config(site.file), [], []
    with pytest.raises(UnreachableError):
        accept_invitation(away, node, site.home)

    over = contextlib.ExitStack()

    def nap(_: float) -> None:
        naps.append(1)
        if len(naps) == 3:  # it has come up
            forward(away.port, invitation.port, over)

    # Not the module's own `sleep`, which other threads use.
    monkeypatch.setattr(join_module, "time", types.SimpleNamespace(**vars(time) | {"sleep": nap}))
    with over:
        member = accept_invitation(away, node, site.home, tell=said.append)
    assert member.name == name
    assert len(naps) == 3
    (line,) = said  # once, not at each attempt
    assert line.startswith(f"waits for the aggregator at {away.address} until ")
    assert "when the invitation expires; Ctrl-C ends: " in line


def test_join_does_not_wait_with_other_text_than_it_registered(member, tmp_path) -> None:
    """For an aggregator that is away, for ever: nothing that it could ask would be answered."""
    changed = shutil.copytree(member.data, tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest, indent=7))
    member.say("", data=changed)
    words = ["join", "--node", str(member.file), "--home", str(member.home)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == DataChangedError.exit_code, result.output
    assert "it registered" in result.output


def test_disk(member) -> None:
    gib = shutil.disk_usage(member.home).total / 2**30 + 1
    member.say(f"[disk]\nmin_free_gib = {gib}")
    assert failed(member.look()["disk"], DiskFullError, "GiB are free under")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fault is a device that is not here")
def test_device_and_threads(member) -> None:
    member.say('[compute]\ndevice = "cuda"')
    assert failed(member.look()["compute"], DeviceError, "not on this machine")
    member.say("[compute]\nthreads = 512")
    assert member.look()["compute"].verdict == "warn"
    assert "512 threads" in member.look()["compute"].found


def test_key(member) -> None:
    (member.home / "node.key").chmod(0o644)
    found = member.look()
    assert failed(found["key"], MembershipError, "may be read or changed by others", "0644")
    assert "chmod 600" in found["key"].hint
    assert found["member"].verdict == found["store"].verdict == "skip"
    (member.home / "node.key").unlink()
    assert failed(member.look()["key"], MembershipError, "no key at")


def test_invitations(site, member, aggregator, tmp_path) -> None:
    none = tmp_path / "none.toml"
    found = site.look(invitation=none)
    assert failed(found["invitation"], InvitationError, "none.toml")
    assert {found[name].verdict for name in LINES[7:]} == {"skip"}
    expired = aggregator.invite("late", hours=-1.0)
    assert failed(site.look(invitation=expired)["invitation"], InvitationError, "expired at")
    soon = aggregator.invite("soon", hours=0.5)
    other = Site(tmp_path, site.data)
    other.home = tmp_path / "other"
    assert other.look(invitation=soon)["invitation"].verdict == "warn"
    stranger = aggregator.invite("stranger")
    found = member.look(invitation=stranger)
    assert failed(found["invitation"], InvitationError, "is the home of", "is for stranger")


def test_no_home_and_no_invitation(site) -> None:
    found = site.look()
    assert failed(found["membership"], InvitationError, "no member's home yet")
    assert "--check --invite FILE" in found["membership"].hint


# --- what is wrong between here and there ---


def test_an_authority_that_is_another(member, aggregator, short_folder) -> None:
    other = keep_certificate(short_folder("liar"), "127.0.0.1")
    shutil.copy(other.ca, member.home / "ca.crt")
    found = member.look()
    assert failed(
        found["authority"], CertificateError, certificate_fingerprint(other.ca.read_text())
    )
    assert found["door"].verdict == "skip"
    # Fingerprint and certificate agree, but the door was signed by somebody else.
    pem = other.ca.read_text()
    file = aggregator.invite("deceived", ca_pem=pem, ca_fingerprint=certificate_fingerprint(pem))
    site = Site(member.home.parent, member.data)
    site.home = member.home.parent / "deceived"
    found = site.look(invitation=file)
    assert found["authority"].verdict == "ok"
    assert failed(found["door"], CertificateError, "not of the authority that the invitation names")
    assert found["version"].verdict == found["clock"].verdict == "skip"


def test_an_invitation_that_was_changed_on_its_way(site, aggregator, short_folder) -> None:
    other = keep_certificate(short_folder("liar"), "127.0.0.1")
    file = aggregator.invite("changed", ca_pem=other.ca.read_text())
    found = site.look(invitation=file)
    assert failed(found["invitation"], InvitationError, "has fingerprint")


def test_addresses(member) -> None:
    port = free_ports(1)[0]
    found = member.look(address=f"127.0.0.1:{port}")
    assert failed(found["address"], UnreachableError, f"port {port} does not answer")
    assert {found[name].verdict for name in LINES[9:]} == {"skip"}
    unknown = member.look(address="no-such-host.invalid:8443")["address"]
    assert failed(unknown, UnreachableError, "no-such-host.invalid has no address")


def test_a_certificate_that_ends_soon(member, monkeypatch) -> None:
    monkeypatch.setattr(join_checks, "_CERTIFICATE_DAYS", 10_000)
    assert member.look()["door"].verdict == "warn"
    assert "the aggregator's operator renews it" in member.look()["door"].hint.lower()


def test_another_version(member, monkeypatch) -> None:
    monkeypatch.setattr(desk_module, "photon_version", lambda: "9.9.0")
    found = member.look()
    assert failed(found["version"], ProtocolError, "the aggregator runs Photon 9.9.0")
    assert well(found, "version")


CLOCKS = [(40.0, "warn"), (3600.0, "fail"), (-3600.0, "fail")]


@pytest.mark.parametrize(("ahead_s", "verdict"), CLOCKS)
def test_clocks(member, monkeypatch, ahead_s, verdict) -> None:
    there = types.SimpleNamespace(time=lambda: time.time() + ahead_s, monotonic=time.monotonic)
    monkeypatch.setattr(desk_module, "time", there)
    found = member.look()
    assert found["clock"].verdict == verdict
    assert "this clock says" in found["clock"].found
    if verdict == "fail":
        assert found["clock"].exit_code == ClockSkewError.exit_code
        assert found["member"].exit_code == ClockSkewError.exit_code, "nor is a signature taken"


def test_a_desk_that_says_no_time(member, monkeypatch) -> None:
    health = DeskClient.health

    def older(self):
        return {name: value for name, value in health(self).items() if name != "server_time"}

    monkeypatch.setattr(DeskClient, "health", older)
    found = member.look()
    assert found["clock"].verdict == "skip"
    assert well(found)


def test_standing(member, aggregator, request) -> None:
    name = name_of(request)
    aggregator.roster.suspend(name)
    found = member.look()
    assert failed(found["member"], UnknownMemberError, "suspended")
    assert found["store"].verdict == "skip"
    aggregator.roster.reinstate(name)
    assert member.look()["member"].verdict == "ok"


# --- the store ---


@pytest.fixture
def another_door(aggregator, short_folder, watch):
    """A second door and desk of the same aggregator, with another store behind them."""
    closing = []

    def open_(
        store_port: int, presigner: S3Presigner | None = None, port: int | None = None
    ) -> str:
        folder = short_folder("another")
        port = port or free_ports(1)[0]
        desk = Desk(
            aggregator.roster,
            presigner or aggregator.presigner,
            audience=certificate_fingerprint(aggregator.files.ca.read_text()),
            authority=aggregator.settings.members_ca.parent,
        )
        desk.start()
        settings = replace(
            aggregator.settings, port=port, desk_port=desk.port, store_port=store_port
        )
        watched = watch(folder / "watched")
        watched.supervisor.__enter__()
        closing.extend([watched.supervisor.close, desk.stop])
        watched.supervisor.start(front_door(settings, folder / "door"))
        return f"127.0.0.1:{port}"

    yield open_
    for close in closing:
        close()


def test_a_store_that_is_down(member, another_door, running_store) -> None:
    port, dead = free_ports(2)
    presigner = running_store.store.presigner(f"https://127.0.0.1:{port}")
    found = member.look(address=another_door(dead, presigner, port))
    assert failed_store(found, StoreUnavailableError, "502")
    assert well(found, "store")


def test_a_store_that_refuses(member, another_door, running_store) -> None:
    port = free_ports(1)[0]
    store = running_store.store
    wrong = S3Presigner(
        f"https://127.0.0.1:{port}",
        store.bucket,
        region="us-east-1",
        access_key_id=store.access_key_id,
        secret="0" * 40,
    )
    found = member.look(address=another_door(store.port, wrong, port))
    assert found["store"].verdict == "fail"
    assert found["store"].exit_code == 76
    assert "403" in found["store"].found
    assert "X-Amz" not in str(found), "nothing of a signature is shown"


def test_leave_that_names_another_host_is_not_used(member, another_door, running_store) -> None:
    elsewhere = running_store.store.presigner("https://192.0.2.1:8443")
    found = member.look(address=another_door(running_store.store.port, elsewhere, free_ports(1)[0]))
    assert found["store"].exit_code == 76
    assert "192.0.2.1" in found["store"].found


def test_an_invitation_bound_to_a_key_is_used_from_that_home_only(
    site, aggregator, tmp_path
) -> None:
    shown = photon("join", "--show-key", "--home", site.home).stdout.strip()
    assert photon("join", "--show-key", "--home", site.home).stdout.strip() == shown
    file = aggregator.invite("bound", key=shown)
    node = load_node_config(site.file)
    with pytest.raises(InvitationError, match=f"is for the key {shown}, the one of"):
        accept_invitation(read_invitation(file), node, tmp_path / "another")
    assert accept_invitation(read_invitation(file), node, site.home).name == "bound"
    assert NodeKey.load(site.home / "node.key").fingerprint == shown


def test_a_store_inside_the_site_is_joined_only_where_the_site_says_so(
    site, aggregator, monkeypatch
) -> None:
    for store, allowed in (
        ("https://10.1.2.3:9000", "10.1.2.3"),
        ("https://169.254.169.254", "169.254.169.254"),
    ):
        monkeypatch.setattr(aggregator.desk, "_store_origin", store)
        site.say("")
        with pytest.raises(AccessRefusedError, match="inside this site's own network") as caught:
            site.join(aggregator, "inside")
        assert not (site.home / "membership.json").exists()
        line = f'allow_private_addresses = ["{allowed}"]'
        assert line in str(caught.value.hint)
        # The same node again is in: the invitation is not lost by it.
        site.say(f"[network]\n{line}")
        invitation = read_invitation(aggregator.folder / "inside.toml")
        known = accept_invitation(invitation, load_node_config(site.file), site.home)
        assert known.store_origin == store
        shutil.rmtree(site.home)
        aggregator.roster.expel("inside")
    monkeypatch.setattr(aggregator.desk, "_store_origin", "http://10.1.2.3:9000")
    with pytest.raises(AccessRefusedError, match="not encrypted"):
        site.join(aggregator, "inside")


def failed_store(found: dict[str, Check], error: type[PhotonError], *words: str) -> bool:
    check = found["store"]
    assert check.verdict == "fail", check
    assert check.exit_code == error.exit_code
    return all(each in check.found for each in words)


# --- as a person or a script calls it ---


def photon(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(member) -> None:
    words = ["join", "--check", "--node", member.file, "--home", member.home]
    shown = photon(*words)
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.stdout.splitlines()][:2] == ["looked", "node.toml"]
    found = json.loads(photon(*words, "--json").stdout)
    assert [one["name"] for one in found] == LINES
    (member.home / "node.key").chmod(0o640)
    result = photon(*words, "--json")
    assert result.exit_code == MembershipError.exit_code
    assert json.loads(result.stdout)[2]["verdict"] == "fail"
    assert photon(*words, f"127.0.0.1:{free_ports(1)[0]}").exit_code == MembershipError.exit_code


def test_socks_is_refused_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    (tmp_path / "run.toml").write_text('[model]\npreset = "tiny"\n[data]\npath = "d"\n')
    for words in (
        ["join", "--check"],
        ["join", "--invite", "i.toml"],
        ["serve", "run.toml"],
        ["serve", "run.toml", "--check"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 95, result.output
        assert "ALL_PROXY=socks5://127.0.0.1:1080" in result.output.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
