"""Exit codes are a promise to scripts: unique, unchanging, and each has a section to read."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import photon.errors
from photon.errors import INTERRUPTED_EXIT_CODE, PhotonError, all_errors

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")

#: Never change a line of this table. A new error adds one; a retired code is not used again.
CODES = {
    "PhotonError": 1,
    "ConfigError": 10,
    "UnknownKeyError": 11,
    "InvalidValueError": 12,
    "IncompatibleConfigError": 13,
    "PluginError": 14,
    "DataError": 20,
    "DataNotFoundError": 21,
    "EmptySiloError": 22,
    "SequenceTooLongError": 23,
    "ShardCorruptError": 24,
    "VocabularyMismatchError": 25,
    "ModelError": 30,
    "ModelMismatchError": 31,
    "RunError": 40,
    "RunExistsError": 41,
    "RunNotFoundError": 42,
    "CheckpointCorruptError": 43,
    "QuorumLostError": 44,
    "ResumeMismatchError": 45,
    "RunBusyError": 46,
    "MachineError": 50,
    "DiskFullError": 51,
    "DeviceError": 52,
    "DoesNotFitError": 53,
    "NodeError": 60,
    "NonFiniteError": 61,
    "WorkerLostError": 62,
    "RankLostError": 63,
    "RankMismatchError": 64,
    "LinkError": 70,
    "StoreUnavailableError": 71,
    "ObjectMissingError": 72,
    "ChunkCorruptError": 73,
    "ManifestError": 74,
    "TransferStalledError": 75,
    "AccessRefusedError": 76,
    "MembershipError": 80,
    "InvitationError": 81,
    "UnknownMemberError": 82,
    "SignatureError": 83,
    "AuditError": 84,
    "PolicyError": 85,
    "ProtocolError": 86,
    "DeployError": 90,
    "PortInUseError": 91,
    "CertificateError": 92,
    "ClockSkewError": 93,
    "ServiceLostError": 94,
    "UnreachableError": 95,
    "KeyInUseError": 96,
    "DataChangedError": 97,
    "CardError": 100,
    "LawError": 101,
    "NotCompliantError": 102,
    "UndecidedError": 103,
}


def ours() -> list[type[PhotonError]]:
    """The tree without classes that other tests derive."""
    return [kind for kind in all_errors() if kind.__module__ == photon.errors.__name__]


def test_codes_are_the_promised_ones() -> None:
    assert {kind.__name__: kind.exit_code for kind in ours()} == CODES
    assert len(set(CODES.values())) == len(CODES)
    assert INTERRUPTED_EXIT_CODE == 130


def test_codes_leave_those_of_shells_alone() -> None:
    taken = {0, 2, *range(126, 256)}
    assert not taken & set(CODES.values())


def test_every_error_is_defined_here() -> None:
    elsewhere = [
        f"{kind.__module__}.{kind.__name__}"
        for kind in all_errors()
        if kind.__module__.startswith("photon.") and kind.__module__ != photon.errors.__name__
    ]
    assert elsewhere == []


def test_a_child_stands_in_its_parents_tens() -> None:
    for kind in ours():
        parent = kind.__mro__[1]
        if parent not in (PhotonError, Exception):
            assert issubclass(parent, PhotonError)
            assert kind.exit_code // 10 == parent.exit_code // 10


def test_page_has_a_section_for_each_code_and_no_other() -> None:
    sections = re.findall(r"^## (\d+): (\w+)$", PAGE, flags=re.MULTILINE)
    others = {"success": 0, "usage": 2, "interrupted": INTERRUPTED_EXIT_CODE}
    assert {name: int(code) for code, name in sections} == {**CODES, **others}
    assert [int(code) for code, _ in sections] == sorted(int(code) for code, _ in sections)


def test_page_draws_the_tree_as_it_is() -> None:
    drawn = PAGE.split("PhotonError 1\n")[1].split("\n## ")[0]
    found = re.findall(r"^ {4}([|' ]*)- (\w+) (\d+)", drawn, flags=re.MULTILINE)
    assert {name: int(code) for _, name, code in found} == {
        name: code for name, code in CODES.items() if name != "PhotonError"
    }
    depth = {name: len(indent) // 3 for indent, name, _ in found}
    for kind in ours()[1:]:
        assert depth[kind.__name__] == (0 if kind.__mro__[1] is PhotonError else 1), kind


@pytest.mark.parametrize("name", CODES)
def test_every_section_says_what_to_do(name: str) -> None:
    section = PAGE.split(f": {name}\n")[1].split("\n## ")[0]
    assert "**Do:**" in section or name == "PhotonError"
    assert len(section) > 100


@pytest.mark.parametrize("kind", ours(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("hint", [None, "do that"])
def test_errors_cross_processes_whole(kind: type[PhotonError], hint: str | None) -> None:
    error = pickle.loads(pickle.dumps(kind("what is wrong", hint=hint)))
    assert type(error) is kind
    assert (error.message, error.hint) == ("what is wrong", hint)
    assert str(error) == ("what is wrong" if hint is None else "what is wrong\ndo that")
    assert error.args == ("what is wrong",)


def test_every_class_has_a_line_of_its_own() -> None:
    for kind in ours():
        assert kind.__doc__, kind
        assert "exit_code" in vars(kind), kind


def test_from_python_a_hint_names_arguments():
    hint = "Use --run-dir, replace it with --overwrite, or `photon members list --home DIR`."
    error = photon.errors.RunExistsError("there -- already", hint=hint)
    assert str(error) == (
        "there -- already\nUse run_dir, replace it with overwrite, or "
        "`photon members list --home DIR`."
    )
    assert error.hint == hint
