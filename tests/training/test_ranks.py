"""Who is who among the ranks of a node, and ranks that can't work together."""

from __future__ import annotations

import pytest

from photon.config import write_resolved
from photon.errors import IncompatibleConfigError, RankLostError, RankMismatchError
from photon.training import Ranks, Seat
from photon.training.ranks import naming_lost_ranks
from photon.training.trainer import rank_share


def test_a_seat_is_what_torchrun_says(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Seat.from_environment() == Seat(0, 0, 1, 1)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Seat.from_environment() == Seat(9, 1, 16, 8)
    assert Seat.from_environment().machines == 2


def test_alone_nothing_is_asked_of_a_network():
    ranks = Ranks.alone()
    assert ranks.leader
    assert ranks.announce("x") == "x"
    assert ranks.least(3) == 3
    ranks.require_agreement({"anything": 1})
    ranks.close()


def test_a_batch_is_shared_out_evenly_or_not_at_all():
    assert rank_share(12, 4) == 3
    with pytest.raises(IncompatibleConfigError, match=r"12 sequences .* among 5 ranks"):
        rank_share(12, 5)


def test_only_a_broken_network_is_blamed_on_a_rank():
    with (
        pytest.raises(RankLostError, match=r"during local training: .*closed by peer"),
        naming_lost_ranks("local training"),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), naming_lost_ranks("local training"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([[], ["local.lr=0.5"]], "disagree on local.lr (rank 0: 0.003, rank 1: 0.5)"),
        ([[], ["data.path={other}"]], "disagree on data sha256"),
        ([[], []], ""),
    ],
)
def test_ranks_with_other_files_refuse_to_start(
    run_ranks, three_silos, one_silo, make_config, tmp_path, overrides, words
):
    write_resolved(make_config(three_silos), tmp_path / "run.toml")
    filled = [[one.format(other=one_silo) for one in rank] for rank in overrides]
    answers = run_ranks(
        "disagree",
        2,
        {"run": str(tmp_path / "run.toml"), "folder": str(tmp_path), "overrides": filled},
    )
    for answer in answers:  # every rank, so that none is left waiting
        assert answer["code"] == (RankMismatchError.exit_code if words else 0)
        assert words in answer["message"]
        assert answer["left"]  # threads of a process group still there at exit abort the process
