"""One drawn tree of exceptions; each has a stable exit code that scripts may rely on.

docs/errors.md has a section per code (a test checks that none is missing). Every error carries
what went wrong (naming the file, key or silo and the value) and, where there is one, what to do.
"""

from __future__ import annotations

import re
from typing import ClassVar

#: An option of the command line; or a whole command, which stays as it is.
_OPTION = re.compile(r"`photon [^`]*`|(?<![\w-])--([a-z]+(?:-[a-z]+)*)")


class PhotonError(Exception):
    """Root of everything Photon raises on purpose.

    Args:
        message: what is wrong, naming the file, key or silo and the value found.
        hint: what the reader can do about it; shown on a line of its own. Options are written as on
            the command line; Python, which shows `str(error)`, gets their arguments' names.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message}\n{self.hint}" if self.hint else self.message
        return _OPTION.sub(lambda found: (found[1] or "").replace("-", "_") or found[0], text)

    def __reduce__(self) -> tuple:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[PhotonError], message: str, hint: str | None) -> PhotonError:
    # Errors cross process boundaries (workers); keyword-only arguments do not pickle by default.
    return kind(message, hint=hint)


# --- 10-19: what the user wrote -----------------------------------------------------------------


class ConfigError(PhotonError):
    """The run file can't be read at all: missing, not TOML, wrong encoding."""

    exit_code = 10


class UnknownKeyError(ConfigError):
    """A key nobody reads; most often a misspelling."""

    exit_code = 11


class InvalidValueError(ConfigError):
    """A key is known but its value has the wrong type or is out of bounds."""

    exit_code = 12


class IncompatibleConfigError(ConfigError):
    """Each value is fine alone; together they can't work."""

    exit_code = 13


class PluginError(ConfigError):
    """An entry point exists but can't be loaded, or is not what its group promises."""

    exit_code = 14


# --- 20-29: data --------------------------------------------------------------------------------


class DataError(PhotonError):
    """Input text or a prepared data folder can't be used."""

    exit_code = 20


class DataNotFoundError(DataError):
    """The named data folder, file or dataset does not exist."""

    exit_code = 21


class EmptySiloError(DataError):
    """A silo has no documents, or too few to train and hold out."""

    exit_code = 22


class SequenceTooLongError(DataError):
    """A silo's text is shorter than one training sequence."""

    exit_code = 23


class ShardCorruptError(DataError):
    """A shard is unreadable, truncated, or its sha256 is not the manifest's."""

    exit_code = 24


class VocabularyMismatchError(DataError):
    """Shards, tokenizer and model do not speak the same vocabulary."""

    exit_code = 25


# --- 30-39: models ------------------------------------------------------------------------------


class ModelError(PhotonError):
    """A model can't be built, loaded, exported or sampled."""

    exit_code = 30


class ModelMismatchError(ModelError):
    """A checkpoint belongs to a model of another shape."""

    exit_code = 31


# --- 40-49: runs --------------------------------------------------------------------------------


class RunError(PhotonError):
    """A run can't be started, continued or read."""

    exit_code = 40


class RunExistsError(RunError):
    """The run folder already holds a run."""

    exit_code = 41


class RunNotFoundError(RunError):
    """The folder holds no run, or no finished round."""

    exit_code = 42


class CheckpointCorruptError(RunError):
    """No checkpoint of the run passes its hashes."""

    exit_code = 43


class QuorumLostError(RunError):
    """Too few updates arrived to close the round; the run can be resumed."""

    exit_code = 44


class ResumeMismatchError(RunError):
    """Config or data changed since the run started, in a way that would change its maths."""

    exit_code = 45


class RunBusyError(RunError):
    """Another process is working in this run folder."""

    exit_code = 46


# --- 50-59: the machine -------------------------------------------------------------------------


class MachineError(PhotonError):
    """The machine can't do what was asked."""

    exit_code = 50


class DiskFullError(MachineError):
    """Not enough room to write; nothing half-written is kept."""

    exit_code = 51


class DeviceError(MachineError):
    """The requested device is not here."""

    exit_code = 52


class DoesNotFitError(MachineError):
    """The model can't be trained in this machine's memory."""

    exit_code = 53


# --- 60-69: nodes -------------------------------------------------------------------------------


class NodeError(PhotonError):
    """A node could not finish its task."""

    exit_code = 60


class NonFiniteError(NodeError):
    """Loss or update of a node is NaN or infinite."""

    exit_code = 61


class WorkerLostError(NodeError):
    """A worker process died or stopped answering."""

    exit_code = 62


class RankLostError(NodeError):
    """One of a node's ranks died or can't be reached."""

    exit_code = 63


class RankMismatchError(NodeError):
    """The ranks of a node were started with different files or versions."""

    exit_code = 64


# --- 70-79: the link ----------------------------------------------------------------------------


class LinkError(PhotonError):
    """Model state or an update could not be moved."""

    exit_code = 70


class StoreUnavailableError(LinkError):
    """A store does not answer, or answers that it can't just now; worth another attempt."""

    exit_code = 71


class ObjectMissingError(LinkError):
    """A store has no object of that name."""

    exit_code = 72


class ChunkCorruptError(LinkError):
    """Bytes that arrived are not those that were promised: another hash or another size."""

    exit_code = 73


class ManifestError(LinkError):
    """A manifest can't be read, is of another version, run or model, or promises too much."""

    exit_code = 74


class TransferStalledError(LinkError):
    """No byte moved for as long as the transfer was to wait."""

    exit_code = 75


class AccessRefusedError(LinkError):
    """A store refuses: a URL that expired or is for something else, or wrong credentials."""

    exit_code = 76


# --- 80-89: who takes part, and what they may ask -------------------------------------------------


class MembershipError(PhotonError):
    """A member, a key or an invitation is not accepted."""

    exit_code = 80


class InvitationError(MembershipError):
    """An invitation that can't be read, has expired, was used, or is another aggregator's."""

    exit_code = 81


class UnknownMemberError(MembershipError):
    """A key that is no member's, or a member that is suspended or was expelled."""

    exit_code = 82


class SignatureError(MembershipError):
    """A request or receipt whose signature does not hold, is too old, or was seen before."""

    exit_code = 83


class AuditError(MembershipError):
    """The log of a run's rounds is broken, or tells of something that must not be."""

    exit_code = 84


class PolicyError(PhotonError):
    """This site's policy refuses what a run asks."""

    exit_code = 85


class ProtocolError(PhotonError):
    """The other side speaks another protocol, or sends what makes no sense in it."""

    exit_code = 86


# --- 90-99: services ------------------------------------------------------------------------------


class DeployError(PhotonError):
    """A service of `photon serve` or `photon join` can't be brought up, or kept up."""

    exit_code = 90


class PortInUseError(DeployError):
    """A port that a service needs is taken."""

    exit_code = 91


class CertificateError(DeployError):
    """A certificate that expired, is of another host or authority, or whose key is another's."""

    exit_code = 92


class ClockSkewError(DeployError):
    """This machine's clock and the other side's are too far apart."""

    exit_code = 93


class ServiceLostError(DeployError):
    """A service died again and again."""

    exit_code = 94


class UnreachableError(DeployError):
    """The aggregator can't be reached."""

    exit_code = 95


class KeyInUseError(DeployError):
    """Two nodes run with one key."""

    exit_code = 96


class DataChangedError(DeployError):
    """A node's data is not what it registered with."""

    exit_code = 97


#: Exit code after Ctrl-C: 128 + SIGINT, as shells expect. The run can be resumed.
INTERRUPTED_EXIT_CODE = 130


def error_of(exit_code: int) -> type[PhotonError]:
    """The class with that code; PhotonError for a code that no class has."""
    return next((kind for kind in all_errors() if kind.exit_code == exit_code), PhotonError)


def all_errors() -> list[type[PhotonError]]:
    """Every class of the tree, root first, by exit code."""
    found: list[type[PhotonError]] = []
    todo: list[type[PhotonError]] = [PhotonError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo.extend(kind.__subclasses__())
    return sorted(found, key=lambda kind: kind.exit_code)
