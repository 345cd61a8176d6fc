"""[federation.children.NAME]: participants that are federations themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from photon.config.link import CodecText
from photon.config.outer import OuterConfig
from photon.config.parts import ATTENTION_RULES
from photon.config.privacy import LEAST_SUMMED, PrivacyConfig, unsummable, voided
from photon.config.section import Positive, Section
from photon.errors import IncompatibleConfigError, some

if TYPE_CHECKING:
    from photon.config.run import RunConfig

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class PolicyConfig(Section):
    """[federation.policy]: residuals; what is not set here is as in the federation around it."""

    jurisdiction: _Name | None = Field(
        default=None, description='Whose law holds for it, in a name of your choice: "EU".'
    )
    residuals: Literal["none", "out", "in", "both"] | None = Field(
        default=None,
        description="out: layers of members, one by one, may leave where they fit badly; in: those "
        "of others are taken in, and handed on. none, if nobody says.",
    )
    never_with: list[_Name] | None = Field(
        default=None, description="Jurisdictions with which it shares none, directly or not."
    )

    def lets(self, *ways: str) -> bool:
        return self.residuals in (*ways, "both")

    def within(self, above: PolicyConfig) -> PolicyConfig:
        """With what it leaves open from the federation around it."""
        return above.model_copy(update={name: one for name, one in self if one is not None})

    def bars(self, passed: Collection[str | None], barred: Collection[str] | None) -> bool:
        """Whether it is kept from what was in these jurisdictions, with these barriers."""
        return self.jurisdiction in (barred or ()) or any(
            one in passed for one in self.never_with or ()
        )


class Level(Section):
    """What any federation says, the whole one and those inside it."""

    sample: Positive | None = Field(
        default=None,
        description="Participants of a round; all of them by default. Not of a group's nodes, each "
        "of which reads its part of the text.",
    )
    sampling: Literal["uniform", "weighted"] = Field(
        default="uniform",
        description="How participants are drawn: alike, or by their training tokens. weighted: a "
        "silo with 0.7 of the text has 0.7 of the merge in expectation: it is drawn so often, and "
        "its update counts once for each time.",
    )
    weighting: Literal["tokens", "equal", "data"] = Field(
        default="tokens",
        description="Weight of an update. tokens: those it was trained on this round, the same for "
        "all while tau and batch are; data: all training tokens of its silo; equal: one each.",
    )
    quorum: Positive | None = Field(
        default=None,
        description="Fewest good updates of any merge; half of the participants by default. With "
        "fewer a round is lost, and a group's whole update comes to nothing.",
    )
    levels: Literal["at_once", "in_turn"] = Field(
        default="at_once",
        description="Whether silos and groups in it train at once, or in turn: silos in one round, "
        "groups in the next, from what the silos came to. Each is one of its rounds.",
    )
    children: dict[_Name, ChildConfig] = Field(
        default_factory=dict,
        description="Participants that are federations themselves, of silos or of nodes that split "
        "a silo's text: see [federation.children.NAME].",
    )
    policy: PolicyConfig = Field(
        default_factory=PolicyConfig, description="See [federation.policy]."
    )


class ChildConfig(Level):
    """[federation.children.NAME]: a group that merges by itself and answers as one participant."""

    nodes: Positive | None = Field(
        default=None, description="NAME is a silo of the data; so many nodes split its text."
    )
    silos: list[str] = Field(
        default_factory=list,
        description="NAME is a new name; these silos of the data are its members.",
    )
    rounds: Positive = Field(
        default=1, description="Inner rounds for each round of the level above."
    )
    steps: Positive | None = Field(
        default=None,
        description="Local steps of an inner round; rounds x steps are the steps above, as they "
        "are by default.",
    )
    pace: Literal["synchronous"] = Field(
        default="synchronous",
        description="An inner round waits for all who were drawn, or for deadline_s. Any other "
        "pace needs a clock for each group.",
    )
    deadline_s: Annotated[float, Field(gt=0, le=30 * 86_400)] | None = Field(
        default=None, description="Of an inner round; as the level above it by default."
    )
    merging_rule: Literal["mean", "median", "trimmed_mean"] = Field(
        default="mean", description="How members' updates become one, as federation.merging_rule."
    )
    outer: OuterConfig = Field(
        default_factory=lambda: OuterConfig(), description="Its own outer optimizer, as [outer]."
    )
    update_codec: CodecText = Field(
        default="fp32",
        description="How its update is encoded, as link.update_codec, with feedback as [link] has "
        "it. Silos encode theirs by [link], wherever they are.",
    )

    privacy: PrivacyConfig | None = Field(
        default=None,
        description="What updates of silos in it go through, as [privacy]. The table nearest to a "
        "silo holds, stricter or not: those above it can't say otherwise, only what it leaves out.",
    )
    update_privacy: PrivacyConfig = Field(
        default_factory=PrivacyConfig,
        description="What its own update goes through before it is encoded, as [privacy]; and each "
        "residual of a member of it.",
    )
    written_in: str | None = Field(
        default=None,
        description="The file that this table came from, where the run file says file = "
        '"eu.toml" in its place. Photon writes it.',
    )

    def silos_of(self, name: str) -> list[str]:
        """The silos of the data below it, at any depth."""
        below = [silo for key, one in self.children.items() for silo in one.silos_of(key)]
        return [name] if self.nodes is not None else self.silos + below

    def holds(self, member: str) -> bool:
        """Whether a silo or group is below it, at any depth."""
        below = self.children.items()
        return member in self.silos or any(member == k or one.holds(member) for k, one in below)

    @property
    def groups(self) -> int:
        """Itself and those below."""
        return 1 + sum(one.groups for one in self.children.values())

    @property
    def leaves(self) -> int:
        """How many train at the same time, at any depth."""
        return self.nodes or len(self.silos) + sum(one.leaves for one in self.children.values())


Level.model_rebuild()  # it names ChildConfig
Children = dict[_Name, ChildConfig]
#: Of a group with secure aggregation: its members keep records of so many, and one more.
MOST_INNER_ROUNDS = 15
#: What a silo in no group is like.
LEAF = ChildConfig(nodes=1)


def at_work(level: Level, silos: int, children: Mapping[str, ChildConfig]) -> float:
    """How many train at the same time, on average: of silos, or nodes, and of groups."""
    kinds = [(False, 1.0)] * silos
    for one in children.values():
        kinds.append((one.nodes is None, at_work(one, one.nodes or len(one.silos), one.children)))
    at_once = level.levels == "at_once"
    stages = [[n for group, n in kinds if at_once or group == turn] for turn in (False, True)]
    drawn = [sum(one) * min(level.sample or len(one), len(one)) / len(one) for one in stages if one]
    return sum(drawn) / len(drawn)


def whose_turn(level: Level, members: Iterable[str], number: int) -> list[str]:
    """Those of the members who may take part in a round: all, or silos or groups, in turn."""
    if level.levels == "at_once":
        return [*members]
    silos = [one for one in members if level.children.get(one, LEAF).nodes is not None]
    return silos if number % 2 else [one for one in members if one not in silos]


def participants(
    children: Mapping[str, ChildConfig], silo_tokens: Mapping[str, int]
) -> dict[str, int]:
    """Training tokens by participant: silos, and in the place of those in groups, these."""
    tokens = dict(silo_tokens)
    for name, child in children.items():
        tokens[name] = sum(tokens.pop(silo, 0) for silo in child.silos_of(name))
    return tokens


def group_of(children: Mapping[str, ChildConfig], member: str) -> str:
    """The participant that this silo, or group, is in, or is."""
    return next((name for name, one in children.items() if one.holds(member)), member)


def inside(config: RunConfig, child: ChildConfig) -> RunConfig:
    """The run file as a group's members have it: the clock is that of the whole run."""
    federation = {key: getattr(child, key) for key in (*Level.model_fields, "merging_rule")}
    federation["rounds"] = config.federation.rounds * child.rounds
    federation["deadline_s"] = child.deadline_s or config.federation.deadline_s
    federation["policy"] = child.policy.within(config.federation.policy)
    return config.having(
        federation=federation,
        local={"steps": config.local.steps // child.rounds},
        link={"broadcast_codec": "fp32"},
        eval={"per_silo": bool(config.parts.personal)},  # which nobody else can score
        outer=child.outer,
        privacy=_privacy_inside(config, child),
    )


def _privacy_inside(config: RunConfig, child: ChildConfig) -> PrivacyConfig:
    privacy = child.privacy or config.privacy
    if child.nodes is None:
        return privacy
    return privacy.model_copy(update={"secure_aggregation": False})  # all of them are one silo


def privacy_of(config: RunConfig, silo: str) -> PrivacyConfig:
    """What a silo's update goes through before it leaves its node."""
    privacy, children = config.privacy, config.federation.children
    while child := children.get(group_of(children, silo)):
        privacy, children = child.privacy or privacy, child.children
    return privacy


def mechanisms(config: RunConfig) -> list[PrivacyConfig]:
    """Every [privacy] in the tree."""
    inner = [child for _, child in tables(config.federation.children)]
    inner += [config.federation.branches] if config.federation.branches else []
    own = [one for child in inner for one in (child.privacy, child.update_privacy) if one]
    return [config.privacy, *own]


def branches_of(like: ChildConfig, silos: Collection[str], above: str = "") -> Children:
    """Groups of silos whose names agree up to a dot, each like one table, to any depth.

    Args:
        above: what their names have in common already.
    """
    groups: dict[str, list[str]] = {}
    for silo in sorted(silos):
        head, dot, _ = silo.removeprefix(above).partition(".")
        if dot:
            groups.setdefault(f"{above}{head}", []).append(silo)
    tree: Children = {}
    for name, members in groups.items():
        own = {
            "silos": [one for one in members if "." not in one.removeprefix(f"{name}.")],
            "children": branches_of(like, members, f"{name}."),
        }
        # Who has only silos, or only groups, has nobody to take turns with.
        own["levels"] = like.levels if all(own.values()) else "at_once"
        tree[name] = like.model_copy(update=own)
    return tree


def with_branches(config: RunConfig, silos: Collection[str]) -> RunConfig:
    """The run file with its groups by name written out, if it has such."""
    if (like := config.federation.branches) is None:
        return config
    groups = {"children": branches_of(like, silos), "branches": None}
    return config.having(federation=groups)


def refuse_children(config: RunConfig, where: str) -> None:
    """Raise IncompatibleConfigError if there are groups, which `where` knows nothing of yet."""
    if config.federation.children or config.federation.branches:
        raise _refused(f"is for `photon simulate`, and {where} has no groups yet")


def lets_residuals(config: RunConfig) -> bool:
    """Whether a policy anywhere in the tree lets some out or in."""
    inner = (one for _, one in tables(config.federation.children))
    return any(one.policy.lets("out", "in") for one in (config.federation, *inner))


def _check_policies(
    config: RunConfig, place: str = "federation", above: PolicyConfig | None = None
) -> None:
    federation, policy = config.federation, config.federation.policy
    merging, rule = federation.merging_rule, config.parts.key_rule if config.parts.key else "none"
    said, why = f'policy: residuals = "{policy.residuals}"', None
    if rule in ATTENTION_RULES and merging in ("median", "trimmed_mean", "clipped_mean", "edit"):
        why = f'merging_rule = "{merging}" is robust, and parts.key_rule = "{rule}" is not'
    elif policy.lets("out", "in") and rule != "attention":
        why = f'{said} needs parts.key and parts.key_rule = "attention"'
    elif above and policy.lets("out") and not above.lets("in"):
        why = f"{said} has no way up: the federation around it lets none in"
    elif above and policy.lets("out") and above.bars([policy.jurisdiction], policy.never_with):
        law = f"{policy.jurisdiction} and {above.jurisdiction}"
        why = f"{said} has no way up: never_with is between {law}, of the federation around it"
    elif above and (sums := unsummable(config)):
        why = f"privacy: {sums}"
    if why:
        raise IncompatibleConfigError(f"{place}.{why}")
    like = {"*": federation.branches} if federation.branches and above is None else {}
    for name, child in {**federation.children, **like}.items():
        within, where = inside(config, child), f"{place}.children.{name}"
        _check_policies(within, where, policy)
        if child.nodes and within.privacy.at_sum:
            raise IncompatibleConfigError(
                f'{where} has nodes, whose sum nobody masks: use privacy.noise_at = "node"'
            )
        if child.nodes and within.privacy.mechanism == "client" and within.privacy.target_epsilon:
            raise IncompatibleConfigError(
                f"{where} has nodes, each of which answers for its text; target_epsilon is of one "
                'answer a round: use noise_multiplier, or mechanism = "dp_sgd"'
            )
        if within.privacy.secure_aggregation and name in federation.children:
            _check_sum(child, where)
        if config.privacy.secure_aggregation and child.update_codec not in ("fp32", "int8"):
            raise IncompatibleConfigError(
                f'{where}.update_codec = "{child.update_codec}": the update of the group is summed '
                "under masks, and travels in fixed point; leave it out"
            )


def _check_sum(child: ChildConfig, where: str) -> None:
    members = child.sample or len(child.silos) + len(child.children)
    if members < LEAST_SUMMED:
        raise IncompatibleConfigError(
            f"{where} has {members} members a round; secure aggregation sums at least "
            f"{LEAST_SUMMED}: of two, each knows the other's update",
            hint=f"Add members, or let its own aggregator see updates: [{where}.privacy] "
            "secure_aggregation = false. The level above sees their sum alone all the same.",
        )
    if child.rounds > MOST_INNER_ROUNDS:
        raise IncompatibleConfigError(
            f"{where}.rounds = {child.rounds}; with secure aggregation {MOST_INNER_ROUNDS} at "
            "most: members keep what a task that is done again asks for"
        )


def check_served(config: RunConfig) -> None:
    """Raise IncompatibleConfigError for groups that no door has, and what none passes on yet."""
    split = any(one.nodes for one in config.federation.children.values())
    if split or config.federation.branches:
        raise _refused("are members of `photon serve`, with doors of their own; nodes can't be")
    if lets_residuals(config):
        raise IncompatibleConfigError(
            "a deployed tree has no residuals yet, and a policy lets some out or in",
            hint='Leave residuals out of a policy, or "none"; simulate has them (docs/worldlm.md).',
        )


def check_children(config: RunConfig, silos: Collection[str] | None = None) -> None:
    """Raise IncompatibleConfigError for groups that can't be.

    Args:
        silos: of the data, where that is at hand.
    """
    federation = config.federation
    if (like := federation.branches) and (
        federation.children or like.silos or like.children or like.nodes
    ):
        raise _refused(
            "and federation.branches can't both say who is in which group, and branches goes by "
            "silos' names: it has no silos, children or nodes of its own"
        )
    _check_policies(config)
    names = list(_names(federation.children, config.local.steps, "federation"))
    placed = {name for name, is_silo in names if is_silo}
    if not like:
        _check_turns(federation, silos is None or not placed.issuperset(silos), "federation")
    if not names:
        return
    needs = {"merge": "delta", "pace": "synchronous", "unequal_steps": False}
    for key, value in needs.items():
        if (found := getattr(federation, key)) != value:
            raise _refused(f"needs federation.{key} = {value!r} (found {found!r})")
    nodes = [name for name, one in tables(federation.children) if one.nodes is not None]
    if config.parts.kept and nodes:
        raise _refused(
            f"has nodes in {some(nodes)}, which would each keep parts of their own: with "
            "parts.personal, or a parts.key_down other than replace, a silo trains in one node"
        )
    for name, child in tables(federation.children):
        if child.update_privacy.secure_aggregation:
            raise _refused(
                f"has update_privacy.secure_aggregation of {name!r}: whether its update is summed "
                "with others' is said by [privacy] of the level above it"
            )
        if child.update_privacy.target_epsilon and lets_residuals(config):
            raise _refused(
                f"has update_privacy.target_epsilon of {name!r} and a policy with residuals: "
                "nobody knows how many will leave; use noise_multiplier"
            )
        if child.update_privacy.mechanism == "dp_sgd":
            why = 'a group takes no steps of its own; use "client"'
            raise _refused(f'has update_privacy.mechanism = "dp_sgd" of {name!r}: {why}')
        for own in ("privacy", "update_privacy"):
            if why := voided(getattr(child, own) or PrivacyConfig(), config):
                raise _refused(f"has {own} of {name!r}: {why}")
    counts = Counter(name for name, _ in names)
    if twice := [name for name, times in counts.items() if times > 1]:
        raise _refused(f"has {some(twice)} in two places; a silo is in one group only")
    there = placed if silos is None else {*silos}
    if unknown := sorted(placed - there):
        raise _refused(f"names {unknown[0]!r}; the data's silos are {some(sorted(there), 8)}")
    if twice := [name for name, is_silo in names if name in there and not is_silo]:
        raise _refused(f"needs another name for {twice[0]!r}: the data has a silo of that name")


def tables(children: Mapping[str, ChildConfig]) -> Iterator[tuple[str, ChildConfig]]:
    """At any depth."""
    for name, child in children.items():
        yield name, child
        yield from tables(child.children)


def _names(
    children: Mapping[str, ChildConfig], steps: int, where: str
) -> Iterator[tuple[str, bool]]:
    """Whatever has a name at any depth, and whether it is a silo of the data; checks clocks."""
    for name, child in children.items():
        place = f"{where}.children.{name}"
        if (child.nodes is None) == (not child.silos and not child.children):
            raise _refused(f"needs members of one kind in [{place}]: nodes, or silos and children")
        if (child.steps or steps // child.rounds) * child.rounds != steps:
            raise _refused(
                f"needs one clock, and rounds x steps of [{place}] are not the {steps} steps "
                "of the level above it"
            )
        _check_round(child, place)
        yield name, child.nodes is not None
        yield from ((f"{name}.{index}", False) for index in range(child.nodes or 0))
        yield from ((silo, True) for silo in child.silos)
        yield from _names(child.children, steps // child.rounds, place)


def _check_round(child: ChildConfig, place: str) -> None:
    """Raise IncompatibleConfigError where too few can be in an inner round."""
    _check_turns(child, bool(child.silos), place)
    if child.levels == "in_turn" and child.rounds % 2:
        raise _refused(f"needs an even number of rounds in [{place}]: its levels train in turn")
    members = child.nodes or len(child.silos) + len(child.children)
    drawn = child.sample or members
    if child.nodes is not None and child.sample is not None:
        raise _refused(f"needs all nodes of [{place}]: its sample would leave out parts of a text")
    if drawn > members:
        raise _refused(f"needs sample of [{place}] to be at most its {members} members")
    if (child.quorum or 1) > drawn:
        raise _refused(f"needs quorum of [{place}] to be at most the {drawn} of an inner round")
    if child.sampling == "weighted" and child.weighting == "data":
        raise _refused(
            f'counts data twice in [{place}]: sampling = "weighted" goes with weighting = "tokens" '
            'or "equal"'
        )


def _check_turns(level: Level, silos: bool, place: str) -> None:
    groups = [child.nodes is None for child in level.children.values()]
    if level.levels == "in_turn" and not (any(groups) and (silos or not all(groups))):
        raise _refused(f'needs silos and groups in [{place}] to train in turn (levels = "in_turn")')


def _refused(why: str) -> IncompatibleConfigError:
    return IncompatibleConfigError(f"federation.children {why}")
