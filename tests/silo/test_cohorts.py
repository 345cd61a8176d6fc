"""What a site holds a cohort against: who is in its sum, of how many, and asked what."""

from __future__ import annotations

import json

import envelope_documents as documents
import pytest

from photon.config import parse_run_config
from photon.config.node import PolicyConfig
from photon.errors import PolicyError, ProtocolError
from photon.federation.envelopes import (
    Ask,
    Evidence,
    FitPart,
    SecurePart,
    dictated,
    encoded,
    node_config,
)
from photon.federation.secure_rounds import question_of
from photon.membership.keys import NodeKey
from photon.membership.signing import RECEIPT, sign_document
from photon.secure.documents import Advert, Cohort, Member
from photon.secure.fixed_point import bits_for
from photon.silo.cohorts import require_sealing, require_signed_cohort

NAMES = ("blue", "green", "pink", "red", "teal")
ROUND, CLOCK, STEPS = 4, 12, 4


def run_of(*overrides):
    """A run file, as a site reads it out of the first Ask."""
    tree = {"model": {"preset": "tiny"}, "data": {"path": "unread"}}
    config = parse_run_config(tree, ["privacy.secure_aggregation=true", *overrides])
    part = documents.run_part(dictated(config), silos=list(NAMES))
    return part, node_config(part, documents.SITE)


def advert_of(name, number=ROUND):
    return Advert(
        round=number, attempt=1, mask_key=name.encode().hex().ljust(64, "0"), box_key="0" * 64
    )


def cohort_of(question, names=NAMES, weights=(), steps=(), **fields):
    """One of equals, where nothing else is said."""
    number, weights, steps = fields.get("round", ROUND), dict(weights), dict(steps)
    members = [
        Member(
            name=name,
            weight=weights.get(name, 1),
            steps=steps.get(name, STEPS),
            advert=advert_of(name, number),
        )
        for name in names
    ]
    plain = {"run": documents.RUN_ID, "round": ROUND, "attempt": 1, "question": question}
    plain |= {"bits": bits_for(len(names)), "floor": 3, "ranges": {"weights/a": 1.0}}
    return Cohort(**plain | fields, members=members)


def sealed(*overrides, policy=(), **fields):
    """Hold a task of red's whose cohort has these fields against its site's rules."""
    part, config = run_of(*overrides)
    question = question_of(part.config, documents.STATE.sha256, CLOCK)
    ask = task_of(part, cohort_of(**{"question": question} | fields).text)
    require_sealing(ask, config, PolicyConfig(**dict(policy)))


def task_of(part, sealing):
    fit = FitPart(round=ROUND, global_step=CLOCK, steps=STEPS, sealing=sealing)
    return documents.ask(run=part, fit=fit)


def test_a_cohort_of_equals_is_answered():
    sealed()
    sealed("federation.quorum=5", policy={"min_participants": 5}, floor=5)


@pytest.mark.parametrize(
    ("overrides", "policy", "floor", "least"),
    [
        ([], {"min_participants": 4}, 3, 4),
        ([], {"min_participants": 5}, 4, 5),
        (["federation.quorum=4"], {}, 3, 4),
        (["federation.quorum=5"], {"min_participants": 4}, 4, 5),
    ],
)
def test_a_sum_of_fewer_than_site_or_run_allow_is_refused(overrides, policy, floor, least):
    with pytest.raises(PolicyError, match=f"as few as {floor}; .* allow {least} or more") as caught:
        sealed(*overrides, policy=policy, floor=floor)
    assert "federation.quorum" in caught.value.hint
    sealed(*overrides, policy=policy, floor=least)


@pytest.mark.parametrize("names", [NAMES, NAMES[1:4]])
def test_a_ring_without_room_for_all_is_refused(names):
    """The bound of each would be the less, and a large update would be the sum of its own."""
    enough = bits_for(len(names))
    sealed(names=names, bits=enough)
    with pytest.raises(PolicyError, match=f"in {enough - 1} bits, would be one silo's update"):
        sealed(names=names, bits=enough - 1)


@pytest.mark.parametrize("heavy", ["red", "blue"])
def test_a_weight_of_more_than_half_is_refused(heavy):
    sealed(weights={heavy: 4})  # of 8
    with pytest.raises(PolicyError, match=r"up to 5 of 9 in all.* one silo's update") as caught:
        sealed(weights={heavy: 5})
    assert "federation.weighting" in caught.value.hint


def other_question(*overrides, state=documents.STATE.sha256, clock=CLOCK):
    return {"question": question_of(run_of(*overrides)[0].config, state, clock)}


@pytest.mark.parametrize(
    "fields",
    [
        other_question("local.lr=1e-9"),
        other_question("model.preset=mini"),
        other_question(state="9" * 64),
        other_question(clock=CLOCK + 1),
        {"round": ROUND + 1},
        {"steps": {"red": STEPS + 1}},
        {"steps": {"blue": 1}},
        {"steps": dict.fromkeys(NAMES, 1)},
        {"names": ("blue", "green", "pink", "teal")},
    ],
    ids=str,
)
def test_company_that_is_asked_something_else_is_refused(fields):
    with pytest.raises(ProtocolError, match="is asked another question than red is"):
        sealed(**fields)


def test_others_steps_may_differ_where_the_run_says_so_and_its_own_may_not():
    unequal = ("federation.unequal_steps=true", "federation.pace=quorum")
    sealed(*unequal, steps={"blue": 1})
    with pytest.raises(ProtocolError, match="another question"):
        sealed(*unequal, steps={"red": 1})


AT_SUM = (
    "privacy.mechanism=client",
    "privacy.noise_at=sum",
    "privacy.clip_norm=2",
    "privacy.noise_multiplier=1",
)
ADAPTS = (*AT_SUM, "privacy.clip_quantile=0.5")


@pytest.mark.parametrize(
    ("overrides", "good", "bad"),
    [
        ((), [{}], [{"clip": 2.0}, {"counted": True}]),
        (
            AT_SUM,
            [{"clip": 2.0}],
            [{}, {"clip": 2.1}, {"clip": 1.9}, {"clip": 2.0, "counted": True}],
        ),
        (
            ADAPTS,
            [{"clip": 200.0, "counted": True}, {"clip": 0.02}],
            [{"clip": 201.0}, {"clip": 0.01}],
        ),
    ],
    ids=["no noise on the sum", "noise on the sum", "a clip that adapts"],
)
def test_updates_are_clipped_as_the_run_file_says(overrides, good, bad):
    """A larger clip is more than the noise of a sum is sized for; a tiny one leaves one update."""
    for fields in good:
        sealed(*overrides, **fields)
    for fields in bad:
        with pytest.raises(ProtocolError, match=r"updates clipped to .*privacy.clip_norm is"):
            sealed(*overrides, **fields)


@pytest.mark.parametrize("promised", [True, False])
def test_a_task_has_a_cohort_where_the_run_promises_one_and_nowhere_else(promised):
    said = f"secure_aggregation = {str(promised).lower()}"
    part, config = run_of(f"privacy.{said.replace(' ', '')}")
    sealing = cohort_of("0" * 64).text
    with pytest.raises(
        ProtocolError, match=f"{said}, and the task has {'no' if promised else 'a'} cohort"
    ):
        require_sealing(task_of(part, None if promised else sealing), config, PolicyConfig())
    if not promised:
        require_sealing(task_of(part, None), config, PolicyConfig())


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"floor": 3}'])
def test_what_is_no_cohort_is_refused(text):
    part, config = run_of()
    with pytest.raises(ProtocolError, match="the aggregator sent no Cohort"):
        require_sealing(task_of(part, text), config, PolicyConfig())


# --- whose keys they are ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: NodeKey.create(folder / f"{name}.key") for name in (*NAMES, "stranger")}


@pytest.fixture
def shown(keys):
    """Hold a cohort against evidence that is as it should be, but for what is named.

    `fields` are of a member's Reply, `signers` says whose key signs for whom.
    """

    def show(fields=None, signers=(), changed=(), who=NAMES, advert=None, **policy):
        fields, signers = fields or {}, dict(signers)
        evidence = []
        for name in who:
            told = advert_of(name) if advert is None or name not in advert else advert[name]
            reply = documents.reply("refused").model_copy(
                update={
                    "kind": "advertise",
                    "silo": name,
                    "refused": None,
                    "secure": told.text,
                    "task": f"{documents.RUN_ID}/advertise/{ROUND}/{name}",
                    **fields.get(name, {}),
                }
            )
            text, key = encoded(reply), keys[signers.get(name, name)]
            signature = sign_document(key, RECEIPT, text)
            if name in changed:
                text = text.replace(b'"log_head":"8', b'"log_head":"9')
            evidence.append(
                Evidence(text=text.decode(), signature=signature, public_key=key.public_pem)
            )
        part = SecurePart(round=ROUND, text=cohort_of("0" * 64).text, evidence=tuple(evidence))
        ask = Ask(**dict(documents.ask()) | {"kind": "share", "fit": None, "secure": part})
        notes: list[str] = []
        require_signed_cohort(ask, PolicyConfig(**policy), notes.append)
        return notes

    return show


def fingerprints(keys, *but):
    return {name: keys[name].fingerprint for name in NAMES if name not in but}


def test_a_cohort_that_its_members_signed_is_taken(shown, keys):
    assert shown(pins=fingerprints(keys, "red")) == []
    (warning,) = shown()
    assert "policy.pins is empty" in warning


def test_an_advert_of_who_is_not_in_the_cohort_changes_nothing(shown, keys):
    who = (*NAMES, "stranger")
    assert shown(who=who, pins=fingerprints(keys)) == []


def test_what_was_changed_since_it_was_signed_is_refused(shown):
    with pytest.raises(ProtocolError, match="an advert of the cohort is not signed"):
        shown(changed=["blue"])


@pytest.mark.parametrize(
    "fields",
    [
        {"run": "f" * 32},
        {"secure": advert_of("other").text},
        {"secure": advert_of("blue", ROUND + 1).text},
        {"secure": json.dumps({"round": ROUND})},
    ],
    ids=["another run's", "other keys", "another round's", "no advert"],
)
def test_what_is_not_the_advert_that_the_cohort_has_is_refused(fields, shown):
    with pytest.raises(ProtocolError, match=r"blue (advertised other keys|sent no Advert)"):
        shown({"blue": fields})


def test_an_answer_to_another_phase_is_no_advert(shown):
    phase = {"kind": "share", "task": f"{documents.RUN_ID}/share/{ROUND}/blue"}
    with pytest.raises(ProtocolError, match="blue advertised other keys"):
        shown({"blue": phase})


def test_a_member_that_nobody_signed_for_is_refused(shown):
    with pytest.raises(ProtocolError, match="nobody signed for teal"):
        shown(who=NAMES[:-1])


def test_one_key_signs_for_one_member(shown):
    """An aggregator that is most of the cohort itself would have one key sign for many."""
    with pytest.raises(ProtocolError, match="one for two"):
        shown(signers={"teal": "blue"})


def test_another_key_than_is_pinned_is_refused(shown, keys):
    signed = {"signers": {"blue": "stranger"}}
    shown(**signed)  # nobody pinned it
    with pytest.raises(PolicyError, match="blue would be in the cohort with the key") as caught:
        shown(**signed, pins=fingerprints(keys))
    assert keys["stranger"].fingerprint in caught.value.message
    assert keys["blue"].fingerprint in caught.value.message
    with pytest.raises(PolicyError, match=r"teal .* policy.pins has none for it"):
        shown(pins=fingerprints(keys, "teal"))
