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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from photon.config import NetworkConfig, NodeConfig, load_node_config
from photon.data import open_data
from photon.deploy.checks import (
    KEEP_IT_RIGHT,
    Check,
    checked,
    flower,
    require_room,
    skew_check,
    synchronised,
)
from photon.deploy.join import CA_FILE, KEY_FILE, PENDING_KEY_FILE, RECORD, require_tokenizer
from photon.deploy.supervisor import runner
from photon.errors import (
    CertificateError,
    DeployError,
    InvitationError,
    PhotonError,
    UnreachableError,
)
from photon.membership.invitation import (
    Invitation,
    SharedTokenizer,
    certificate_fingerprint,
    read_invitation,
)
from photon.membership.keys import NodeKey
from photon.silo.desk_client import DeskClient, Standing
from photon.silo.policy import (
    MEMBERSHIP_FILE,
    Membership,
    own_part,
    read_membership,
    require_our_version,
    require_same_data,
)
from photon.store.dialling import proxy_to
from photon.store.granted_store import GrantedStore
from photon.store.presign import Grant

_ANSWER_S = 10.0
#: The aggregator makes its own anew long before.
_CERTIFICATE_DAYS = 14
_LATER = "is looked at once this node is a member: join, then `photon join --check`"


@dataclass(frozen=True)
class Aggregator:
    """Whom this node will speak to, as its invitation or its membership has it.

    Attributes:
        name: of the member.
        address: "host:port" of the door.
        ca_pem, ca_fingerprint: of the authority, as they came.
        ca_source: the file that ca_pem is from.
        membership: None before joining.
        tokenizer: that the invitation names.
    """

    name: str
    address: str
    ca_pem: str
    ca_fingerprint: str
    ca_source: Path
    membership: Membership | None = None
    tokenizer: SharedTokenizer | None = None


def preflight(
    home: Path, node_file: Path, *, invitation: Path | None = None, address: str | None = None
) -> list[Check]:
    """Look at node.toml, invitation or membership, key, data, machine, aggregator and store.

    Args:
        home: of the node; need not be there yet.
        node_file: node.toml.
        invitation: None where this home is a member's already.
        address: the aggregator's new one, where it has moved.
    """
    found: list[Check] = []
    nodes: list[NodeConfig] = []
    known: list[Aggregator] = []
    found.append(checked("node.toml", lambda: _node(node_file, nodes)))
    what = "membership" if invitation is None else "invitation"
    found.append(checked(what, lambda: _aggregator(home, invitation, address, known)))
    found.append(checked("key", lambda: _key(home, invitation is not None)))
    if nodes:
        node, who = nodes[0], (known[0] if known else None)
        found.append(checked("data", lambda: _data(node, who)))
        found.append(checked("disk", lambda: _disk(home, node)))
        found.append(checked("compute", lambda: _compute(node)))
    else:
        found += [_skipped(name, "node.toml") for name in ("data", "disk", "compute")]
    found.append(checked("flower", flower))
    if known:
        network = nodes[0].network if nodes else NetworkConfig()
        found += _outside(home, known[0], network, found)
    else:
        names = ("authority", "address", "door", "version", "clock", "member", "store")
        found += [_skipped(name, what) for name in names]
    return found


def _skipped(name: str, before: str) -> Check:
    return Check(name, "skip", f"not looked at: {before} first")


# --- here -----------------------------------------------------------------------------------------


def _node(path: Path, nodes: list[NodeConfig]) -> Check:
    node = load_node_config(path)
    nodes.append(node)
    policy = node.policy
    rules = [f"runs {', '.join(policy.runs) or 'none'}", f"peers {', '.join(policy.peers)}"]
    if policy.min_participants > 1:
        rules.append(f"{policy.min_participants} participants or more")
    limits = ("max_epsilon", "max_local_steps", "max_parameters")
    rules += [f"{name} {most:,}" for name in limits if (most := getattr(policy, name)) is not None]
    rules.append(f"model paths {', '.join(policy.model_paths) or 'none'}")
    words = f"{path}; policy: {'; '.join(rules)}"
    if not policy.runs or policy.max_epsilon is not None:
        rule = "policy.runs" if not policy.runs else "policy.max_epsilon"
        return Check(
            "node.toml",
            "warn",
            words,
            f"{rule} refuses every run today: see [policy] in docs/deploy.md.",
        )
    return Check("node.toml", "ok", words)


def _aggregator(
    home: Path, file: Path | None, address: str | None, known: list[Aggregator]
) -> Check:
    """Who invited this node, or whose member it is."""
    if file is not None:
        invitation = read_invitation(file)
        found = _invited(home, file, invitation)
        known.append(
            Aggregator(
                invitation.name,
                invitation.address,
                invitation.ca_pem,
                invitation.ca_fingerprint,
                file,
                tokenizer=invitation.tokenizer,
            )
        )
        return found
    if not (home / MEMBERSHIP_FILE).exists():
        raise InvitationError(
            f"{home} is no member's home yet",
            hint="Look with the invitation: `photon join --check --invite FILE`.",
        )
    membership = read_membership(home)
    if address is not None:
        membership = replace(membership, address=address)
    try:
        pem = (home / CA_FILE).read_text(encoding="ascii")
    except (OSError, UnicodeError) as error:
        raise CertificateError(
            f"can't read {home / CA_FILE}: {error}",
            hint="It came with the invitation: restore it from a backup, or join again.",
        ) from error
    known.append(
        Aggregator(
            membership.name,
            membership.address,
            pem,
            membership.ca_fingerprint,
            home / CA_FILE,
            membership,
        )
    )
    words = f"{membership.name} in {home}, at {known[0].address}"
    running = runner(home / RECORD)
    if running is not None:
        words += f"; photon join runs there (pid {running or 'unknown'})"
    return Check("membership", "ok", words)


def _invited(home: Path, file: Path, invitation: Invitation) -> Check:
    invitation.require_unexpired(time.time())
    hours = (invitation.expires_at - time.time()) / 3600
    words = f"{file}: {invitation.name} at {invitation.address}, unused so far as this node knows"
    if (home / MEMBERSHIP_FILE).exists():
        member = read_membership(home).name
        if member != invitation.name:
            raise InvitationError(
                f"{home} is the home of {member}, the invitation is for {invitation.name}",
                hint="Choose another --home for another member.",
            )
        words += f"; {home} is {member}'s, which gets a new key"
    if hours < 1:
        return Check(
            "invitation",
            "warn",
            f"{words}; it expires in {hours * 60:.0f} minutes",
            "Join soon, or ask the aggregator's operator for a new one.",
        )
    return Check("invitation", "ok", f"{words}; valid for {hours:.0f} hours")


def _key(home: Path, invited: bool) -> Check:
    pending = home / PENDING_KEY_FILE
    if invited and not pending.exists():
        return Check("key", "ok", f"{home / KEY_FILE} is made when this node joins")
    path = pending if invited else home / KEY_FILE
    key = NodeKey.load(path)
    return Check("key", "ok", f"{path}, readable by its owner only: {key.fingerprint}")


def _data(node: NodeConfig, known: Aggregator | None) -> Check:
    folder = open_data(node.data.path)
    if known is None:
        words = f"{node.data.path} holds {', '.join(folder.silos)}"
        return Check("data", "ok", words)
    data = own_part(folder, node.data, known.name)
    tokens = data.silos[known.name].train_tokens
    words = f"{node.data.path}, sha256 {data.sha256[:12]}..., {tokens:,} tokens to train on"
    require_tokenizer(known.tokenizer, data, known.name)
    if known.membership is None:
        if known.tokenizer is None:
            unknown = "the invitation does not name the federation's tokenizer"
            hint = "If the text was cut by another one, this site can't train: ask the operator."
            return Check("data", "warn", f"{words}; {unknown}", hint)
        return Check("data", "ok", f"{words}, the federation's tokenizer; joining registers it")
    require_same_data(data, known.membership.data_sha256, known.name)
    # A task reads it through; that takes as long as the disk does, and `data show --verify` does.
    return Check("data", "ok", f"{words}; as registered")


def _disk(home: Path, node: NodeConfig) -> Check:
    needed = node.disk.min_free_gib
    free = require_room(home, needed, "--home")
    words = f"{free:.1f} GiB are free under {home.absolute()}; {needed:g} stay free"
    if free <= needed + 10:
        return Check(
            "disk",
            "warn",
            words,
            "A task on P parameters takes up to 28 P bytes besides, and is refused where they "
            "are not there.",
        )
    return Check("disk", "ok", words)


def _compute(node: NodeConfig) -> Check:
    try:  # seconds, and memory that nobody else here needs
        from photon.training.device import cores, plan_compute, ranks_of_a_node
    except ImportError as error:
        raise DeployError(
            f"PyTorch can't be imported: {error}",
            hint="Install Photon with its dependencies into this environment.",
        ) from error
    ranks = ranks_of_a_node(node.compute, workers=0)
    plan = plan_compute(node.compute, processes=ranks)
    here = cores()
    words = (
        f"{ranks} x {plan.device}, {plan.precision}, {plan.threads} threads each, {here} cores here"
    )
    if plan.threads * ranks > here:
        return Check(
            "compute",
            "warn",
            words,
            "More threads than cores slow each other down: lower compute.threads, or leave it out.",
        )
    return Check("compute", "ok", words)


# --- the aggregator -------------------------------------------------------------------------------


def _outside(
    home: Path, known: Aggregator, network: NetworkConfig, before: list[Check]
) -> list[Check]:
    """All that needs the network, each only where what it needs is well."""
    found = [checked("authority", lambda: _authority(known))]
    if found[0].verdict == "fail":
        names = ("address", "door", "version", "clock", "member", "store")
        return found + [_skipped(name, "authority") for name in names]
    found.append(checked("address", lambda: _address(known.address)))
    if found[-1].verdict == "fail":
        names = ("door", "version", "clock", "member", "store")
        return found + [_skipped(name, "address") for name in names]
    health: dict[str, Any] = {}
    # An invitation's authority is in no file of its own yet.
    with tempfile.TemporaryDirectory(prefix="photon-check-") as folder:
        ca_file = Path(folder) / CA_FILE
        ca_file.write_text(known.ca_pem, encoding="ascii")
        found.append(checked("door", lambda: _door(known, ca_file, health)))
        if not health:
            names = ("version", "clock", "member", "store")
            return found + [_skipped(name, "door") for name in names]
        found.append(checked("version", lambda: _version(known, health)))
        found.append(checked("clock", lambda: _clock(known, health)))
        membership = known.membership
        if membership is None:
            return found + [Check(name, "skip", _LATER) for name in ("member", "store")]
        if any(one.name == "key" and one.verdict == "fail" for one in before):
            return found + [_skipped(name, "key") for name in ("member", "store")]
        standings: list[Standing] = []
        found.append(checked("member", lambda: _member(home, known, ca_file, standings)))
        if not standings:
            return [*found, _skipped("store", "member")]
        found.append(checked("store", lambda: _store(membership, network, ca_file, standings[0])))
    return found


def _authority(known: Aggregator) -> Check:
    try:
        carried = certificate_fingerprint(known.ca_pem)
    except ValueError as error:
        raise CertificateError(
            f"{known.ca_source} holds no certificate: {error}",
            hint="Restore it from a backup, or ask for a new invitation.",
        ) from error
    if carried != known.ca_fingerprint:
        raise CertificateError(
            f"{known.ca_source} names the authority {known.ca_fingerprint}, and the one that it "
            f"carries is {carried}",
            hint="It was damaged or changed on its way: ask for a new invitation."
            if known.membership is None
            else f"{CA_FILE} was changed since this node joined: restore it, or join again.",
        )
    return Check("authority", "ok", carried)


def _address(address: str) -> Check:
    parts = urlsplit(f"https://{address}")
    host, port = parts.hostname or "", parts.port or 443
    proxy = proxy_to(f"https://{address}")
    if proxy is not None:
        return Check("address", "ok", f"{address}, through the proxy {proxy}")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnreachableError(
            f"{host} has no address here: {error}",
            hint="Is the name right, and does this machine's DNS know it? If the aggregator has "
            "moved: `photon join HOST:PORT`.",
        ) from error
    addresses = list(dict.fromkeys(str(place[4][0]) for place in places))
    last: OSError | None = None
    for each in addresses[:4]:
        try:
            with socket.create_connection((each, port), timeout=_ANSWER_S):
                named = host if host == each else f"{host} ({each})"
                return Check("address", "ok", f"port {port} of {named} answers")
        except OSError as error:
            last = error
    named = host if addresses == [host] else f"{host} ({', '.join(addresses)})"
    raise UnreachableError(
        f"{named}: port {port} does not answer: {last}",
        hint="Is `photon serve` up, is the port right, and does a firewall on the way let this "
        "machine connect to it?",
    )


def _door(known: Aggregator, ca_file: Path, health: dict[str, Any]) -> Check:
    client = DeskClient(known.address, ca_file, None, timeout_s=_ANSWER_S)
    try:
        health |= client.health()
    finally:
        client.close()
    words = "its certificate is of that authority, and the desk answers"
    days = _days_left(known.address, ca_file)
    if days is None:
        return Check("door", "ok", words)
    words += f"; valid for {days:.0f} days"
    if days < _CERTIFICATE_DAYS:
        hint = "The aggregator's operator renews it; this node needs nothing new for that."
        return Check("door", "warn", words, hint)
    return Check("door", "ok", words)


def _days_left(address: str, ca_file: Path) -> float | None:
    """Until the door's certificate expires; None where a proxy is between."""
    parts = urlsplit(f"https://{address}")
    if proxy_to(f"https://{address}") is not None:
        return None
    trust = ssl.create_default_context(cafile=str(ca_file))
    try:
        with (
            socket.create_connection((parts.hostname, parts.port), timeout=_ANSWER_S) as plain,
            trust.wrap_socket(plain, server_hostname=parts.hostname) as tls,
        ):
            until = (tls.getpeercert() or {}).get("notAfter")
    except OSError:
        return None
    return (ssl.cert_time_to_seconds(str(until)) - time.time()) / 86_400 if until else None


def _version(known: Aggregator, health: dict[str, Any]) -> Check:
    theirs = str(health.get("version", "?"))
    require_our_version(theirs, known.name)
    return Check("version", "ok", f"the aggregator runs Photon {theirs[:40]}")


def _clock(known: Aggregator, health: dict[str, Any]) -> Check:
    theirs = health.get("server_time")
    if not isinstance(theirs, int | float):
        return Check("clock", "skip", "this aggregator does not say what time it has")
    moment = datetime.fromtimestamp(theirs, UTC)
    found = skew_check("clock", moment, datetime.now(UTC), "the aggregator")
    if found.verdict == "ok" and synchronised() is False:
        words = f"{found.found}, but nothing keeps this clock right"
        return Check("clock", "warn", words, KEEP_IT_RIGHT)
    return found


def _member(home: Path, known: Aggregator, ca_file: Path, standings: list[Standing]) -> Check:
    key = NodeKey.load(home / KEY_FILE)
    client = DeskClient(known.address, ca_file, key, timeout_s=_ANSWER_S)
    try:
        standing = client.standing()
    finally:
        client.close()
    standings.append(standing)
    if not standing.registered:
        return Check(
            "member",
            "warn",
            f"{standing.name} is {standing.status}, and not registered for tasks yet",
            "That happens by itself once `photon join` runs; if it stays so, the aggregator's log "
            "says why.",
        )
    return Check("member", "ok", f"{standing.name} is {standing.status} and registered for tasks")


def _store(
    membership: Membership, network: NetworkConfig, ca_file: Path, standing: Standing
) -> Check:
    probe = standing.probe
    if isinstance(probe, PhotonError):
        raise probe
    origin = membership.store_origin
    membership.require_store(network)

    def leave(*_: object) -> Grant:
        return probe

    store = GrantedStore(
        leave,
        origin,
        allowed=membership.store_allowed(network),
        name=f"the store at {origin}",
        silence_s=_ANSWER_S,
        ca_file=ca_file if membership.store is None else None,
    )
    began = time.monotonic()
    try:
        store.size(standing.probe_key)
    finally:
        store.close()
    return Check("store", "ok", f"{store} answers, in {time.monotonic() - began:.1f} s")
