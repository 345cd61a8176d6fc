"""The federation: rounds, tasks and receipts, participants, and the state of a run."""

from photon.federation.baseline import CentralisedTraining
from photon.federation.checkpoint import CheckpointStore, RunState
from photon.federation.node import Node, NodeSettings
from photon.federation.rounds import Federation
from photon.federation.sampling import Candidates, FixedFleet, Fleet, sample_participants
from photon.federation.tasks import Engine, EvalReceipt, EvalTask, FitTask, Receipt, Update

__all__ = [
    "Candidates",
    "CentralisedTraining",
    "CheckpointStore",
    "Engine",
    "EvalReceipt",
    "EvalTask",
    "Federation",
    "FitTask",
    "FixedFleet",
    "Fleet",
    "Node",
    "NodeSettings",
    "Receipt",
    "RunState",
    "Update",
    "sample_participants",
]
