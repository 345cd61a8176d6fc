"""What holds without a superlink: the version, light programs, command lines, odd inputs."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message

from photon.engines.flower import bundle, commands, pace, pinned, post, supernode
from photon.errors import DeployError
from photon.membership.records import SignedReply

_METADATA = Metadata(
    run_id=5,
    message_id="",
    src_node_id=7,
    dst_node_id=1,
    reply_to_message_id="asked",
    group_id="",
    created_at=1.0,
    ttl=60.0,
    message_type="train",
)

PROGRAMS = Path(__file__).parent / "programs"


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=200,
    )


# --- the version ---------------------------------------------------------------------------------


def missing_parts() -> list[str]:
    """Inner parts of Flower that are not where this folder looks for them; none, if all is well."""
    missing = []
    for module, attribute in pinned.INNER_PARTS:
        try:
            part = importlib.import_module(module)
            for name in attribute.split("."):
                part = getattr(part, name)
        except (ImportError, AttributeError):
            missing.append(f"{module}.{attribute}")
    return missing


def test_everything_inner_is_where_it_is_looked_for():
    pinned.check_flower()
    assert missing_parts() == []


def test_a_part_that_moved_is_named(monkeypatch):
    monkeypatch.setattr(pinned, "INNER_PARTS", (("flwr.supernode", "gone.away"), ("flwr.no", "x")))
    assert missing_parts() == ["flwr.supernode.gone.away", "flwr.no.x"]


def test_only_listed_parts_are_changed():
    with pytest.raises(DeployError, match="no known part"):
        pinned.change(json, "loads", None)
    assert json.loads("1") == 1


@pytest.mark.parametrize("program", ["superlink", "superexec", "server_app", "supernode", "shim"])
def test_another_flower_is_refused_by_name(program, tmp_path):
    folder = tmp_path / "flwr-1.42.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.42.0\n")
    arguments = {"shim": ("--runtime-api", "127.0.0.1:1", "--secret", "none", "--socket", "none")}
    module = f"photon.engines.flower.{program}"
    done = python("-m", module, *arguments.get(program, ()), PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "flwr 1.42.0 is installed; this Photon drives flwr 1.41.0 only" in done.stderr


def test_no_other_folder_imports_flower():
    source = Path(pinned.__file__).parents[2]
    pattern = re.compile(r"^\s*(import|from) flwr\b", re.MULTILINE)
    found = {
        path.relative_to(source).parts[:2]
        for path in source.rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert found == {("engines", "flower")}


# --- light ---------------------------------------------------------------------------------------


LIGHT = ("supernode", "shim", "superexec", "control", "server_app")


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What is loaded after each of `LIGHT`, imported in this order by one process."""
    code = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'photon.engines.flower.{name}')\n"
        "    loaded[name] = list(sys.modules)\n"
        "print(json.dumps(loaded))\n"
    )
    done = python("-c", code, *LIGHT)
    assert done.returncode == 0, done.stderr
    return {name: set(modules) for name, modules in json.loads(done.stdout).items()}


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_be_light_is_light(module, loaded):
    assert f"photon.engines.flower.{module}" in loaded[module]
    assert {"torch", "transformers"} & loaded[module] == set()


def test_command_lines_are_made_without_flower():
    done = python("-c", "import sys, photon.engines.flower.commands; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert {"flwr", "torch", "pydantic"} & set(done.stdout.split()) == set()


# --- command lines -------------------------------------------------------------------------------


def test_services_are_private_and_quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    monkeypatch.setenv("no_proxy", "intra.net")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    command = commands.superexec(
        home=tmp_path,
        superlink_port=1234,
        ca=tmp_path / "ca.crt",
        secret=tmp_path / "secret",
        bundle="0" * 64,
        run_folder=tmp_path / "run",
    )
    flowers = {name: value for name, value in command.env.items() if name.startswith("FLWR_")}
    assert flowers == {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(pace.SUPEREXEC_POLL_S),
    }
    for name in ("no_proxy", "NO_PROXY"):
        assert {"intra.net", "127.0.0.1", "localhost", "::1"} <= set(command.env[name].split(","))
    assert command.env["HTTPS_PROXY"] == "http://proxy:3128"
    assert command.env[commands.RUN_FOLDER_VARIABLE] == str(tmp_path / "run")
    assert command.argv[:3] == (sys.executable, "-m", "photon.engines.flower.superexec")
    assert oct((tmp_path / "flwr").stat().st_mode)[-3:] == "700"


def test_credentials_are_for_the_loop_alone(tmp_path, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    files = {name: tmp_path / name for name in ("ca", "key", "secret")}
    superlink = commands.superlink(
        home=tmp_path, port=1, certificate=tmp_path / "server.crt", **files
    )
    supernode = commands.supernode(home=tmp_path, superlink="door:1", runtime_port=2, **files)
    shim = commands.shim(
        home=tmp_path, runtime_port=2, secret=files["secret"], trainer=tmp_path / "sock"
    )
    for command in (superlink, supernode, shim):
        assert "secret" not in command.env.values()
        assert command.env["LC_ALL"] == "C.UTF-8"
        assert command.env["PATH"] == os.environ["PATH"]
    loop = commands.superexec(
        home=tmp_path,
        superlink_port=1,
        ca=files["ca"],
        secret=files["secret"],
        bundle="0" * 64,
        run_folder=tmp_path / "run",
    )
    assert loop.env["AWS_SECRET_ACCESS_KEY"] == "secret"


def test_a_secret_is_private_and_kept(tmp_path):
    path = commands.write_secret(tmp_path / "deep" / "secret")
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", text)
    assert commands.write_secret(path).read_text() == text


# --- bundle --------------------------------------------------------------------------------------


def test_the_bundle_is_three_small_files_and_always_the_same():
    one = bundle.build_bundle()
    assert one == bundle.build_bundle()
    assert len(bundle.digest(one)) == 64
    with zipfile.ZipFile(io.BytesIO(one)) as files:
        assert files.namelist() == ["pyproject.toml", "photon_bundle.py", ".info/CONTENT"]
        code = files.read("photon_bundle.py").decode()
    assert "import photon.deploy.aggregator as aggregator" in code
    assert bundle.digest(bundle.build_bundle("other.module")) != bundle.digest(one)


@pytest.mark.parametrize("name", ["", "a b", "a;import os", "a.", ".a", "a\nb", "1a", "a-b"])
def test_a_bundle_names_a_module(name):
    with pytest.raises(ValueError, match="no module's name"):
        bundle.build_bundle(name)


# --- answers as they come ------------------------------------------------------------------------


def message(record: object) -> Message:
    content = RecordDict()
    if record is not None:
        content["photon"] = ConfigRecord(record)  # type: ignore[arg-type]
    return make_message(metadata=_METADATA, content=content)


def test_an_answer_is_a_reply_a_signature_and_a_fingerprint():
    whole = {"reply": b"text", "signature": "s", "fingerprint": "f"}
    assert post._answer(message(whole)) == SignedReply("", b"text", "s", "f")
    for part in whole:
        assert "none" in str(post._answer(message({k: v for k, v in whole.items() if k != part})))
        assert "none" in str(post._answer(message({**whole, part: 5})))
        assert "none" in str(post._answer(message({**whole, part: [b"text"]})))
    assert "none" in str(post._answer(message(None)))
    words = post._answer(make_message(metadata=_METADATA, error=Error(8, "x" * 5000)))
    assert isinstance(words, str)
    assert "code 8" in words
    assert len(words) < 1100


# --- a dead one's leave --------------------------------------------------------------------------


def test_leave_is_taken_for_the_dead_of_this_machine_only(tmp_path):
    path = tmp_path / "home" / "supernode.json"
    assert supernode._orphan(path) == 0
    supernode._remember(path, 2**63 + 5)
    assert supernode._orphan(path) == 2**63 + 5, "this process itself, exec'd anew"
    assert json.loads(path.read_text())["pid"] == os.getpid()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"pid": dead.pid}))
    assert supernode._orphan(path) == 2**63 + 5
    path.write_text(json.dumps(record | {"pid": os.getppid()}))
    assert supernode._orphan(path) == 0, "it is alive"
    path.write_text(json.dumps(record | {"pid": dead.pid, "boot": "another"}))
    assert supernode._orphan(path) == 0, "another machine's, maybe"
    for text in ("", "[]", "{", '{"node_id": "7", "pid": 1}', '{"node_id": 7}'):
        path.write_text(text)
        assert supernode._orphan(path) == 0


@pytest.mark.parametrize(
    ("whose", "words"), [("ours", "ClientApp stopped responding."), ("flowers", "nothing")]
)
def test_a_message_that_was_never_fetched_is_answered_for(whose, words):
    """Flower alone waits for ever; the day it does not, our change may go."""
    done = python(str(PROGRAMS / "lost_message.py"), whose)
    assert done.stdout.strip() == words, done.stderr


@pytest.mark.parametrize(("whose", "sent"), [("ours", "1"), ("flowers", "0")])
def test_an_answer_that_nobody_waits_for_is_sent(whose, sent):
    """Flower alone sends it with the next task, whose own answer then waits, and so on."""
    done = python(str(PROGRAMS / "stray_answer.py"), whose)
    assert done.stdout.strip().splitlines()[-1] == sent, done.stderr
