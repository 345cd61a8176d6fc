"""A site that looks before it joins, the aggregator it would join, and what is found."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_node_config
from photon.deploy.certificates import CertificateFiles
from photon.deploy.checks import Check
from photon.deploy.desk import Desk
from photon.deploy.front_door import DoorSettings
from photon.deploy.join import accept_invitation
from photon.deploy.join_checks import preflight
from photon.errors import PhotonError
from photon.membership.invitation import (
    Invitation,
    SharedTokenizer,
    certificate_fingerprint,
    read_invitation,
    write_invitation,
)
from photon.membership.keys import NodeKey
from photon.membership.roster import Roster
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


def photon(*words):
    return CliRunner().invoke(app, [str(word) for word in words])
