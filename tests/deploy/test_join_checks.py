"""`photon join --check`: it changes nothing, and names what is wrong at this site."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checked_site import LINES, Site, failed, name_of, photon, well
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_node_config
from photon.deploy.checks import worst
from photon.deploy.join import accept_invitation
from photon.deploy.ports import free_ports
from photon.errors import (
    DataChangedError,
    DataNotFoundError,
    DeviceError,
    DiskFullError,
    InvitationError,
    MembershipError,
    UnknownKeyError,
    VocabularyMismatchError,
)
from photon.membership.invitation import SharedTokenizer, read_invitation

# --- nothing is changed ---


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_with_an_invitation_nothing_is_used_up(site, aggregator) -> None:
    file = aggregator.invite("fresh")
    before, text = aggregator.state(), file.read_bytes()
    found = site.look(invitation=file)
    assert list(found) == ["invitation" if name == "membership" else name for name in LINES]
    assert well(found)
    assert "fresh at 127.0.0.1" in found["invitation"].found
    assert "is made when this node joins" in found["key"].found
    assert "joining registers it" in found["data"].found
    assert found["member"].verdict == found["store"].verdict == "skip"
    assert "once this node is a member" in found["store"].found
    assert aggregator.state() == before
    assert file.read_bytes() == text
    assert not site.home.exists()
    # And the invitation still works.
    site.join(aggregator, "fresh")
    assert well(site.look())


def test_a_member_looks_at_everything_and_changes_nothing(member, aggregator) -> None:
    before, files = aggregator.state(), files_of(member.home)
    found = member.look()
    assert list(found) == LINES
    assert {one.verdict for one in found.values()} <= {"ok", "warn"}, found
    assert worst(list(found.values())) == 0
    assert "as registered" in found["data"].found
    assert "is active" in found["member"].found
    assert "answers, in" in found["store"].found
    assert "runs *" in found["node.toml"].found
    assert "1 x cpu" in found["compute"].found or torch.cuda.is_available()
    assert aggregator.state() == before, "not even that it was here"
    assert files_of(member.home) == files


# --- what is wrong here ---


def test_node_files(member) -> None:
    member.say("[policy]\nrunz = []")
    found = member.look()
    assert failed(found["node.toml"], UnknownKeyError, "runz")
    assert found["data"].verdict == found["disk"].verdict == found["compute"].verdict == "skip"
    assert well(found, "node.toml"), "the rest is looked at all the same"
    member.say('[policy]\nruns = ["med-*"]\nmin_participants = 3\nmax_parameters = 2_000_000')
    words = member.look()["node.toml"].found
    for each in ("runs med-*", "3 participants", "max_parameters 2,000,000", "model paths none"):
        assert each in words
    member.say("[policy]\nmax_epsilon = 3.0\nruns = []")
    assert member.look()["node.toml"].verdict == "warn"
    assert "max_epsilon 3.0" in member.look()["node.toml"].found
    assert "policy.runs refuses every run" in member.look()["node.toml"].hint


def test_data(member, tmp_path) -> None:
    member.say("", data=tmp_path / "none")
    assert failed(member.look()["data"], DataNotFoundError, "none")
    changed = shutil.copytree(member.data, tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest, indent=7))
    member.say("", data=changed)
    assert failed(member.look()["data"], DataChangedError, "it registered")


def test_text_that_another_tokenizer_cut_is_told_before_the_invitation_is_used_up(
    site, aggregator, request
) -> None:
    name = name_of(request)
    other = SharedTokenizer("f" * 64, "</s>", None)
    invitation = aggregator.invite(name, tokenizer=other)
    said = site.look(invitation=invitation)["data"]
    assert failed(said, VocabularyMismatchError, "cut by another tokenizer")
    assert "photon data prepare --tokenizer" in said.hint
    assert "ffffffffffff" in said.found
    before = aggregator.state()
    with pytest.raises(VocabularyMismatchError, match="cut by another tokenizer"):
        accept_invitation(read_invitation(invitation), load_node_config(site.file), site.home)
    assert aggregator.state() == before
    assert not (site.home / "node.key.new").exists()
    # An invitation from before there was a run says nothing of it, and that is said.
    unnamed = site.look(invitation=aggregator.invite(name, tokenizer=None))["data"]
    assert unnamed.verdict == "warn"
    assert "does not name the federation's tokenizer" in unnamed.found
    site.join(aggregator, name)


def test_disk(member) -> None:
    gib = shutil.disk_usage(member.home).total / 2**30 + 1
    member.say(f"[disk]\nmin_free_gib = {gib}")
    assert failed(member.look()["disk"], DiskFullError, "GiB are free under")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fault is a device that is not here")
def test_device_and_threads(member) -> None:
    member.say('[compute]\ndevice = "cuda"')
    assert failed(member.look()["compute"], DeviceError, "not on this machine")
    member.say("[compute]\nthreads = 512")
    assert member.look()["compute"].verdict == "warn"
    assert "512 threads" in member.look()["compute"].found


def test_key(member) -> None:
    (member.home / "node.key").chmod(0o644)
    found = member.look()
    assert failed(found["key"], MembershipError, "may be read or changed by others", "0644")
    assert "chmod 600" in found["key"].hint
    assert found["member"].verdict == found["store"].verdict == "skip"
    (member.home / "node.key").unlink()
    assert failed(member.look()["key"], MembershipError, "no key at")


def test_invitations(site, member, aggregator, tmp_path) -> None:
    none = tmp_path / "none.toml"
    found = site.look(invitation=none)
    assert failed(found["invitation"], InvitationError, "none.toml")
    assert {found[name].verdict for name in LINES[7:]} == {"skip"}
    expired = aggregator.invite("late", hours=-1.0)
    assert failed(site.look(invitation=expired)["invitation"], InvitationError, "expired at")
    soon = aggregator.invite("soon", hours=0.5)
    other = Site(tmp_path, site.data)
    other.home = tmp_path / "other"
    assert other.look(invitation=soon)["invitation"].verdict == "warn"
    stranger = aggregator.invite("stranger")
    found = member.look(invitation=stranger)
    assert failed(found["invitation"], InvitationError, "is the home of", "is for stranger")


def test_no_home_and_no_invitation(site) -> None:
    found = site.look()
    assert failed(found["membership"], InvitationError, "no member's home yet")
    assert "--check --invite FILE" in found["membership"].hint


# --- as a person or a script calls it ---


def test_the_command(member) -> None:
    words = ["join", "--check", "--node", member.file, "--home", member.home]
    shown = photon(*words)
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.stdout.splitlines()][:2] == ["looked", "node.toml"]
    found = json.loads(photon(*words, "--json").stdout)
    assert [one["name"] for one in found] == LINES
    (member.home / "node.key").chmod(0o640)
    result = photon(*words, "--json")
    assert result.exit_code == MembershipError.exit_code
    assert json.loads(result.stdout)[2]["verdict"] == "fail"
    assert photon(*words, f"127.0.0.1:{free_ports(1)[0]}").exit_code == MembershipError.exit_code


def test_socks_is_refused_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    (tmp_path / "run.toml").write_text('[model]\npreset = "tiny"\n[data]\npath = "d"\n')
    for words in (
        ["join", "--check"],
        ["join", "--invite", "i.toml"],
        ["serve", "run.toml"],
        ["serve", "run.toml", "--check"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 95, result.output
        assert "ALL_PROXY=socks5://127.0.0.1:1080" in result.output.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
