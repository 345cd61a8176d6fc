"""Every rule of [policy], and who a node says it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from photon.config.node import PolicyConfig
from photon.errors import MembershipError, PolicyError, ProtocolError
from photon.federation.envelopes import node_config
from photon.federation.tasks import StateRef
from photon.silo.policy import (
    check,
    few_silos,
    least_merged,
    note_scored,
    read_membership,
    require_size,
)


@pytest.fixture
def judged(aggregator, changed, three_silos):
    """Holds the run, with some keys changed, against a policy; None or the PolicyError."""

    def judge(policy: dict, *, config: dict | None = None, steps: int = 4, kind="fit", **run):
        ask = aggregator.fit() if kind == "fit" else aggregator.evaluation()
        tree = {**ask.run.config}
        for dotted, value in (config or {}).items():
            table, key = dotted.split(".")
            tree[table] = {**tree.get(table, {}), key: value}
            if dotted == "model.path":
                tree[table].pop("preset", None)
        part = ask.fit.model_copy(update={"steps": steps}) if ask.fit is not None else None
        ask = changed(ask, run={"config": tree, **run}, fit=part)
        site = {"compute": {}, "data": {"path": str(three_silos)}}
        try:
            found = node_config(ask.run, site)
            check(ask, found, PolicyConfig(**policy), found.privacy)
        except PolicyError as error:
            return error
        return None

    return judge


def dp(**privacy):
    """A run file's mechanism."""
    named = {"mechanism": "dp_sgd", "clip_norm": 1.0} | privacy
    return {f"privacy.{key}": value for key, value in named.items()}


AT_SUM = {"mechanism": "client", "noise_at": "sum", "secure_aggregation": True}


@pytest.mark.parametrize(
    ("policy", "run", "refused"),
    [
        ({}, {}, None),
        ({"runs": ["med-*"]}, {}, "the run is called 'test'; policy.runs allows med-*"),
        ({"runs": ["med-*", "te?t"]}, {}, None),
        ({"runs": ["TEST"]}, {}, "policy.runs allows TEST"),
        ({"runs": []}, {}, "policy.runs allows none"),
        ({"peers": ["blue"]}, {}, "green would take part too; policy.peers allows blue"),
        ({"peers": ["blue", "gr*"]}, {}, None),
        ({"peers": []}, {"silos": ["red"]}, None),
        ({"peers": ["a"]}, {"silos": list("abcdefg")}, "b, c, d and 3 more would take part"),
        # Half of three participants, rounded up, close a round.
        ({"min_participants": 2}, {}, None),
        ({"min_participants": 3}, {}, "as few as 2 (of 3 silos"),
        ({"min_participants": 3}, {"config": {"federation.quorum": 3}}, None),
        ({"min_participants": 2}, {"config": {"federation.sample": 2}}, "as few as 1"),
        ({"min_participants": 2}, {"config": {"federation.quorum": 1}}, "3 silos"),
        ({"min_participants": 2}, {"silos": ["red", "red", "red", "red"]}, "as few as 1"),
        (
            {"secure_aggregation": True, "min_participants": 3},
            {"config": {"federation.quorum": 3}},
            "would see single updates; policy.secure_aggregation allows privacy.secure_aggregation",
        ),
        ({"max_rounds": 3}, {"config": {"federation.rounds": 3}}, None),
        ({"max_rounds": 3}, {"config": {"federation.rounds": 4}}, "has 4 rounds"),
        ({"evaluate": "never"}, {}, None),
        ({"evaluate": "never"}, {"kind": "evaluate"}, "policy.evaluate allows no state"),
        ({"max_epsilon": 8.0}, {}, "promises no differential privacy"),
        ({"max_epsilon": 8.0}, {"config": dp(noise_multiplier=0.0)}, "no differential privacy"),
        ({"max_epsilon": 8.0}, {"config": dp(noise_multiplier=0.1)}, None),  # its ledger stops it
        ({"max_epsilon": 8.0}, {"config": dp(target_epsilon=8.0, delta=1e-5)}, None),
        (
            {"max_epsilon": 8.0},
            {"config": dp(target_epsilon=8.1, delta=1e-5)},
            "promises an epsilon of 8.1; policy.max_epsilon allows an epsilon of at most 8",
        ),
        (
            {"max_epsilon": 8.0},
            {"config": dp(**AT_SUM, target_epsilon=1.0, delta=1e-5)},
            "promises an epsilon of 1 by noise that the aggregator is trusted with",
        ),
        ({"max_local_steps": 4}, {}, None),
        ({"max_local_steps": 3}, {}, "takes 4 local steps; policy.max_local_steps allows 3"),
        ({"max_local_steps": 4}, {"steps": 5}, "takes 5 local steps"),
        ({"max_local_steps": 4}, {"config": {"local.steps": 9}}, "takes 9 local steps"),
        ({}, {"config": {"model.path": "gpt2"}}, "policy.model_paths allows presets only"),
        ({"model_paths": ["ours/*"]}, {"config": {"model.path": "gpt2"}}, "allows ours/*"),
        ({"model_paths": ["ours/*"]}, {"config": {"model.path": "ours/base"}}, None),
        ({"model_paths": ["ours/*"]}, {"config": {"model.path": "ours/../etc"}}, "'ours/../etc'"),
        ({"model_paths": ["../models"]}, {"config": {"model.path": "../models"}}, None),
        ({"trust_tokenizer": "0" * 64}, {}, "policy.trust_tokenizer allows " + "0" * 64),
        ({"trust_tokenizer": "0" * 64}, {"tokenizer": "0" * 64}, None),
    ],
)
def test_each_rule(policy, run, refused, judged):
    error = judged(policy, **run)
    if refused is None:
        assert error is None
    else:
        assert refused in error.message
        assert error.exit_code == 85
        assert f"policy.{next(iter(policy), 'model_paths')}" in error.hint


def test_every_rule_has_a_test():
    rules = set(PolicyConfig.model_fields)
    (cases,) = [mark for mark in test_each_rule.pytestmark if mark.name == "parametrize"]
    seen = {rule for policy, _, refused in cases.args[1] if refused for rule in policy}
    assert rules == seen | {"max_parameters", "pins"}  # which have tests of their own


def test_no_round_is_beyond_the_runs_last(aggregator):
    ask = aggregator.evaluation(number=aggregator.config.federation.rounds + 1)
    with pytest.raises(ProtocolError, match="of a run of"):
        check(ask, aggregator.config, PolicyConfig(), aggregator.config.privacy)


def test_one_state_a_round_is_scored(aggregator, tmp_path):
    """Each score of a state that was made up says something of the text."""
    once, always = PolicyConfig(), PolicyConfig(evaluate="always")

    def asked(number, state):
        part = StateRef(round=number, sha256=state * 64)
        return aggregator.evaluation(number=number, state=part)

    note_scored(asked(2, "a"), once, tmp_path)
    note_scored(asked(2, "a"), once, tmp_path)  # asked again
    for number in (1, 2):
        with pytest.raises(PolicyError, match=r"policy.evaluate allows one state a round"):
            note_scored(asked(number, "b"), once, tmp_path)
    note_scored(asked(3, "b"), once, tmp_path)
    note_scored(asked(2, "c"), always, tmp_path)


def test_two_silos_see_through_each_other(aggregator):
    """The mean of two, less one's own half, is the other's: what both screens warn of."""
    two = aggregator.run.model_copy(update={"silos": ["blue", "red"]})
    ask = aggregator.fit().model_copy(update={"run": two})
    assert least_merged(ask, aggregator.config) == 1
    assert "may merge one update only: of two silos each can compute the other's" in few_silos(1)


def test_size():
    require_size(10, PolicyConfig(max_parameters=10))
    require_size(10**12, PolicyConfig())
    with pytest.raises(PolicyError, match=r"11 parameters; policy.max_parameters allows 10"):
        require_size(11, PolicyConfig(max_parameters=10))


GOOD = {"name": "red", "address": "a.example:8443", "fingerprint": "sha256:00"}


def test_the_membership_is_read(tmp_path):
    path = tmp_path / "membership.json"
    path.write_text(json.dumps(GOOD | {"data_sha256": "ab", "joined": "later keys are not ours"}))
    found = read_membership(tmp_path)
    assert (found.name, found.address, found.data_sha256) == ("red", "a.example:8443", "ab")
    assert found.store is None
    path.write_text(json.dumps(GOOD | {"address": "[::1]:443"}))
    assert read_membership(tmp_path).address == "[::1]:443"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no membership at"),
        ("", "can't read"),
        ("[]", "can't read"),
        ("{}", "can't read"),
        (json.dumps(GOOD | {"name": 3}), "name = 3"),
        (json.dumps(GOOD | {"name": ""}), "name = ''"),
        (json.dumps(GOOD | {"address": "a.example"}), "not HOST:PORT"),
        (json.dumps(GOOD | {"data_sha256": 5}), "data_sha256 = 5"),
    ],
)
def test_a_bad_membership_is_named(text, words, tmp_path):
    if text is not None:
        (tmp_path / "membership.json").write_text(text)
    with pytest.raises(MembershipError, match=r"membership\.json") as caught:
        read_membership(tmp_path)
    assert words in caught.value.message
    assert "photon join" in caught.value.hint


def test_services_beside_the_trainer_stay_light():
    """They use the socket, the policy's membership and the desk's client, and hold no torch."""
    modules = "photon.silo.socket, photon.silo.policy, photon.silo.presence, photon.silo.courier"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
