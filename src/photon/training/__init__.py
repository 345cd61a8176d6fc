"""Local training: one loop, useful with no federation at all."""

from photon.training.device import ComputePlan, plan_compute, ranks_of_a_node
from photon.training.inner import InnerOptimizer
from photon.training.micro_batch import MicroBatch
from photon.training.placement import PlacedModel, local_part, materialise
from photon.training.ranks import Ranks, Seat
from photon.training.recipe import CentralRecipe, photon_recipe
from photon.training.schedule import Schedule
from photon.training.snapshot import Allocate, PendingSnapshot, read_snapshot, write_snapshot
from photon.training.strategy import Strategy, choose_strategy
from photon.training.timing import StepTimes
from photon.training.trainer import LocalResult, Progress, Trainer, rank_share

__all__ = [
    "Allocate",
    "CentralRecipe",
    "ComputePlan",
    "InnerOptimizer",
    "LocalResult",
    "MicroBatch",
    "PendingSnapshot",
    "PlacedModel",
    "Progress",
    "Ranks",
    "Schedule",
    "Seat",
    "StepTimes",
    "Strategy",
    "Trainer",
    "choose_strategy",
    "local_part",
    "materialise",
    "photon_recipe",
    "plan_compute",
    "rank_share",
    "ranks_of_a_node",
    "read_snapshot",
    "write_snapshot",
]
