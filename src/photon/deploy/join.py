"""`photon join`: a site's trainer, kept up, and the courier between it and the aggregator's desk.

    trainer    lives across rounds and runs: one process, or the ranks of a node
    courier    in this process: takes tasks from the desk to the trainer, and its answers back

It only ever connects outwards, and waits for an aggregator that is away, for as long as that takes.
What a task needs is in the task; what was finished is on this disk: either may die at any time.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from photon.config import NodeConfig, load_node_config
from photon.data import PreparedData, open_data
from photon.deploy.figures import Reader, figures_served, tell_machine, tell_node
from photon.deploy.logs import merged_line, readable
from photon.deploy.service import Service, troubles_to
from photon.deploy.supervisor import Supervisor
from photon.environment import given
from photon.errors import (
    CertificateError,
    DeployError,
    IncompatibleConfigError,
    InvitationError,
    MembershipError,
    UnreachableError,
    VocabularyMismatchError,
)
from photon.membership.invitation import (
    Invitation,
    SharedTokenizer,
    certificate_fingerprint,
    read_invitation,
)
from photon.membership.keys import NodeKey
from photon.membership.roster import Facts
from photon.silo.courier import Courier
from photon.silo.desk_client import DeskClient
from photon.silo.gateway import Calls, Gateway
from photon.silo.narrator import GOES_ON, SAYS
from photon.silo.outside import outside
from photon.silo.policy import (
    MEMBERSHIP_FILE,
    Membership,
    own_part,
    read_membership,
    require_same_data,
)
from photon.silo.presence import BOOT
from photon.silo.socket import SOCKET_FILE, connected
from photon.store.disk import held_alone, write_json, write_whole
from photon.store.transfer import Transfer
from photon.version import photon_version

KEY_FILE, CA_FILE, RECORD = "node.key", "ca.crt", "join.json"
#: The key that joining registers, until the aggregator believes it.
PENDING_KEY_FILE = f"{KEY_FILE}.new"
#: Of a federation that is to join.
INVITATION_FILE = "invitation.toml"

#: Between two attempts to join an aggregator that does not answer.
_ASK_AGAIN_S = 10.0


def accept_invitation(
    invitation: Invitation,
    node: NodeConfig,
    home: Path,
    *,
    facts: Facts | None = None,
    tell: Callable[[str], None] | None = None,
) -> Membership:
    """Make this site's key, register it at the aggregator, and keep what joining needs.

    A key that is there already is used again: an answer that was lost costs nothing.

    Args:
        invitation: from the aggregator's operator.
        node: the site's own file; its text is described, not sent.
        home: of the node; made, and made private.
        facts: of a federation, which has no text itself.
        tell: an aggregator that is not there yet is waited for until the invitation expires, and
            this is told so; None does not wait.

    Raises:
        InvitationError: expired, used, or another member's home.
        DeployError: a node runs in this home; the invitation is unused.
        CertificateError: the aggregator is not the one that invited.
        VocabularyMismatchError: the text was cut by another tokenizer than the federation's.
        AccessRefusedError: its store is where this site lets nobody send it: see
            network.allow_private_addresses.
        PhotonError: the text can't be used, or the aggregator can't be reached.
    """
    invitation.require_unexpired(time.time())
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(home):
        return _accept(invitation, node, home, facts, tell)


def keep_invitation(file: Path, home: Path) -> None:
    """Put a federation's invitation where its loop redeems it, and the tokenizer that it carries
    where `photon invite` finds that of any run.

    Raises:
        InvitationError: it is none.
    """
    shared = read_invitation(file).tokenizer
    (home / "tokenizer").mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(home / INVITATION_FILE, file.read_bytes(), "the invitation")
    if shared is not None and shared.json is not None:
        write_whole(home / "tokenizer" / "tokenizer.json", shared.json, "the tokenizer")
        named = {"sha256": shared.sha256, "eos_token": shared.eos_token}
        write_json(home / "manifest.json", {"tokenizer": named}, "the tokenizer")


def joining_key(home: Path) -> NodeKey:
    """The key that a home joins with next; made if there is none yet. Raises as NodeKey's."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return NodeKey.load_or_create(home / PENDING_KEY_FILE)


def _facts(invitation: Invitation, node: NodeConfig) -> Facts:
    data = own_part(open_data(node.data.path), node.data, invitation.name)
    require_tokenizer(invitation.tokenizer, data, invitation.name)
    return Facts(
        data_sha256=data.sha256,
        tokenizer_sha256=data.tokenizer_sha256,
        train_tokens=data.silos[invitation.name].train_tokens,
        photon_version=photon_version(),
    )


def _accept(
    invitation: Invitation,
    node: NodeConfig,
    home: Path,
    facts: Facts | None,
    tell: Callable[[str], None] | None,
) -> Membership:
    if certificate_fingerprint(invitation.ca_pem) != invitation.ca_fingerprint:
        raise CertificateError(
            f"the invitation for {invitation.name} names the authority "
            f"{invitation.ca_fingerprint}, and carries another",
            hint="It was damaged or changed on its way. Ask for a new one.",
        )
    member = invitation.name
    with contextlib.suppress(MembershipError):  # of none, or of one that is damaged: it is mended
        member = read_membership(home).name
    require_own_home(home, member, invitation.name)
    facts = facts or _facts(invitation, node)
    key, pending = joining_key(home), home / PENDING_KEY_FILE
    if invitation.key_fingerprint not in (None, key.fingerprint):
        raise InvitationError(
            f"the invitation for {invitation.name} is for the key {invitation.key_fingerprint}, "
            f"the one of {home} is {key.fingerprint}",
            hint="Join from the home whose key it names, or ask for another invitation.",
        )
    write_whole(home / CA_FILE, invitation.ca_pem, "the aggregator's authority")
    desk = DeskClient(invitation.address, home / CA_FILE, key)
    told = ""
    while True:
        try:
            answer = desk.join(invitation.token, invitation.name, key.public_pem, facts)
            break
        except UnreachableError as error:
            if tell is None or time.time() + _ASK_AGAIN_S > invitation.expires_at:
                raise
            if error.message != told:
                until = time.strftime("%Y-%m-%d %H:%M", time.localtime(invitation.expires_at))
                tell(
                    f"waits for the aggregator at {invitation.address} until {until}, when the "
                    f"invitation expires; Ctrl-C ends: {error.message}"
                )
                told = error.message
        time.sleep(_ASK_AGAIN_S)
    membership = Membership(
        name=invitation.name,
        address=invitation.address,
        ca_fingerprint=invitation.ca_fingerprint,
        aggregator_key=invitation.aggregator_key,
        data_sha256=facts.data_sha256,
        store=answer.get("store"),
    )
    membership.require_store(node.network)
    # The aggregator believes the new key from now on: it takes the old one's place.
    pending.replace(home / KEY_FILE)
    _write_membership(home, membership)
    return membership


def require_own_home(home: Path, member: str, invited: str) -> None:
    """Raise InvitationError where a home is another member's than an invitation is for."""
    if member != invited:
        raise InvitationError(
            f"{home} is the home of {member}, the invitation is for {invited}",
            hint="Choose another --home for another member.",
        )


def require_tokenizer(shared: SharedTokenizer | None, data: PreparedData, name: str) -> None:
    """Refuse text that no task could be trained on, before an invitation is used up.

    Args:
        shared: the invitation's; None where it names none.
        name: of the member.

    Raises:
        VocabularyMismatchError: the text was cut by another tokenizer.
    """
    if shared is None or shared.sha256 == data.tokenizer_sha256:
        return
    given = "the invitation" if shared.json is not None else "the folder that the operator sends"
    raise VocabularyMismatchError(
        f"the text of {name} was cut by another tokenizer than the federation's: its sha256 is "
        f"{data.tokenizer_sha256[:12]}..., the invitation names {shared.sha256[:12]}...",
        hint="The invitation is still unused. Prepare the text again: `photon data prepare "
        f"--tokenizer FILE ...`, where FILE is {given}.",
    )


def require_registered(home: Path, node: NodeConfig) -> None:
    """Refuse to wait for an aggregator that would get no answer: the data is not as registered.

    Raises:
        DataChangedError: it is another than this node joined with.
        DataError: it can't be opened.
    """
    member = read_membership(home)
    data = own_part(open_data(node.data.path), node.data, member.name)
    require_same_data(data, member.data_sha256, member.name)


def moved(home: Path, address: str) -> Membership:
    """Note that the aggregator is at another address now; who it must be stays the same."""
    known = read_membership(home)
    with _alone(home):
        if known.address != address:
            known = replace(known, address=address)
            _write_membership(home, known)
    return known


def shared_folder(node: NodeConfig) -> Path:
    """Where a site's gateway and its trainer meet; made, and made private.

    Raises:
        IncompatibleConfigError: node.toml names none.
        DeployError: others may write there, who could have anything signed in this site's name.
    """
    if node.gateway.folder is None:
        raise IncompatibleConfigError(
            "node.toml does not say which folder this site's two machines share",
            hint='Under [gateway]: folder = "/shared/photon", on both.',
        )
    folder = Path(node.gateway.folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_mode & 0o022:
        raise DeployError(
            f"gateway.folder = {folder}: others may write there, and so speak for this site",
            hint=f"chmod go-w {folder}",
        )
    return folder


def _alone(home: Path) -> AbstractContextManager[None]:
    """Hold a node's home as its supervisor does: a node that runs must keep its key and address."""
    return held_alone(
        (home / RECORD).with_suffix(".lock"),
        DeployError(
            f"another `photon join` runs in {home}; nothing was changed",
            hint="End it first (Ctrl-C, or `systemctl stop`), or choose another --home.",
        ),
    )


class Node:
    """All services of one site, or of one of its two machines (photon.silo.gateway).

    Args:
        home: of the node, where an invitation was accepted; of a trainer alone, the shared folder.
        node_file: node.toml, for the trainer.
        part: of the site that this machine is; "" for all of it.
        log: told each line of every service.
        on_event: told what happens to services, and to this site, in words.
        on_live: told how far what goes on has come; each replaces the one before.
    """

    def __init__(
        self,
        home: Path,
        node_file: Path,
        *,
        part: Literal["", "gateway", "trainer"] = "",
        log: Callable[[str], None],
        on_event: Callable[[str], None] | None = None,
        on_live: Callable[[str], None] | None = None,
    ) -> None:
        self._log = log
        self._on_live = on_live or (lambda _: None)
        self._node_file = node_file.absolute()
        self._node = node = load_node_config(self._node_file)
        self._on_event = on_event or (lambda _: None)
        self._part = part
        self._home = home.absolute()
        self._membership = read_membership(self._home)
        self._membership.require_key()
        # Now, with its own words where it can't be.
        self._key = NodeKey.load(self._home / KEY_FILE) if part != "trainer" else None
        self._boot = secrets.token_hex(8)
        self._watch, self._reserve_gib = node.watch, node.disk.min_free_gib
        self._supervisor = Supervisor(
            self._home / RECORD,
            self._home / "logs",
            log=log,
            events=troubles_to(self._on_event),
            facts={"name": self._membership.name, "aggregator": self._membership.address},
        )

    def run(self, *, on_ready: Callable[[], None]) -> None:
        """Take part until stopped.

        Args:
            on_ready: called once the services are started; the aggregator may still be away.

        Raises:
            ServiceLostError: the trainer, or another, dies again and again.
        """
        with contextlib.ExitStack() as ends:
            supervisor = ends.enter_context(self._supervisor)
            ends.enter_context(supervisor.ending_on_signals())
            if self._part == "gateway":
                calls = self._gateway()
                calls.start()
                ends.callback(calls.stop)
            else:
                courier = self._courier()
                supervisor.start(self._trainer())
                courier.start()
            ends.enter_context(figures_served(self._watch.metrics, self._figures))
            on_ready()
            supervisor.wait()

    def _courier(self) -> Courier:
        if self._part == "trainer":
            desk = Gateway(self._home, "courier")
        else:
            desk, _ = self._outside()
        return Courier(desk, self._home / SOCKET_FILE, self._boot, self._courier_says)

    def _outside(self) -> tuple[DeskClient, Callable[[str], Transfer]]:
        assert self._key is not None
        return outside(self._home / CA_FILE, self._node, self._membership, self._key)

    def _gateway(self) -> Calls:
        assert self._key is not None
        wait_s, tell = self._node.gateway.wait_s, self._on_event
        folder = shared_folder(self._node)
        _write_membership(folder, self._membership)
        return Calls(folder, *self._outside(), self._key, self._boot, wait_s, tell)

    def _figures(self) -> list[Reader]:
        folders = {"home": self._home}
        return [
            lambda page: tell_machine(page, folders, self._reserve_gib, self._supervisor.status()),
            lambda page: tell_node(page, self._home / SOCKET_FILE),
        ]

    def _trainer(self) -> Service:
        socket_path = self._home / SOCKET_FILE
        return Service(
            "trainer",
            (
                *(sys.executable, "-m", "photon.silo"),
                *("--home", str(self._home), "--node", str(self._node_file)),
                *(["--gateway"] if self._part == "trainer" else []),
            ),
            environment=given() | {BOOT: self._boot},
            ready=lambda: _listens(socket_path),
            ready_s=180.0,
            stop_s=15.0,
            wording=self._wording,
        )

    def _courier_says(self, text: str) -> None:
        for line in text.splitlines():
            self._log(merged_line("courier", line))

    def _wording(self, line: str) -> str | None:
        """Take what is for the screen out of the trainer's output."""
        if line.startswith(SAYS):
            self._on_event(line.removeprefix(SAYS))
        elif line.startswith(GOES_ON):
            self._on_live(line.removeprefix(GOES_ON))
        else:
            return readable(line)
        return None


def _listens(path: Path) -> bool:
    """Whether the trainer answers; the socket file of one that was killed stays behind."""
    try:
        with connected(path):
            return True
    except OSError:
        return False


def _write_membership(home: Path, membership: Membership) -> None:
    record = {name: value for name, value in vars(membership).items() if value is not None}
    write_json(home / MEMBERSHIP_FILE, record, "the membership")
