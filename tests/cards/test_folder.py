"""Cards on disk: what Photon fills in, what people say, signatures, and data that moves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from made_cards import answered, tree
from typer.testing import CliRunner

from photon.cards.filling import facts_of_data
from photon.cards.folder import data_card_of, read_card, read_cards, write_cards, write_data_card
from photon.cards.questions import CARDS, questions
from photon.cards.text import card_text, cards_page
from photon.cli.main import app
from photon.data import open_data
from photon.errors import CardError, DataError, NotCompliantError, RunNotFoundError, UndecidedError
from photon.membership.audit import AUDIT_FILE, MEMBER, AuditLog
from photon.membership.keys import NodeKey
from photon.membership.records import Signer
from photon.membership.signing import sign_card, signature_file
from photon.runs import load_weights, simulate
from photon.telemetry.history import read_history
from photon.training import count_flops


def photon(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def begun(three_silos: Path, make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with data of its own beside it."""
    folder = tmp_path_factory.mktemp("cards")
    shutil.copytree(three_silos, folder / "data")
    config = make_config(
        folder / "data", "federation.rounds=1", "local.steps=2", "eval.max_tokens=200"
    )
    simulate(config, run_dir=folder / "run")
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """The run folder, with cards, and with data that a test may change."""
    shutil.copytree(begun / "data", tmp_path / "data")
    shutil.copytree(begun / "run", tmp_path / "run")
    resolved = tmp_path / "run" / "config.resolved.toml"
    text = resolved.read_text().replace(str(begun / "data"), str(tmp_path / "data"))
    resolved.write_text(text)
    write_cards(tmp_path / "run")
    return tmp_path / "run"


def test_what_photon_knows_is_filled_in(run: Path) -> None:
    cards, data = read_cards(run), open_data(run.parent / "data")
    history = read_history(run)
    assert cards.project.facts.silos == ["blue", "green", "red"]
    assert cards.project.facts.how == "simulate"
    for silo, card in cards.data.items():
        known = data.silo(silo)
        assert card.facts.train_tokens == known.train_tokens
        assert card.facts.bytes == known.bytes
        assert card.facts.documents == known.documents
        assert card.facts.shards == {
            one.file: one.sha256 for split in ("train", "held_out") for one in known.shards(split)
        }
        assert cards.standing(silo).counts
    card = cards.models["round-1"]
    model, config = load_weights(run)
    counted = count_flops(model, config.data.sequence_length)
    tokens = 3 * 2 * config.local.batch_size * config.data.sequence_length
    assert card.facts.tokens == tokens
    assert card.facts.training_flops == counted.per_token * tokens
    assert card.facts.flops_method == counted.explain()
    assert card.facts.parameters == history.started.parameters
    assert card.facts.recipe["local.lr"] == "0.003"
    assert set(card.facts.held_out) == {"", "blue", "green", "red"}
    assert card.facts.held_out[""]["perplexity"] == history.summary["global_perplexity"]
    state = json.loads(sorted(run.glob("checkpoints/*/state.json"))[-1].read_text())
    assert card.facts.files == state["files"]
    assert card.facts.weights_sha256 == history.summary["weights_sha256"]
    assert set(cards.models) == {"round-1", "tokenizer"}


def test_every_question_stands_in_its_card_with_its_article(run: Path) -> None:
    texts = {
        "project": (run / "cards/project.toml").read_text(),
        "data": (run / "cards/data/red.toml").read_text(),
        "model": (run / "cards/models/round-1.toml").read_text(),
    }
    texts["entity"] = texts["project"]
    for kind, text in texts.items():
        words = " ".join(text.replace("#", " ").split())
        for one in questions(kind):
            assert " ".join(one.ask.split()) in words, one
            assert one.article in words
        assert "not legal advice" in words


def test_answers_stay_and_a_second_time_changes_nothing(run: Path) -> None:
    path = run / "cards/project.toml"
    path.write_text(path.read_text().replace("# placed_in_union =", "placed_in_union = true"))
    write_cards(run)
    assert read_card(path, "project").scope.placed_in_union is True
    before = path.read_bytes()
    write_cards(run)
    assert path.read_bytes() == before


def test_a_card_reads_back_as_it_was_written(tmp_path: Path) -> None:
    whole = tree()
    written = {
        "project": whole["project"] | {"entities": whole["entity"]},
        "data": whole["data"]["north"],
        "model": whole["model"]["round-8"],
    }
    for kind, answers in written.items():
        path = tmp_path / f"{kind}.toml"
        path.write_text(card_text(kind, answers))  # type: ignore[arg-type]
        assert read_card(path, kind) == CARDS[kind].model_validate(answers)  # type: ignore[arg-type]


def move(run: Path, silo: str) -> None:
    """Change a silo's data, as preparing other text would."""
    root = run.parent / "data"
    manifest = root / "silos" / silo / "manifest.json"
    manifest.write_text(manifest.read_text() + " \n")


def test_a_card_goes_stale_when_its_data_moves_and_no_other_does(run: Path) -> None:
    card = data_card_of(run, "red")
    card.write_text(card.read_text().replace("# described =", "described = true"))
    move(run, "red")
    cards = read_cards(run)
    assert [one for one in cards.data if cards.standing(one).fresh is not True] == ["red"]
    assert "moved" in cards.standing("red").why
    write_cards(run)
    old, new = (read_card(path, "data") for path in (card.with_name("red.v1.toml"), card))
    assert (old.rights.described, old.facts.version) == (True, 1)
    assert (new.rights.described, new.facts.version) == (None, 2)
    assert "# described = true" in card.read_text()  # what was said of the older data
    assert set(read_cards(run).data) == {"blue", "green", "red"}


def test_without_the_data_the_run_vouches(run: Path) -> None:
    shutil.rmtree(run.parent / "data")
    cards = read_cards(run)
    assert all(cards.standing(one).fresh for one in cards.data)
    card = data_card_of(run, "red")
    sha = cards.data["red"].facts.folder_sha256
    card.write_text(card.read_text().replace(sha, "00" * 32))
    assert read_cards(run).standing("red").fresh is False


def test_signatures_hold_for_these_bytes_and_this_member_only(run: Path, tmp_path: Path) -> None:
    key, other = (NodeKey.create(tmp_path / name / "node.key") for name in ("a", "b"))
    card = data_card_of(run, "red")
    assert read_cards(run).standing("red").signature == "none"
    assert photon("cards", "sign", card, "--key", tmp_path / "a" / "node.key").exit_code == 0
    assert read_cards(run).standing("red").signature == "good"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"kind": "serve"}))
    audit = AuditLog(run / AUDIT_FILE)
    for name, owner in (("red", key), ("blue", other)):
        audit.append(
            MEMBER, Signer(name, owner.fingerprint, owner.public_pem, record["data_sha256"])
        )
    standing = read_cards(run).standing("red")
    assert (standing.signature, standing.fresh) == ("good", True)
    assert read_cards(run).standing("green").fresh is None  # no member of that name
    sign_card(card, other)
    assert read_cards(run).standing("red").signature == "forged"
    sign_card(card, key)
    card.write_bytes(card.read_bytes() + b"\n")
    assert read_cards(run).standing("red").signature == "forged"
    signature_file(card).write_text("{}")
    assert "is no signature" in read_cards(run).standing("red").why


def test_a_site_writes_its_own_card_alone(run: Path, tmp_path: Path) -> None:
    data, site = run.parent / "data", tmp_path / "site"
    done = photon("cards", "init", site, "--data", data, "--silo", "red")
    assert done.exit_code == 0
    assert data_card_of(site, "red").read_bytes() == data_card_of(run, "red").read_bytes()
    assert write_data_card(data_card_of(site, "red"), facts_of_data(data, "red")) == []
    assert photon("cards", "init", site, "--data", data).exit_code == CardError.exit_code
    with pytest.raises(DataError, match="It has blue, green, red"):
        facts_of_data(data, "purple")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("# military_only =", "militry_only = true", "Did you mean scope.military_only"),
        ("# military_only =", 'military_only = "yes"', "valid boolean"),
        ("# purposes = []", 'purposes = ["annex_iv"]', "purposes"),
        ("# placed_on = 2026-12-31", "placed_on = 2026", "valid date"),
        ("[scope]", "[scope", "not valid TOML"),
        ("\nrounds = 1", "\nrounds = -1", "greater than or equal"),
    ],
)
def test_bad_cards_are_refused_by_key(run: Path, old: str, new: str, problem: str) -> None:
    path = run / "cards/project.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CardError, match=problem):
        read_cards(run)


def test_facts_are_the_runs_whatever_a_hand_wrote_there(run: Path) -> None:
    path = run / "cards/models/round-1.toml"
    flops = read_cards(run).models["round-1"].facts.training_flops
    path.write_text(path.read_text().replace(f"training_flops = {flops}", "training_flops = 1.0"))
    assert read_card(path, "model").facts.training_flops == 1.0
    assert read_cards(run).models["round-1"].facts.training_flops == flops


def test_two_entities_of_one_name_are_told_apart(run: Path) -> None:
    path = run / "cards/project.toml"
    path.write_text(path.read_text().replace('name = "green"', 'name = "red"'))
    labels = [label for label, _, _ in read_cards(run).subjects("entity")]
    assert labels == ["entity/aggregator", "entity/blue", "entity/red (3)", "entity/red (4)"]


def test_a_card_under_another_name_is_refused(run: Path) -> None:
    data_card_of(run, "red").rename(data_card_of(run, "rose"))
    with pytest.raises(CardError, match="is the card of 'red'"):
        read_cards(run)


def answer_all(run: Path) -> None:
    """Everything that people can answer, as well as it can be, beside what Photon knows."""
    whole = tree(("blue", "green", "red"))
    paths = {"project": run / "cards/project.toml", "model": run / "cards/models/round-1.toml"}
    project = read_card(paths["project"], "project").model_dump(exclude_none=True)
    given = whole["project"] | {"facts": project["facts"], "entities": whole["entity"]}
    paths["project"].write_text(tomli_w.dumps(given))
    model = read_card(paths["model"], "model").model_dump(exclude_none=True)
    paths["model"].write_text(tomli_w.dumps(whole["model"]["round-8"] | {"facts": model["facts"]}))
    tokenizer = run / "cards/models/tokenizer.toml"
    facts = read_card(tokenizer, "model").model_dump(exclude_none=True)["facts"]
    tokenizer.write_text(tomli_w.dumps(answered("model") | {"facts": facts}))
    for silo, answers in whole["data"].items():
        path = data_card_of(run, silo)
        facts = read_card(path, "data").model_dump(exclude_none=True)["facts"]
        path.write_text(tomli_w.dumps(answers | {"facts": facts}))


def test_comply_tells_its_verdict_by_exit_code_and_json(run: Path) -> None:
    law = ("--law", "2026-11-30")
    opened = photon("comply", run, *law, "--json")
    assert opened.exit_code == UndecidedError.exit_code
    answer_all(run)
    met = photon("comply", run, *law, "--json")
    assert met.exit_code == 0, met.output
    told = json.loads(met.stdout)
    assert (told["verdict"], told["law"]) == ("met", "2026-11-30")
    assert set(told["findings"][0]) == {"id", "subject", "status", "evidence", "todo"}
    assert told["note"] == "Prediction, not legal advice"
    path = run / "cards/project.toml"
    path.write_text(path.read_text().replace("social_scoring = false", "social_scoring = true"))
    banned = photon("comply", run, *law)
    assert banned.exit_code == NotCompliantError.exit_code
    assert "art_5.par_1.pt_c" in banned.output
    before = photon("comply", run, "--law", "2025-02-01")
    assert before.exit_code == 0
    assert photon("comply", run, "--law", "tomorrow").exit_code == 2
    for done in (opened, met, banned, before, photon("comply", run, "--all")):
        assert "Prediction, not legal advice" in done.output
    move(run, "red")
    assert (
        json.loads(photon("comply", run, "--law", "2025-02-01", "--json").stdout)["verdict"]
        == "unknown"
    )


def test_check_and_show(run: Path) -> None:
    shown = photon("cards", "check", run).output
    assert all(one in shown for one in ("project", "data/red", "model/round-1", "entity/red"))
    assert "Prediction, not legal advice" in shown
    path = run / "cards/project.toml"
    path.write_text(path.read_text().replace('title = "test"', 'title = "<script>x"'))
    assert photon("cards", "show", run).exit_code == 0
    page = (run / "cards.html").read_text()
    assert "<script" not in page
    assert "Prediction, not legal advice" in page
    assert "cards.provider" in page
    assert cards_page(read_cards(run)).count("<h2>") < page.count("<h2>")


def test_a_run_without_cards_says_how_to_make_them(begun: Path) -> None:
    done = photon("comply", begun / "run")
    assert done.exit_code == CardError.exit_code
    assert "photon cards init" in done.output


@pytest.mark.parametrize("kind", CARDS)
def test_the_schema_has_every_question(kind: str) -> None:
    schema = json.loads(photon("cards", "schema", kind).stdout)
    text = json.dumps(schema, ensure_ascii=False)
    assert schema["additionalProperties"] is False
    for one in questions(kind):  # type: ignore[arg-type]
        assert json.dumps(f"{one.ask} {one.article}".strip())[1:-1] in text
    assert photon("cards", "schema", "nothing").exit_code == CardError.exit_code


def test_neither_photon_nor_a_run_loads_cards_or_forms_and_law_loads_no_torch() -> None:
    code = (
        "import sys, photon, photon.runs, photon.cli.main\n"
        "names = ('photon.cards', 'photon.law', 'photon.forms', 'cyclonedx', 'spdx_python_model')\n"
        "assert not [one for one in sys.modules if one.startswith(names)]"
    )
    light = (
        "import sys, photon.law.prediction, photon.cards.folder; assert 'torch' not in sys.modules"
    )
    for text in (code, light):
        subprocess.run([sys.executable, "-c", text], check=True, timeout=120)


def test_cards_of_a_planned_run_are_read_and_predicted(run: Path, tmp_path: Path) -> None:
    file, folder = run / "config.resolved.toml", tmp_path / "plan"
    assert photon("cards", "init", folder, "--run-file", file).exit_code == 0
    checked = photon("cards", "check", folder)
    assert checked.exit_code == 0
    assert "model/planned" in checked.stdout
    told = photon("cards", "export", folder, "--form", "oscal", "--out", tmp_path / "oscal.json")
    assert told.exit_code == CardError.exit_code
    assert "only planned" in told.output
    predicted = photon("comply", folder, "--law", "2026-12-15", "--json")
    assert predicted.exit_code == UndecidedError.exit_code
    assert "model/planned" in {one["subject"] for one in json.loads(predicted.stdout)["findings"]}


def test_what_is_open_is_shown_once_for_each_requirement(run: Path) -> None:
    told = json.loads(photon("comply", run, "--law", "2026-12-15", "--json").stdout)["findings"]
    unknown = [one["id"] for one in told if one["status"] == "unknown"]
    shown = photon("comply", run, "--law", "2026-12-15").stdout
    everything = photon("comply", run, "--law", "2026-12-15", "--all").stdout
    assert len(unknown) > len(set(unknown)) > 0
    assert shown.count("\n") < everything.count("\n")


def test_a_folder_of_runs_names_them(run: Path) -> None:
    told = photon("cards", "init", run.parent)
    assert told.exit_code == RunNotFoundError.exit_code
    assert "There are runs in it: run." in told.stderr


def test_a_site_is_told_to_sign(run: Path, tmp_path: Path) -> None:
    told = photon("cards", "init", tmp_path / "site", "--data", run.parent / "data", "--silo=red")
    assert "cards sign" in told.stderr
    assert "cards check" not in told.stderr


def test_the_only_silo_of_a_site_goes_by_the_member_s_name(one_silo: Path, run: Path) -> None:
    facts = facts_of_data(one_silo, "north")
    assert facts == facts_of_data(one_silo, "red") | {"silo": "north"}
    with pytest.raises(DataError, match="no silo 'north'"):
        facts_of_data(run.parent / "data", "north")
