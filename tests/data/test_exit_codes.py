"""`photon data` through the whole command line: each way to make silos, and every exit code."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.data import open_data


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text files in two folders, and a metadata.csv beside them."""
    root = tmp_path_factory.mktemp("commands")
    lines = ["id,party"]
    for n in range(48):
        folder = root / "text" / ("north" if n % 2 else "south")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"d{n}.txt").write_text(f"Report {n} on {n * n} ships. " * 20)
        lines.append(f"d{n},{'whig' if n % 3 else 'tory'}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root / "text"


@pytest.fixture(scope="module")
def prepared(text):
    out = text.parent / "prepared"
    run("prepare", "--input", text, "--out", out, "--vocab-size", 300, "--iid", 2)
    return out


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.mark.parametrize(
    ("ways", "silos"),
    [
        ([], ["all"]),
        (["--iid", "3"], ["silo-0", "silo-1", "silo-2"]),
        (["--contiguous", "2"], ["silo-0", "silo-1"]),
        (["--dirichlet", "2:1", "--label-field", "party"], ["silo-0", "silo-1"]),
        (["--dirichlet", "2"], ["silo-0", "silo-1"]),
        (["--silo-folders"], ["north", "south"]),
        (["--silo-field", "party"], ["tory", "whig"]),
    ],
)
def test_each_way_to_make_silos(text, tmp_path, ways, silos):
    out = tmp_path / "data"
    arguments = ["--metadata", text.parent / "metadata.csv", "--vocab-size", 300, "--json"]
    shown = json.loads(run("prepare", "--input", text, "--out", out, *arguments, *ways).stdout)
    assert list(shown["silos"]) == silos
    assert json.loads(run("show", out, "--verify", "--json").stdout) == shown
    held_out = shown["held_out"]["held_out_documents"]
    rest = sum(s["documents"] + s["held_out_documents"] for s in shown["silos"].values())
    assert held_out + rest == 48


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--input", "nowhere"], 21, "no input at nowhere"),
        (["--silo-field", "party"], 20, "--silo-field party: d1.txt has no such field"),
        (["--iid", "2", "--silo-folders"], 13, "--iid and --silo-folders"),
        (["--dirichlet", "x"], 12, "--dirichlet 'x' is not N:ALPHA"),
        (["--partitioner", "nobody"], 14, "no plugin named 'nobody'"),
        (["--iid", "40"], 22, "48 documents can't fill 40 silos"),
        (["--tokenizer", "nowhere"], 21, "no tokenizer at nowhere"),
        (["--tokenizer", "PREPARED", "--eos", "</s>"], 25, "no token '</s>'"),
        (["--metadata", "nowhere.csv"], 21, "no metadata file at nowhere.csv"),
        (["--vocab-size", "9"], 20, "--vocab-size 9 is too small"),
        (["--unknown"], 2, "No such option"),
    ],
)
def test_errors_have_the_documented_code(text, prepared, tmp_path, arguments, code, said):
    given = [prepared / "tokenizer" if word == "PREPARED" else word for word in arguments]
    base = [] if "--input" in arguments else ["--input", text]
    result = run("prepare", *base, "--out", tmp_path / "data", *given, code=code)
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept(text, prepared):
    before = open_data(prepared).sha256
    result = run("prepare", "--input", text, "--out", prepared, code=20)
    assert "already exists" in result.stderr
    assert "--overwrite" in result.stderr
    assert open_data(prepared).sha256 == before


def damage_shard(root):
    next((root / "silos/silo-0").glob("train*.bin")).write_bytes(b"")


def damage_index(root):
    next((root / "silos/silo-1").glob("train*.npy")).unlink()


def damage_silo(root):
    (root / "silos/silo-1/manifest.json").write_text("{}")


def damage_format(root):
    file = root / "manifest.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 7'))


def damage_tokenizer(root):
    (root / "tokenizer/tokenizer.json").write_text("{}")


def lower_vocabulary(root):
    file = root / "manifest.json"
    file.write_text(file.read_text().replace('"vocab_size": 300', '"vocab_size": 90'))


@pytest.mark.parametrize(
    ("damage", "code", "named"),
    [
        (damage_shard, 24, "train-00000.bin has 0 bytes"),
        (damage_index, 24, "train-00000.ends.npy is missing"),
        (damage_silo, 24, "silos/silo-1/manifest.json has sha256"),
        (damage_format, 20, "manifest.json has format 7"),
        (damage_tokenizer, 24, "tokenizer.json has sha256"),
        (lower_vocabulary, 25, "has 90 tokens"),
        (lambda root: (root / "manifest.json").unlink(), 21, "is not a prepared data folder"),
        (shutil.rmtree, 21, "no prepared data at"),
    ],
)
def test_show_names_the_damaged_file(prepared, tmp_path, damage, code, named):
    root = shutil.copytree(prepared, tmp_path / "data")
    damage(root)
    result = run("show", root, "--verify", code=code)
    assert named in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["prepare", "show"])
def test_help_has_an_example(command):
    text = " ".join(run(command, "--help").stdout.split())
    assert f"photon data {command}" in text
    assert "Example" in text
