"""What this site takes part in: who it is, its text, what it allows, why a run is refused.

Everything is checked before anything of a run is read, built or downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from photon.config.addresses import host_and_port
from photon.errors import (
    DataChangedError,
    EmptySiloError,
    MembershipError,
    PolicyError,
    ProtocolError,
    VocabularyMismatchError,
    some,
)
from photon.membership.keys import canonical_pem
from photon.store.dialling import Allowed
from photon.store.disk import write_json
from photon.store.granted_store import require_origin
from photon.version import photon_version

if TYPE_CHECKING:  # they import torch, and `photon join` reads the membership without it
    from photon.config import NetworkConfig, PolicyConfig, PrivacyConfig, RunConfig
    from photon.config.node import NodeDataConfig
    from photon.data import PreparedData
    from photon.federation.envelopes import Ask

#: What `photon join` leaves in a node's home.
MEMBERSHIP_FILE = "membership.json"


@dataclass(frozen=True)
class Membership:
    """Who this node is in a federation.

    Attributes:
        name: of the member; the silo's name in every run.
        address: of the aggregator's door, "host:port".
        ca_fingerprint: of the authority that signed the door's certificate.
        aggregator_key: PEM of the key that signs the aggregator's Asks, as the invitation had it;
            None where an older Photon joined.
        data_sha256: of the data it registered with; None holds it against nothing older than the
            trainer's own start.
        store: scheme, host and port of the store, where it is not behind the door.
    """

    name: str
    address: str
    ca_fingerprint: str
    aggregator_key: str | None = None
    data_sha256: str | None = None
    store: str | None = None

    @property
    def store_origin(self) -> str:
        """Scheme, host and port that every grant must name."""
        return self.store or f"https://{self.address}"

    def store_allowed(self, network: NetworkConfig) -> list[str]:
        """Where the store may lie inside this site's network, as photon.store.dialling.Allowed.

        The door may: whoever accepted the invitation chose it.
        """
        if self.store is None:
            return [host_and_port(self.address)[0]]
        return network.allow_private_addresses

    def require_store(self, network: NetworkConfig) -> None:
        """Refuse a store that this node would not speak to.

        Raises:
            AccessRefusedError: not encrypted, or inside this site's network.
        """
        _, host, port = require_origin(self.store_origin)
        Allowed(self.store_allowed(network)).require(host, port)

    def require_key(self) -> str:
        """The aggregator's key.

        Raises:
            MembershipError: it is not known, or is none.
        """
        if self.aggregator_key is None:
            raise MembershipError(
                f"the membership of {self.name} was made by an older Photon: it has no key of the "
                "aggregator's, by which a node knows the aggregator's tasks now",
                hint="Ask the aggregator's operator for a rotation invitation (`photon members "
                f"rotate {self.name}`), and join with it: `photon join --invite FILE`.",
            )
        return canonical_pem(self.aggregator_key)


def read_membership(home: Path) -> Membership:
    """What joining left in a node's home.

    Raises:
        MembershipError: nothing, or nothing that can be read.
    """
    path = home / MEMBERSHIP_FILE
    again = "Join again: `photon join --invite FILE`."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = Membership(
            record["name"],
            record["address"],
            record.get("fingerprint") or record["ca_fingerprint"],
            record.get("aggregator_key"),
            record.get("data_sha256"),
            record.get("store"),
        )
    except FileNotFoundError:
        raise MembershipError(f"no membership at {path}", hint=again) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MembershipError(f"can't read {path}: {error!r}", hint=again) from error
    for key, value in vars(found).items():
        optional = key in ("aggregator_key", "data_sha256", "store")
        if not (isinstance(value, str) and value) and not (optional and value is None):
            raise MembershipError(f"{path}: {key} = {value!r} is not a string", hint=again)
    try:
        host_and_port(found.address)
    except ValueError as error:
        raise MembershipError(f"{path}: address = {error}", hint=again) from None
    return found


def require_for_us(ask: Ask, membership: Membership) -> None:
    """Refuse what another silo, or another Photon, should answer.

    Raises:
        ProtocolError: names what does not match.
    """
    if ask.silo != membership.name:
        raise ProtocolError(
            f"a task for silo {ask.silo!r} reached {membership.name!r}",
            hint="The aggregator's roster has this node under another name; register it again.",
        )
    if ask.silo not in ask.run.silos:
        raise ProtocolError(f"a task for {ask.silo!r}, which is not among the run's silos")
    require_our_version(ask.photon_version, membership.name)


def require_our_version(theirs: str, name: str) -> None:
    """Refuse an aggregator whose Photon has another minor version than this one.

    Raises:
        ProtocolError: names both.
    """
    mine = photon_version()
    if _minor(mine) != _minor(theirs):
        raise ProtocolError(
            f"the aggregator runs Photon {theirs[:40]}, {name} runs {mine}",
            hint="Install the same version on both sides; the last of its three numbers may "
            "differ.",
        )


def check(ask: Ask, config: RunConfig, policy: PolicyConfig, privacy: PrivacyConfig) -> None:
    """Hold a run against this site's rules.

    Args:
        ask: one of its tasks.
        config: the run's, as this site would train it.
        policy: [policy] of node.toml.
        privacy: what this site's answers go through.

    Raises:
        PolicyError: naming the rule, what the run asks, and what the site allows.
    """
    if ask.round > config.most_rounds:
        raise ProtocolError(f"round {ask.round} of a run of {config.most_rounds}")
    name, rounds, path = config.run.name, config.federation.rounds, config.model.path
    others = [silo for silo in ask.run.silos if silo != ask.silo]
    strangers = [silo for silo in others if not _matches(silo, policy.peers)]
    least = least_merged(ask, config)
    steps = max(config.local.steps, ask.fit.steps if ask.fit is not None else 0)
    tokenizer, trusted = ask.run.tokenizer, policy.trust_tokenizer
    _hold("runs", _matches(name, policy.runs), f"the run is called {name!r}", _listed(policy.runs))
    company = f"{some(strangers)} would take part too"
    _hold("peers", not strangers, company, _listed(policy.peers))
    _hold(
        "min_participants",
        least >= policy.min_participants,
        f"a round may merge as few as {least} (of {len(ask.run.silos)} silos; "
        "federation.sample and federation.quorum decide)",
        f"{policy.min_participants} or more",
    )
    _hold(
        "secure_aggregation",
        config.privacy.secure_aggregation or not policy.secure_aggregation,
        "the aggregator would see single updates",
        "privacy.secure_aggregation = true",
    )
    most, target, z = policy.max_epsilon, privacy.target_epsilon, privacy.noise_multiplier
    promised = f"an epsilon of {target:g}" if target else "differential privacy"
    promised += " by noise that the aggregator is trusted with" if privacy.at_sum else ""
    enough = not privacy.at_sum and bool(target <= (most or 0) if target else z)
    _hold(
        "max_epsilon",
        most is None or enough,
        f"the run promises {promised if target or privacy.at_sum else 'no ' + promised}",
        f"an epsilon of at most {most or 0:g}, by noise of this site's own",
    )
    _hold_most("max_rounds", rounds, policy.max_rounds, f"it has {rounds} rounds")
    scores = ask.evaluate is None or policy.evaluate != "never"
    _hold("evaluate", scores, "a state is to be scored on this site's text", "no state")
    _hold_most(
        "max_local_steps", steps, policy.max_local_steps, f"a task takes {steps} local steps"
    )
    _hold(
        "model_paths",
        path is None or _may_read(path, policy.model_paths),
        f"model.path is {path!r}",
        _listed(policy.model_paths) if policy.model_paths else "presets only",
    )
    _hold(
        "trust_tokenizer",
        trusted is None or trusted == tokenizer,
        f"the run's tokenizer has sha256 {tokenizer}",
        f"{trusted}",
    )


def note_scored(ask: Ask, policy: PolicyConfig, folder: Path) -> None:
    """Refuse to score another state than a round's one, and write down which that is.

    Args:
        folder: of the run in the node's home.

    Raises:
        PolicyError: policy.evaluate allows one state a round, and rounds go up.
        DiskFullError: no room.
    """
    path, wanted = folder / "scored.json", {"round": ask.round, "state": ask.state.sha256}
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = None
    if last == wanted:
        return
    if policy.evaluate == "once" and last is not None:
        _hold(
            "evaluate",
            ask.round > last["round"],
            f"another state is to be scored in round {ask.round}, after one of round "
            f"{last['round']} was",
            "one state a round",
        )
    write_json(path, wanted, "which state was scored")


def require_size(parameters: int, policy: PolicyConfig) -> None:
    """Hold a model's size against this site's rules.

    Raises:
        PolicyError: it is too large.
    """
    has = f"the model has {parameters:,} parameters"
    _hold_most("max_parameters", parameters, policy.max_parameters, has)


def require_data(ask: Ask, data: PreparedData, registered: str | None) -> None:
    """Refuse to train on other text than was registered, or that was cut by another tokenizer.

    Args:
        registered: sha256 of the data's manifest; None for any.

    Raises:
        DataChangedError: the data is another.
        VocabularyMismatchError: the run has another tokenizer.
    """
    require_same_data(data, registered, ask.silo)
    for what, mine, theirs in (
        ("tokenizer's sha256", data.tokenizer_sha256, ask.run.tokenizer),
        ("vocabulary size", data.vocab_size, ask.run.vocab_size),
        ("end-of-text token", data.eos_id, ask.run.eos_id),
    ):
        if mine != theirs:
            raise VocabularyMismatchError(
                f"the text of {ask.silo} was cut by another tokenizer than the run's: the {what} "
                f"is {mine}, the run's {theirs}",
                hint="Prepare the text again with the federation's tokenizer: `photon data prepare "
                "--tokenizer FOLDER`.",
            )


def own_part(data: PreparedData, config: NodeDataConfig, name: str) -> PreparedData:
    """The folder as if this site's were the only text in it.

    Args:
        data: the opened folder.
        config: [data] of node.toml, which may say which silo of the folder it is.
        name: of the member.

    Raises:
        EmptySiloError: no silo of it is this site's.
    """
    chosen = config.silo
    if chosen is None:
        chosen = name if name in data.silos or len(data.silos) != 1 else next(iter(data.silos))
    if chosen not in data.silos:
        raise EmptySiloError(
            f"{data.path} holds no silo {chosen!r}, it holds {', '.join(data.silos)}",
            hint="Say in node.toml which one is this site's: data.silo = NAME.",
        )
    own = replace(data.silos[chosen], name=name)
    return replace(data, silos={name: own})


def require_same_data(data: PreparedData, registered: str | None, name: str) -> None:
    """Refuse other text than a member registered.

    Args:
        registered: sha256 of the data's manifest; None for any.

    Raises:
        DataChangedError: the data is another.
    """
    if registered is not None and data.sha256 != registered:
        raise DataChangedError(
            f"the data of {name} has sha256 {data.sha256[:12]}..., it registered "
            f"{registered[:12]}...",
            hint="Point data.path of node.toml at the registered folder, or join again with a new "
            "invitation to register this one.",
        )


def _hold(rule: str, kept: bool, asked: str, allowed: str) -> None:
    if not kept:
        raise PolicyError(
            f"this site's policy refuses the run: {asked}; policy.{rule} allows {allowed}",
            hint=f"The site decides in [policy] of its node.toml; see policy.{rule}.",
        )


def _hold_most(rule: str, value: int, most: int | None, asked: str) -> None:
    if most is not None:
        _hold(rule, value <= most, asked, f"{most:,}")


def few_silos(least: int) -> str:
    """What a round of fewer than three silos shows, in words for both sides' screens."""
    return (
        f"a round may merge {'one update only' if least == 1 else f'{least} updates only'}: of two "
        "silos each can compute the other's update from the result, and of one it is the result"
    )


def least_merged(ask: Ask, config: RunConfig) -> int:
    """Fewest updates that a round of this run is closed with."""
    silos = len(set(ask.run.silos))
    return config.quorum_of(min(config.federation.sample or silos, silos))


def _may_read(path: str, patterns: Sequence[str]) -> bool:
    # A pattern's * matches slashes, too: "models/*" must not lead out of models by "..".
    return path in patterns or (".." not in Path(path).parts and _matches(path, patterns))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(patterns) or "none"


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
