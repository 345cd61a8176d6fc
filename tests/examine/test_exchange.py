"""Examinations of several sites: compared, refused, and in a data card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examined_texts import german, prepare_texts, sentences
from extremes import examples, spoiled
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from photon.cards.filling import facts_of_data
from photon.cards.folder import data_card_of, read_card
from photon.cli.main import app
from photon.errors import DataError, DataNotFoundError, error_of
from photon.examine.examination import Examination
from photon.examine.exchange import behind, compare, read_examination
from photon.membership.keys import NodeKey
from photon.membership.signing import sign_card, signature_file, signer_of
from photon.products import evaluate
from photon.runs import simulate
from photon.store.disk import file_sha256
from photon.telemetry.events import Evaluated
from photon.telemetry.history import RunHistory


def photon(*words: Any, **more: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], **more)


@pytest.fixture(scope="module")
def sites(one_silo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of two silos, a key, and both examinations."""
    folder = tmp_path_factory.mktemp("sites")
    shared = [sentences(n) for n in range(15)]
    silos = {
        "north": [f"{one} So in the north." for one in shared] + [german(n) for n in range(40)],
        "south": [f"{one} So in the south." for one in shared]
        + [sentences(n) for n in range(50, 90)],
    }
    prepare_texts(folder / "data", one_silo / "tokenizer", silos)
    (folder / "sites.key").write_text("0123456789abcdef" * 4)
    for silo in silos:
        assert examine(folder, silo).exit_code == 0
    return folder


def examine(folder: Path, silo: str, *more: Any, key: str = "sites.key") -> Any:
    out = ("--out", folder / f"{silo}.json", "--yes") if "--out" not in more else ()
    words = ("data", "examine", folder / "data", "--silo", silo, "--key", folder / key)
    return photon(*words, *out, *more)


@pytest.fixture
def copied(sites: Path, tmp_path: Path) -> Path:
    """The same, for a test to change."""
    return Path(shutil.copytree(sites, tmp_path / "sites"))


def both(folder: Path) -> list[Path]:
    return [folder / "north.json", folder / "south.json"]


def test_gaps_and_copies_across_sites(sites: Path) -> None:
    figures, told = compare(both(sites))
    north = read_examination(sites / "north.json")
    assert figures["languages", "de"].keys() == {"north"}
    assert 0.6 < figures["languages", "de"]["north"] < 0.8
    assert ("languages: de", "hardly any in south") in told
    (copies,) = (words for of, words in told if of == "copies: north")
    found, rest = copies.split(" of ", 1)
    assert int(found) in (13, 14, 15)  # two documents of all are held out
    assert rest == f"{north.documents} are in south too"
    result = photon("data", "compare", *both(sites))
    assert result.exit_code == 0, result.output
    assert "hardly any in south" in result.stdout


def test_few_copies_are_not_told(copied: Path) -> None:
    mine, others = (np.load(copied / f"{silo}.signatures.npy") for silo in ("north", "south"))
    # South has no band in common with north but of three documents.
    others = np.arange(others.size, dtype=np.uint64).reshape(others.shape)
    others[:3] = mine[:3]
    rewrite(copied, "south", others)
    _, told = compare(both(copied))
    assert [words.split(" of ")[0] for of, words in told if of.startswith("copies")] == [
        "hardly any",
        "hardly any",
    ]


def rewrite(
    folder: Path, silo_name: str, signatures: np.ndarray | None = None, **fields: Any
) -> None:
    """Change an examination as its site might."""
    path, beside = folder / f"{silo_name}.json", folder / f"{silo_name}.signatures.npy"
    record = json.loads(path.read_text()) | fields
    if signatures is not None:
        np.save(beside, signatures)
        record["signatures_sha256"] = file_sha256(beside)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"key": "0" * 16}, "by key"),
        ({"method": "0, other detectors"}, "by method"),
        ({"held_out_sha256": "0" * 64}, "by held_out_sha256"),
        ({"silo": "north"}, "2 examinations are of 1 silos"),
        ({"documents": 2**60}, "documents"),
        ({"documents": 1}, "documents of 1"),
        ({"min_cell": 2}, "min_cell"),
        ({"min_cell": 55}, "below the cell size of 55"),
        ({"losses": {"de": float("inf")}}, "losses.de"),
        ({"tables": {"a\x1b[2J": {}}}, "tables"),
        ({"format": 2}, "format"),
        ({"texts": ["here"]}, "texts"),
    ],
)
def test_examinations_that_can_not_be_compared(
    copied: Path, fields: dict[str, Any], words: str
) -> None:
    rewrite(copied, "south", **fields)
    with pytest.raises(DataError, match=words):
        compare(both(copied))


def test_signatures_of_others_are_refused(copied: Path) -> None:
    beside = copied / "south.signatures.npy"
    good = np.load(beside)
    for wrong, words in (
        (good[:-1], "does not hold"),
        (good.astype(np.int64), "does not hold"),
        (np.array([{"a": 1}], dtype=object), "does not hold"),
    ):
        rewrite(copied, "south", wrong)
        with pytest.raises(DataError, match=words):
            compare(both(copied))
    np.save(beside, good)
    with pytest.raises(DataError, match="does not hold"):
        compare(both(copied))
    beside.unlink()
    _, told = compare(both(copied))
    assert not [of for of, _ in told if of.startswith("copies")]


def test_no_file_and_no_examination(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"gone\.json"):
        read_examination(tmp_path / "gone.json")
    for text in (b"", b"[]", b"\xff\xfe", b"{" * 2_000_000):
        (tmp_path / "bad.json").write_bytes(text)
        with pytest.raises(DataError, match="is no examination"):
            read_examination(tmp_path / "bad.json")


_VALID = {
    "method": "1",
    "silo": "north",
    "data_sha256": "a" * 64,
    "folder_sha256": "b" * 64,
    "min_cell": 10,
    "documents": 60,
    "tables": {"languages": {"cells": {"en": 40}, "joined": ["de"], "joined_documents": 20}},
    "held_out_sha256": "c" * 64,
    "losses": {"de": 3.5},
    "key": "0" * 16,
}


@examples(40)
@given(st.data())
def test_whatever_a_site_writes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, drawn: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "spoiled.json"
    path.write_text(json.dumps(drawn.draw(spoiled(Examination, _VALID))))
    try:
        record = read_examination(path)
    except DataError:
        return
    assert all(0 <= figure < 2**53 for figure in record.figures().values())
    compare([path])


def test_a_site_sees_it_before_it_is_written(copied: Path) -> None:
    out = copied / "seen.json"
    shown = examine(copied, "north", "--out", out, "--min-cell", 5)
    assert shown.exit_code == 1  # nobody answered
    assert "languages: de" in shown.stdout
    assert not out.exists()
    words = ("data", "examine", copied / "data", "--silo", "north", "--out", out)
    assert photon(*words, input="n\n").exit_code == 0
    assert not out.exists()
    assert photon(*words, input="y\n").exit_code == 0
    assert read_examination(out).key is None
    assert not out.with_suffix(".signatures.npy").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--key", "gone.key"), 21, "gone.key"),
        (("--probes", "data"), 12, "--probes and --model"),
        (("--out", "north.txt"), 12, "does not end in .json"),
        (("--min-cell", "2"), 20, "--min-cell 2"),
        (("--held-out", "gone"), 21, "no prepared data at gone"),
    ],
)
def test_bad_options(sites: Path, words: tuple[str, ...], code: int, told: str) -> None:
    result = photon("data", "examine", sites / "data", "--silo", "north", *words)
    assert (result.exit_code, told in result.stderr) == (code, True), result.output
    assert issubclass(error_of(code), Exception)


def test_the_card_holds_it_and_its_signature_covers_it(copied: Path, tmp_path: Path) -> None:
    words = ("cards", "init", tmp_path, "--data", copied / "data", "--silo", "north")
    assert photon(*words).exit_code == 0
    card = data_card_of(tmp_path, "north")
    card.write_text(card.read_text().replace("# personal =", "personal = true"))
    key = NodeKey.create(tmp_path / "node.key")
    sign_card(card, key)
    result = photon(*words, "--examined", copied / "north.json")
    assert result.exit_code == 0, result.output
    facts, answers = read_card(card, "data").facts, read_card(card, "data").persons
    assert facts.examined == read_examination(copied / "north.json").figures()
    assert (facts.version, answers.personal) == (1, True)
    # The signature was over a card without it.
    assert not signature_file(card).exists()
    sign_card(card, key)
    again = photon(*words, "--examined", copied / "north.json")
    assert again.exit_code == 0
    assert signer_of(card) == (key.fingerprint, "")
    card.write_text(card.read_text().replace('"documents" = ', '"documents" = 1'))
    card.write_text(card.read_text().replace("min_cell = 10", "min_cell = 11"))
    assert signer_of(card)[0] is None


def test_an_examination_of_other_data_is_stale(copied: Path, tmp_path: Path) -> None:
    words = ("cards", "init", tmp_path, "--data", copied / "data", "--silo", "north")
    result = photon(*words, "--examined", copied / "south.json")
    assert result.exit_code == 100
    assert "is stale" in result.stderr
    rewrite(copied, "north", data_sha256="0" * 64)
    result = photon(*words, "--examined", copied / "north.json")
    assert result.exit_code == 100
    assert facts_of_data(copied / "data", "north")["data_sha256"] in result.stderr
    assert not data_card_of(tmp_path, "north").exists()
    assert photon("cards", "init", tmp_path, "--examined", "x.json").exit_code == 100


def test_who_stays_behind() -> None:
    def score(round_: int, silo: str | None, loss: float | None) -> Evaluated:
        return Evaluated(
            round=round_,
            silo=silo,
            loss=loss,
            perplexity=1.0,
            bits_per_byte=None,
            tokens=1,
            eval_s=0.0,
        )

    losses = {0: (5.0, 5.0, 5.0), 1: (3.0, 4.0, 5.5), 2: (2.0, 3.0, 5.6)}
    events = [score(n, None, 1.0) for n in losses]
    events += [
        score(n, silo, loss)
        for n, three in losses.items()
        for silo, loss in zip("abc", three, strict=True)
    ]
    events += [score(0, "gone", 4.0), score(1, "gone", None)]
    told = dict(behind(RunHistory(Path("run"), list(events))))
    assert set(told) == {"loss: a", "loss: b", "loss: c"}
    assert "+2.067 at last" in told["loss: c"]
    assert "above it in 3 of 3" in told["loss: c"]
    assert "rose 2 times" in told["loss: c"]
    assert "rose 0 times" in told["loss: a"]
    assert not list(behind(RunHistory(Path("run"), [])))


def test_losses_on_probes_and_who_stays_behind_in_a_run(
    three_silos: Path, make_config: Any, tmp_path: Path
) -> None:
    config = make_config(three_silos, "federation.rounds=1", "local.steps=2", "eval.max_tokens=200")
    simulate(config, run_dir=tmp_path / "run")
    for silo in ("blue", "red"):
        words = ("data", "examine", three_silos, "--silo", silo, "--min-cell", 3, "--yes")
        more = ("--model", tmp_path / "run", "--probes", three_silos)
        result = photon(*words, *more, "--out", tmp_path / f"{silo}.json")
        assert result.exit_code == 0, result.output
        assert "loss: green" in result.stdout
    files = [tmp_path / "blue.json", tmp_path / "red.json"]
    losses = read_examination(files[0]).losses
    scored = evaluate(tmp_path / "run", three_silos).per_silo
    assert losses == {group: one.loss for group, one in scored.items()}
    figures, _ = compare(files)
    away = [figures["loss less mean", group]["blue"] for group in losses]
    assert abs(sum(away)) < 1e-9
    shown = photon("data", "compare", *files, "--run", tmp_path / "run").stdout
    assert all(f"loss: {silo}" in shown for silo in ("blue", "green", "red"))
