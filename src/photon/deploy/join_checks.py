"""What `photon join --check` looks at before a node takes part, and says in words.

It changes nothing: an invitation stays unused, nothing is registered, no file is written in the
home. What needs a member's key (how it stands, the store behind the door) is looked at once the
node is a member.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from cryptography import x509

from photon.config import NetworkConfig, NodeConfig, load_node_config
from photon.data import open_data
from photon.deploy.checks import (
    Check,
    Doubt,
    Look,
    checked,
    kept_right,
    require_room,
    skew,
)
from photon.deploy.join import (
    CA_FILE,
    KEY_FILE,
    PENDING_KEY_FILE,
    RECORD,
    require_own_home,
    require_tokenizer,
)
from photon.deploy.supervisor import runner
from photon.errors import (
    CertificateError,
    DeployError,
    InvitationError,
    UnreachableError,
)
from photon.membership.desk_documents import CheckAnswer
from photon.membership.invitation import (
    Invitation,
    certificate_fingerprint,
    read_invitation,
)
from photon.membership.keys import NodeKey
from photon.membership.records import printable
from photon.silo.desk_client import DeskClient
from photon.silo.policy import (
    MEMBERSHIP_FILE,
    Membership,
    own_part,
    read_membership,
    require_our_version,
    require_same_data,
)
from photon.store.dialling import http_client, proxy_to
from photon.store.granted_store import GrantedStore
from photon.store.presign import Grant

_ANSWER_S = 10.0
#: The aggregator makes its own anew long before.
_CERTIFICATE_DAYS = 14
_LATER = "is looked at once this node is a member: join, then `photon join --check`"


def preflight(
    home: Path,
    node_file: Path,
    *,
    invitation: Path | None = None,
    address: str | None = None,
    gateway: bool = False,
) -> list[Check]:
    """Look at node.toml, invitation or membership, key, data, machine, aggregator and store.

    Args:
        home: of the node; need not be there yet.
        node_file: node.toml.
        invitation: None where this home is a member's already.
        address: the aggregator's new one, where it has moved.
        gateway: the devices are another machine's: this one's are not looked at.
    """
    who = "membership" if invitation is None else "invitation"
    # An invitation's authority is in no file of its own yet.
    with tempfile.TemporaryDirectory(prefix="photon-check-") as folder:
        site = _Site(home, node_file, invitation, address, Path(folder) / CA_FILE)
        looks: dict[str, tuple[Look, tuple[str, ...]]] = {
            "node.toml": (site.node_file, ()),
            who: (site.aggregator, ()),
            "key": (site.key, ()),
            "data": (site.data, ("node.toml",)),
            "disk": (site.disk, ("node.toml",)),
            "compute": (site.compute, ("node.toml",)),
            "authority": (site.authority, (who,)),
            "address": (site.reached, ("authority",)),
            "door": (site.door, ("address",)),
            "version": (site.version, ("door",)),
            "clock": (site.clock, ("door",)),
            "member": (site.member, ("door", "key") if invitation is None else ("door",)),
            "store": (site.store, ("member",) if invitation is None else ("door",)),
        }
        if gateway:
            del looks["compute"]
        found: list[Check] = []
        blamed: dict[str, str] = {}
        for name, (look, needs) in looks.items():
            missing = next((blamed[one] for one in needs if one in blamed), None)
            if missing is not None:
                blamed[name] = missing
                found.append(Check(name, "skip", f"not looked at: {missing} first"))
                continue
            found.append(checked(name, look))
            if found[-1].verdict == "fail":
                blamed[name] = name
    return found


class _Site:
    """What is looked at, one thing after another; what one look learns, later ones use.

    Args:
        ca_file: where the aggregator's authority is put for those looks that need it in a file.
    """

    def __init__(
        self,
        home: Path,
        node_file: Path,
        invitation: Path | None,
        address: str | None,
        ca_file: Path,
    ) -> None:
        self._home = home
        self._file = node_file
        self._invitation = invitation
        self._moved_to = address
        self._ca_file = ca_file
        self._node: NodeConfig | None = None
        #: Who invited this node, or whose member it is; the authority, and where that is from.
        self._known: Invitation | Membership | None = None
        self._ca_pem, self._ca_source = "", home / CA_FILE
        self._health: dict[str, Any] = {}
        self._standing: CheckAnswer | None = None
        self._trust: Callable[[], ssl.SSLContext] | None = None

    # --- here --------------------------------------------------------------------------------

    def node_file(self) -> str | Doubt:
        node = self._node = load_node_config(self._file)
        policy = node.policy
        rules = [f"runs {', '.join(policy.runs) or 'none'}", f"peers {', '.join(policy.peers)}"]
        if policy.min_participants > 1:
            rules.append(f"{policy.min_participants} participants or more")
        limits = ("max_epsilon", "max_local_steps", "max_parameters")
        rules += [
            f"{name} {most:,}" for name in limits if (most := getattr(policy, name)) is not None
        ]
        rules.append(f"model paths {', '.join(policy.model_paths) or 'none'}")
        words = f"{self._file}; policy: {'; '.join(rules)}"
        if policy.runs:
            return words
        return Doubt(words, "policy.runs refuses every run today: see [policy] in docs/deploy.md.")

    def aggregator(self) -> str | Doubt:
        """Who invited this node, or whose member it is."""
        home = self._home
        if (file := self._invitation) is not None:
            invitation = read_invitation(file)
            found = self._invited(file, invitation)
            self._known, self._ca_pem, self._ca_source = invitation, invitation.ca_pem, file
            return found
        if not (home / MEMBERSHIP_FILE).exists():
            raise InvitationError(
                f"{home} is no member's home yet",
                hint="Look with the invitation: `photon join --check --invite FILE`.",
            )
        member = read_membership(home)
        if self._moved_to is not None:
            member = replace(member, address=self._moved_to)
        try:
            self._ca_pem = self._ca_source.read_text(encoding="ascii")
        except (OSError, UnicodeError) as error:
            raise CertificateError(
                f"can't read {home / CA_FILE}: {error}",
                hint="It came with the invitation: restore it from a backup, or join again.",
            ) from error
        self._known = member
        words = f"{member.name} in {home}, at {member.address}"
        running = runner(home / RECORD)
        if running is not None:
            words += f"; photon join runs there (pid {running or 'unknown'})"
        return words

    def _invited(self, file: Path, invitation: Invitation) -> str | Doubt:
        invitation.require_unexpired(time.time())
        hours = (invitation.expires_at - time.time()) / 3600
        words = (
            f"{file}: {invitation.name} at {invitation.address}, unused so far as this node knows"
        )
        if (self._home / MEMBERSHIP_FILE).exists():
            member = read_membership(self._home).name
            require_own_home(self._home, member, invitation.name)
            words += f"; {self._home} is {member}'s, which gets a new key"
        if hours < 1:
            return Doubt(
                f"{words}; it expires in {hours * 60:.0f} minutes",
                "Join soon, or ask the aggregator's operator for a new one.",
            )
        return f"{words}; valid for {hours:.0f} hours"

    def key(self) -> str:
        own = self._home / KEY_FILE
        path = own if self._invitation is None else self._home / PENDING_KEY_FILE
        if self._invitation is not None and not path.exists():
            return f"{own} is made when this node joins"
        return f"{path}, readable by its owner only: {NodeKey.load(path).fingerprint}"

    def data(self) -> str | Doubt:
        assert self._node is not None
        known, part = self._known, self._node.data
        folder = open_data(part.path)
        if known is None:
            return f"{part.path} holds {', '.join(folder.silos)}"
        data = own_part(folder, part, known.name)
        tokens = data.silos[known.name].train_tokens
        words = f"{part.path}, sha256 {data.sha256[:12]}..., {tokens:,} tokens to train on"
        if isinstance(known, Membership):
            require_same_data(data, known.data_sha256, known.name)
            # A task reads it through; that takes as long as the disk does, and `data show
            # --verify` does.
            return f"{words}; as registered"
        require_tokenizer(known.tokenizer, data, known.name)
        if known.tokenizer is not None:
            return f"{words}, the federation's tokenizer; joining registers it"
        return Doubt(
            f"{words}; the invitation does not name the federation's tokenizer",
            "If the text was cut by another one, this site can't train: ask the operator.",
        )

    def disk(self) -> str | Doubt:
        assert self._node is not None
        needed = self._node.disk.min_free_gib
        free = require_room(self._home, needed, "--home")
        words = f"{free:.1f} GiB are free under {self._home.absolute()}; {needed:g} stay free"
        if free > needed + 10:
            return words
        return Doubt(
            words,
            "A task on P parameters takes up to 28 P bytes besides, and is refused where they "
            "are not there.",
        )

    def compute(self) -> str | Doubt:
        assert self._node is not None
        try:  # seconds, and memory that nobody else here needs
            from photon.training.device import cores, plan_compute, ranks_of_a_node
        except ImportError as error:
            raise DeployError(
                f"PyTorch can't be imported: {error}",
                hint="Install Photon with its dependencies into this environment.",
            ) from error
        ranks = ranks_of_a_node(self._node.compute, workers=0)
        plan = plan_compute(self._node.compute, processes=ranks)
        each = f"{ranks} x {plan.device}, {plan.precision}, {plan.threads} threads each"
        words = f"{each}, {cores()} cores here"
        if plan.threads * ranks <= cores():
            return words
        return Doubt(
            words,
            "More threads than cores slow each other down: lower compute.threads, or leave it out.",
        )

    # --- the aggregator ----------------------------------------------------------------------

    @property
    def _its(self) -> Invitation | Membership:
        assert self._known is not None
        return self._known

    def authority(self) -> str:
        known = self._its
        try:
            carried = certificate_fingerprint(self._ca_pem)
        except ValueError as error:
            raise CertificateError(
                f"{self._ca_source} holds no certificate: {error}",
                hint="Restore it from a backup, or ask for a new invitation.",
            ) from error
        if carried != known.ca_fingerprint:
            raise CertificateError(
                f"{self._ca_source} names the authority {known.ca_fingerprint}, and the one that "
                f"it carries is {carried}",
                hint="It was damaged or changed on its way: ask for a new invitation."
                if isinstance(known, Invitation)
                else f"{CA_FILE} was changed since this node joined: restore it, or join again.",
            )
        self._ca_file.write_text(self._ca_pem, encoding="ascii")
        return carried

    def reached(self) -> str:
        address = self._its.address
        parts = urlsplit(f"https://{address}")
        host, port = parts.hostname or "", parts.port or 443
        proxy = proxy_to(f"https://{address}")
        if proxy is not None:
            return f"{address}, through the proxy {proxy}"
        try:
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UnreachableError(
                f"{host} has no address here: {error}",
                hint="Is the name right, and does this machine's DNS know it? If the aggregator "
                "has moved: `photon join HOST:PORT`.",
            ) from error
        addresses = list(dict.fromkeys(str(place[4][0]) for place in places))
        last: OSError | None = None
        for each in addresses[:4]:
            try:
                with socket.create_connection((each, port), timeout=_ANSWER_S):
                    named = host if host == each else f"{host} ({each})"
                    return f"port {port} of {named} answers"
            except OSError as error:
                last = error
        named = host if addresses == [host] else f"{host} ({', '.join(addresses)})"
        raise UnreachableError(
            f"{named}: port {port} does not answer: {last}",
            hint="Is `photon serve` up, is the port right, and does a firewall on the way let this "
            "machine connect to it?",
        )

    def door(self) -> str | Doubt:
        address = self._its.address
        try:
            with closing(self._client(None)) as client:
                self._health = client.health()
        except CertificateError as error:
            found = f"{error.message}; it was issued by {_issuer(address)}"
            raise CertificateError(found, hint=error.hint) from error
        words = "its certificate is of that authority, and the desk answers"
        try:
            trust = ssl.create_default_context(cafile=str(self._ca_file))
            until = _certificate(address, trust).not_valid_after_utc
        except httpx2.RequestError:
            return words
        days = (until.timestamp() - time.time()) / 86_400
        words += f"; valid for {days:.0f} days"
        if days >= _CERTIFICATE_DAYS:
            return words
        hint = "The aggregator's operator renews it; this node needs nothing new for that."
        return Doubt(words, hint)

    def version(self) -> str:
        theirs = str(self._health.get("version", "?"))
        require_our_version(theirs, self._its.name)
        return f"the aggregator runs Photon {theirs[:40]}"

    def clock(self) -> str | Doubt:
        theirs = self._health.get("server_time")
        if not isinstance(theirs, int | float):
            return Doubt("this aggregator does not say what time it has", verdict="skip")
        moment = datetime.fromtimestamp(theirs, UTC)
        found = skew(moment, datetime.now(UTC), "the aggregator")
        return found if isinstance(found, Doubt) else kept_right(found)

    def member(self) -> str | Doubt:
        if isinstance(self._its, Invitation):
            return Doubt(_LATER, verdict="skip")
        with closing(self._client(NodeKey.load(self._home / KEY_FILE))) as client:
            standing = self._standing = client.standing()
            trust = client.trust()
        self._trust = lambda: trust
        return f"{standing.name} is {standing.member_status}"

    def store(self) -> str | Doubt:
        membership, standing = self._its, self._standing
        if isinstance(membership, Invitation) or standing is None:
            return Doubt(_LATER, verdict="skip")
        probe = standing.store.leave()
        if not isinstance(probe, Grant):
            assert probe is not None  # DeskClient.standing
            raise probe
        network = self._node.network if self._node is not None else NetworkConfig()
        origin = membership.store_origin
        membership.require_store(network)
        store = GrantedStore(
            lambda *_: probe,
            origin,
            allowed=membership.store_allowed(network),
            name=f"the store at {origin}",
            silence_s=_ANSWER_S,
            trust=self._trust if membership.store is None else None,
        )
        began = time.monotonic()
        with closing(store):
            store.size(standing.store.key)
        return f"{store} answers, in {time.monotonic() - began:.1f} s"

    def _client(self, key: NodeKey | None) -> DeskClient:
        return DeskClient(self._its.address, self._ca_file, key, timeout_s=_ANSWER_S)


def _certificate(address: str, trust: ssl.SSLContext) -> x509.Certificate:
    """What the other side shows, through a proxy or not. Raises httpx2.RequestError."""
    url, timeout = f"https://{address}", httpx2.Timeout(_ANSWER_S)
    with http_client(url, trust, timeout) as client, client.stream("GET", url) as answer:
        tls = answer.extensions["network_stream"].get_extra_info("ssl_object")
        return x509.load_der_x509_certificate(tls.getpeercert(True))


def _issuer(address: str) -> str:
    """Who issued what the other side shows, as that says: nothing of it is believed."""
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    try:
        return printable(_certificate(address, trust).issuer.rfc4514_string())[:200]
    except (httpx2.RequestError, ValueError):
        return "unknown"
