"""What the global held-out set holds of each source, and folders that hold nothing else."""

import json

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.data import PrepareOptions, open_data, prepare
from photon.errors import EmptySiloError, IncompatibleConfigError

KINDS = ["deeds", "hymns", "letters", "news", "plays", "songs"]


def write(root, counts):
    """Text files in a folder for each kind, and one JSONL of the same with the kind as a field."""
    lines = []
    for kind, count in counts.items():
        (root / "text" / kind).mkdir(parents=True)
        for n in range(count):
            text = f"{kind} number {n} of the round, {n * n}. " * 5
            (root / "text" / kind / f"{n}.txt").write_text(text)
            lines.append(json.dumps({"text": text, "kind": kind}) + "\n")
    (root / "rows.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Six kinds, two of them large: 1% of the documents is in those two."""
    counts = dict.fromkeys(KINDS, 12) | {"news": 90, "plays": 90, "songs": 4}
    return write(tmp_path_factory.mktemp("uneven"), counts)


def made(root, given, out, **more):
    options = {"vocab_size": 300, "global_fraction": 0.01, **more}
    return prepare(PrepareOptions(input=root / given, out=root / out, **options))


def manifest(data):
    return json.loads((data.path / "manifest.json").read_text())


def by(data, kind):
    return {k: row["documents"] for k, row in manifest(data)["held_out_from"][kind].items()}


def test_the_global_set_holds_something_of_each_source_that_can_spare_it(uneven):
    data = made(uneven, "text", "folders", silo_folders=True)
    held = by(data, "silo")
    assert set(held) == set(KINDS)
    assert all(held[kind] for kind in KINDS if kind != "songs")
    assert held["songs"] == 0  # four documents: it would be a quarter of them
    said = " / ".join(data.remarks)
    assert "had nothing of 'deeds'" in said
    assert "holds nothing of 1 silos (songs; 2% of all text)" in said
    # Whatever the partition, as it goes by where the text lies.
    others = [made(uneven, "text", f"iid-{n}", iid=n) for n in (2, 3)]
    assert all(by(one, "source") == by(data, "source") for one in others)
    assert len({one.held_out.held_out_bytes for one in (data, *others)}) == 1


def test_a_field_is_stratified_when_it_is_named(uneven):
    plain = made(uneven, "rows.jsonl", "plain", silo_field="kind")
    assert any("holds nothing of" in r and "--stratify-field" in r for r in plain.remarks)
    options = {"stratify_field": "kind"}
    held = [
        made(uneven, "rows.jsonl", "by-kind", silo_field="kind", **options),
        made(uneven, "rows.jsonl", "dealt", iid=2, **options),
    ]
    assert all(by(held[0], "silo")[kind] for kind in KINDS if kind != "songs")
    shards = [data.held_out.shards("held_out") for data in held]
    assert [s.documents for s in shards[0]] == [s.documents for s in shards[1]]
    assert held[0].held_out.held_out_bytes == held[1].held_out.held_out_bytes


def test_the_card_breaks_the_set_down_to_the_last_byte(uneven):
    data = made(uneven, "text", "card", silo_folders=True)
    card = (data.path / "README.md").read_text()
    assert "| held out globally, by silo | documents | tokens | text bytes |" in card
    for kind in ("silo", "source"):
        rows = manifest(data)["held_out_from"][kind].values()
        whole = data.held_out
        counts = (whole.held_out_documents, whole.held_out_tokens, whole.held_out_bytes)
        for what, count in zip(("documents", "tokens", "bytes"), counts, strict=True):
            assert sum(row[what] for row in rows) == count
    assert f"| deeds | {by(data, 'silo')['deeds']} |" in card


@pytest.fixture(scope="module")
def scored(uneven):
    """Evaluation text of a single document, cut by another folder's tokenizer."""
    tokenizer = made(uneven, "text", "base", iid=2).tokenizer_file
    (uneven / "exam.txt").write_text("One text to score models with.")
    options = {"held_out_only": True, "tokenizer": tokenizer}
    return prepare(PrepareOptions(input=uneven / "exam.txt", out=uneven / "exam", **options))


def test_evaluation_only_text_of_any_amount(uneven, scored):
    assert not scored.silos
    assert scored.held_out.held_out_documents == 1
    assert scored.held_out.held_out_bytes == len("One text to score models with.")
    assert scored.tokenizer_sha256 == open_data(uneven / "base").tokenizer_sha256
    scored.verify()
    card = (scored.path / "README.md").read_text()
    assert "All of it is held out" in card
    assert "Silos: none" in card
    assert not scored.remarks
    with pytest.raises(EmptySiloError, match="its text is held out to score models") as caught:
        open_data(scored.path)  # what trains opens it so
    assert "--held-out-only" in caught.value.hint
    shown = CliRunner().invoke(app, ["data", "show", str(scored.path), "--verify", "--json"])
    assert json.loads(shown.stdout)["silos"] == {}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "held_out_only needs a tokenizer"),
        ({"iid": 2, "tokenizer": "x"}, "iid makes silos, and held_out_only makes none"),
    ],
)
def test_evaluation_only_options_that_clash(uneven, more, said):
    with pytest.raises(IncompatibleConfigError, match=said):
        made(uneven, "text", "never", held_out_only=True, **more)


def test_a_run_is_scored_on_evaluation_only_text(uneven, scored, make_config):
    from photon.products import evaluate
    from photon.runs import simulate

    config = make_config(uneven / "base", "federation.rounds=1", "local.steps=1")
    config = config.model_copy(
        update={"eval": config.eval.model_copy(update={"per_silo": False, "max_tokens": 64})}
    )
    simulate(config, run_dir=uneven / "run")
    result = evaluate(uneven / "run", scored.path)
    assert result.overall.perplexity > 1
    assert not result.per_silo
