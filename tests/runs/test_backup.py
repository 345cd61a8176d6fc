"""A backup made while the run goes on, the machine lost, another one: the same weights."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import silos_in_process
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_run_config
from photon.deploy.backup import MANIFEST, back_up, restore, verified
from photon.errors import DeployError, MembershipError, RunExistsError
from photon.membership.keys import AGGREGATOR_KEY_FILE
from photon.membership.roster import ROSTER_FILE, RUN_SETTING, Roster
from photon.membership.roster_file import ROSTER_FILES
from photon.runs.notary import Notary
from photon.store.disk import held_alone
from photon.store.served import Serving


@pytest.fixture
def home(served) -> Path:
    served.roster.set_setting(RUN_SETTING, str(served.folder))
    return Path(served.serving.home)


def taken_in_round_two(served, home: Path, out: Path) -> list[int]:
    """Have a backup made between two answers of round 2; its round."""
    rounds: list[int] = []

    def fault(silo, ask, times):
        if silo.name == "blue" and ask.round == 2 and ask.fit and not rounds:
            rounds.append(back_up(home, out).round)
        return silo.answer(ask)

    served.wire.fault = fault
    return rounds


def moved(served, home: Path, run: Path) -> None:
    """As another machine that was given the two; the silos are where they were."""
    served.roster.close()
    served.folder = run
    served.roster = Roster(home / ROSTER_FILE)
    served.wire = silos_in_process.Wire(served.silos, served.roster)


def test_the_machine_is_lost_and_the_run_ends_with_the_same_weights(
    served, home, calm, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "med.tar"
    taken = taken_in_round_two(served, home, out)
    closed, close_round = [], Notary._close_round

    def lost_after_two(self, number):
        close_round(self, number)
        closed.append(number)
        if number == 2 and len(closed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Notary, "_close_round", lost_after_two)
    with pytest.raises(KeyboardInterrupt):
        served.go_on()
    assert (taken, closed) == (
        [1],
        [1, 2],
    )  # round 2 was merged, and the backup knows nothing of it
    key = (home / AGGREGATOR_KEY_FILE).read_bytes()
    served.roster.close()
    shutil.rmtree(home)
    shutil.rmtree(served.folder)
    new = tmp_path / "elsewhere"
    made, run = restore(out, new / "server", new / "run")
    assert (made.round, run) == (1, new / "run")
    assert (new / "server" / AGGREGATOR_KEY_FILE).read_bytes() == key
    assert (new / "server" / AGGREGATOR_KEY_FILE).stat().st_mode & 0o077 == 0
    assert Serving.read(run).home == load_run_config(run / "serve.toml").serve.home
    moved(served, new / "server", run)
    assert served.roster.setting(RUN_SETTING) == str(run)
    summary = served.go_on().summary
    for name in ("weights_sha256", "tokens", "global_loss", "per_silo"):
        assert summary[name] == calm[name], name
    assert served.audit().rounds == 3
    assert closed == [1, 2, 2, 3]


def test_what_is_in_it(served, home, tmp_path) -> None:
    for name in ("logs/serve.log", "operator.sock", "serve.lock", "store/data/1.dat"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("x")
    (home / "ca.key").write_text("secret")
    (home / "ca.key").chmod(0o600)
    (served.folder / "events.jsonl").write_text('{"a": 1}\n{"b"')
    out = tmp_path / "med.tar"
    made = back_up(home, out)
    assert out.stat().st_mode & 0o777 == 0o600
    assert made == verified(out)
    assert made.references == {
        "data": load_run_config(served.folder / "serve.toml").data.path,
        "store": "the embedded one, in the old home",
    }
    assert set(made.files) == {
        *(f"home/{name}" for name in (AGGREGATOR_KEY_FILE, *ROSTER_FILES, "ca.key")),
        *(f"run/{name}" for name in ("serve.toml", "serve.json", "events.jsonl")),
    }
    _, run = restore(out, tmp_path / "new", tmp_path / "run")
    assert (run / "events.jsonl").read_text() == '{"a": 1}\n'
    whole = back_up(home, tmp_path / "whole.tar", with_store=True)
    assert set(whole.references) == {"data"}
    assert set(whole.files) - set(made.files) == {"home/store/data/1.dat"}
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_overwritten_on_either_side(served, home, tmp_path) -> None:
    out = tmp_path / "med.tar"
    out.write_text("mine")
    with pytest.raises(DeployError, match="is there already"):
        back_up(home, out)
    assert out.read_text() == "mine"
    out.unlink()
    with pytest.raises(MembershipError, match="no members yet"):
        back_up(tmp_path / "nowhere", out)
    back_up(home, out)
    with pytest.raises(DeployError, match="is not empty"):
        restore(out, home, tmp_path / "run")
    busy = tmp_path / "busy"
    busy.mkdir()
    with held_alone(busy / "serve.lock", DeployError("x")):
        with pytest.raises(DeployError, match="a `photon serve` runs"):
            restore(out, busy, tmp_path / "run")
        with held_alone(home / "serve.lock", DeployError("x")):
            back_up(home, tmp_path / "two.tar")
            with pytest.raises(DeployError, match="in use"):
                back_up(home, tmp_path / "three.tar", with_store=True)
    with pytest.raises(RunExistsError, match="is not empty"):
        restore(out, tmp_path / "new", served.folder)
    with pytest.raises(DeployError, match="lie in each other"):
        restore(out, tmp_path / "new", tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_checkpoint_is_no_backup(served, home, tmp_path) -> None:
    served.roster.set_setting("draining", False)
    served.go_on()
    newest = sorted((served.folder / "checkpoints").glob("round-*"))[-1]
    assert back_up(home, tmp_path / "good.tar").round == 3
    weights = next(newest.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(DeployError, match="round 3 changed meanwhile, or is damaged"):
        back_up(home, tmp_path / "bad.tar")
    assert [path.name for path in tmp_path.glob("*.tar")] == ["good.tar"]


def changed(entry: str):
    def change(name: str, data: bytes) -> tuple[str, bytes] | None:
        return (name, b"x" + data[1:]) if name == entry else (name, data)

    return change


def renamed(to: str):
    return lambda name, data: (to if name.endswith(AGGREGATOR_KEY_FILE) else name, data)


@pytest.mark.parametrize(
    "change",
    [
        changed(f"home/{ROSTER_FILE}"),
        changed("run/serve.toml"),
        changed(MANIFEST),
        renamed("home/other.key"),
        renamed("home/../../evil"),
        renamed("/etc/evil"),
        lambda name, data: None if name == "run/serve.toml" else (name, data),
        lambda name, data: None if name == MANIFEST else (name, data),
    ],
    ids=["roster", "file", "manifest", "name", "up", "root", "missing", "no manifest"],
)
def test_what_was_changed_is_found_before_anything_is_written(
    change, served, home, tmp_path
) -> None:
    out, bad = tmp_path / "med.tar", tmp_path / "bad.tar"
    back_up(home, out)
    with tarfile.open(out) as old, tarfile.open(bad, "w") as new:
        for info in old:
            kept = change(info.name, old.extractfile(info).read())
            if kept is not None:
                info.name, info.size = kept[0], len(kept[1])
                new.addfile(info, io.BytesIO(kept[1]))
    for file in (bad, out.rename(tmp_path / "cut.tar")):
        if file.name == "cut.tar":
            file.write_bytes(file.read_bytes()[:-20_000])
        with pytest.raises(DeployError, match=r"Nothing was changed|damaged|no whole backup"):
            restore(file, tmp_path / "new", tmp_path / "run")
        assert not (tmp_path / "new").exists()
        assert not (tmp_path / "run").exists()


def test_the_commands_warn_of_keys_and_say_how_to_go_on(served, home, tmp_path) -> None:
    out = tmp_path / "med.tar"
    done = CliRunner().invoke(app, ["backup", str(home), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "private keys" in done.output
    words = ["restore", str(out), "--home", str(tmp_path / "new"), "--run-dir", str(tmp_path / "r")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"photon serve --resume {tmp_path / 'r'}" in done.output.replace("\n", "")
    assert json.loads((tmp_path / "r" / "serve.json").read_text())["home"] == str(tmp_path / "new")
