"""A node joins with its invitation: what it waits for, and where it does not join."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
import types
from dataclasses import replace

import pytest
from checked_site import name_of, photon
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_node_config
from photon.deploy import join as join_module
from photon.deploy.join import accept_invitation
from photon.deploy.ports import free_ports
from photon.errors import (
    AccessRefusedError,
    DataChangedError,
    DeployError,
    IncompatibleConfigError,
    InvitationError,
    UnreachableError,
)
from photon.membership.invitation import read_invitation
from photon.membership.keys import NodeKey


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


def test_a_trainer_and_a_gateway_say_what_they_miss(tmp_path) -> None:
    node, folder = tmp_path / "node.toml", tmp_path / "shared"

    def told(*words: str, gateway: str = "") -> tuple[int, str]:
        node.write_text(f'[data]\npath = "d"\n{gateway}')
        found = CliRunner().invoke(app, ["join", "--node", str(node), *words])
        return found.exit_code, " ".join(found.output.split())

    for part in ("--trainer", "--gateway"):
        code, words = told(part)
        assert code == IncompatibleConfigError.exit_code
        assert "which folder this site's two machines share" in words
        assert "folder = " in words
    shared = f'[gateway]\nfolder = "{folder}"\n'
    code, words = told("--trainer", gateway=shared)
    assert code == DeployError.exit_code
    assert "no gateway" in words
    assert "photon join --gateway" in words
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    code, words = told("--gateway", gateway=shared)
    assert code == DeployError.exit_code
    assert "others may write there" in words
    code, words = told("--trainer", "--invite", "i.toml", gateway=shared)
    assert code == IncompatibleConfigError.exit_code
