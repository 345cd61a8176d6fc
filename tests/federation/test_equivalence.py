"""Invariants 1 and 2: federated training reduces to centralised training where it must."""

import pytest
import torch

from photon.runs import load_weights, simulate, train


def distance(one, other) -> float:
    a, b = load_weights(one)[0], load_weights(other)[0]
    return max(
        float((x - y).detach().abs().max())
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


def moved(folder, config) -> float:
    from photon.data import open_data
    from photon.federation.layout import initial_model

    start = initial_model(config, open_data(config.data.path))
    end = load_weights(folder)[0]
    return max(
        float((x - y).detach().abs().max())
        for x, y in zip(start.parameters(), end.parameters(), strict=True)
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_one_participant_adopted_is_centralised_bit_for_bit(
    one_silo, make_config, tmp_path, optimizer
):
    config = make_config(
        one_silo,
        "federation.merge=adopt",
        "federation.optimizer_state=keep",
        f"local.optimizer={optimizer}",
        f"local.lr={0.1 if optimizer == 'sgd' else 3e-3}",
        "local.weight_decay=0.1",
        "local.warmup_steps=2",
    )
    federated = simulate(config, run_dir=tmp_path / "federated").summary
    central = train(config, run_dir=tmp_path / "central").summary
    assert federated["weights_sha256"] == central["weights_sha256"]
    assert federated["tokens"] == central["tokens"]
    assert federated["global_loss"] == central["global_loss"]
    assert moved(tmp_path / "central", config) > 1e-3


def test_a_reset_is_not_centralised(one_silo, make_config, tmp_path):
    """The bit-for-bit test above would not pass for any other reason."""
    config = make_config(one_silo, "federation.merge=adopt", "federation.optimizer_state=reset")
    federated = simulate(config, run_dir=tmp_path / "federated").summary
    central = train(config, run_dir=tmp_path / "central").summary
    assert federated["weights_sha256"] != central["weights_sha256"]


@pytest.mark.parametrize("state", ["keep", "average"])
def test_one_participant_by_deltas_is_centralised_within_rounding(
    one_silo, make_config, tmp_path, state
):
    """theta - (theta - local) rounds; three rounds stay within 1e-5 of moves of about 1e-2."""
    config = make_config(one_silo, f"federation.optimizer_state={state}")
    simulate(config, run_dir=tmp_path / "federated")
    train(config, run_dir=tmp_path / "central")
    assert distance(tmp_path / "federated", tmp_path / "central") < 1e-5
    assert moved(tmp_path / "central", config) > 5e-3


def test_averaged_state_of_one_participant_is_its_own(one_silo, make_config, tmp_path):
    adopt = ["federation.merge=adopt", "local.optimizer=adamw"]
    kept = make_config(one_silo, *adopt, "federation.optimizer_state=keep")
    averaged = make_config(one_silo, *adopt, "federation.optimizer_state=average")
    one = simulate(kept, run_dir=tmp_path / "kept").summary
    two = simulate(averaged, run_dir=tmp_path / "averaged").summary
    assert one["weights_sha256"] == two["weights_sha256"]
    assert two["bytes_up"] == pytest.approx(3 * one["bytes_up"], rel=0.01)
    assert two["bytes_down"] == pytest.approx(3 * one["bytes_down"], rel=0.01)


def test_k_participants_with_one_sgd_step_are_one_large_batch(three_silos, make_config, tmp_path):
    """Mean of K gradients of B sequences == gradient of their K x B sequences."""
    config = make_config(
        three_silos,
        "federation.rounds=1",
        "local.steps=1",
        "local.optimizer=sgd",
        "local.lr=0.5",
        "local.clip_norm=0",
        "local.schedule=constant",
    )
    simulate(config, run_dir=tmp_path / "federated")
    from photon.data import open_data, open_stream
    from photon.federation.layout import initial_model
    from photon.models import training_loss

    data = open_data(config.data.path)
    model = initial_model(config, data)
    batches = []
    for silo in sorted(data.silos):
        with open_stream(config, data, [silo]) as stream:
            batches.append(torch.from_numpy(stream.batch(0, config.local.batch_size)))
    training_loss(model, torch.cat(batches))[0].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    for mine, theirs in zip(
        load_weights(tmp_path / "federated")[0].parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
    assert moved(tmp_path / "federated", config) > 1e-3
