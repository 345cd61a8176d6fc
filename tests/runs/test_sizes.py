"""What docs/deploy.md says of bytes a round, disk and memory, computed again from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from photon.compression import build_codec
from photon.compression.codec import bytes_of
from photon.config import ModelConfig, RunConfig
from photon.config.serve import ServeConfig
from photon.models import build_skeleton
from photon.runs import session, simulate

DOCS = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
MODELS = ("125m", "350m", "1.3b", "3b", "7b")
CODECS = ("fp32", "bf16", "int8", "sparseloco")
SILOS = (4, 8, 32)
#: Of a served run with every default: deploy.md says what they are made of.
RESERVE = 36
KEEP_ROUNDS = ServeConfig().keep_rounds


def parameters(preset: str) -> int:
    config = ModelConfig(preset=preset)  # type: ignore[arg-type]
    shape = build_skeleton(config, vocab_size=50_368, sequence_length=2048, eos_id=0)
    return sum(parameter.numel() for parameter in shape.parameters())


def bytes_a_value(codec: str) -> float:
    """On the wire, of a long tensor; what zstd saves depends on the values."""
    values = torch.randn(1 << 22)
    return bytes_of(build_codec(codec).encode(values)) / values.numel()


def gb(size: float) -> str:
    """As the tables have it: two digits, GB of 10^9 bytes."""
    return f"{size / 1e9:.2g}" if size < 1e11 else f"{size / 1e9:.0f}"


@pytest.fixture(scope="module")
def rates() -> dict[str, float]:
    return {codec: bytes_a_value(codec) for codec in CODECS}


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("preset", MODELS)
def test_the_tables_of_bytes(preset, rates) -> None:
    count = parameters(preset)
    down, up = 4 * count, {codec: rate * count for codec, rate in rates.items()}
    million = f"{count / 1e6:,.0f} M"
    assert row(preset, million, gb(down), *map(gb, up.values())) in DOCS
    door = [gb(silos * (down + up["int8"])) for silos in SILOS]
    store = gb((KEEP_ROUNDS + 2) * (down + 4 * up["int8"]))
    assert row(preset, *door, gb(RESERVE * count), store, gb(0.5e9 + 4 * down)) in DOCS


def test_what_a_run_asks_its_disk_for(config, tmp_path, monkeypatch) -> None:
    class AskedError(Exception):
        pass

    def ask(_: Path, needed: int, *__: object) -> None:
        raise AskedError(needed)

    monkeypatch.setattr(session, "require_disk", ask)
    with pytest.raises(AskedError) as caught:
        simulate(config, run_dir=tmp_path / "run")
    count = sum(one.numel() for one in _skeleton(config).parameters())
    assert config.federation.optimizer_state != "keep"
    assert caught.value.args == (RESERVE * count,)
    assert f"{RESERVE} P" in re.sub(r"\s+", " ", DOCS)


def _skeleton(config: RunConfig) -> torch.nn.Module:
    from photon.data import open_data

    data = open_data(config.data.path)
    length = config.data.sequence_length
    return build_skeleton(
        config.model, vocab_size=data.vocab_size, sequence_length=length, eos_id=0
    )


def test_what_a_served_run_keeps_in_its_store_is_bounded(make_served) -> None:
    served = make_served("federation.rounds=7", "eval.every=7")
    folder, most = Path(served.serving.store), 0

    def look(silo, ask, _):
        nonlocal most
        answer = silo.answer(ask)
        sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
        most = max(most, sum(sizes))
        return answer

    served.wire.fault = look
    summary = served.go_on().summary
    state = summary["bytes_up"] / (7 * 3)  # fp32 without a codec: an update has a state's size
    bound = (KEEP_ROUNDS + 2) * (state + 3 * state)
    assert 0.6 * bound < most < 1.01 * bound
