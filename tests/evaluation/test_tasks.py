"""Tasks made from held-out text, and the harness's scores on them against ones worked out here."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from photon.cli.main import app
from photon.data import PrepareOptions, open_data, prepare
from photon.errors import DataError, InvalidValueError, MachineError
from photon.evaluation.tasks import MADE, cloze, definitions, paragraphs
from photon.products import evaluate_tasks, export
from photon.runs import simulate

NOUNS = ["harbor", "river", "bridge", "school", "market", "garden", "mill", "tower", "well"]
KINDS = ["flat", "round", "narrow", "distant", "northern", "wooden", "royal", "quiet"]


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Prepared data of a dictionary and prose, and all of its text."""
    folder = tmp_path_factory.mktemp("dictionary")
    draw = random.Random(1)
    texts: list[str] = []
    for place in range(48):
        parts = []
        for entry in range(12):
            kind, noun = draw.choice(KINDS), draw.choice(NOUNS)
            meaning = f"a {kind} {noun} that stands beside the {draw.choice(NOUNS)} of old"
            word = f"{noun[:3]}{kind[:3]}"
            forms = [
                f"{word} (noun): {meaning}",
                f"{word}, n. [L. {word}us.] {meaning.capitalize()}.",
            ]
            parts.append(forms[entry % 2].replace(word, f"{word}{'abcdefghijkl'[entry]}"))
            said = [
                f"The {draw.choice(KINDS)} {draw.choice(NOUNS)} was near the {noun}."
                for _ in "abcd"
            ]
            parts.append(" ".join(said))
        texts.append("\n\n".join(parts))
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{place}.txt").write_text(texts[-1], encoding="utf-8")
    prepare(
        PrepareOptions(
            input=str(folder / "text"), out=folder / "data", iid=2, vocab_size=300,
            global_fraction=0.4,
        )
    )  # fmt: skip
    return folder / "data", "\n\n".join(texts)


def test_paragraphs_are_whole_and_of_the_held_out_text(dictionary: tuple[Path, str]) -> None:
    data, text = dictionary
    known = set(text.split("\n\n"))
    found = list(paragraphs(open_data(data)))
    assert len(found) > 200
    assert set(found) <= known
    assert len(set(found)) < len(known)  # not what is trained on


def test_a_passage_ends_with_a_sentence_and_lacks_its_last_word() -> None:
    long = (
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    )
    found = cloze([f"{long} sixteen. And here is more of it.", "Too short.", f"{long} 1911."])
    assert found == [
        {"passage": f"{long} sixteen. And here is more of", "word": "it"}
    ] or found == [{"passage": long, "word": "sixteen"}]
    assert found[0]["word"] == "sixteen"  # "it" has two letters, 1911 none
    many = " ".join(["word"] * 80)
    assert cloze([f"{many}."]) == []


def test_entries_of_three_dictionaries() -> None:
    texts = [
        "melancholy (noun): a constitutional tendency to be gloomy and depressed",
        "Flask, n. [AS. flasce, flaxe; akin to D.]\n1. A small vessel for fluids, of glass.",
        "extensible\n(programming) Said of a system made to allow more of it. See also extend.",
        "Clingy, a. Apt to cling; adhesive, and this is long enough to be one. [R.]",
        "It was a bright cold day in April when the clocks were striking thirteen. He slipped in.",
    ]  # fmt: skip
    found = definitions(texts)
    right = {one["term"]: one["choices"][one["right"]] for one in found}
    assert right == {
        "melancholy (noun):": "a constitutional tendency to be gloomy and depressed",
        "Flask, n:": "A small vessel for fluids, of glass",
        "extensible:": "(programming) Said of a system made to allow more of it",
        "Clingy, a:": "Apt to cling",
    }
    for one in found:
        assert sorted(one["choices"]) == sorted(right.values())
    assert definitions(texts) == found  # drawn, and the same again
    assert definitions(texts[:3]) == []


def test_places_of_right_meanings_tell_nothing(dictionary: tuple[Path, str]) -> None:
    found = definitions(paragraphs(open_data(dictionary[0])))
    assert len(found) > 60
    places = [one["right"] for one in found]
    assert all(places.count(place) > len(found) / 8 for place in range(4))
    assert all(len(set(one["choices"])) == 4 for one in found)


@pytest.mark.tasks
@pytest.mark.timeout(1200)
def test_scores_are_those_worked_out_by_hand(
    dictionary: tuple[Path, str], make_config: Any, tmp_path: Path
) -> None:
    config = make_config(dictionary[0], "federation.rounds=6", "local.steps=16")
    run = simulate(config, run_dir=tmp_path / "run").folder
    told = CliRunner().invoke(
        app,
        ["eval", str(run), "--data", str(dictionary[0]), "--tasks", "cloze,definitions", "--json"],
    )
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    model_folder = export(run, tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    longest = model.config.max_position_embeddings

    def scored(context: str, word: str) -> float:
        before, whole = (tokenizer(text)["input_ids"] for text in (context, f"{context} {word}"))
        count = len(whole) - len(before)
        tokens = torch.tensor([whole[-(longest + 1) :]])
        with torch.inference_mode():
            logits = model(tokens[:, :-1]).logits.log_softmax(-1)
        chosen = logits[0, -count:].gather(1, tokens[0, -count:, None])
        return chosen.sum().item()

    texts = list(paragraphs(open_data(dictionary[0])))
    passages, terms = cloze(texts), definitions(texts)
    assert (found["cloze"]["examples"], found["definitions"]["examples"]) == (
        len(passages),
        len(terms),
    )
    nats = [scored(one["passage"], one["word"]) for one in passages]
    expected = math.exp(-sum(nats) / len(nats))
    assert found["cloze"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    hits = 0
    for one in terms:
        chances = [scored(one["term"], choice) for choice in one["choices"]]
        hits += max(range(4), key=chances.__getitem__) == one["right"]
    assert found["definitions"]["acc"] == pytest.approx(hits / len(terms), abs=2 / len(terms))
    # The exported folder is the same model.
    assert evaluate_tasks(model_folder, ["cloze"], dictionary[0])["cloze"] == pytest.approx(
        found["cloze"]
    )
    with pytest.raises(InvalidValueError, match="'nonsense'"):
        evaluate_tasks(model_folder, ["nonsense"])
    with pytest.raises(MachineError, match="can't fetch the text of arc_easy"):
        evaluate_tasks(model_folder, ["arc_easy"])


@pytest.mark.tasks
def test_text_of_another_sort_is_refused(three_silos: Path, tmp_path: Path) -> None:
    for name in MADE:
        with pytest.raises(DataError, match="made from held-out text"):
            evaluate_tasks(tmp_path, [name])
    with pytest.raises(DataError, match="gives 0 examples of the task definitions"):
        evaluate_tasks(tmp_path, ["definitions"], three_silos)


def test_one_of_data_and_tasks_is_needed(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["eval", str(tmp_path)])
    assert told.exit_code == 2
    assert "--tasks" in told.output
