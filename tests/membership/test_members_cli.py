"""`photon invite`, `photon members`, `photon audit` as an operator and a script use them."""

import json
import stat
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.errors import InvitationError
from photon.membership.audit import MEMBER, AuditLog
from photon.membership.invitation import read_invitation
from photon.membership.roster import Presence, Roster


def photon(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\nname = "med"\n[model]\npreset = "tiny"\n[data]\npath = "data"\n'
        '[serve]\nhome = "server"\nhost = "127.0.0.1"\nlisten = "127.0.0.1:9443"\n'
        'silos = ["hospital-a"]\n'
    )
    return path


@pytest.fixture
def joined(run_file, keys, facts):
    """hospital-a is a member; its roster."""
    photon("invite", "hospital-a", "--run-file", run_file, "--new")
    invitation = read_invitation("hospital-a.invitation.toml")
    with Roster("server/members.sqlite") as roster:
        roster.redeem(invitation.token, "hospital-a", keys[0].public_pem, facts)
        yield roster


def test_invite_writes_one_file(run_file, tmp_path, keys, facts):
    result = photon("invite", "hospital-a", "--run-file", run_file, "--new")
    path = tmp_path / "hospital-a.invitation.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    invitation = read_invitation(path)
    assert invitation.address == "127.0.0.1:9443"
    assert invitation.ca_pem == (tmp_path / "server/ca.crt").read_text()
    assert invitation.ca_fingerprint in result.stdout.replace("\n", "")
    assert "photon join --invite hospital-a.invitation.toml" in result.stdout
    assert 'path = "data/hospital-a"' in result.stdout.replace("\n", "")
    assert invitation.token not in result.output
    with Roster("server/members.sqlite") as roster:
        member = roster.redeem(invitation.token, "hospital-a", keys[0].public_pem, facts)
        assert member.status == "active"


def test_invite_for_scripts(run_file):
    result = photon(
        "invite", "lab", "--run-file", run_file, "--out", "a.toml", "--json", "--valid-hours", "1",
        "--address", "[fd00::7]:443", "--new",
    )  # fmt: skip
    record = json.loads(result.stdout)
    invitation = read_invitation("a.toml")
    assert record["file"] == "a.toml"
    assert record["address"] == invitation.address == "[fd00::7]:443"
    assert record["ca_fingerprint"] == invitation.ca_fingerprint
    assert "token" not in record
    assert "serve.silos does not name lab" in result.stderr


def test_invite_for_a_key(run_file, keys, facts):
    arguments = ["invite", "lab", "--run-file", run_file, "--new", "--out", "a.toml", "--key"]
    assert "no fingerprint of a key" in photon(*arguments, "sha256:12", code=80).output
    shown = photon(*arguments, keys[0].fingerprint).stdout
    assert f"Only the key {keys[0].fingerprint} can use it" in shown.replace("\n", "")
    invitation = read_invitation("a.toml")
    assert invitation.key_fingerprint == keys[0].fingerprint
    with Roster("server/members.sqlite") as roster:
        with pytest.raises(InvitationError, match="is for the key"):
            roster.redeem(invitation.token, "lab", keys[1].public_pem, facts)
        roster.redeem(invitation.token, "lab", keys[0].public_pem, facts)


def test_without_a_run_file_the_defaults_count(tmp_path):
    photon("invite", "lab", "--address", "fed.example.org:1", "--new")
    assert (tmp_path / "photon-server/members.sqlite").exists()
    said = photon("invite", "lab", "--address", "fed.example.org:1", "--home", "other", "--new")
    assert (tmp_path / "other/members.sqlite").exists()
    assert f"Made a new aggregator's home {tmp_path / 'other'}." in said.stdout
    assert "does not name the tokenizer: no run is known" in said.stderr
    said = photon("invite", "lab", "--address", "fed.example.org:1", "--home", "other", "--new")
    assert f"The aggregator's home is {tmp_path / 'other'}." in said.stdout


def test_in_the_wrong_folder_no_new_authority_is_made(run_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for arguments in ([], ["--run-file", run_file], ["--home", "elsewhere"]):
        said = photon("invite", "lab", *arguments, code=80).output
        assert "members.sqlite" in said
        assert "--new" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_run_that_was_served_last_is_known(joined, run_file, tmp_path, facts):
    served = tmp_path / "elsewhere" / "run"
    served.mkdir(parents=True)
    run_file.rename(served / "serve.toml")
    joined.set_setting("run", str(served))
    said = photon("invite", "lab", "--home", "server")
    assert read_invitation("lab.invitation.toml").address == "127.0.0.1:9443"
    assert "serve.silos does not name lab" in said.stderr
    assert "no data can be read at data (data.path of" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["../lab"], 80, "is no name for a member"),
        (["lab", "--address", "host"], 12, "is not HOST:PORT"),
        (["lab", "--address", "host:99999"], 12, "is not HOST:PORT"),
        (["lab", "--address", "https://host:1"], 12, "is not HOST:PORT"),
        (["lab", "--address", "a b:1"], 12, "must be a name or an address"),
        (["lab", "--out", "nowhere/a.toml"], 81, "there is no folder nowhere"),
        (["lab", "--out", "run.toml"], 81, "is no invitation; it is not replaced"),
        (["lab", "--valid-hours", "0"], 2, "valid-hours"),
        (["lab", "--run-file", "none.toml"], 10, "no run file at none.toml"),
    ],
)
def test_what_invite_refuses(run_file, arguments, code, words):
    defaults = ["--new"] if "--run-file" in arguments else ["--run-file", "run.toml", "--new"]
    before = run_file.read_text()
    assert words in photon("invite", *arguments, *defaults, code=code).output
    assert run_file.read_text() == before


def test_invite_says_when_the_certificate_is_for_another_host(run_file, tmp_path):
    from photon.deploy.certificates import keep_certificate

    keep_certificate(tmp_path / "server", "127.0.0.1")
    Roster(tmp_path / "server/members.sqlite").close()
    assert "certificate" not in photon("invite", "hospital-a", "--run-file", run_file).stderr
    said = photon("invite", "hospital-a", "--run-file", run_file, "--address", "10.0.0.1:1").stderr
    assert "not for 10.0.0.1" in said.replace("\n", " ")


def test_list(joined, run_file, keys):
    joined.all_seen({"hospital-a": (Presence("training", "r", 2, 3, 9, boot="b"), time.time())})
    photon("invite", "lab", "--run-file", run_file)
    shown = photon("members", "list", "--run-file", run_file).stdout
    assert "hospital-a" in shown
    assert f" {keys[0].fingerprint}\n" in shown
    assert "active" in shown
    assert "123,456" in shown
    assert "training" in shown
    assert "invited" in shown
    record = json.loads(photon("members", "list", "--home", "server", "--json").stdout)
    (member,) = record["members"]
    assert member["fingerprint"] == keys[0].fingerprint
    assert member["facts"]["data_sha256"] == "d" * 64
    assert member["presence"]["round"] == 2
    assert [one["name"] for one in record["invitations"]] == ["lab"]


def test_suspend_reinstate_expel_count_at_once(joined, run_file, keys):
    for command, status in (
        ("suspend", "suspended"),
        ("reinstate", "active"),
        ("expel", "expelled"),
    ):
        more = ["--yes"] if command != "reinstate" else []
        photon("members", command, "hospital-a", "--run-file", run_file, *more)
        assert joined.by_fingerprint(keys[0].fingerprint).status == status
    refused = photon("members", "reinstate", "hospital-a", "--run-file", run_file, code=82)
    assert "was expelled" in refused.output
    refused = photon("members", "suspend", "nobody", "--run-file", run_file, code=82)
    assert "there is no member 'nobody'" in refused.output
    refused = photon("members", "list", "--home", "elsewhere", code=80)
    assert "there is no elsewhere/members.sqlite" in refused.output


@pytest.mark.parametrize(("command", "done"), [("suspend", "suspended"), ("expel", "expelled")])
def test_a_run_that_is_left_with_too_few_is_asked_about(
    joined, run_file, keys, facts, tmp_path, command, done
):
    def asked(answer, code):
        words = ["members", command, "hospital-a", "--run-file", str(run_file)]
        result = CliRunner().invoke(app, words, input=answer)
        assert result.exit_code == code, result.output
        assert "med needs 1 silos for a round; without hospital-a it has 0 (none)" in result.output
        return result.output

    for answer in ("", "n\n"):
        assert f"hospital-a was not {done}" in asked(answer, 80)
        assert joined.member("hospital-a").status == "active"
    # Who is no silo of the run, or where the run is over, is let go unasked.
    joined.redeem(joined.invite("lab", 60), "lab", keys[1].public_pem, facts)
    assert "needs" not in photon("members", command, "lab", "--run-file", run_file).output
    asked("y\n", 0)
    assert joined.member("hospital-a").status == done


def test_a_run_that_is_over_is_not_asked_about(joined, run_file, tmp_path):
    joined.set_setting("run", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    photon("members", "suspend", "hospital-a", "--run-file", run_file)
    assert joined.member("hospital-a").status == "suspended"


def test_rotate(joined, run_file, keys, facts):
    assert (
        "is a member already"
        in photon("invite", "hospital-a", "--run-file", run_file, code=80).output
    )
    result = photon("members", "rotate", "hospital-a", "--run-file", run_file, "--json")
    record = json.loads(result.stdout)
    assert record["rotate"] is True
    token = read_invitation(record["file"]).token
    assert joined.active(keys[0].fingerprint)
    joined.redeem(token, "hospital-a", keys[1].public_pem, facts)
    assert joined.active(keys[1].fingerprint).name == "hospital-a"
    assert (
        "there is no member 'lab'"
        in photon("members", "rotate", "lab", "--run-file", run_file, code=82).output
    )


def test_audit(joined, tmp_path, keys):
    run = tmp_path / "runs/med"
    run.mkdir(parents=True)
    assert "there is no" in photon("audit", run, code=42).output
    log = AuditLog(run / "audit.jsonl")
    log.append(MEMBER, joined.signer(keys[0].fingerprint))
    result = photon("audit", run)
    assert "1 lines, 0 rounds" in result.stdout
    assert keys[0].fingerprint in result.stdout
    assert "No line was changed" in result.stdout
    record = json.loads(photon("audit", run, "--json", "--head", log.head).stdout)
    assert (record["ok"], record["head"]) == (True, log.head)
    with (run / "audit.jsonl").open("ab") as file:
        file.write(b"words\n")
    result = photon("audit", run, code=84)
    assert "line 2: it is no line of an audit log" in result.output.replace("\n", " ")
    assert "No line was changed" not in result.stdout
    result = photon("audit", run, "--json", code=84)
    assert json.loads(result.stdout)["ok"] is False


def test_every_command_shows_an_example():
    for arguments in (
        ["invite"],
        ["audit"],
        *(["members", name] for name in ("list", "suspend", "reinstate", "expel", "rotate")),
    ):
        assert "Example" in photon(*arguments, "--help").stdout


def test_none_of_it_loads_torch(run_file):
    code = (
        "import sys\n"
        "import photon.membership.verification, photon.membership.invitation\n"
        "from photon.cli.members import invite\n"
        f"invite('lab', run_file=__import__('pathlib').Path({str(run_file)!r}), new=True)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
