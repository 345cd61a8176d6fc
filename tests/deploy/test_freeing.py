"""Runs that are over are freed, also after a kill -9, by the serve of their home and no other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from memory_store import MemoryStore

from photon.config import parse_run_config
from photon.deploy.freeing import (
    FREEING_FILE,
    free_leftovers,
    leftovers,
    note_leftover,
)
from photon.deploy.served_run import prepare_run
from photon.errors import DeployError, RunExistsError
from photon.store.contract import FolderStore, Store
from photon.store.served import SERVE_FILE, Serving

RUN, NEXT, OTHER = "1" * 32, "2" * 32, "3" * 32
HOUR_S = 3600.0


def fill(store: Store, run: str, objects: int = 7) -> None:
    for number in range(objects):
        store.put(f"{run}/silos/red/chunks/{number:064x}", b"x" * 10)


def keys(store: Store, run: str) -> list[str]:
    return [key for key, _ in store.keys(run)]


def own_store(folder: Path, home: Path, run: str = RUN) -> Serving:
    """A run whose objects lie in a store of the operator's own."""
    return Serving(run, str(home), str(folder / "store"), {})


@pytest.fixture
def told() -> list[str]:
    return []


def free(home: Path, told: list[str], embedded: Store | None = None, **how) -> None:
    free_leftovers(home, embedded, tell=told.append, **how)


# --- the list ---


def test_what_is_noted_is_freed_told_and_struck_off_when_nothing_can_come(tmp_path, told) -> None:
    store = FolderStore(tmp_path / "store")
    fill(store, RUN)
    fill(store, OTHER)
    note_leftover(tmp_path, own_store(tmp_path, tmp_path), keep_last_state=False, grant_s=HOUR_S)
    assert (tmp_path / FREEING_FILE).stat().st_mode & 0o777 == 0o600
    free(tmp_path, told)
    assert told == [f"freed 7 objects, 70 bytes, of run {RUN} in {tmp_path / 'store'}"]
    assert keys(store, RUN) == []
    assert len(keys(store, OTHER)) == 7, "not noted, not touched"
    # A site may still have leave to write: what comes late goes at the next start.
    assert [one.run_id for one in leftovers(tmp_path)] == [RUN]
    fill(store, RUN, 1)
    note_leftover(tmp_path, own_store(tmp_path, tmp_path), keep_last_state=False, grant_s=-1.0)
    free(tmp_path, told)
    assert told[1].startswith("freed 1 objects")
    assert leftovers(tmp_path) == []
    free(tmp_path, told)
    assert len(told) == 2, "nothing to say"


def test_the_run_that_is_served_is_left_alone(tmp_path, told) -> None:
    store = FolderStore(tmp_path / "store")
    fill(store, RUN)
    note_leftover(tmp_path, own_store(tmp_path, tmp_path), keep_last_state=False, grant_s=0.0)
    free(tmp_path, told, but=RUN)
    assert len(keys(store, RUN)) == 7
    assert told == []


def test_a_run_whose_store_never_was_up_left_nothing(tmp_path) -> None:
    note_leftover(tmp_path, Serving(RUN, str(tmp_path), "", {}), keep_last_state=False, grant_s=0.0)
    assert not (tmp_path / FREEING_FILE).exists()


def test_the_embedded_store_is_freed_by_the_home_it_is_in(tmp_path, told) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    serving = Serving(RUN, str(home), "s3://photon", {"endpoint": "x"}, str(home / "a.json"))
    note_leftover(other, serving, keep_last_state=False, grant_s=-1.0)
    assert leftovers(other) == []
    assert [one.store for one in leftovers(home)] == ["embedded"]
    free(home, told)  # a serve with a store of its own: the embedded one does not run
    assert [one.run_id for one in leftovers(home)] == [RUN]
    assert told == []
    embedded = MemoryStore()
    fill(embedded, RUN)
    free(home, told, embedded)
    assert keys(embedded, RUN) == []
    assert leftovers(home) == []
    # A home that is gone took its store along.
    gone = Serving(NEXT, str(tmp_path / "gone"), "s3://photon", {}, "x")
    note_leftover(other, gone, keep_last_state=False, grant_s=0.0)
    assert leftovers(other) == []


def test_a_store_that_is_away_is_told_and_tried_again(tmp_path, told) -> None:
    (tmp_path / "store").write_text("no folder")
    note_leftover(tmp_path, own_store(tmp_path, tmp_path), keep_last_state=False, grant_s=-1.0)
    nowhere = Serving(NEXT, str(tmp_path), "nosuch://store", {})
    note_leftover(tmp_path, nowhere, keep_last_state=False, grant_s=-1.0)
    free(tmp_path, told)
    assert any(NEXT in words and "next start tries again" in words for words in told)
    assert NEXT in [one.run_id for one in leftovers(tmp_path)]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {}}', '{"a": 1}', '{"a": {"more": 1}}'])
def test_a_list_that_can_not_be_read_frees_nothing(tmp_path, told, text) -> None:
    (tmp_path / FREEING_FILE).write_text(text)
    free(tmp_path, told)
    assert len(told) == 1
    assert "stays" in told[0]
    with pytest.raises(DeployError, match=FREEING_FILE):
        note_leftover(tmp_path, own_store(tmp_path, tmp_path), keep_last_state=True, grant_s=0.0)
    assert (tmp_path / FREEING_FILE).read_text() == text


# --- a run that is replaced ---


def run_config(three_silos, home: Path):
    tree = {
        "run": {"name": "med"},
        "model": {"preset": "tiny"},
        "data": {"path": str(three_silos)},
        "serve": {"home": str(home), "grant_s": 60},
    }
    return parse_run_config(tree)


def test_overwriting_a_run_notes_it_before_its_folder_goes(three_silos, tmp_path, told) -> None:
    home, folder = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    config = run_config(three_silos, home)
    prepare_run(config, folder)
    first = Serving.read(folder)
    assert first.store == "", "no store yet"
    store = FolderStore(tmp_path / "store")
    fill(store, first.run_id)
    own_store(tmp_path, home, first.run_id).write(folder)
    with pytest.raises(RunExistsError):
        prepare_run(config, folder)
    assert leftovers(home) == []
    prepare_run(config, folder, overwrite=True)
    second = Serving.read(folder)
    assert second.run_id != first.run_id
    assert [(one.run_id, one.keep_last_state) for one in leftovers(home)] == [(first.run_id, False)]
    assert sorted(path.name for path in folder.iterdir()) == [SERVE_FILE, "serve.toml"]
    fill(store, second.run_id)
    free(home, told, but=second.run_id)
    assert keys(store, first.run_id) == []
    assert len(keys(store, second.run_id)) == 7


def test_overwriting_what_was_not_served_notes_nothing(three_silos, tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    prepare_run(run_config(three_silos, tmp_path / "home"), folder, overwrite=True)
    assert not (tmp_path / "home" / FREEING_FILE).exists()


# --- the real store ---


def test_in_seaweedfs(tmp_path, told, running_store) -> None:
    store = running_store.store.open("freeing")
    fill(store, RUN, 1200)
    fill(store, OTHER, 3)
    serving = Serving(RUN, str(tmp_path), "s3://x", {}, "secrets")
    note_leftover(tmp_path, serving, keep_last_state=True, grant_s=-1.0)
    free(tmp_path, told, store)
    assert told == [
        f"freed 1,200 objects, 12,000 bytes, of run {RUN} in {store}, its last global state stays"
    ]
    assert keys(store, RUN) == []
    assert len(keys(store, OTHER)) == 3
    assert leftovers(tmp_path) == []


SWEEPER = """
import sys, time
from pathlib import Path
from photon.deploy.freeing import free_leftovers
from photon.store import garbage
garbage._AT_ONCE = 20
from photon.store.contract import FolderStore
store = FolderStore(Path(sys.argv[2]))
def slowly():
    time.sleep(0.2)
    return True
free_leftovers(Path(sys.argv[1]), store, tell=lambda words: print(words, flush=True), go_on=slowly)
"""


def test_killed_while_it_frees_the_next_start_goes_on(tmp_path, told) -> None:
    store = FolderStore(tmp_path / "store", durable=False)
    fill(store, RUN, 2000)
    fill(store, OTHER, 5)
    serving = Serving(RUN, str(tmp_path), "s3://x", {}, "secrets")
    note_leftover(tmp_path, serving, keep_last_state=False, grant_s=-1.0)
    with subprocess.Popen(
        [sys.executable, "-c", SWEEPER, str(tmp_path), str(tmp_path / "store")],
        stdout=subprocess.PIPE,
    ) as sweeper:
        end = time.monotonic() + 60
        chunks = tmp_path / "store" / RUN / "silos" / "red" / "chunks"
        while len(list(chunks.iterdir())) == 2000:
            assert time.monotonic() < end
            time.sleep(0.01)
        sweeper.kill()
        assert sweeper.stdout is not None
        assert sweeper.stdout.read() == b"", "it did not get to its end"
    left = len(keys(store, RUN))
    assert 0 < left < 2000
    assert json.loads((tmp_path / FREEING_FILE).read_text()).keys() == {RUN}
    free(tmp_path, told, store)
    assert told == [f"freed {left:,} objects, {10 * left:,} bytes, of run {RUN} in {store}"]
    assert keys(store, RUN) == []
    assert len(keys(store, OTHER)) == 5
    assert leftovers(tmp_path) == []


def test_asked_to_stop_it_leaves_the_rest_for_the_next_start(tmp_path, told) -> None:
    store = MemoryStore()
    fill(store, RUN, 1200)
    serving = Serving(RUN, str(tmp_path), "s3://x", {}, "secrets")
    note_leftover(tmp_path, serving, keep_last_state=False, grant_s=-1.0)
    answers = iter([True, True, False])
    free(tmp_path, told, store, go_on=lambda: next(answers))
    assert told[0].endswith("; the rest follows at the next start")
    assert len(keys(store, RUN)) == 700
    assert [one.run_id for one in leftovers(tmp_path)] == [RUN]
    free(tmp_path, told, store)
    assert keys(store, RUN) == []
