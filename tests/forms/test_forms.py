"""The eight forms from a real run: valid, true to the cards, and silent where the cards are."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from made_cards import SHA, cards_of, change, tree
from read_forms import headings, read_form
from typer.testing import CliRunner

import photon
from photon.cards.bundle import Standing
from photon.cards.folder import read_cards
from photon.cards.questions import FACTS, questions
from photon.cli.main import app
from photon.errors import CardError, MachineError
from photon.forms.documents import NOT_ANSWERED, form
from photon.forms.export import FORMS, documents
from photon.forms.reading import Reading
from photon.law.prediction import NOTE, predict
from photon.law.rules import load_law

DAY = datetime.date(2026, 11, 30)
PROSE = ("hf", "mdf", "summary", "annex4")


class Without:
    """Where a package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def command(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@functools.cache
def exported(run: Path, name: str) -> dict[str, Any]:
    """What a form says, through the command and what validates the form, by file name."""
    out = run.parent / f"out-{name}"
    done = command("cards", "export", run, "--form", name, "--out", out, "--law", DAY)
    assert done.exit_code == 0, done.output
    found = sorted(out.iterdir()) if out.is_dir() else [out]
    return {path.name: read_form(name, path.read_text(encoding="utf-8")) for path in found}


def made(name: str, whole: dict[str, Any], **standings: Standing) -> Any:
    """The same from cards in memory; of croissant the first file."""
    whole["project"]["facts"] |= {"started_at": "2026-11-30T10:00:00+01:00", "run": "first"}
    return read_form(name, next(iter(documents(cards_of(whole, standings), name, DAY).values())))


@pytest.mark.parametrize("name", FORMS)
def test_unanswered_cards_make_a_valid_form(finished: Path, name: str) -> None:
    found = exported(finished / "run", name)
    assert set(found) == (
        {"blue.json", "green.json", "red.json"} if name == "croissant" else {f"out-{name}"}
    )
    for one in found.values():
        assert (NOT_ANSWERED in str(one)) is (name in PROSE or name == "oscal")  # as evidence there
        assert (NOTE in str(one)) is (name in PROSE or name == "oscal")


@pytest.mark.parametrize("name", FORMS)
def test_answered_cards_make_a_valid_form(kept: Path, name: str) -> None:
    for file, one in exported(kept, name).items():
        text = json.dumps(one) if isinstance(one, dict) else one
        assert "by hand" in text or name == "oscal", file


def test_another_process_loads_no_library_too_early_and_makes_the_same_bytes(
    answered: Path,
) -> None:
    code = (
        "import datetime, hashlib, pathlib, sys; from photon.forms.export import *\n"
        "names = ('torch', 'jinja2', 'huggingface_hub', 'cyclonedx', 'spdx_python_model')\n"
        "assert not [one for one in sys.modules if one.startswith(names)]\n"
        "cards = read_cards(pathlib.Path(sys.argv[1])); day = datetime.date(2026, 11, 30)\n"
        "found = [documents(cards, one, day) for one in FORMS]\n"
        "print(hashlib.sha256(repr(found).encode()).hexdigest())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, answered],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    cards = read_cards(answered)
    found = [documents(cards, one, DAY) for one in FORMS]
    assert told.stdout.strip() == hashlib.sha256(repr(found).encode()).hexdigest()
    path = answered / "cards/project.toml"
    path.write_text(path.read_text().replace("robust = true", "robust = false"))
    assert Reading(read_cards(answered)).sha256 != Reading(cards).sha256


def test_cyclonedx_has_hashes_licences_metrics_and_what_was_trained_on(kept: Path) -> None:
    bill = exported(kept, "cyclonedx")["out-cyclonedx"]
    model, cards = bill["metadata"]["component"], read_cards(kept)
    facts = cards.models["round-1"].facts
    assert (model["type"], model["licenses"]) == (
        "machine-learning-model",
        [{"license": {"id": "Apache-2.0"}}],
    )
    assert model["hashes"] == [{"alg": "SHA-256", "content": facts.weights_sha256}]
    files = {one["name"]: one["hashes"][0]["content"] for one in model["components"]}
    assert files == facts.files
    card = model["modelCard"]
    silos = ["data/blue", "data/green", "data/red"]
    assert card["modelParameters"]["datasets"] == [{"ref": one} for one in silos]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    told = {(one["slice"], one["type"]): float(one["value"]) for one in metrics}
    assert told["global", "perplexity"] == facts.held_out[""]["perplexity"]
    assert told["red", "loss"] == facts.held_out["red"]["loss"]
    (needs,) = [one for one in bill["dependencies"] if one["ref"] == "model/round-1"]
    assert needs["dependsOn"] == [*silos, "model/tokenizer"]
    data = {one["bom-ref"]: one for one in bill["components"]}
    assert data["data/red"]["licenses"] == [{"license": {"id": "MIT"}}]
    assert data["data/blue"]["licenses"] == [{"license": {"name": "terms of blue"}}]
    owner = {"organization": {"name": "Consortium"}}
    assert data["data/red"]["data"][0]["governance"]["custodians"] == [owner]
    (used,) = card["considerations"]["environmentalConsiderations"]["energyConsumptions"]
    assert used["activityEnergyCost"]["value"] == facts.energy_kwh


def test_energy_is_told_where_a_card_has_it() -> None:
    whole = tree()
    assert "energyConsumptions" not in json.dumps(made("cyclonedx", whole))
    change(whole, {"model.facts.energy_kwh": 1.5e-7, "model.facts.energy_method": "modelled"})
    considered = made("cyclonedx", whole)["metadata"]["component"]["modelCard"]["considerations"]
    (used,) = considered["environmentalConsiderations"]["energyConsumptions"]
    assert used["activityEnergyCost"] == {"value": 1.5e-7, "unit": "kWh"}
    assert (used["activity"], used["energyProviders"][0]["energySource"]) == ("training", "unknown")
    assert {"name": "photon:facts.energy_method", "value": "modelled"} in used["properties"]
    (package,) = [one for one in made("spdx", whole)["@graph"] if one["type"] == "ai_AIPackage"]
    assert package["ai_energyConsumption"]["ai_trainingEnergyConsumption"] == [
        {
            "type": "ai_EnergyConsumptionDescription",
            "ai_energyQuantity": 1.5e-7,
            "ai_energyUnit": "kilowattHour",
        }
    ]
    change(whole, {"model.facts.energy_kwh": 1234.0})
    assert "1.2e+00 MWh" in made("mdf", whole)
    for name in ("hf", "annex4", "mdf"):
        assert "energy method: modelled" in made(name, whole)


def test_spdx_relates_the_model_to_data_tokenizer_and_licences(kept: Path) -> None:
    graph = exported(kept, "spdx")["out-spdx"]["@graph"]
    by_id = {one.get("spdxId"): one for one in graph}
    (model,) = [one for one in graph if one["type"] == "ai_AIPackage"]
    links = {
        one["relationshipType"]: [by_id.get(to, to) for to in one["to"]]
        for one in graph
        if one["type"] == "Relationship" and one["from"] == model["spdxId"]
    }
    assert [one["name"] for one in links["trainedOn"]] == ["blue", "green", "red"]
    assert [one["name"] for one in links["dependsOn"]] == ["tokenizer"]
    (declared,) = links["hasDeclaredLicense"]
    assert declared["simplelicensing_licenseExpression"] == "Apache-2.0"
    assert links["hasConcludedLicense"][0].endswith("NoAssertionLicense")
    assert by_id[model["suppliedBy"]]["name"] == "Consortium"
    assert model["releaseTime"] == "2026-09-01T00:00:00Z"
    texts = [one.get("simplelicensing_licenseText") for one in graph]
    assert "terms of blue" in texts
    entries = {one["key"]: one["value"] for one in model["ai_hyperparameter"]}
    assert entries["local.lr"] == "0.003"


def test_croissant_has_hashes_and_answers_and_no_text(kept: Path) -> None:
    found = exported(kept, "croissant")["red.json"]
    root = kept.parent / "data"
    for file in found["distribution"]:
        content = (root / file["contentUrl"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["license"] == "MIT"
    assert found["inLanguage"] == ["en", "fr"]
    assert found["rai:dataCollection"] == "by hand"
    assert "Does it hold personal data? no" in found["rai:personalSensitiveInformation"]
    assert {"facts.train_tokens", "facts.shards"} & {
        one["name"] for one in found["variableMeasured"]
    } == {"facts.train_tokens"}


def test_oscal_has_the_prediction_and_its_evidence(answered: Path) -> None:
    path = answered / "cards/project.toml"
    text = path.read_text().replace("social_scoring = false", "social_scoring = true")
    path.write_text(text.replace("robust = true\n", ""))
    tree = exported(answered, "oscal")["out-oscal"]
    (result,) = tree["assessment-results"]["results"]
    found = predict(read_cards(answered), load_law(), DAY)
    assert {one["value"] for one in result["props"]} >= {found.verdict} == {"prohibited"}
    observed = {one["title"]: one for one in result["observations"]}
    told = {one["title"]: one["target"] for one in result["findings"]}
    states = {"met": "satisfied", "not_met": "not-satisfied", "unknown": "not-satisfied"}
    assert {one.status for one in found.findings} >= {"met", "not_met", "not_applicable"}
    for one in found.findings:
        title = f"{one.id} of {one.subject}"
        assert observed[title]["description"] == one.evidence
        target = told.pop(f"{title}: {one.status}", None)
        assert (target is None) is (one.status not in states)
        if target:
            assert target["target-id"] == one.id
            assert target["status"]["state"] == states[one.status]
    assert told == {}


def test_unknown_is_never_satisfied(run: Path) -> None:
    (result,) = exported(run, "oscal")["out-oscal"]["assessment-results"]["results"]
    unknown = [one["target"]["status"] for one in result["findings"] if "unknown" in one["title"]]
    assert unknown
    assert {one["state"] for one in unknown} == {"not-satisfied"}
    assert {one["reason"] for one in unknown} == {"other"}


@pytest.mark.parametrize("name", PROSE)
def test_every_field_asks_for_what_cards_have(name: str) -> None:
    kinds = {"provider": "entity", "initial": "model", "tokenizer": "model"}
    asked = form(name)
    whole = cards_of(tree())
    for field in asked.fields:
        assert set(field.views) <= set(asked.views)
        assert field.band is None or field.band in asked.bands
        for path in field.paths:
            subject, section, key = path.split(".", 2)
            key, _, pick = key.partition("?")
            known = questions(kinds.get(subject, subject), facts=section == FACTS)  # type: ignore
            one = {one.key: one for one in known if one.section == section}
            assert "*" in key or key in one, path
            if pick and one[key].kind == "list":
                assert pick in (one[key].choices or {}), path
            Reading(whole).told(path)
    assert len(headings(name)) == len(set(headings(name))) or asked.views


def test_annex_iv_has_nine_sections_and_the_form_of_the_code_eight() -> None:
    for name, sections in (("annex4", 9), ("mdf", 8), ("summary", 3)):
        parts = list(dict.fromkeys(one.part for one in form(name).fields))
        assert [part.split(".")[0] for part in parts] == [str(n + 1) for n in range(sections)]


def test_each_reader_of_the_documentation_form_sees_its_own_view(kept: Path) -> None:
    text = exported(kept, "mdf")["out-mdf"]
    office, authorities, downstream = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    parameters = f"{read_cards(kept).models['round-1'].facts.parameters:,}"
    for view in (office, authorities):
        assert parameters in view
        assert "Energy used for training" in view
        assert "FLOP" in view
    assert parameters not in downstream
    assert "below 500 million parameters" in downstream
    assert "Energy" not in downstream
    assert "Required hardware" not in office
    tokens = f"{read_cards(kept).data['red'].facts.train_tokens:,}"
    assert tokens in office
    assert tokens not in authorities


def test_a_field_is_answered_for_each_card_and_a_total_only_if_all_have_it() -> None:
    whole = tree()
    change(
        whole, {"data.north.about.languages": ["en"], "data.north.facts.train_tokens": 2 * 10**9}
    )
    text = made("summary", whole)
    assert "- data/north, In which languages is it (en, fr, ...)? en" in text
    assert f"- data/south, In which languages is it (en, fr, ...)? {NOT_ANSWERED}" in text
    assert f"- data/south, train tokens: {NOT_ANSWERED}" in text
    change(whole, {"data.south.facts.train_tokens": 1})
    assert "- 1 billion to 10 trillion tokens" in made("summary", whole)
    change(whole, {"data.north.about.sources": ["own"]})
    text = made("summary", whole)
    assert "Where does it come from? from users of the holder's services: no" in text
    assert f"made by a model: {NOT_ANSWERED}" in text


@pytest.mark.parametrize("name", [one for one in FORMS if one != "oscal"])
def test_nothing_of_a_card_that_moved_is_relied_on(name: str) -> None:
    whole = tree(("north",))
    change(whole, {"data.about.obtained": "from afar", "data.about.licence": "MIT"})
    sound, stale = made(name, whole), made(name, whole, north=Standing(False, why="data moved"))
    assert "from afar" in str(sound)
    assert "from afar" not in str(stale)
    assert "data moved" in str(stale)
    assert SHA not in str(stale) or name in PROSE  # of prose it is the hash of all cards


def test_public_forms_name_no_silo_of_a_run_across_sites() -> None:
    whole = tree(("northbank", "southbank"))
    change(whole, {"project.facts.how": "serve", "project.facts.silos": ["northbank", "southbank"]})
    scores = {"": {"loss": 3.0, "perplexity": 20.1}, "northbank": {"loss": 2.0}}
    change(whole, {"model.facts.held_out": scores, "model.facts.participants": ["northbank"]})
    change(whole, {"model.facts.recipe": {"federation.weights": "northbank 2", "local.lr": "0.1"}})
    good = Standing(signature="good", why="signed")
    moved = Standing(False, why="the data of southbank has moved")
    for name in ("hf", "summary"):
        text = made(name, whole, northbank=good, southbank=moved)
        assert "bank" not in text
        assert "data/1" in text
        assert "data/2" in text
        assert "not current" in text
    assert "northbank" in made("mdf", whole)


def test_a_path_of_the_machine_is_told_nowhere() -> None:
    whole = tree()
    whole["model"]["begun"] = {
        "facts": {"name": "initial", "what": "initial", "architecture": "/srv/secret/llama"}
    }
    change(whole, {"model.round-8.facts.recipe": {"model.path": "/srv/secret/llama"}})
    for name in FORMS:
        text = json.dumps(made(name, whole))
        assert "/srv" not in text
        assert "llama" in text or name in ("croissant", "oscal")
    whole["model"]["begun"]["facts"]["architecture"] = "hf:owner/llama"
    (text,) = documents(cards_of(whole), "hf", DAY).values()
    assert ModelCard(text).data.base_model == "owner/llama"


def test_what_an_examination_finds_is_told_without_a_line_here() -> None:
    whole = tree()
    change(whole, {"data.facts.examined": {"duplicates": 0.25}})
    for name in ("mdf", "summary", "annex4"):
        assert "examined: duplicates: 0.25" in made(name, whole)
    for name in ("cyclonedx", "spdx", "croissant"):
        assert "duplicates" in json.dumps(made(name, whole))


def test_the_hub_reads_licence_languages_and_scores(answered: Path) -> None:
    (text,) = documents(read_cards(answered), "hf", DAY).values()
    data = ModelCard(text).data
    facts = read_cards(answered).models["round-1"].facts
    assert (data.license, data.language, data.model_name) == ("apache-2.0", ["en", "fr"], "test")
    scores = {one.metric_type: one.metric_value for one in data.eval_results}
    assert scores["perplexity"] == facts.held_out[""]["perplexity"]
    path = answered / "cards/models/round-1.toml"
    path.write_text(path.read_text().replace("apache-2.0", "Our own: see the contract"))
    (text,) = documents(read_cards(answered), "hf", DAY).values()
    data = ModelCard(text).data
    assert (data.license, data.license_name) == ("other", "Our own: see the contract")


def test_an_exported_model_bears_the_card_of_the_run(answered: Path, tmp_path: Path) -> None:
    folder = photon.export(answered, tmp_path / "model", license="mit", languages=["de"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    read_form("hf", text)
    data = ModelCard(text).data
    assert (data.license, data.language) == ("mit", ["de"])
    assert "# a project" in text
    assert read_cards(answered).models["round-1"].facts.weights_sha256 in text
    (answered / "cards/models/round-1.toml").unlink()
    with pytest.raises(CardError, match="no card of round-1"):
        photon.export(answered, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    done = command("cards", "export", answered, "--form", "mdf", "--out", tmp_path / "x.md")
    assert done.exit_code == CardError.exit_code
    (answered / "cards/project.toml").unlink()
    plain = photon.export(answered, tmp_path / "plain")
    assert "# test" in (plain / "README.md").read_text(encoding="utf-8")


def test_what_is_wrong_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.md"

    def failed(*words: Any, kind: type = CardError) -> str:
        done = command("cards", "export", *words)
        assert done.exit_code == kind.exit_code, done.output  # type: ignore[attr-defined]
        return " ".join(done.output.split())

    told = failed(run, "--form", "pdf", "--out", out)
    assert all(name in told for name in ("'pdf'", *FORMS))
    assert "photon cards init" in failed(tmp_path, "--form", "mdf", "--out", out)
    assert not out.exists()
    out.write_text("mine")
    assert "already exists" in failed(run, "--form", "mdf", "--out", out)
    assert out.read_text() == "mine"
    assert (
        command("cards", "export", run, "--form", "mdf", "--out", out, "--overwrite").exit_code == 0
    )
    assert "Model Documentation Form" in out.read_text()
    under = out / "below" / "x.md"
    assert str(out) in failed(run, "--form", "mdf", "--out", under, kind=MachineError)
    folder = tmp_path / "folder"
    (folder / "red.json").mkdir(parents=True)
    assert "red.json" in failed(run, "--form", "croissant", "--out", folder)
    assert sorted(one.name for one in folder.iterdir()) == ["red.json"]
    for name, package in (("cyclonedx", "cyclonedx"), ("spdx", "spdx_python_model")):
        loaded = (f"photon.forms.{name}", package)
        for module in [one for one in sys.modules if one.startswith(loaded)]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
        told = failed(run, "--form", name, "--out", tmp_path / name, kind=MachineError)
        assert "pip install 'photon-federated[cards]'" in told
    for silo in (run / "cards/data").iterdir():
        silo.unlink()
    assert "no data card" in failed(run, "--form", "croissant", "--out", tmp_path / "none")
