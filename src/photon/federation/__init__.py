"""The federation: versions, tasks and receipts, participants, and the round."""

from photon.federation.account import Closed
from photon.federation.checkpoint import CheckpointStore, RunState
from photon.federation.engine import Answer, Engine, Mailbox, Participant, Version, fitted
from photon.federation.federation import Federation
from photon.federation.node import Node, NodeSettings
from photon.federation.sampling import Candidates, FixedFleet, Fleet, sample_participants
from photon.federation.server import Server
from photon.federation.tasks import (
    EvalReceipt,
    EvalTask,
    FitTask,
    Receipt,
    SecureReceipt,
    SecureTask,
    Task,
    Update,
)

__all__ = [
    "Answer",
    "Candidates",
    "CheckpointStore",
    "Closed",
    "Engine",
    "EvalReceipt",
    "EvalTask",
    "Federation",
    "FitTask",
    "FixedFleet",
    "Fleet",
    "Mailbox",
    "Node",
    "NodeSettings",
    "Participant",
    "Receipt",
    "RunState",
    "SecureReceipt",
    "SecureTask",
    "Server",
    "Task",
    "Update",
    "Version",
    "fitted",
    "sample_participants",
]
