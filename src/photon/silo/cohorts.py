"""What a site holds a cohort against before it deals shares, and before it seals an update."""

from __future__ import annotations

from collections.abc import Callable

from photon.config import RunConfig
from photon.config.node import PolicyConfig
from photon.errors import MembershipError, PolicyError, ProtocolError, some
from photon.federation.envelopes import Ask, parse_reply
from photon.federation.secure_rounds import question_of
from photon.membership.keys import fingerprint_of
from photon.membership.signing import RECEIPT, verify_document
from photon.secure.documents import Advert, Cohort, Sealing, read


def require_signed_cohort(ask: Ask, policy: PolicyConfig, tell: Callable[[str], None]) -> None:
    """Refuse a cohort whose members' own keys did not sign what is said to be their adverts.

    Args:
        ask: of the phase "share".
        policy: whose pins say which keys members have; without any, that is the operator's word.
        tell: told so.

    Raises:
        ProtocolError: an advert is not what its member signed.
        PolicyError: a member's key is not the one that is pinned for it.
    """
    assert ask.secure is not None
    cohort, shown = read(ask.secure.text, Cohort, "the aggregator"), dict[str, str]()
    for one in ask.secure.evidence:
        try:
            verify_document(one.public_key, RECEIPT, one.text.encode(), one.signature)
        except MembershipError as error:
            raise ProtocolError(f"an advert of the cohort is not signed: {error.message}") from None
        reply = parse_reply(one.text.encode())
        about = (reply.kind, reply.run, reply.round)
        if about != ("advertise", ask.run.id, ask.round) or reply.secure is None:
            raise ProtocolError(f"what is shown for {reply.silo} is no advert for {ask.task_id}")
        advert = read(reply.secure, Advert, reply.silo)
        if reply.silo in cohort.by_name and cohort.by_name[reply.silo].advert != advert:
            raise ProtocolError(f"{reply.silo} advertised other keys than the cohort has for it")
        shown[reply.silo] = fingerprint_of(one.public_key)
    if missing := [name for name in cohort.names if name not in shown]:
        raise ProtocolError(f"{some(missing)} of the cohort are not shown to have advertised")
    others = [name for name in cohort.names if name != ask.silo]
    if len({shown[name] for name in cohort.names}) < len(cohort.names):
        raise ProtocolError("two members of the cohort have one key")
    if not policy.pins:
        tell("warning: nobody's key is pinned: that the others are others is the operator's word")
        return
    for name in others:
        if (pinned := policy.pins.get(name)) != shown[name]:
            raise PolicyError(
                f"{name} would be in the cohort with the key {shown[name]}; policy.pins has "
                f"{pinned or 'none for it'}",
                hint=f"Ask {name} for its fingerprint (`photon join --show` there), and have it in "
                "[policy] pins of node.toml.",
            )


def require_sealing(ask: Ask, config: RunConfig, policy: PolicyConfig) -> None:
    """Refuse to answer without a mask where the run promises one, or for other company.

    Raises:
        ProtocolError: no masks, or others are asked another question.
        PolicyError: the sum may be of fewer than this site allows.
    """
    assert ask.fit is not None
    if bool(ask.fit.sealing) != config.privacy.secure_aggregation:
        says, has = config.privacy.secure_aggregation, "has" if ask.fit.sealing else "has no"
        raise ProtocolError(
            f"privacy.secure_aggregation = {str(says).lower()}, and the task {has} cohort"
        )
    if not ask.fit.sealing:
        return
    cohort = read(ask.fit.sealing, Sealing, "the aggregator").cohort
    mine = question_of(ask.run.config, ask.state.sha256, ask.fit.global_step)
    own = cohort.by_name.get(ask.silo)
    if (cohort.round, cohort.question) != (ask.round, mine) or own is None:
        raise ProtocolError(
            f"the cohort of round {cohort.round} is asked another question than {ask.silo} is",
            hint="Model, recipe, state and clock are to be the same for all: else a sum could be "
            "made of one update and nothing else.",
        )
    steps = {one.steps for one in cohort.members}
    if own.steps != ask.fit.steps or (len(steps) > 1 and not config.federation.unequal_steps):
        raise ProtocolError(
            f"{ask.silo} is asked for {ask.fit.steps} steps, the cohort for {sorted(steps)}"
        )
    if cohort.floor < policy.min_participants:
        raise PolicyError(
            f"this site's policy refuses the run: a sum may be of as few as {cohort.floor}; "
            f"policy.min_participants allows {policy.min_participants} or more",
            hint="federation.quorum decides how many a sum is of at least.",
        )
