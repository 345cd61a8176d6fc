"""Promises about the repository itself: names, links, recipes, the lock, what a wheel holds."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from photon.config import load_run_config

ROOT = Path(__file__).parents[2]
FORBIDDEN_NAMES = re.compile(r"(^|/)(utils?|common|helpers?|core|misc)(\.py)?(/|$)")
# Spelt in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile("|".join(f"(?<![\\w.~}}])/{name}/" for name in ("work", "root", "home")))


def repository_files() -> list[Path]:
    """Files that are, or would be, in version control."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive has no .git
        skipped = re.compile(r"^(\.venv|\.git|build|dist|runs|data)/|/__pycache__/|^\.\w+_cache/")
        every = (str(path.relative_to(ROOT)) for path in ROOT.rglob("*"))
        names = [name for name in every if not skipped.search(name)]
    return sorted(path for name in names if (path := ROOT / name).is_file())


FILES = repository_files()
PAGES = [path for path in FILES if path.suffix == ".md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_or_folder_of_the_package_has_a_name_that_says_nothing() -> None:
    found = [name for path in FILES if FORBIDDEN_NAMES.search(name := name_of(path))]
    assert [name for name in found if name.startswith(("src/", "tests/"))] == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=name_of)
def test_recipe_parses(recipe: Path) -> None:
    load_run_config(recipe)


def test_there_are_recipes() -> None:
    assert list((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)(?:\s[^)]*)?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor and linked.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(anchor_of, titles), f"{name_of(page)} links to {target}"


def anchor_of(title: str) -> str:
    """The anchor that a heading gets where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def test_no_file_names_a_place_on_one_machine() -> None:
    found: list[str] = []
    for path in FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [f"{name_of(path)}:{n}" for n, line in lines if MACHINE_PATHS.search(line)]
    assert found == []


def test_lock_pins_every_dependency_but_torch() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned: dict[str, list[str]] = {}
    for line in lock.splitlines():
        if line and not line.startswith((" ", "#")):
            requirement = Requirement(line.removesuffix(" \\"))
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            pinned.setdefault(requirement.name, []).append(pin.version)
    assert "torch" not in pinned
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name != "torch":
            versions = pinned.get(requirement.name, [])
            assert versions, f"{requirement.name} is not in requirements.lock: run `make lock`"
            for version in versions:
                assert version in requirement.specifier, f"{text}: run `make lock`"


def test_lock_has_hashes_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    assert "find-links" not in lock
    assert lock.count("--hash=sha256:") >= lock.count("==")


def test_only_flowers_public_modules_are_named() -> None:
    """Its inner ones moved with every release; what it documents did not."""
    public = {"flwr.app", "flwr.serverapp", "flwr.clientapp"}
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        named = set(re.findall(r"\bflwr(?:\.\w+)*", path.read_text(encoding="utf-8")))
        if named := {one for one in named if one.startswith("flwr.")}:
            found[path.parent.name] = found.get(path.parent.name, set()) | named
    assert found == {"flower": public}


def test_makefile_and_project_agree_on_torch() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    default = re.search(r"^TORCH \?= torch==(\S+)$", makefile, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (torch,) = [
        requirement
        for text in project["project"]["dependencies"]
        if (requirement := Requirement(text)).name == "torch"
    ]
    assert default is not None
    assert default[1] in torch.specifier


def test_every_make_target_is_phony_and_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    explained = re.findall(r"^([a-z]+):.*## \S", makefile, re.MULTILINE)
    assert phony[1].split() == explained
    assert {"demo", "test"} <= set(explained)


def test_ci_runs_what_a_person_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    commands = [
        line for line in script.read_text(encoding="utf-8").splitlines() if line[:1].isalpha()
    ]
    assert commands[0] == "set -euo pipefail"
    assert commands[-1] == "make test"


def test_types_are_published() -> None:
    assert (ROOT / "src" / "photon" / "py.typed").is_file()
