"""Inner optimizers on several ranks against one process alone, from the same gradients.

Takes [[ranks, layouts], ...] and starts the ranks itself. Prints for each of these a list by rank:
for each layout and optimizer the largest differences, and how many matrices the rank put through
Newton-Schulz.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from photon.config import LocalConfig
from photon.training import InnerOptimizer, muon
from photon.training.local_tensors import local

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adamw8": {"optimizer": "adamw", "optimizer_bits": 8},
    "muon": {"optimizer": "muon"},
    "normuon": {"optimizer": "muon", "row_beta2": 0.9},
    "adopt": {"optimizer": "adopt"},
    "amsgrad": {"optimizer": "amsgrad"},
    "sgd": {"optimizer": "sgd"},
}


class Block(nn.Module):
    """Rows that no number of ranks divides, and a matrix and vectors with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 7)
        self.down = nn.Linear(7, 12, bias=False)
        self.narrow = nn.Linear(12, 2)
        self.wide = nn.Linear(2, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(torch.tanh(self.up(x))) + self.wide(self.narrow(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(11, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 11, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def placed(layout: str) -> Model:
    model = Model()
    world = dist.get_world_size()
    if layout == "ddp":
        return model
    shape = (2, world // 2) if layout == "hybrid" else (world,)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def give(optimizer: InnerOptimizer, step: int) -> None:
    """The same gradients whatever the layout; in some steps one matrix has none."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in optimizer.parameters.items():
        gradient = torch.randn(parameter.shape, generator=generator) * 0.1
        if step % 3 == 2 and name == "blocks.1.up.weight":
            continue
        if isinstance(parameter, DTensor):
            mesh, cut = parameter.device_mesh, parameter.placements
            gradient = distribute_tensor(gradient, mesh, cut, src_data_rank=None)
        parameter.grad = gradient


def steps(optimizer: InnerOptimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        give(optimizer, step)
        optimizer.step(1.0 - 0.1 * step)
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gap(these: dict[str, Any], those: dict[str, Any]) -> float:
    assert list(these) == list(those)
    gaps = [(whole(these[name]) - whole(those[name])).detach().abs().max() for name in these]
    return max(map(float, gaps), default=0.0)


def same_memory(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return list(these) == list(those) and all(
        type(these[name]) is type(those[name]) and torch.equal(local(these[name]), local(other))
        for name, other in those.items()
    )


def compare(layout: str, options: dict[str, Any]) -> dict[str, Any]:
    config = LocalConfig(lr=1e-2, weight_decay=0.1, no_decay=["blocks.2.*", "embed*"], **options)
    group = dist.group.WORLD if layout == "ddp" else None
    model = placed(layout)
    alone = InnerOptimizer(Model(), config)
    ours, again = (InnerOptimizer(model, config, group=group) for _ in range(2))
    with counting() as done_alone:
        steps(alone, 0, 5)
    with counting() as done:
        steps(ours, 0, 5)
    return {
        "weights": gap(dict(ours.parameters), dict(alone.parameters)),
        "state": gap(ours.state_tensors(), alone.state_tensors()),
        "done": sum(done),
        "done_alone": sum(done_alone),
        "starts": starts_alike(ours),
        **round_trip(ours, again),
    }


def starts_alike(optimizer: InnerOptimizer) -> bool:
    """Whether what is averaged starts as what it becomes: names, shapes, cuts."""
    return [
        (name, tensor.shape, getattr(tensor, "placements", None))
        for name, tensor in optimizer.initial_state().items()
    ] == [
        (name, tensor.shape, getattr(tensor, "placements", None))
        for name, tensor in optimizer.averaged_state().items()
    ]


def round_trip(ours: InnerOptimizer, again: InnerOptimizer) -> dict[str, bool]:
    """State saved whole, or as it is cut, and gone on with: nothing may change by a bit."""
    state = ours.state_tensors()
    kept = {name: local(tensor).clone() for name, tensor in state.items()}
    weights = {name: local(p).detach().clone() for name, p in ours.parameters.items()}
    loads = []
    for saved in ({name: whole(tensor) for name, tensor in state.items()}, state):
        again.load_state_tensors(saved)
        loads.append(same_memory(again.state_tensors(), state))
    steps(ours, 5, 2)
    loaded = again.state_tensors()
    straight = {name: local(p).detach().clone() for name, p in ours.parameters.items()}
    with torch.no_grad():
        for name, parameter in ours.parameters.items():
            local(parameter).copy_(weights[name])
    copied = all(torch.equal(local(loaded[name]), kept[name]) for name in kept)
    steps(again, 5, 2)
    resumed = {name: local(p).detach() for name, p in again.parameters.items()}
    return {
        "loads": all(loads),
        "copied": copied,
        "resumes": all(torch.equal(resumed[name], straight[name]) for name in straight),
    }


def backward(layout: str) -> float:
    """Gradients from a real backward pass, of ranks with no rows too; the batch on every rank."""
    config = LocalConfig(optimizer="muon", lr=1e-3)
    ids = torch.arange(22).view(2, 11) % 11
    models = [Model(), placed(layout)]
    group = dist.group.WORLD if layout == "ddp" else None
    optimizers = [InnerOptimizer(models[0], config), InnerOptimizer(models[1], config, group=group)]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            logits = model(ids)
            nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(1).flatten()).backward()
            assert all(p.grad is not None for p in optimizer.parameters.values())
            optimizer.step(1.0)
            optimizer.zero_grad()
    return gap(dict(optimizers[1].parameters), dict(optimizers[0].parameters))


@contextmanager
def counting() -> Iterator[list[int]]:
    """Sizes of the batches that go through Newton-Schulz in this process."""
    real, sizes = muon.orthogonalise, []

    def noting(matrices: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(matrices))
        return real(matrices, *rest)

    muon.orthogonalise = noting
    try:
        yield sizes
    finally:
        muon.orthogonalise = real


def join(rank: int, world: int, meeting: str, layouts: list[str], answers: Any) -> None:
    torch.set_num_threads(1)
    # A rank that dies leaves the others waiting no longer than this.
    patience = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=patience
    )
    found: dict[str, Any] = {}
    for layout in layouts:
        for name, options in OPTIMIZERS.items():
            found[f"{layout} {name}"] = compare(layout, options)
        found[f"{layout} backward"] = backward(layout)
    answers.put((rank, found))
    dist.destroy_process_group()


def main() -> None:
    # Forked, so that torch and the rest are imported once and not once a rank.
    context = multiprocessing.get_context("fork")
    worlds = []
    for world, layouts in json.loads(sys.argv[1]):
        answers = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                context.Process(target=join, args=(rank, world, f"{folder}/m", layouts, answers))
                for rank in range(world)
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                sys.exit(f"of {world} ranks: exit codes {[p.exitcode for p in ranks]}")
            worlds.append([found for _, found in sorted(answers.get() for _ in range(world))])
    print(json.dumps(worlds))


if __name__ == "__main__":
    main()
