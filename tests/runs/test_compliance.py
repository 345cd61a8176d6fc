"""[comply]: who may take part in a served run by its cards, and what is written down of it."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
from made_cards import change, tree
from typer.testing import CliRunner

from photon.cards.filling import facts_of_data
from photon.cards.folder import data_card_of, read_card, read_cards, write_cards
from photon.cards.text import card_text
from photon.cli.main import app
from photon.errors import CardError, ConfigError, NotCompliantError
from photon.membership.bulletin import told
from photon.membership.keys import NodeKey
from photon.membership.records import Facts, Member
from photon.membership.signing import sign_card
from photon.runs.compliance import Compliance, planned, refused_by, verdict_alone

NAMES = ("blue", "green", "red")
DAY = datetime.date(2026, 12, 15)


def written(folder: Path, whole: dict[str, Any]) -> Path:
    """Cards of a tree, as files."""
    project = whole["project"] | {"entities": whole["entity"]}
    texts = {folder / "project.toml": card_text("project", project)}
    for name, card in whole["data"].items():
        texts[data_card_of(folder.parent, name)] = card_text("data", card)
    for name, card in whole["model"].items():
        texts[folder / "models" / f"{name}.toml"] = card_text("model", card)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def whole_of(data: Path | None, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """All answered well, of real data or of none."""
    whole = tree(names)
    for name in names if data is not None else ():
        whole["data"][name]["facts"] = facts_of_data(data, name)
    model = whole["model"].pop("round-8")
    whole["model"]["planned"] = model | {"facts": {"name": "planned", "what": "checkpoint"}}
    return whole


class Company:
    """Members with keys of their own, and cards that they signed."""

    def __init__(self, folder: Path, whole: dict[str, Any], make_config: Any, data: Path) -> None:
        self.cards = written(folder / "cards", whole)
        self.members = []
        for number, name in enumerate(whole["data"]):
            key = NodeKey.create(folder / f"{name}.key")
            facts = Facts("ab" * 32, "e" * 64, 100, "0.1.0")
            one = Member(name, key.public_pem, key.fingerprint, "active", facts, float(number))
            self.members.append(one)
            sign_card(data_card_of(self.cards.parent, name), key)
        self.keys = {one.name: NodeKey.load(folder / f"{one.name}.key") for one in self.members}
        self.told: list[dict[str, Any]] = []
        self._config, self._data = make_config, data

    def compliance(self, require: str | None = "met", day: datetime.date = DAY) -> Compliance:
        said = [f'comply.require="{require}"'] if require else []
        config = self._config(self._data, f"comply.cards={self.cards}", *said)
        return Compliance(config, {}, self.told.append, lambda: day)

    def change(self, name: str, answers: dict[str, Any], sign: bool = True) -> None:
        path = data_card_of(self.cards.parent, name)
        card = read_card(path, "data").model_dump(exclude_none=True)
        for key, value in answers.items():
            section, _, key = key.partition(".")
            card[section][key] = value
        path.write_text(card_text("data", card))
        if sign:
            sign_card(path, self.keys[name])


@pytest.fixture
def company(tmp_path: Path, make_config: Any, three_silos: Path) -> Company:
    return Company(tmp_path, whole_of(None), make_config, three_silos)


def test_a_card_that_goes_bad_costs_its_silo_alone(company: Company) -> None:
    look = company.compliance()
    assert look.refused(company.members) == {}
    assert company.told[0]["verdict"] == "met"
    # Art. 10 or 53 asks what the card no longer says; it is signed all the same.
    company.change("green", {"about.purposes": ["research"]})
    refused = look.refused(company.members)
    assert list(refused) == ["green"]
    assert "cards.data_purposes (data/green)" in refused["green"]
    assert company.told[-1]["refused"] == refused
    assert company.told[-1]["verdict"] == "met"  # of those who take part
    company.change("green", {"about.purposes": ["general_purpose"]})
    assert look.refused(company.members) == {}
    assert len(company.told) == 3


def test_stale_forged_unsigned_damaged_and_missing_cards(company: Company) -> None:
    look = company.compliance()
    *_, red = company.members
    company.change("blue", {"facts.folder_sha256": "cd" * 32})
    sign_card(data_card_of(company.cards.parent, "green"), company.keys["red"])
    refused = look.refused(company.members)
    assert "cards.fresh" in refused["blue"]
    assert "cards.signature" in refused["green"]
    assert list(refused) == ["blue", "green"]
    data_card_of(company.cards.parent, "green").write_text("[facts]\nsilo = 7\n")
    data_card_of(company.cards.parent, "blue").unlink()
    refused = look.refused(company.members)
    assert refused["blue"] == "it has no data card"
    assert "facts.silo = 7" in refused["green"]
    assert look.refused([red]) == {}
    # With "unknown" put up with, only what is not met counts.
    assert company.compliance("unknown").refused(company.members) == {}


def test_who_joined_first_comes_first(tmp_path: Path, make_config: Any, three_silos: Path) -> None:
    """Not their cards: a legal entity that comes with its silo does not do what it must."""
    whole = whole_of(None)
    whole["entity"] = entities = tree((), ("Consortium", "North", "South"))["entity"]
    change(whole, {"project.about.is_system": True, "project.scope.changed_since": True})
    for key in ("narrow_task", "improves_result", "detects_patterns", "preparatory"):
        change(whole, {f"project.high_risk.{key}": False})
    for kind in ("project", "data", "model"):
        change(whole, {f"{kind}.about.purposes": ["annex_iii_5d"]})
    for entity, silo in zip(entities[1:], ("green", "red"), strict=True):
        entity["about"] |= {"silos": [silo], "roles": ["deployer"]}
    entities[2]["use"]["monitors"] = False
    company = Company(tmp_path, whole, make_config, three_silos)
    look = company.compliance("unknown", datetime.date(2031, 1, 1))
    refused = look.refused(company.members)
    assert list(refused) == ["red"]
    assert "(entity/South)" in refused["red"]


def test_a_project_that_does_not_comply_does_not_start(company: Company) -> None:
    path = company.cards / "project.toml"
    path.write_text(path.read_text().replace('law = "eu_ai_act"', 'law = "none"'))
    with pytest.raises(NotCompliantError, match=r"verdict on 2026-12-15 is unknown, whoever.*law"):
        company.compliance().refused(company.members)
    assert company.compliance("unknown").refused(company.members) == {}
    assert company.compliance(None).refused(company.members) == {}
    path.unlink()
    with pytest.raises(CardError, match=r"project\.toml"):
        company.compliance(None).refused(company.members)


def test_nothing_is_looked_at_twice_and_the_date_counts(company: Company) -> None:
    day = [datetime.date(2026, 11, 1)]
    look = company.compliance("not_met")
    look._today = lambda: day[0]
    look.refused(company.members)
    assert look._look is not None
    before = len(company.told)
    look.refused(company.members)
    day[0] = datetime.date(2026, 11, 2)
    look.refused(company.members)
    assert len(company.told) == before  # another day, the same verdict: nothing to tell
    day[0] = datetime.date(2031, 1, 1)
    look.refused(company.members)
    assert all(was != now for _, _, was, now in company.told[-1]["changes"])


def test_require_needs_cards(make_config: Any, three_silos: Path) -> None:
    with pytest.raises(ConfigError, match="need cards"):
        make_config(three_silos, 'comply.require="met"')
    assert refused_by(make_config(three_silos))([]) == {}


def test_a_served_run_goes_on_without_a_silo_until_its_card_is_mended(
    make_served: Any, three_silos: Path, tmp_path: Path
) -> None:
    cards = written(tmp_path / "cards", whole_of(three_silos))
    served = make_served(
        f"comply.cards={cards}", 'comply.require="met"', "serve.min_silos=2", "eval.every=0"
    )
    for name in ("blue", "red"):
        sign_card(data_card_of(cards.parent, name), served.silos[name].key)

    def mend(silo: Any, ask: Any, times: int) -> Any:
        answer = silo.answer(ask)
        if ask.round == 1 and ask.fit:
            sign_card(data_card_of(cards.parent, "green"), served.silos["green"].key)
        return answer

    served.wire.fault = mend
    heard = []
    served.watch = lambda: heard.append(told(served.roster, "green")["silo"])
    summary = served.go_on().summary
    assert summary["rounds"] == 3
    assert served.asked(1) == ["blue", "red"]
    assert served.asked(2) == ["blue", "green", "red"]
    assert served.audit().rounds == 3
    first, second = (line["body"] for line in served.lines() if line["kind"] == "verdict")
    assert "cards.signature (data/green)" in first["refused"]["green"]
    assert (first["verdict"], second["verdict"], second["refused"]) == ("met", "met", {})
    assert any(key[1] == "data/green" for key in second["changes"])
    assert any("this silo is not asked" in one["words"] for one in heard if one)
    # The planned model's card is the first checkpoint's, with the run's facts.
    write_cards(served.folder)
    assert not (cards / "models/planned.toml").exists()
    model = read_cards(served.folder).models["round-3"]
    assert model.facts.tokens == summary["tokens"]
    assert model.about.released is True


def test_a_served_run_that_may_not_start_says_so_at_once(
    make_served: Any, three_silos: Path, tmp_path: Path
) -> None:
    whole = whole_of(three_silos)
    change(whole, {"project.practices.manipulation": True})
    cards = written(tmp_path / "cards", whole)
    served = make_served(f"comply.cards={cards}", 'comply.require="not_met"')
    begun = time.monotonic()
    with pytest.raises(NotCompliantError, match="prohibited, whoever takes part"):
        served.go_on()
    assert time.monotonic() - begun < 60  # serve.gather_s is an hour
    assert served.wire.asked == []


def test_cards_before_the_run(three_silos: Path, make_config: Any, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[run]\nname = "first"\n[model]\npreset = "tiny"\n[data]\npath = "{three_silos}"\n'
        '[federation]\nrounds = 2\n[serve]\nsilos = ["blue", "red"]\n'
        '[comply]\ncards = "cards"\n'
    )
    told = CliRunner().invoke(app, ["cards", "init", str(tmp_path), "--run-file", str(run_file)])
    assert told.exit_code == 0, told.output
    project = read_card(tmp_path / "cards/project.toml", "project")
    assert [one.about.silos for one in project.entities] == [None, ["blue"], ["red"]]
    facts = read_card(tmp_path / "cards/models/planned.toml", "model").facts
    config = make_config(three_silos)
    known = planned(config).models["planned"]
    tokens = config.total_steps * config.local.batch_size * config.data.sequence_length
    assert known["tokens"] == tokens
    assert known["training_flops"] == known["flops_per_token"] * tokens
    assert facts.training_flops == facts.flops_per_token * facts.tokens > 0
    # `photon serve --check` says what they come to.
    asked = config.having(comply={"cards": str(tmp_path / "cards")})
    assert verdict_alone(asked).startswith("unknown on ")
    with pytest.raises(NotCompliantError, match="whoever takes part"):
        verdict_alone(config.having(comply={"cards": str(tmp_path / "cards"), "require": "met"}))
