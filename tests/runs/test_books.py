"""Workers train the next round while the books of the one before are closed."""

from __future__ import annotations

import time

import pytest

from photon.federation import CheckpointStore
from photon.runs import resume, simulate

RECIPE = ("federation.workers=2", "federation.rounds=4", "local.steps=1", "eval.every=0")
KEEPS = ("federation.optimizer_state=keep", "link.update_codec=int8", "link.error_feedback=true")


def test_what_a_quick_silo_leaves_meanwhile_stays_and_a_death_then_changes_nothing(
    three_silos, make_config, tmp_path, monkeypatch
):
    config = make_config(three_silos, *RECIPE, *KEEPS)
    expected = simulate(config, run_dir=tmp_path / "calm").summary["weights_sha256"]
    save, dies = CheckpointStore.save, [3]

    def slow(store, state, groups):
        nodes, number = store.folder.parent / "nodes", state.round + 1
        if state.round in (1, 3):  # the next round's first two silos are done before this is
            until = time.monotonic() + 60
            while len([*nodes.glob(f"*/round-{number:06d}")]) < 2:
                assert time.monotonic() < until
                time.sleep(0.01)
        if state.round in dies:
            dies.remove(state.round)
            raise KeyboardInterrupt
        return save(store, state, groups)

    monkeypatch.setattr(CheckpointStore, "save", slow)
    folder = tmp_path / "slow"
    with pytest.raises(KeyboardInterrupt):
        simulate(config, run_dir=folder)
    assert CheckpointStore(folder / "checkpoints", 2).rounds()[-1] == 2
    assert resume(folder).summary["weights_sha256"] == expected
