"""The wheel holds the package whole: types, templates, recipes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from photon.errors import MachineError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel"],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "src" / "photon"
    wanted = {
        str(path.relative_to(ROOT / "src"))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = set(wheel.namelist())
    assert wanted - held == set()
    assert "photon/py.typed" in held


def test_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    texts = {
        Path(name).name: wheel.read(name).decode()
        for name in wheel.namelist()
        if ".dist-info/" in name
    }
    assert "photon = photon.cli:photon" in texts["entry_points.txt"]
    assert "Apache License" in texts["LICENSE"]


def test_what_a_site_runs_needs_no_extra() -> None:
    """Nor does training alone; `make dist` installs the wheel without any, and trains."""
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "import photon.silo.__main__, photon.deploy.join, photon.runs, photon.products"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_extra_that_is_missing_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from photon.cli.main import app; app(['serve', 'run.toml', '--check'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == MachineError.exit_code
    assert "obstore, which is not installed" in done.stderr
    assert "pip install 'photon-federated[serve]'" in done.stderr


def test_photon_init_works_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    assert wheel.filename is not None
    code = (
        "import photon, sys; assert '.whl' in photon.__file__, photon.__file__\n"
        "from photon.cli.main import app; app(['init', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "first"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": wheel.filename},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first/run.toml").exists()
