"""Local training: one loop, useful with no federation at all."""

from photon.training.device import ComputePlan, plan_compute
from photon.training.inner import InnerOptimizer
from photon.training.recipe import CentralRecipe, photon_recipe
from photon.training.schedule import Schedule
from photon.training.trainer import LocalResult, Progress, Trainer

__all__ = [
    "CentralRecipe",
    "ComputePlan",
    "InnerOptimizer",
    "LocalResult",
    "Progress",
    "Schedule",
    "Trainer",
    "photon_recipe",
    "plan_compute",
]
