"""Silos with a tokenizer each: `photon data prepare --own-vocabulary` and the runs on such text."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import photon
from photon.cli.main import app
from photon.data import PrepareOptions, load_tokenizer, open_data, prepare
from photon.data.shards import HELD_OUT
from photon.errors import (
    IncompatibleConfigError,
    ModelError,
    ShardCorruptError,
    VocabularyMismatchError,
)
from photon.runs import load_weights
from photon.telemetry import read_history
from photon.telemetry.events import Evaluated

OWN = 'parts.personal=["*embed_tokens*","lm_head*"]'
QUICK = ("federation.rounds=2", "local.steps=2", "eval.every=2")
NATO = ["alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"]
GREEK = ["άλφα", "βήτα", "γάμμα", "δέλτα", "έψιλον", "ζήτα", "ήτα", "θήτα", "γιώτα", "κάππα"]


def write(folder, silo, words, *, documents=24, length=80):
    (folder / silo).mkdir(parents=True)
    for number in range(documents):
        draw = np.random.default_rng([number, len(words)])
        text = " ".join(draw.choice(words, length))
        (folder / silo / f"{number}.txt").write_text(f"{text} {number}", encoding="utf-8")


def cut(text, out, **options):
    fractions = {"global_fraction": 0.1, "silo_fraction": 0.2}
    given = PrepareOptions(text, out, silo_folders=True, vocab_size=300, **fractions, **options)
    return prepare(given)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two alphabets, and a silo whose text gives hardly a token of two bytes."""
    folder = tmp_path_factory.mktemp("unlike") / "text"
    write(folder, "nato", NATO)
    write(folder, "greek", GREEK)
    write(folder, "bare", ["a", "b"], length=40)
    return folder


@pytest.fixture(scope="module")
def data(text):
    return cut(text, text.parent / "data", own_vocabulary=True)


@pytest.fixture(scope="module")
def run(data, make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    photon.simulate(make_config(data.path, *QUICK, OWN), run_dir=folder)
    return folder


def test_each_silos_tokenizer_is_of_its_own_text_alone(text, data, tmp_path):
    made = {name: load_tokenizer(one.tokenizer_file) for name, one in data.silos.items()}
    assert made["nato"].vocab_size == made["greek"].vocab_size == data.vocab_size == 300
    assert made["bare"].vocab_size < 300  # the rows that are over stand for nothing
    assert len({one.tokenizer_sha256 for one in data.silos.values()}) == 3
    assert (data.held_out.tokens, data.held_out.splits) == (0, {})
    other = tmp_path / "other"
    shutil.copytree(text, other)
    shutil.rmtree(other / "greek")
    write(other, "greek", NATO[:4])
    again = cut(other, tmp_path / "data", own_vocabulary=True)
    for file in ("manifest.json", "tokenizer/tokenizer.json", "held_out-00000.bin"):
        first, second = (one.silos["nato"].path / file for one in (data, again))
        assert first.read_bytes() == second.read_bytes()
    assert again.silos["greek"].tokenizer_sha256 != data.silos["greek"].tokenizer_sha256


def test_what_is_held_out_is_what_one_vocabulary_for_all_holds_out(text, data, tmp_path):
    shared = cut(text, tmp_path / "shared")
    for name, silo in shared.silos.items():
        for what in ("train_bytes", "train_documents", "held_out_bytes", "held_out_documents"):
            assert getattr(data.silos[name], what) == getattr(silo, what)


def test_a_tokenizer_that_changed_is_noticed(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data.path, copy)
    opened = open_data(copy, own_vocabularies=True)
    opened.verify()
    file = opened.silos["nato"].tokenizer_file
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ShardCorruptError, match=r"nato/tokenizer/tokenizer\.json has sha256"):
        opened.verify()
    file.unlink()
    with pytest.raises(ShardCorruptError, match=r"nato/tokenizer/tokenizer\.json is missing"):
        open_data(copy, own_vocabularies=True)


def test_where_all_silos_have_one_text_it_is_the_run_over_one_vocabulary(make_config, tmp_path):
    """Their tokenizers are the same then, and so is every number."""
    for silo in ("one", "two"):
        write(tmp_path / "text", silo, NATO)
    runs = []
    for own in (False, True):
        made = cut(tmp_path / "text", tmp_path / f"data-{own}", own_vocabulary=own)
        folder = tmp_path / f"run-{own}"
        photon.simulate(make_config(made.path, *QUICK, OWN), run_dir=folder)
        runs.append(folder)
    for silo in ("one", "two"):
        first, second = (load_weights(one, silo)[0].state_dict() for one in runs)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    scores = [
        [(one.round, one.silo, one.loss, one.bits_per_byte, one.tokens) for one in found]
        for found in (read_history(folder).of(Evaluated) for folder in runs)
    ]
    assert scores[0] == scores[1]


def test_bits_per_byte_are_those_of_a_count_by_hand(data, run):
    scores = {one.silo: one for one in read_history(run).of(Evaluated)}
    bits = size = 0.0
    for name, silo in data.silos.items():
        model, config = load_weights(run, name)
        tokenizer = load_tokenizer(silo.tokenizer_file)
        files = [silo.path / shard.file for shard in silo.shards(HELD_OUT)]
        ids = torch.from_numpy(
            np.concatenate([np.fromfile(one, "<u2") for one in files]).astype(int)
        )
        nats, length = 0.0, config.data.sequence_length
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0].double()
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        # Of a byte-level token one character is one byte; the first of all is not predicted.
        first = tokenizer.tokenizer.id_to_token(int(ids[0]))
        predicted_bytes = silo.held_out_bytes - len(first)
        assert scores[name].tokens == len(ids) - 1
        assert scores[name].loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        expected = nats / math.log(2) / predicted_bytes
        assert scores[name].bits_per_byte == pytest.approx(expected, rel=1e-5)
        bits, size = bits + nats / math.log(2), size + predicted_bytes
    assert scores[None].bits_per_byte == pytest.approx(bits / size, rel=1e-5)


def test_what_comes_out_of_a_run_is_of_a_silo_and_speaks_as_it_does(data, run, tmp_path):
    for name, words in (("nato", NATO), ("greek", GREEK)):
        photon.export(run, tmp_path / name, of=name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        own = load_tokenizer(data.silos[name].tokenizer_file)
        assert tokenizer.encode(" ".join(words)) == own.encode([" ".join(words)])[0]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).config.vocab_size == 304
        quick = {"temperature": 0, "max_new_tokens": 8}
        spoken = photon.generate(run, words[0], of=name, **quick)
        assert spoken == photon.generate(tmp_path / name, words[0], **quick)
        scored = photon.evaluate(run, data.path, of=name, device="cpu")
        assert (scored.overall, list(scored.per_silo)) == (None, [name])  # ids of others mean other
        again = photon.evaluate(tmp_path / name, data.path, sequence_length=32, device="cpu")
        assert again.per_silo[name].loss == pytest.approx(scored.per_silo[name].loss)
    command = ["eval", str(run), "--data", str(data.path), "--of", "greek"]
    shown = CliRunner().invoke(app, command)
    assert "greek" in shown.output
    assert "global" not in shown.output
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (told["global"], list(told["per_silo"])) == (None, ["greek"])


def test_other_text_by_a_silos_own_tokenizer_can_be_scored(run, text, tmp_path):
    tokenizer = run / "tokenizer/nato"
    all_text = cut(text, tmp_path / "data", tokenizer=tokenizer)
    scored = photon.evaluate(run, all_text.path, of="nato", max_tokens=100, device="cpu")
    assert scored.overall is not None
    assert sorted(scored.per_silo) == ["bare", "greek", "nato"]
    with pytest.raises(VocabularyMismatchError, match="another tokenizer"):
        photon.evaluate(run, all_text.path, of="greek", device="cpu")


def test_a_run_stopped_between_rounds_comes_to_the_same(data, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints/round-000002")
    (folder / "summary.json").unlink()
    photon.resume(folder)
    for name in data.silos:
        first, second = (load_weights(one, name)[0].state_dict() for one in (run, folder))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize(
    ("personal", "named"),
    [
        ("[]", r"'model\.embed_tokens\.weight', 'lm_head\.weight'"),
        ('["lm_head*"]', r"name 'model\.embed_tokens\.weight'\n"),
        ('["*embed_tokens*"]', r"name 'lm_head\.weight'\n"),
    ],
)
def test_embedding_and_head_must_be_the_silos_own(data, make_config, tmp_path, personal, named):
    config = make_config(data.path, f"parts.personal={personal}")
    with pytest.raises(IncompatibleConfigError, match=r"parts\.personal .*" + named):
        photon.simulate(config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_one_vocabulary_is_needed_it_is_refused(data, run, text, make_config, tmp_path):
    config, words = make_config(data.path, *QUICK, OWN), "has a vocabulary of its own"
    with pytest.raises(VocabularyMismatchError, match=words):
        photon.train(config, run_dir=tmp_path / "central")
    with pytest.raises(VocabularyMismatchError, match=words):
        open_data(data.path)  # as `photon serve` and a silo that joins do
    with pytest.raises(ModelError, match=r"each silo of the run .* has a model of its own"):
        photon.export(run, tmp_path / "out")
    with pytest.raises(ModelError, match=r"each silo of the run .* has a model of its own"):
        photon.generate(run, "alfa")
    photon.export(run, tmp_path / "nato", of="nato")
    with pytest.raises(ModelError, match="is one model"):
        photon.generate(tmp_path / "nato", "alfa", of="nato")
    model = config.model.model_validate({"path": str(tmp_path / "nato"), "init": "pretrained"})
    pretrained = config.model_copy(update={"model": model})
    with pytest.raises(IncompatibleConfigError, match=r'model\.init = "pretrained" brings one'):
        photon.simulate(pretrained, run_dir=tmp_path / "pretrained")
    for other in ({"tokenizer": run / "tokenizer/nato"}, {"held_out_only": True}):
        with pytest.raises(IncompatibleConfigError, match="own_vocabulary trains a tokenizer"):
            cut(text, tmp_path / "data", own_vocabulary=True, **other)
