"""Whatever valid config a run has, the file saved with the run reads back to the same one."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from photon.config import RunConfig, parse_run_config, resolved_toml
from photon.config.outer import OUTER_NAMES
from photon.config.run import PRESETS

counts = st.integers(1, 10_000)
fractions = st.floats(0, 1, exclude_max=True)
rates = st.floats(1e-12, 1e6)
# Keys and strings with dots, quotes, newlines and other scripts are what TOML gets wrong first.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
plain = st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | words


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A table with any subset of its keys."""
    return st.fixed_dictionaries({}, optional=fields)


models = some(family=st.sampled_from(["llama", "mpt"])).flatmap(
    lambda shape: st.one_of(
        st.sampled_from(PRESETS).map(lambda preset: {**shape, "preset": preset}),
        st.builds(
            lambda path, init: {**shape, "path": path, "init": init},
            words,
            st.sampled_from(["random", "pretrained"]),
        ),
    )
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Valid run files as nested dicts."""
    steps, micro, factor = draw(counts), draw(counts), draw(st.integers(1, 64))
    rounds = draw(counts)
    schedule = draw(st.sampled_from(["cosine", "wsd", "constant"]))
    warmup = draw(st.integers(0, rounds * steps - 1))
    local: dict[str, Any] = {
        "steps": steps,
        "batch_size": micro * factor,
        "schedule": schedule,
        "warmup_steps": warmup,
        **draw(some(lr=rates, beta1=fractions, min_lr_ratio=fractions, clip_norm=rates)),
    }
    if schedule == "wsd" and draw(st.booleans()):
        local["decay_steps"] = draw(st.integers(0, rounds * steps - warmup))
    sample = draw(counts)
    outer = draw(
        some(
            name=st.sampled_from(OUTER_NAMES),
            lr=rates,
            momentum=fractions,
            options=st.dictionaries(words, plain | st.lists(st.integers(0, 9), max_size=3)),
        )
    )
    return {
        "run": draw(
            some(
                name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z"),
                seed=st.integers(0, 2**31 - 1),
            )
        ),
        "model": draw(models),
        "data": {
            "path": draw(words),
            **draw(some(mixture=st.dictionaries(words, rates, max_size=3), verify=st.booleans())),
        },
        "federation": {
            "rounds": rounds,
            "sample": sample,
            **draw(some(quorum=st.integers(1, sample), workers=st.integers(0, 1024))),
        },
        "local": local,
        "compute": {
            "micro_batch_size": micro,
            **draw(some(device=st.sampled_from(["auto", "cpu", "cuda", "mps"]))),
        },
        "outer": outer,
        "eval": draw(some(every=st.integers(0, 9), max_tokens=counts, per_silo=st.booleans())),
        "train": draw(some(batch_size=counts, lr=rates)),
    }


@given(trees())
def test_resolved_toml_reads_back_to_the_same_config(tree: dict[str, Any]) -> None:
    config = parse_run_config(tree)
    again = parse_run_config(tomllib.loads(resolved_toml(config)))
    assert again == config
    assert resolved_toml(again) == resolved_toml(config)


@given(trees())
def test_defaults_are_written_out(tree: dict[str, Any]) -> None:
    written = tomllib.loads(resolved_toml(parse_run_config(tree)))
    for section, field in RunConfig.model_fields.items():
        table = field.annotation
        assert table is not None
        for key, about in table.model_fields.items():  # type: ignore[union-attr]
            assert key in written[section] or about.default is None
