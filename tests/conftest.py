"""What every test runs under: no network access by libraries, no display, reproducible examples."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
from collections import Counter
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from hypothesis import settings

# Set before any test module imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples on every machine, and no failure because a shared one was slow.
settings.register_profile("photon", deadline=None, derandomize=True)
settings.load_profile("photon")

# What modules define is no garbage, and there is a lot of it to look through.
gc.disable()

# only_fails says what differs, as it did in a test file.
pytest.register_assert_rewrite("remote_bench")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that none of them begins when all others are done.

    Files are handed to processes in this order (`--no-loadscope-reorder`). The sort is stable: a
    file's own tests keep theirs.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Collections look from now on at what tests make, and not at all that was imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _write_corpus(
    folder: Path, parties: dict[str, int], *, words: int = 220, seed: int = 0
) -> Path:
    """Text files of made-up sentences and a metadata.csv with a party for each.

    Sentences come from a small grammar that differs by party, so there is something to learn and
    silos are not alike.
    """
    draw = random.Random(0)
    nouns = ["bank", "river", "treaty", "harbor", "farm", "court", "road", "school", "army", "mine"]
    verbs = ["serves", "guards", "needs", "opens", "builds", "crosses", "feeds", "keeps"]
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["fileid,party,year"]
    number = 0
    for place, (party, count) in enumerate(parties.items()):
        own_nouns = nouns[place * 2 :] + nouns[: place * 2]
        for _ in range(count):
            sentences = []
            while sum(map(len, sentences)) < words * 6:
                subject = draw.choice(own_nouns[:6])
                sentences.append(
                    f"The {subject} {draw.choice(verbs)} the {draw.choice(own_nouns)} of "
                    f"{draw.randint(1790, 2020)}."
                )
            name = f"doc-{number:04d}"
            (folder / f"{name}.txt").write_text(" ".join(sentences), encoding="utf-8")
            rows.append(f"{name},{party},{1790 + number}")
            number += 1
    (folder.parent / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def prepare_silos(root: Path, parties: dict[str, int]) -> Path:
    """A prepared folder with one silo per party."""
    from photon.data import PrepareOptions, prepare

    text = _write_corpus(root / "text", parties)
    options = PrepareOptions(
        input=str(text),
        out=root / "data",
        metadata=root / "metadata.csv",
        silo_field="party",
        vocab_size=300,
        global_fraction=0.1,
        silo_fraction=0.1,
    )
    return prepare(options).path


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Forks processes that have imported torch and Photon: each would take five seconds to."""
    context = multiprocessing.get_context("forkserver")
    # The last four are what a run imports late, each.
    late = ["photon.data.quiet_grain", "transformers.models.llama.modeling_llama"]
    late += ["tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"]
    context.set_forkserver_preload(["photon.cli.main", "photon.runs", *late])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read once, when torch is imported
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def prepare_text():
    """Makes prepared folders; see `prepare_silos`."""
    return prepare_silos


@pytest.fixture(scope="session")
def write_corpus():
    """Writes text files with something to learn; see `_write_corpus`."""
    return _write_corpus


@pytest.fixture(scope="session")
def three_silos(tmp_path_factory) -> Path:
    """Prepared data: silos "blue", "green" and "red" of different sizes."""
    return prepare_silos(tmp_path_factory.mktemp("three"), {"red": 16, "green": 12, "blue": 20})


@pytest.fixture(scope="session")
def five_silos(tmp_path_factory) -> Path:
    """Prepared data with silos "a" to "e"."""
    return prepare_silos(tmp_path_factory.mktemp("five"), dict.fromkeys("abcde", 8))


@pytest.fixture(scope="session")
def one_silo(tmp_path_factory) -> Path:
    """Prepared data with the single silo "red"."""
    return prepare_silos(tmp_path_factory.mktemp("one"), {"red": 24})


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """The shape of a model whose steps take a millisecond or two, where `tiny`'s take fifty.

    For real processes that are started, killed and started again: they are about the run.
    """
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("small") / "model"
    LlamaConfig(
        vocab_size=304, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def make_config(small_model):
    """A small run over prepared data: three rounds of four steps; overrides as on the CLI.

    The model is `small_model`, one in another folder, or a preset.
    """
    from photon.config import parse_run_config

    def make(data: Path, *overrides: str, model: Path = small_model, preset: str | None = None):
        tree = {
            "run": {"name": "test", "seed": 11, "log_every": 2},
            "compute": {"threads": 1},
            "model": {"preset": preset} if preset else {"path": str(model)},
            "data": {"path": str(data), "sequence_length": 32},
            "federation": {"rounds": 3},
            "local": {"steps": 4, "batch_size": 4, "lr": 3e-3},
            "eval": {"max_tokens": 600},
        }
        return parse_run_config(tree, overrides)

    return make
