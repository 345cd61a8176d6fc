"""What a site holds a cohort against before it deals shares, and before it seals an update."""

from __future__ import annotations

from collections.abc import Callable

from photon.config import RunConfig
from photon.config.node import PolicyConfig
from photon.config.privacy import CLIP_MOVES
from photon.errors import MembershipError, PolicyError, ProtocolError, some
from photon.federation.envelopes import Ask, parse_reply
from photon.federation.secure_rounds import question_of
from photon.membership.keys import fingerprint_of
from photon.membership.signing import RECEIPT, verify_document
from photon.secure.documents import Advert, Cohort, read
from photon.secure.fixed_point import bits_for


def require_signed_cohort(ask: Ask, policy: PolicyConfig, tell: Callable[[str], None]) -> None:
    """Refuse a cohort whose members' own keys did not sign what is said to be their adverts.

    Args:
        ask: of the phase "share".
        policy: whose pins say which keys members have; without any, that is the operator's word.
        tell: told so.

    Raises:
        ProtocolError: an advert is not what its member signed, or is shown for nobody.
        PolicyError: a member's key is not the one that is pinned for it.
    """
    assert ask.secure is not None
    cohort, keys = read(ask.secure.text, Cohort, "the aggregator"), dict[str, str]()
    for one in ask.secure.evidence:
        try:
            verify_document(one.public_key, RECEIPT, one.text.encode(), one.signature)
        except MembershipError as error:
            raise ProtocolError(f"an advert of the cohort is not signed: {error.message}") from None
        reply = parse_reply(one.text.encode())
        advert = read(reply.secure or "", Advert, reply.silo)
        told = cohort.by_name[reply.silo].advert if reply.silo in cohort.by_name else advert
        if (reply.kind, reply.run, advert) != ("advertise", ask.run.id, told):
            raise ProtocolError(f"{reply.silo} advertised other keys than the cohort has for it")
        keys[reply.silo] = fingerprint_of(one.public_key)
    unsigned = [name for name in cohort.names if name not in keys]
    if unsigned or len({keys[name] for name in cohort.names}) < len(cohort.names):
        raise ProtocolError(f"in the cohort nobody signed for {some(unsigned)}, or one for two")
    if not policy.pins:
        tell("warning: policy.pins is empty: who the other silos are is the operator's word")
    for name in cohort.names if policy.pins else ():
        if name != ask.silo and policy.pins.get(name) != keys[name]:
            raise PolicyError(
                f"{name} would be in the cohort with the key {keys[name]}; policy.pins has "
                f"{policy.pins.get(name) or 'none for it'}",
                hint="Ask that site for its fingerprint, and write it into node.toml.",
            )


def require_sealing(ask: Ask, config: RunConfig, policy: PolicyConfig) -> None:
    """Refuse to answer without a mask where the run promises one, or for other company.

    Raises:
        ProtocolError: no masks, or others are asked another question.
        PolicyError: the sum may be of fewer than this site allows.
    """
    assert ask.fit is not None
    if bool(ask.fit.sealing) != config.privacy.secure_aggregation:
        raise ProtocolError(
            f"privacy.secure_aggregation = {str(not ask.fit.sealing).lower()}, and the task has "
            f"{'a' if ask.fit.sealing else 'no'} cohort"
        )
    if not ask.fit.sealing:
        return
    cohort = read(ask.fit.sealing, Cohort, "the aggregator")
    question = question_of(ask.run.config, ask.state.sha256, ask.fit.global_step)
    steps = {one.name: one.steps for one in cohort.members}
    alike = len({*steps.values()}) == 1 or config.federation.unequal_steps
    asked = (ask.round, question, ask.fit.steps)
    privacy, clip = config.privacy, cohort.clip or 0.0
    first = privacy.clip_norm or 0.0 if privacy.at_sum else 0.0
    moves = CLIP_MOVES if privacy.clip_quantile else 1.0
    if not first / moves <= clip <= first * moves or (cohort.counted and moves == 1):
        raise ProtocolError(
            f"the cohort of round {cohort.round} has updates clipped to {cohort.clip}; the run's "
            f"privacy.clip_norm is {privacy.clip_norm}, noise_at {privacy.noise_at!r}"
        )
    if (cohort.round, cohort.question, steps.get(ask.silo)) != asked or not alike:
        raise ProtocolError(
            f"the cohort of round {cohort.round} is asked another question than {ask.silo} is",
            hint="Model, recipe, state, clock and steps are to be the same for all: else a sum "
            "could be made of one update and nothing else.",
        )
    least = max(policy.min_participants, config.quorum_of(len(cohort.names)))
    if cohort.floor < least:
        raise PolicyError(
            f"a sum may be of as few as {cohort.floor}; policy.min_participants and the run's "
            f"federation.quorum allow {least} or more",
            hint="federation.quorum decides how many a sum is of at least.",
        )
    weights = [one.weight for one in cohort.members]
    if cohort.bits < bits_for(len(weights)) or 2 * max(weights) > sum(weights):
        raise PolicyError(
            f"a sum of {len(weights)} updates with weights up to {max(weights)} of {sum(weights)} "
            f"in all, in {cohort.bits} bits, would be one silo's update and little else",
            hint='federation.weighting = "equal" has all count the same.',
        )
