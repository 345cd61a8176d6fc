"""Local training: one loop, useful with no federation at all."""

from photon.training.device import plan_compute, power_of, ranks_of_a_node
from photon.training.fit import Fit, plan_fit
from photon.training.flops import count_flops
from photon.training.hardware import mfu, stated_peak
from photon.training.inner import InnerOptimizer, adam_betas, decayed_names
from photon.training.local_tensors import local as local_part
from photon.training.micro_batch import MicroBatch, within_memory
from photon.training.placement import difference, materialise
from photon.training.private import PrivateSteps
from photon.training.ranks import Ranks, Seat
from photon.training.schedule import Schedule
from photon.training.snapshot import Allocate, PendingSnapshot, read_snapshot, write_snapshot
from photon.training.timing import StepTimes
from photon.training.trainer import LocalResult, Trainer
