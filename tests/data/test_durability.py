"""A prepared folder is there whole or not at all: kills, full disks, links, two at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from photon.data import PrepareOptions, open_data, prepare
from photon.errors import DataError, EmptySiloError, MachineError


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [{"text": f"Report {n} on {n * n} ships. " * 40} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def options(rows, **more):
    return PrepareOptions(input=rows, out=rows.parent / "data", **{"vocab_size": 300, **more})


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def start(rows, body):
    """A process of its own that prepares; `body` sees `options` and `stop(stage)`."""
    script = f"""
import resource, sys, time
from pathlib import Path
from photon.data import PrepareOptions, prepare
from photon.errors import PhotonError
options = PrepareOptions(input={str(rows)!r}, out={str(rows.parent / "data")!r}, vocab_size=300)
{body}
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


HOLD = """
def hold(stage, done, total):
    if stage == "tokenising":
        print("tokenising", flush=True)
        time.sleep(60)
prepare(options, hold)
"""


def test_a_killed_prepare_leaves_no_data_and_the_next_one_cleans_up(rows):
    process = start(rows, HOLD)
    try:
        assert process.stdout.readline() == "tokenising\n"
        held = left(rows.parent)
        # While it lives its folder is locked: another prepare of the same name lets it be.
        prepare(options(rows))
        assert left(rows.parent) == sorted([*held, "data"])
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert held[0].startswith(".data.preparing-")
    assert list((rows.parent / held[0]).rglob("*.bin"))  # it was killed in the middle of it
    prepare(options(rows, overwrite=True)).verify()
    assert left(rows.parent) == ["data", "rows.jsonl"]


def test_only_scratch_folders_of_that_name_are_swept(rows):
    mine = [".data.notes", ".data2.preparing-x", ".data.preparing-y"]
    for name in mine:
        (rows.parent / name).mkdir()
    (rows.parent / ".data.preparing-file").write_text("not a folder")
    prepare(options(rows))
    assert left(rows.parent) == [
        *sorted([".data.notes", ".data.preparing-file", ".data2.preparing-x"]),
        "data",
        "rows.jsonl",
    ]


def test_the_only_copy_of_replaced_data_is_not_swept(rows):
    """A kill between the two renames of --overwrite leaves the old folder under a hidden name."""
    prepare(options(rows))
    old = rows.parent / ".data.preparing-x.old"
    (rows.parent / "data").rename(old)

    def stop(stage, done, total):
        if stage == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options(rows), stop)
    open_data(old).verify()


@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_a_full_disk_is_an_exit_class_of_its_own_and_leaves_nothing(rows, limit):
    """A file-size limit makes the kernel refuse a write for real: tokenizer, shard or index."""
    body = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    prepare(options)
except PhotonError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    process = start(rows, body)
    said, _ = process.communicate()
    if limit < 60_000:  # what the largest file needs
        assert process.returncode == 51, said
        assert "no room to write" in said
        assert left(rows.parent) == ["rows.jsonl"]
    else:
        assert process.returncode == 0


def test_an_index_too_large_for_the_disk_says_so_too(tmp_path):
    """Of tiny documents the index (8 bytes each) is the largest file, written by another call."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n % 40:02}"}) + "\n" for n in range(6000)))
    whole = prepare(PrepareOptions(input=rows, out=tmp_path / "whole", vocab_size=300))
    sizes = {path.name: path.stat().st_size for path in whole.path.rglob("*") if path.is_file()}
    assert max(sizes, key=sizes.__getitem__) == "train-00000.ends.npy"
    limit = sizes["train-00000.ends.npy"] - 1
    body = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    prepare(options)
except PhotonError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    process = start(rows, body)
    said, _ = process.communicate()
    assert process.returncode == 51, said
    assert left(tmp_path) == ["rows.jsonl", "whole"]


def test_a_link_stays_a_link(rows):
    real = rows.parent / "real"
    real.mkdir()
    (rows.parent / "data").symlink_to(real)
    first = prepare(options(rows))
    second = prepare(options(rows, iid=2, overwrite=True))
    assert first.path == second.path == real.resolve()
    assert (rows.parent / "data").is_symlink()
    assert left(rows.parent) == ["data", "real", "rows.jsonl"]


def unread(stage, done, total):
    raise AssertionError("it began to read")


@pytest.mark.parametrize("out", ["file/below", "file/a/b", "x" * 300, "new/" + "x" * 300, "loop/a"])
def test_what_can_not_be_written_is_said_before_the_work(rows, out):
    (rows.parent / "file").write_text("no folder")
    (rows.parent / "loop").symlink_to("loop")
    before = left(rows.parent)
    with pytest.raises(MachineError, match=r"can't prepare .*/") as caught:
        prepare(PrepareOptions(input=rows, out=rows.parent / out, vocab_size=300), unread)
    assert "--out" in caught.value.hint
    assert left(rows.parent) == before


def test_a_folder_that_takes_no_files_is_said_before_the_work(unprivileged):
    root = Path(tempfile.mkdtemp())
    try:
        rows = root / "rows.jsonl"
        rows.write_text('{"text": "a"}\n')
        root.chmod(0o555)
        with (
            unprivileged(),
            pytest.raises(MachineError, match=r"can't prepare .*Permission denied"),
        ):
            prepare(PrepareOptions(input=rows, out=root / "data", vocab_size=300), unread)
    finally:
        root.chmod(0o755)
        shutil.rmtree(root)


def test_parents_that_were_made_go_with_a_failure(rows):
    with pytest.raises(EmptySiloError):
        prepare(PrepareOptions(input=rows, out=rows.parent / "a/b/c", iid=50, vocab_size=300))
    assert left(rows.parent) == ["rows.jsonl"]
    assert prepare(PrepareOptions(input=rows, out=rows.parent / "a/b/c", vocab_size=300)).silos


def test_names_that_are_no_utf8_are_kept_as_they_are(tmp_path):
    """Bytes of another encoding in a folder's, a file's or an ending's name."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for silo in ("a", os.fsdecode(b"\xfc")):
        (folder / silo).mkdir(parents=True)
        for n in range(12):
            (folder / silo / f"{n}.txt").write_text(f"{n} ships. " * 20)
    (folder / os.fsdecode(b"x.\xe9")).write_text("")
    data = prepare(PrepareOptions(input=folder, out=tmp_path / "data", silo_folders=True))
    assert list(data.silos) == ["a", "unnamed"]
    manifest = json.loads((data.path / "manifest.json").read_bytes())
    assert manifest["options"]["input"] == folder.name
    assert r"caf\udce9" in (data.path / "README.md").read_text()
    open_data(data.path).verify()


def test_names_beyond_the_machines_encoding_are_refused_before_the_work():
    code = r"""
from photon.data import PrepareOptions, prepare
from photon.data.partition import folder_names
from photon.errors import PhotonError
for call in (
    lambda: folder_names(["\u6771\u4eac"]),
    lambda: prepare(PrepareOptions(input="x", out="\u6771")),
):
    try:
        call()
    except PhotonError as error:
        print(error.exit_code, "file names on this machine are" in str(error))
"""
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    environment = os.environ | plain
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == "20 True\n50 True\n"


def test_an_unreadable_prepared_folder_is_said_in_words(rows):
    with pytest.raises(MachineError, match=r"can't read the prepared data at x{300}: File name"):
        open_data("x" * 300)
    data = prepare(options(rows))
    shard = data.silos["all"].path / data.silos["all"].shards("train")[0].file
    shard.rename(shard.with_suffix(".kept"))
    shard.mkdir()
    with pytest.raises(MachineError, match=r"can't read the prepared data at .*train-00000\.bin"):
        data.verify()


def test_permissions_are_those_of_other_folders(rows):
    assert prepare(options(rows)).path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("change", ["longer", "shorter", "same length"])
def test_any_change_between_passes_is_noticed(rows, change):
    lines = rows.read_text().splitlines(keepends=True)

    def meddle(stage, done, total):
        if stage == "training the tokenizer" and not done:
            if change == "longer":
                rows.write_text("".join([*lines, lines[0]]))
            elif change == "shorter":
                rows.write_text("".join(lines[:-1]))
            else:
                rows.write_text("".join([*lines[:-1], lines[-1].replace("ships", "shops")]))

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(options(rows), meddle)
    assert left(rows.parent) == ["rows.jsonl"]


def test_importing_and_streaming_is_silent_and_takes_no_torch(rows):
    data = prepare(options(rows))
    script = f"""
import sys, time
start = time.perf_counter()
import photon.data
assert not {{"torch", "transformers", "grain", "datasets", "pyarrow"}} & set(sys.modules)
data = photon.data.open_data({str(data.path)!r})
with photon.data.token_stream(data, ["all"], 16, 0) as stream:
    stream.batch(0, 4)
list(photon.data.held_out_text(data, None).windows(16))
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_file_is_the_same_whatever_the_process(rows):
    """Hash seeds, threads and the clock leave no trace; small shards, sources, a field."""
    script = f"""
import sys
from photon.data import PrepareOptions, prepare
prepare(PrepareOptions(input={str(rows)!r}, out=sys.argv[1], iid=3, shard_tokens=700,
                       vocab_size=300))
"""
    outs = [rows.parent / name for name in ("one", "two")]
    for number, out in enumerate(outs):
        environment = os.environ | {
            "PYTHONHASHSEED": str(number + 1),
            "TOKENIZERS_PARALLELISM": "true" if number else "false",
        }
        subprocess.run([sys.executable, "-c", script, out], env=environment, check=True)
        time.sleep(0.01)
    files = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file())
    assert len(files) > 15
    assert files == sorted(p.relative_to(outs[1]) for p in outs[1].rglob("*") if p.is_file())
    for file in files:
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes(), file
