"""Reading run files: values, overrides, and errors that name key, value and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from photon.config import (
    RunConfig,
    load_node_config,
    load_run_config,
    parse_run_config,
    write_resolved,
)
from photon.config.addresses import host_and_port
from photon.errors import (
    ConfigError,
    IncompatibleConfigError,
    InvalidValueError,
    UnknownKeyError,
)

MINIMAL: dict[str, Any] = {"model": {"preset": "tiny"}, "data": {"path": "data/demo"}}


def parse(*overrides: str, **tables: dict[str, Any]) -> RunConfig:
    return parse_run_config({**MINIMAL, **tables}, overrides)


def refused(kind: type[ConfigError], *overrides: str, **tables: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(*overrides, **tables)
    assert type(caught.value) is kind, caught.value
    return caught.value


# --- files --------------------------------------------------------------------------------------


def test_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npreset = "75m"\n[data]\npath = "dätä"\n', encoding="utf-8")
    config = load_run_config(file, ["local.steps=7"])
    assert (config.model.preset, config.data.path, config.local.steps) == ("75m", "dätä", 7)


def test_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npreset = "75m"\n[data]\npath = "d"\n', encoding="utf-8-sig")
    assert load_run_config(file).model.preset == "75m"


def test_missing_file_names_itself_and_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path / "absent.toml")
    assert caught.value.message == f"no run file at {tmp_path / 'absent.toml'}"
    assert caught.value.hint is not None
    assert "`photon init DIR`" in caught.value.hint


def test_directory_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read run file") as caught:
        load_run_config(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert "directory" in caught.value.message


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.toml"
    file.write_bytes('[run]\nname = "é"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match="can't read run file") as caught:
        load_run_config(file)
    assert str(file) in caught.value.message
    assert "utf-8" in caught.value.message


def test_what_is_not_toml_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\npreset: tiny\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not valid TOML") as caught:
        load_run_config(file)
    assert type(caught.value) is ConfigError
    assert str(file) in caught.value.message
    assert "line 2" in caught.value.message


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npreset = "tiny"\n[data]\npath = "d"\n[x]\n', encoding="utf-8")
    with pytest.raises(UnknownKeyError, match=str(file)):
        load_run_config(file)


def test_write_resolved_leaves_no_partial_file(tmp_path: Path) -> None:
    config = parse("local.steps=9")
    write_resolved(config, tmp_path / "run.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    assert load_run_config(tmp_path / "run.toml") == config


# --- overrides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("local.steps=64", 64),
        (" local.steps = 64 ", 64),
        ("local.lr=6e-4", 6e-4),
        ("local.lr=1", 1.0),
        ("data.verify=false", False),
        ("eval.per_silo=true", True),
        ("run.name=night-3", "night-3"),
        ('run.name="night-3"', "night-3"),
        ("run.name=2026", "2026"),
        ("run.name=2026-11-21", "2026-11-21"),
        ("data.path=my data/set one", "my data/set one"),
        ('data.path="my data/set one"', "my data/set one"),
        ("data.path='my data'", "my data"),
        ("data.path=a=b", "a=b"),
        ("model.preset=125m", "125m"),
        ("federation.quorum=2", 2),
    ],
)
def test_override(override: str, value: object) -> None:
    config = parse(override)
    table, key = override.partition("=")[0].strip().split(".")
    found = getattr(getattr(config, table), key)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_into_tables_and_the_last_one_wins() -> None:
    config = parse("data.mixture.en=2", "data.mixture.fr=0.5", "outer.options.rho=[1, 2]")
    assert config.data.mixture == {"en": 2.0, "fr": 0.5}
    assert config.outer.options == {"rho": [1, 2]}
    assert parse("local.steps=1", "local.steps=2").local.steps == 2


def test_overrides_leave_the_given_tree_alone() -> None:
    tree = {**MINIMAL, "outer": {"options": {"rho": 1}}}
    assert parse_run_config(tree, ["outer.options.rho=2"]).outer.options == {"rho": 2}
    assert tree["outer"] == {"options": {"rho": 1}}


@pytest.mark.parametrize(
    "override", ["local.steps", "=3", ".steps=3", "local.=3", "local..x=3", ""]
)
def test_malformed_override_shows_the_form(override: str) -> None:
    error = refused(ConfigError, override)
    assert f"override {override!r} is not of the form section.key=value" == error.message
    assert error.hint == "Example: --set local.steps=64"


def test_override_below_a_value() -> None:
    error = refused(UnknownKeyError, "model.preset.size=3")
    assert "model.preset is a value, not a table" in error.message


def test_override_of_a_whole_table_must_be_a_table() -> None:
    assert "local = 5 must be a table, [local]" in refused(InvalidValueError, "local=5").message
    assert parse("local={steps = 5}").local.steps == 5


# --- unknown keys -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("local.stepz=3", "Did you mean local.steps?"),
        ("local.learning_rate=3", "Valid keys of [local]: adamw_lr_ratio,"),
        ("federation.round=3", "Did you mean federation.rounds?"),
        ("modle={}", "Did you mean model?"),
        ("federation.steps=3", "steps belongs to another table: local.steps."),
        ("rounds=3", "rounds belongs to another table: federation.rounds."),
        ("run.lr=3", "lr belongs to another table: local.lr or outer.lr or train.lr."),
        (
            "zzz=3",
            "Valid keys of a run file: comply, compute, data, energy, eval, federation, link,",
        ),
    ],
)
def test_unknown_key_suggests(override: str, hint: str) -> None:
    error = refused(UnknownKeyError, override)
    assert repr(override.partition("=")[0]) in error.message
    assert error.hint is not None
    assert error.hint.startswith(hint)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "found", "allowed"),
    [
        ("local.steps=0", "local.steps = 0:", "greater than or equal to 1"),
        ("local.steps=1.5", "local.steps = 1.5:", "valid integer"),
        ("local.steps=true", "local.steps = True:", "valid integer"),
        ('local.steps="3"', "local.steps = '3':", "valid integer"),
        ("local.steps=[3]", "local.steps = [3]:", "valid integer"),
        ("local.lr=0", "local.lr = 0:", "greater than 0"),
        ("local.lr=nan", "local.lr = nan:", "finite number"),
        ("local.lr=fast", "local.lr = 'fast':", "valid number"),
        ("local.beta1=1.0", "local.beta1 = 1.0:", "less than 1"),
        ("local.min_lr_ratio=1.1", "local.min_lr_ratio = 1.1:", "less than or equal to 1"),
        ("data.verify=1", "data.verify = 1:", "valid boolean"),
        ("data.sequence_length=1", "data.sequence_length = 1:", "greater than or equal to 2"),
        ("data.mixture.en=-1", "data.mixture.en = -1:", "greater than 0"),
        ("data.mixture=3", "data.mixture = 3:", "valid dictionary"),
        ("run.seed=-1", "run.seed = -1:", "greater than or equal to 0"),
        ("run.seed=2147483648", "run.seed = 2147483648:", "less than 2147483648"),
        ("run.name=../up", "run.name = '../up':", "match pattern"),
        ("run.name=", "run.name = '':", "match pattern"),
        ("compute.device=tpu", "compute.device = 'tpu':", "'auto', 'cpu', 'cuda' or 'mps'"),
        ("model.preset=2b", "model.preset = '2b':", "'small', '75m', '125m', '350m'"),
        ("federation.workers=1025", "federation.workers = 1025:", "less than or equal to 1024"),
        ("federation.sample=0", "federation.sample = 0:", "greater than or equal to 1"),
        ("outer.name=adam", "outer.name = 'adam':", "is not one of fedavg, fedavgm, nesterov"),
        ("federation.merging_rule=sum", "federation.merging_rule = 'sum':", "not one of mean"),
    ],
)
def test_refused_value_is_named_with_what_is_allowed(
    override: str, found: str, allowed: str
) -> None:
    error = refused(InvalidValueError, override)
    assert found in error.message
    assert allowed in error.message
    described = ".".join(override.partition("=")[0].split(".")[:2])
    assert error.hint is not None
    assert error.hint.startswith(f"{described}: ")


def test_more_errors_are_counted() -> None:
    error = refused(InvalidValueError, "local.steps=0", "local.lr=0", "run.seed=-1")
    assert error.message.endswith("(and 2 more)")


def test_missing_key_and_missing_table() -> None:
    with pytest.raises(InvalidValueError) as caught:
        parse_run_config({"model": {"preset": "tiny"}, "data": {}})
    assert caught.value.message == "run config: data.path is missing"
    assert caught.value.hint is not None
    assert "photon data prepare" in caught.value.hint
    with pytest.raises(InvalidValueError) as caught:
        parse_run_config({"model": {"preset": "tiny"}})
    assert caught.value.message == "run config: data is missing"
    assert caught.value.hint is not None
    assert "Add a table [data]" in caught.value.hint


def test_array_of_tables_is_not_a_table() -> None:
    with pytest.raises(InvalidValueError, match="must be a table"):
        parse_run_config({**MINIMAL, "local": [{"steps": 3}]})


# --- values that can't work together -------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.path=gpt2"], ["[model]", "either preset or path, not both"]),
        (["model.init=pretrained"], ['init = "pretrained" needs path']),
        (
            ["local.batch_size=16", "compute.micro_batch_size=3"],
            ["compute.micro_batch_size = 3 does not divide local.batch_size = 16"],
        ),
        (["federation.merge=adopt", "outer.lr=0.7"], ["adopt", "'fedavg', 0.7", "delta"]),
        (["federation.merge=adopt", "outer.name=nesterov"], ["adopt", "'nesterov', 0.7"]),
        (
            ["federation.sample=2", "federation.quorum=3"],
            ["federation.quorum = 3 exceeds federation.sample = 2"],
        ),
        (
            ["federation.rounds=2", "local.steps=5", "local.warmup_steps=10"],
            ["local.warmup_steps = 10", "10 global steps"],
        ),
        (
            [
                "federation.rounds=2",
                "local.steps=5",
                "local.schedule=wsd",
                "local.warmup_steps=5",
                "local.decay_steps=6",
            ],
            ["= 11 exceeds the run's 10 global steps"],
        ),
        (["local.decay_steps=3"], ['schedule = "wsd"', "'cosine'"]),
        (["local.optimizer=amsgrad"], ["amsgrad", "FedLALR", 'optimizer_state = "average"']),
        (
            ["local.optimizer=amsgrad", "federation.optimizer_state=keep"],
            ["(found 'keep')", "adamw"],
        ),
        (["local.optimizer_bits=8", "local.optimizer=adopt"], ["optimizer_bits = 8", "'adopt'"]),
        (["model.qk_norm=true", "model.family=mpt"], ["qk_norm", 'family = "llama"']),
        (["local.document_mask=true", "model.family=mpt"], ["document_mask", "llama"]),
    ],
)
def test_incompatible_values(overrides: list[str], words: list[str]) -> None:
    error = refused(IncompatibleConfigError, *overrides)
    for word in words:
        assert word in error.message


def test_neither_preset_nor_path() -> None:
    with pytest.raises(IncompatibleConfigError, match="either preset or path, not neither"):
        parse_run_config({"model": {}, "data": {"path": "d"}})


# --- what a config says of itself ----------------------------------------------------------------


def test_defaults() -> None:
    config = parse()
    assert config.run.name == "run"
    assert (config.federation.rounds, config.local.steps, config.total_steps) == (10, 32, 320)
    assert (config.federation.merge, config.federation.weighting) == ("delta", "tokens")
    assert (config.outer.name, config.outer.lr) == ("fedavg", 1.0)
    assert config.federation.sample is None
    assert config.data.mixture == {}


@pytest.mark.parametrize(
    ("quorum", "participants", "fewest"),
    [(None, 1, 1), (None, 4, 2), (None, 5, 3), (3, 8, 3), (3, 2, 2)],
)
def test_quorum_of(quorum: int | None, participants: int, fewest: int) -> None:
    overrides = [] if quorum is None else [f"federation.quorum={quorum}"]
    assert parse(*overrides).quorum_of(participants) == fewest


def test_config_is_frozen() -> None:
    config = parse()
    with pytest.raises(ValidationError, match="frozen"):
        config.local.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.local = config.local  # type: ignore[misc]


# --- what an operator writes is checked where it is written ---------------------------------------


@pytest.mark.parametrize(
    ("host", "kept"),
    [
        ("ai.example.org", "ai.example.org"),
        ("lab_7", "lab_7"),
        ("10.0.0.7", "10.0.0.7"),
        ("[::1]", "::1"),
        ("fd00:0:0::1", "fd00::1"),
        ("\xc4.example.org", "xn--4ca.example.org"),
    ],
)
def test_hosts(host: str, kept: str) -> None:
    assert parse(serve={"host": host}).serve.host == kept


@pytest.mark.parametrize(
    "host",
    [
        *("ai.example.org:8443", "https://ai.example.org", "a b", "a/b", "", ".", "a..b", "-a"),
        *("10.0.0.256", "fe80::1%eth0", "[ai.example.org]", "u@h", "a" * 64, "\u2024"),
    ],
)
def test_what_is_no_host(host: str) -> None:
    error = refused(InvalidValueError, serve={"host": host})
    assert "serve.host" in str(error)
    with pytest.raises(ValueError, match=r"HOST:PORT|must be a name|has a zone"):
        host_and_port(f"{host}:8443")


@pytest.mark.parametrize("text", ["a", "a:", ":1", "a:0", "a:65536", "a:1_0", "::1:80", "a:1:2"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|must be a name"):
        host_and_port(text)


def test_private_addresses_of_a_site(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    node = '[data]\npath = "d"\n[network]\nallow_private_addresses = ["{}"]\n'
    for entry, kept in (
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("[fd00::1]", "fd00::1/128"),
        ("MinIO.lab", "minio.lab"),
    ):
        file.write_text(node.format(entry))
        assert load_node_config(file).network.allow_private_addresses == [kept]
    for entry in ("10.1.0.1/16", "https://minio", "minio:9000", "*", ""):
        file.write_text(node.format(entry))
        with pytest.raises(InvalidValueError, match="allow_private_addresses"):
            load_node_config(file)


def test_a_tilde_is_the_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(
        data={"path": "~/text"},
        serve={"home": "~/s", "certificate": "~/c", "key": "~/k", "ca": "~/a"},
    )
    serve = config.serve
    found = [config.data.path, serve.home, serve.certificate, serve.key, serve.ca]
    assert found == [str(tmp_path / name) for name in ("text", "s", "c", "k", "a")]
    file = tmp_path / "node.toml"
    file.write_text('[data]\npath = "~/text"\n')
    assert load_node_config(file).data.path == str(tmp_path / "text")
