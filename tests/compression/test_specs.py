"""Specs: what a run file may say, and that it says what is built."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.compression import Codec, build_codec
from photon.compression.blockwise import Int8
from photon.compression.build import CODECS
from photon.compression.casts import Fp32
from photon.compression.low_rank import LowRank, PowerSGD
from photon.compression.nested import Nesting
from photon.compression.sparseloco import SparseLoco
from photon.compression.topk import TopK
from photon.compression.zstd import Zstd
from photon.config.codecs import MAX_SPEC, STAGES, StageSpec, parse_codec
from photon.errors import PluginError

CANONICAL = {
    "fp32": "fp32",
    "int8": "int8(block=128)",
    " int8 ( block = 64 ) ": "int8(block=64)",
    "zstd": "fp32+zstd(level=3)",
    "bf16+zstd(level=19)": "bf16+zstd(level=19)",
    "topk": "topk(density=0.01)+fp32",
    "topk(density=1)": "topk(density=1.0)+fp32",
    "topk(density=2e-2)+int8+zstd": "topk(density=0.02)+int8(block=128)+zstd(level=3)",
    "topk(density=0.1e+1)+int4": "topk(density=1.0)+int4(block=128)",
    "lowrank+zstd": "lowrank(energy=0.95)+fp32+zstd(level=3)",
    "powersgd(rank=2)+bf16": "powersgd(rank=2)+bf16",
    "sparseloco+zstd(level=1)": "sparseloco(k=64)+zstd(level=1)",
}


def written(codec):
    """The spec that a codec is of."""
    known = STAGES[codec.name].parameters if codec.name in STAGES else vars(codec)
    own = str(StageSpec(codec.name, {key: getattr(codec, key) for key in known}))
    if not isinstance(codec, Nesting):
        return own
    inner = written(codec.inner)
    return f"{inner}+{own}" if isinstance(codec, Zstd) else f"{own}+{inner}"


@pytest.mark.parametrize("spec", CANONICAL)
def test_a_spec_and_its_codec_say_the_same(spec):
    codec = build_codec(spec)
    assert written(codec) == str(parse_codec(spec)) == CANONICAL[spec]
    assert parse_codec(CANONICAL[spec]) == parse_codec(spec)


def test_stages_are_nested_in_order():
    codec = build_codec("topk(density=0.02)+int8(block=64)+zstd(level=7)")
    assert isinstance(codec, Zstd)
    assert codec.level == 7
    assert isinstance(codec.inner, TopK)
    assert codec.inner.density == 0.02
    assert isinstance(codec.inner.inner, Int8)
    assert codec.inner.inner.block == 64
    assert [stage.name for stage in parse_codec("topk+int8+zstd")] == ["topk", "int8", "zstd"]


@given(
    structure=st.one_of(
        st.just(""),
        st.floats(0, 1, exclude_min=True).map(lambda share: f"topk(density={share!r})+"),
        st.floats(0, 1, exclude_min=True).map(lambda share: f"lowrank(energy={share!r})+"),
        st.integers(1, 1024).map(lambda rank: f"powersgd(rank={rank})+"),
    ),
    values=st.sampled_from(["fp32", "bf16", "fp16", "int8(block=32)", "sign(block=4096)"]),
    level=st.none() | st.integers(1, 19),
)
def test_canonical_text_is_its_own_canonical_text(structure, values, level):
    spec = structure + values + (f"+zstd(level={level})" if level else "")
    assert str(parse_codec(spec)) == spec
    assert written(build_codec(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("zstd+int8", "write 'int8+zstd'"),
        ("int8(block=32)+topk", "write 'topk+int8(block=32)'"),
        ("zstd+topk", "write 'topk+zstd'"),
        ("sparseloco+int8", "write 'sparseloco'"),
        ("topk+sparseloco+zstd", "write 'sparseloco+zstd'"),
        ("int8+int4", "write 'int8' or 'int4'"),
        ("topk+lowrank+int8", "write 'topk+int8' or 'lowrank+int8'"),
        ("zstd+zstd", "zstd once; write 'zstd'"),
        ("", "'' is not a stage"),
        ("int8+", "'' is not a stage"),
        ("int8(block=64", "'int8(block=64' is not a stage"),
        ("int8)", "'int8)' is not a stage"),
        ("int9", "no codec is called 'int9'; did you mean int8? (there are: topk, lowrank, "),
        ("INT8", "no codec is called 'INT8'"),
        ("int8(64)", "codec int8: '64' is not a parameter; write name=number"),
        ("int8(blocks=64)", "codec int8 has no parameter 'blocks' (it has: block)"),
        ("bf16(block=64)", "codec bf16 has no parameter 'block' (it has: none)"),
        ("int8(block=64, block=32)", "parameter 'block' is given twice"),
        ("int8(block=65)", "block = 65: a power of two from 16 to 4096 is needed"),
        ("int8(block=8192)", "a power of two from 16 to 4096 is needed"),
        ("int8(block=64.0)", "block = 64.0: a power of two from 16 to 4096 is needed"),
        ("int8(block=x)", "block = x is not a number"),
        ("topk(density=0)", "density = 0: a number above 0 to 1 is needed"),
        ("topk(density=1.01)", "a number above 0 to 1 is needed"),
        ("topk(density=nan)", "density = nan is not a number"),
        ("topk(density=1_0)", "density = 1_0 is not a number"),
        ("sparseloco(k=6)", "k = 6: a multiple of 4 from 4 to 1024 is needed"),
        ("zstd(level=0)", "level = 0: a whole number from 1 to 19 is needed"),
        ("powersgd(rank=0)", "rank = 0: a whole number from 1 to 1024 is needed"),
        ("i" * (MAX_SPEC + 1), "a codec of 201 characters; at most 200"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(spec, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build_codec(spec)
    assert told in str(caught.value)


def test_bounds_of_the_grammar_are_those_of_the_classes():
    for name, stage in STAGES.items():
        for key, parameter in stage.parameters.items():
            step = type(parameter.default)(1)
            for value in (parameter.low, parameter.high, parameter.default):
                if parameter.allows(value):
                    assert getattr(CODECS[name](**{key: value}), key) == value
                else:
                    assert value == 0.0
            for value in (parameter.low - step, parameter.high + step):
                assert not parameter.allows(value)
                with pytest.raises(ValueError, match="needed"):
                    CODECS[name](**{key: value})


def test_defaults_are_the_classes_own():
    for kind in (TopK, LowRank, PowerSGD, SparseLoco, Zstd):
        codec = kind()
        defaults = {key: found.default for key, found in STAGES[codec.name].parameters.items()}
        assert {key: getattr(codec, key) for key in defaults} == defaults
        assert getattr(codec, "inner", Fp32()).name == "fp32"


def test_the_grammar_names_the_classes():
    assert set(CODECS) == set(STAGES)
    around = {name for name, stage in STAGES.items() if stage.role in ("structure", "entropy")}
    assert {name for name, kind in CODECS.items() if issubclass(kind, Nesting)} == around
    with pytest.raises(TypeError, match="codec int8 takes no blocks"):
        Int8(blocks=128)


_PLUGIN = """
from photon.compression.casts import Fp32

class Scaled(Fp32):
    name = "scaled"

    def __init__(self, by=2.0):
        self.by = by

    def encode(self, tensor, memory=None):
        return super().encode(tensor * self.by)

    def decode(self, parts, shape, empty=None):
        return super().decode(parts, shape) / self.by

    @property
    def lossless(self):
        return False

class Shy(Fp32):
    name = "bold"
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    (tmp_path / "photon_test_codecs.py").write_text(_PLUGIN)
    info = tmp_path / "photon_test_codecs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: photon-test-codecs\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[photon.codecs]\nscaled = photon_test_codecs:Scaled\nshy = photon_test_codecs:Shy\n"
        "other = photon_test_codecs:Fp33\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("photon_test_codecs", None)


@pytest.mark.usefixtures("plugins")
def test_a_values_codec_of_another_package():
    spec = "topk(density=0.5)+scaled(by=4)+zstd"
    codec = build_codec(spec)
    assert written(codec) == "topk(density=0.5)+scaled(by=4)+zstd(level=3)"
    assert isinstance(codec, Codec)
    tensor = torch.arange(8.0)
    assert codec.decode(codec.encode(tensor), (8,)).tolist() == [0, 0, 0, 0, 4, 5, 6, 7]
    assert written(build_codec("scaled")) == "scaled(by=2.0)"
    with pytest.raises(ValueError, match=r"codec scaled: .*'be'"):
        build_codec("scaled(be=4)")
    with pytest.raises(ValueError, match="write 'scaled' or 'int8'"):
        parse_codec("scaled+int8")
    with pytest.raises(ValueError, match=r"did you mean scaled\? .*; of plugins: other, scaled"):
        parse_codec("scaledd")


@pytest.mark.usefixtures("plugins")
def test_plugins_that_are_not_what_they_say():
    with pytest.raises(PluginError, match=r"'shy' .* calls itself 'bold'"):
        build_codec("shy")
    with pytest.raises(PluginError, match=r"'other' .* can't be imported"):
        build_codec("other")
