"""The federation's tokenizer travels in the invitation, and cuts a site's text to the same bits."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.data import load_tokenizer, open_data
from photon.errors import DataNotFoundError
from photon.membership.invitation import read_invitation


def photon(*words, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def run_file(three_silos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(
        'run.name = "med"\nmodel.preset = "tiny"\nserve.host = "127.0.0.1"\n'
        f'data.path = "{three_silos}"\n'
    )
    return path


def test_a_site_prepares_its_text_with_nothing_but_the_invitation(run_file, three_silos, tmp_path):
    said = photon("invite", "lab", "--run-file", run_file, "--new")
    assert "photon data prepare --input texts/ --iid 1 --tokenizer lab.invitation.toml" in said
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"what lab {number} has to say of it. " * 40)
    # Whatever the file is called on its way.
    (tmp_path / "lab.invitation.toml").rename(tmp_path / "from-them")
    photon(
        *("data", "prepare", "--input", texts, "--iid", "1", "--tokenizer", "from-them"),
        *("--out", "data/lab"),
    )
    theirs, ours = open_data(tmp_path / "data/lab"), open_data(three_silos)
    assert theirs.tokenizer_sha256 == ours.tokenizer_sha256
    assert (theirs.vocab_size, theirs.eos_id) == (ours.vocab_size, ours.eos_id)
    assert theirs.tokenizer_file.read_bytes() == ours.tokenizer_file.read_bytes()


def test_an_invitation_without_it_says_whom_to_ask(run_file, three_silos, tmp_path):
    run_file.write_text(run_file.read_text().replace(str(three_silos), "nowhere"))
    said = photon("invite", "lab", "--run-file", run_file, "--new")
    assert "the invitation does not name the tokenizer: no data can be read" in said
    file = tmp_path / "lab.invitation.toml"
    assert read_invitation(file).tokenizer is None
    with pytest.raises(DataNotFoundError, match="names no tokenizer") as caught:
        load_tokenizer(file)
    assert "operator" in (caught.value.hint or "")


def test_a_tokenizer_that_is_not_the_data_s_is_not_sent(run_file, three_silos, tmp_path):
    folder = tmp_path / "damaged"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "manifest.json").write_text((three_silos / "manifest.json").read_text())
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    run_file.write_text(run_file.read_text().replace(str(three_silos), str(folder)))
    assert "is not the one that the data was made with" in photon(
        "invite", "lab", "--run-file", run_file, "--new", code=24
    )
    assert not (tmp_path / "lab.invitation.toml").exists()
