"""One drawn tree of exceptions; each has a stable exit code that scripts may rely on.

docs/errors.md has a section per code (a test checks that none is missing). Every error carries
what went wrong (naming the file, key or silo and the value) and, where there is one, what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

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

    def __init_subclass__(cls, *, exit_code: int | None = None) -> None:
        super().__init_subclass__()
        if exit_code is not None:
            cls.exit_code = exit_code

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message}\n{self.hint}" if self.hint else self.message
        return _OPTION.sub(lambda found: (found[1] or "").replace("-", "_") or found[0], text)

    def __reduce__(self) -> tuple:
        # Errors cross process boundaries (workers); keyword-only arguments don't pickle by default.
        return (partial(type(self), hint=self.hint), (self.message,))


# --- 10-19: what the user wrote -----------------------------------------------------------------


class ConfigError(PhotonError, exit_code=10):
    """The run file can't be read at all: missing, not TOML, wrong encoding."""


class UnknownKeyError(ConfigError, exit_code=11):
    """A key nobody reads; most often a misspelling."""


class InvalidValueError(ConfigError, exit_code=12):
    """A key is known but its value has the wrong type or is out of bounds."""


class IncompatibleConfigError(ConfigError, exit_code=13):
    """Each value is fine alone; together they can't work."""


class PluginError(ConfigError, exit_code=14):
    """An entry point exists but can't be loaded, or is not what its group promises."""


# --- 20-29: data --------------------------------------------------------------------------------


class DataError(PhotonError, exit_code=20):
    """Input text or a prepared data folder can't be used."""


class DataNotFoundError(DataError, exit_code=21):
    """The named data folder, file or dataset does not exist."""


class EmptySiloError(DataError, exit_code=22):
    """A silo has no documents, or too few to train and hold out."""


class SequenceTooLongError(DataError, exit_code=23):
    """A silo's text is shorter than one training sequence."""


class ShardCorruptError(DataError, exit_code=24):
    """A shard is unreadable, truncated, or its sha256 is not the manifest's."""


class VocabularyMismatchError(DataError, exit_code=25):
    """Shards, tokenizer and model do not speak the same vocabulary."""


# --- 30-39: models ------------------------------------------------------------------------------


class ModelError(PhotonError, exit_code=30):
    """A model can't be built, loaded, exported or sampled."""


class ModelMismatchError(ModelError, exit_code=31):
    """A checkpoint belongs to a model of another shape."""


# --- 40-49: runs --------------------------------------------------------------------------------


class RunError(PhotonError, exit_code=40):
    """A run can't be started, continued or read."""


class RunExistsError(RunError, exit_code=41):
    """The run folder already holds a run."""


class RunNotFoundError(RunError, exit_code=42):
    """The folder holds no run, or no finished round."""


class CheckpointCorruptError(RunError, exit_code=43):
    """No checkpoint of the run passes its hashes."""


class QuorumLostError(RunError, exit_code=44):
    """Too few updates arrived to close the round; the run can be resumed."""


class ResumeMismatchError(RunError, exit_code=45):
    """Config or data changed since the run started, in a way that would change its maths."""


class RunBusyError(RunError, exit_code=46):
    """Another process is working in this run folder."""


# --- 50-59: the machine -------------------------------------------------------------------------


class MachineError(PhotonError, exit_code=50):
    """The machine can't do what was asked."""


class DiskFullError(MachineError, exit_code=51):
    """Not enough room to write; nothing half-written is kept."""


class DeviceError(MachineError, exit_code=52):
    """The requested device is not here."""


class DoesNotFitError(MachineError, exit_code=53):
    """The model can't be trained in this machine's memory."""


# --- 60-69: nodes -------------------------------------------------------------------------------


class NodeError(PhotonError, exit_code=60):
    """A node could not finish its task."""


class NonFiniteError(NodeError, exit_code=61):
    """Loss or update of a node is NaN or infinite."""


class WorkerLostError(NodeError, exit_code=62):
    """A worker process died or stopped answering."""


class RankLostError(NodeError, exit_code=63):
    """One of a node's ranks died or can't be reached."""


class RankMismatchError(NodeError, exit_code=64):
    """The ranks of a node were started with different files or versions."""


# --- 70-79: the link ----------------------------------------------------------------------------


class LinkError(PhotonError, exit_code=70):
    """Model state or an update could not be moved."""


class StoreUnavailableError(LinkError, exit_code=71):
    """A store does not answer, or answers that it can't just now; worth another attempt."""


class ObjectMissingError(LinkError, exit_code=72):
    """A store has no object of that name."""


class ChunkCorruptError(LinkError, exit_code=73):
    """Bytes that arrived are not those that were promised: another hash or another size."""


class ManifestError(LinkError, exit_code=74):
    """A manifest can't be read, is of another version, run or model, or promises too much."""


class TransferStalledError(LinkError, exit_code=75):
    """No byte moved for as long as the transfer was to wait."""


class AccessRefusedError(LinkError, exit_code=76):
    """A store refuses: a URL that expired or is for something else, or wrong credentials."""


# --- 80-89: who takes part, and what they may ask -------------------------------------------------


class MembershipError(PhotonError, exit_code=80):
    """A member, a key or an invitation is not accepted."""


class InvitationError(MembershipError, exit_code=81):
    """An invitation that can't be read, has expired, was used, or is another aggregator's."""


class UnknownMemberError(MembershipError, exit_code=82):
    """A key that is no member's, or a member that is suspended or was expelled."""


class SignatureError(MembershipError, exit_code=83):
    """A request or receipt whose signature does not hold, is too old, or was seen before."""


class AuditError(MembershipError, exit_code=84):
    """The log of a run's rounds is broken, or tells of something that must not be."""


class PolicyError(PhotonError, exit_code=85):
    """This site's policy refuses what a run asks."""


class ProtocolError(PhotonError, exit_code=86):
    """The other side speaks another protocol, or sends what makes no sense in it."""


# --- 90-99: services ------------------------------------------------------------------------------


class DeployError(PhotonError, exit_code=90):
    """A service of `photon serve` or `photon join` can't be brought up, or kept up."""


class PortInUseError(DeployError, exit_code=91):
    """A port that a service needs is taken."""


class CertificateError(DeployError, exit_code=92):
    """A certificate that expired, is of another host or authority, or whose key is another's."""


class ClockSkewError(DeployError, exit_code=93):
    """This machine's clock and the other side's are too far apart."""


class ServiceLostError(DeployError, exit_code=94):
    """A service died again and again."""


class UnreachableError(DeployError, exit_code=95):
    """The aggregator can't be reached."""


class KeyInUseError(DeployError, exit_code=96):
    """Two nodes run with one key."""


class DataChangedError(DeployError, exit_code=97):
    """A node's data is not what it registered with."""


# --- 100-109: cards and law ----------------------------------------------------------------------


class CardError(PhotonError, exit_code=100):
    """A card that can't be read, or has a key or an answer that nobody knows."""


class LawError(PhotonError, exit_code=101):
    """A law file that can't be read, or contradicts itself."""


class NotCompliantError(PhotonError, exit_code=102):
    """By the cards, something that the law asks is not met."""


class UndecidedError(PhotonError, exit_code=103):
    """The cards leave open whether all that the law asks is met."""


#: Exit code after Ctrl-C: 128 + SIGINT, as shells expect. The run can be resumed.
INTERRUPTED_EXIT_CODE = 130


def some(names: Iterable[str], most: int = 3) -> str:
    """Names as a message gives them: the first ones, and how many more there are."""
    listed = list(names)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def first_fault(error: Any) -> str:
    """Where a pydantic ValidationError has its first fault, and which, of bounded length.

    No value of the input is in it: it may be a secret.
    """
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:60] for part in first["loc"][:6])
    return f"{where}: {first['msg'][:200]}" if where else first["msg"][:200]


def error_of(exit_code: int) -> type[PhotonError]:
    """The class with that code; PhotonError for a code that no class has."""
    return next((kind for kind in all_errors() if kind.exit_code == exit_code), PhotonError)


def all_errors() -> list[type[PhotonError]]:
    """Every class of the tree, root first, by exit code."""
    found: list[type[PhotonError]] = [PhotonError]
    for kind in found:  # which grows meanwhile
        found.extend(kind.__subclasses__())
    return sorted(found, key=lambda kind: kind.exit_code)
