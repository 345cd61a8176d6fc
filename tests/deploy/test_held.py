"""Nothing of a run or of a node is replaced before whoever may be at work in it was looked for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.deploy import serve as serving
from photon.deploy.join import KEY_FILE, RECORD, Node, _write_membership
from photon.deploy.served_run import reopen_run
from photon.deploy.supervisor import Supervisor
from photon.errors import RunExistsError
from photon.membership.invitation import Invitation, certificate_fingerprint, write_invitation
from photon.membership.keys import NodeKey
from photon.silo.policy import Membership
from photon.store.served import Serving, hold_run

RUN = """
[run]
name = "med"
[model]
preset = "tiny"
[data]
path = "{data}"
sequence_length = 32
[serve]
home = "{home}"
host = "127.0.0.1"
"""


def photon(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def everything(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.fixture
def live(three_silos, home, tmp_path) -> Path:
    """A run folder as a serve that is at work has it; its home is beside run.toml."""
    (tmp_path / "run.toml").write_text(RUN.format(data=three_silos, home=home))
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "kept").write_text("a day of training")
    (folder / "run.json").write_text('{"kind": "serve"}')
    (folder / "serve.toml").write_text(RUN.format(data=three_silos, home=home))
    Serving("0" * 32, str(home), "", {}).write(folder)
    return folder


def test_serve_replaces_no_run_whose_home_another_serve_holds(live, home, tmp_path) -> None:
    before = everything(live)
    with Supervisor(home / serving.RECORD, home / "logs"):
        for more in (["--overwrite"], []):
            code, said = photon("serve", tmp_path / "run.toml", "--run-dir", live, "-q", *more)
            assert code == 90, said
            assert "another Photon" in said
    assert everything(live) == before


def test_serve_replaces_no_run_that_is_served_from_another_home(live, short_folder, tmp_path):
    before, other = everything(live), short_folder("other")
    with hold_run(live, served=True):
        command = ("serve", tmp_path / "run.toml", "--run-dir", live, "--overwrite", "-q")
        code, said = photon(*command, "--set", f"serve.home={other}")
        assert code == 46, said
        assert str(live) in said
        # Nor does it change the run file of a run that goes on elsewhere.
        code, said = photon("serve", "--resume", live, "-q", "--set", f"serve.home={other}")
        assert code == 46, said
    assert everything(live) == before


def test_simulate_and_train_replace_no_served_run(live, tmp_path) -> None:
    """Its loop, which holds the folder too, may just be away."""
    before = everything(live)
    with hold_run(live, served=True):
        for command in ("simulate", "train"):
            code, said = photon(
                *(command, tmp_path / "run.toml", "--run-dir", live, "--overwrite", "-q")
            )
            assert code == 46, said
            assert "photon stop" in said
    assert everything(live) == before


def test_a_run_that_nobody_holds_is_replaced(live, home, tmp_path, monkeypatch) -> None:
    """What comes after the locks is not this test's matter: it ends at the first service."""
    monkeypatch.setattr(serving.Aggregator, "_store", lambda *_: 1 / 0)
    result = CliRunner().invoke(
        app, ["serve", str(tmp_path / "run.toml"), "--run-dir", str(live), "--overwrite", "-q"]
    )
    assert isinstance(result.exception, ZeroDivisionError)
    assert sorted(everything(live)) == ["serve.json", "serve.toml"]
    assert Serving.read(live).run_id != "0" * 32


def test_only_where_things_are_may_change_in_a_run_that_goes_on(live, tmp_path) -> None:
    moved = reopen_run(live, [f"data.path={tmp_path / 'moved'}", "serve.gather_s=5"])
    assert (moved.data.path, moved.serve.gather_s) == (str(tmp_path / "moved"), 5)
    for key in ("data.sequence_length=64", "data.path_too=1", "local.steps=3"):
        with pytest.raises(RunExistsError, match="can't change in a run that has begun"):
            reopen_run(live, [key])


def test_what_a_trainer_says_for_the_screen_is_shown_and_the_rest_is_its_log(home, tmp_path):
    key = NodeKey.create(home / KEY_FILE).public_pem
    _write_membership(home, Membership("blue", "127.0.0.1:1", "sha256:" + "0" * 64, key))
    events, live = [], []
    (tmp_path / "node.toml").write_text(f'[data]\npath = "{tmp_path}"\n')
    node = Node(
        *(home, tmp_path / "node.toml"),
        log=lambda _: None,
        on_event=events.append,
        on_live=live.append,
    )
    wording = node._trainer().wording
    assert wording("@screen round 1: trains, 5 steps") is None
    assert wording("@live round 1: step 2 of 5") is None
    assert wording("INFO round 1 @screen") == "INFO round 1 @screen"
    assert (events, live) == (["round 1: trains, 5 steps"], ["round 1: step 2 of 5"])


def test_joining_and_moving_leave_a_running_node_its_key_and_address(
    certificates, home, three_silos, tmp_path
) -> None:
    key = NodeKey.create(home / KEY_FILE).public_pem
    pem = certificates.ca.read_text(encoding="ascii")
    fingerprint = certificate_fingerprint(pem)
    _write_membership(home, Membership("blue", "127.0.0.1:1", fingerprint, key))
    invitation = Invitation(
        *("blue", "127.0.0.1", 1, pem, fingerprint),
        aggregator_key=key,
        token="t" * 43,
        expires_at=time.time() + 999,
    )
    write_invitation(tmp_path / "blue.invitation.toml", invitation)
    (tmp_path / "node.toml").write_text(f'[data]\npath = "{three_silos}"\n')
    common = ("--node", tmp_path / "node.toml", "--home", home)
    with Supervisor(home / RECORD, home / "logs"):
        before = everything(home)
        for command in (
            ("join", "--invite", tmp_path / "blue.invitation.toml", *common),
            ("join", "127.0.0.1:2", *common),
        ):
            code, said = photon(*command)
            assert code == 90, said
            assert "nothing was changed" in said
        assert everything(home) == before
