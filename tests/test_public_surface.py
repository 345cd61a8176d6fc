"""`import photon`: small, lazy, documented, and enough for a notebook."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest

import photon

PUBLIC = [
    "MergingRule",
    "OuterOptimizer",
    "Partitioner",
    "PhotonError",
    "PrepareOptions",
    "PreparedData",
    "RunConfig",
    "RunHistory",
    "RunResult",
    "build_config",
    "evaluate",
    "events",
    "export",
    "generate",
    "load_config",
    "open_data",
    "prepare_data",
    "read_run",
    "report",
    "resume",
    "show_progress",
    "simulate",
    "train",
]


def test_the_surface_is_what_we_promise():
    assert photon.__all__ == PUBLIC
    assert sorted(photon._HOMES) == PUBLIC
    assert dir(photon) == PUBLIC
    for name in PUBLIC:
        home, attribute = photon._HOMES[name]
        assert getattr(photon, name) is getattr(importlib.import_module(home), attribute)
        assert inspect.getdoc(getattr(photon, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        photon.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    source = inspect.getsource(photon)
    block = source[source.index("if TYPE_CHECKING:") : source.index("_HOMES")]
    for name in PUBLIC:
        assert f" {name}" in block, name


def test_import_is_light():
    code = (
        "import os, sys, photon\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'grain'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "photon.load_config\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(("policy", "told"), [(None, 1), ("ACTIVE", 0), ("PASSIVE", 0)])
def test_threads_that_spin_are_told(policy, told):
    # Not the real torch, which takes seconds: what counts is that a module of that name is there.
    code = (
        "import sys, types, warnings\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        "from photon.openmp import warn_of_spinning\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    warn_of_spinning()\n"
        "print(len(found))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{told}\n"


def test_a_notebook_from_text_to_words(three_silos, tmp_path, monkeypatch, capsys):
    text = three_silos.parent / "text"
    data = photon.prepare_data(
        photon.PrepareOptions(input=text, out=tmp_path / "data", iid=2, vocab_size=300)
    )
    assert sorted(photon.open_data(data.path).silos) == ["silo-0", "silo-1"]
    config = photon.build_config(
        {
            "run": {"name": "notebook"},
            "compute": {"threads": 1},
            "model": {"preset": "tiny"},
            "data": {"path": str(data.path), "sequence_length": 32},
            "federation": {"rounds": 2},
        },
        ["local.steps=2", "local.batch_size=2", "eval.max_tokens=500"],
    )
    heard = []

    class Ear:
        def on_event(self, event):
            heard.append(event)

        def close(self):
            heard.append(None)

    monkeypatch.setattr("photon.openmp._TOO_LATE", True)
    with pytest.warns(RuntimeWarning, match="Import photon first"):
        result = photon.simulate(config, run_dir=tmp_path / "run", listener=Ear())
    monkeypatch.setattr("photon.openmp._TOO_LATE", False)
    assert heard[-1] is None
    view = photon.show_progress()
    for event in heard[:-1]:
        view.on_event(event)
    assert "round 2/2 finished" in capsys.readouterr().err
    with pytest.raises(photon.PhotonError, match="choose another run_dir, or replace it with ov"):
        photon.simulate(config, run_dir=tmp_path / "run")
    assert any(isinstance(event, photon.events.RoundMerged) for event in heard)
    history = photon.read_run(result.folder)
    assert repr(result).startswith(f"RunResult('{result.folder}': rounds=2, tokens=")
    assert "2 RoundFinished" in repr(history)
    assert "silo-0: " in repr(data)
    for shown in (repr(result), repr(history), repr(data)):
        assert len(shown) < 500
    table = history.table(photon.events.Evaluated)
    overall = [loss for loss, silo in zip(table["loss"], table["silo"], strict=True) if not silo]
    assert overall[-1] == result.summary["global_loss"]
    assert len(overall) == 3
    assert photon.resume(result).summary == result.summary
    assert photon.report(result).exists()
    folder = photon.export(result.folder, tmp_path / "hf")
    assert photon.evaluate(folder, data.path, max_tokens=500).overall.loss > 0
    assert isinstance(photon.generate(folder, "The bank", max_new_tokens=5), str)
    with pytest.raises(photon.PhotonError):
        photon.read_run(tmp_path / "nothing")
    with pytest.raises(photon.PhotonError, match=r"not 'run.toml'\nphoton.load_config\(PATH\)"):
        photon.simulate("run.toml")
    with pytest.raises(photon.PhotonError, match=r"not of 'run.toml'\nphoton.load_config\(PATH\)"):
        photon.build_config("run.toml")
    tables = {"model": {"preset": "tiny"}, "data": {"path": "data"}}
    assert photon.build_config(tables, "federation.rounds=4").federation.rounds == 4
    with pytest.raises(photon.PhotonError, match="no silo named 'silo-9'"):
        photon.train(config, silos="silo-9", run_dir=tmp_path / "alone")
