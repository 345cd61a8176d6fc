"""A run's folder: what it holds, who may work in it, what a finished run left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from photon.config import RunConfig, load_run_config, write_resolved
from photon.config.children import tables
from photon.data import PreparedData, tokenizer_identity
from photon.errors import (
    ModelError,
    ModelMismatchError,
    RunBusyError,
    VocabularyMismatchError,
    some,
)
from photon.federation import CheckpointStore
from photon.federation.layout import Layout, empty_model, layout_of
from photon.federation.own_parts import way_to, weights_of
from photon.federation.tasks import WEIGHTS, section
from photon.models import carried_tensors
from photon.store.disk import held_alone, write_json, writing
from photon.store.run_folder import RUN_FORMAT, read_record, usable
from photon.store.served import LOCK_FILE, hold_run
from photon.training import difference, materialise
from photon.version import photon_version

#: Where a run keeps its model's config.json.
MODEL = "model"


@dataclass(frozen=True, repr=False)
class RunResult:
    """A finished run; can be given wherever a run folder can.

    Attributes:
        folder: events.jsonl, summary.json, config.resolved.toml, checkpoints/.
        summary: what summary.json holds.
    """

    folder: Path
    summary: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        told = {name: self.summary.get(name) for name in ("rounds", "tokens", "global_perplexity")}
        figures = ", ".join(
            f"{name}={value:,.2f}" if isinstance(value, float) else f"{name}={value:,}"
            for name, value in told.items()
            if value is not None
        )
        return f"RunResult({str(self.folder)!r}: {figures or 'not finished'})"


def read_summary(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What DIR/summary.json holds; None while the run is not finished."""
    try:
        return json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finished_summary(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run that has no round left; None while it has."""
    summary = read_summary(folder) or {}
    return summary if summary.get("rounds", 0) >= config.federation.rounds else None


def load_weights(
    folder: str | os.PathLike[str], of: str | None = None
) -> tuple[nn.Module, RunConfig]:
    """The model a run has come to: its newest checkpoint in the run's own architecture.

    Reads the run folder only.

    Args:
        of: whose, where silos or groups have parts of their own: a name, or a path such as eu/bank.

    Raises:
        RunNotFoundError: no run there, or one without a checkpoint.
        CheckpointCorruptError: no checkpoint passes its hashes, or the silo's part is gone.
        ModelError: nobody has a whole model but silos, and none is named; or there is no such silo
            or group; or all have the same model.
        ModelMismatchError: the checkpoint is of another model than the run's.
    """
    folder = Path(folder)
    record = read_record(folder)
    config = load_run_config(folder / "config.resolved.toml")
    own = with_own_model(config, folder)
    checkpoints = CheckpointStore(folder / "checkpoints", config.run.keep_checkpoints)
    state, tensors, _ = checkpoints.load_latest()
    model = empty_model(own, vocab_size=record["vocab_size"], eos_id=record["eos_id"])
    layout = layout_of(model)
    values = dict(tensors.get("once", {}))
    if (way := _way(folder, record, config, layout, of)) is None:
        values |= section(tensors["global"], WEIGHTS)
    else:
        nodes = folder / "nodes"
        group, merged = way[-1] not in record["silos"], tensors["global"]
        values |= weights_of(config.parts, nodes, layout, way, merged, state, group=group)
    problem = difference(values, carried_tensors(model))
    if problem is not None:
        raise ModelMismatchError(
            f"the newest checkpoint of {folder} is of another model: {problem}"
        )
    materialise(model, torch.device("cpu"))
    for name, tensor in carried_tensors(model).items():
        tensor.data.copy_(values[name])
    return model, config


def _way(
    folder: Path, record: dict[str, Any], config: RunConfig, layout: Layout, of: str | None
) -> list[str] | None:
    """The way to who has the model that is asked for; None for the federation's own."""
    children, silos = config.federation.children, record["silos"]
    if of and (name := record.get("name")) in (asked := of.split("/")):  # as its parent calls it
        of = "/".join(asked[asked.index(name) + 1 :]) or None
    members = [*silos, *(name for name, one in tables(children) if one.nodes is None)]
    named = f"Its silos{' and groups' * bool(children)}: {some(sorted(members), 8)}."
    if of is None:
        if not layout.personal:
            return None
        raise ModelError(
            f"each silo of the run in {folder} has a model of its own; personal are "
            f"{some(map(repr, layout.personal))}",
            hint=f"Name one by --of. {named}",
        )
    *above, name = of.split("/")
    if not config.parts.kept:
        raise ModelError(f"in the run in {folder} all have the same model: nothing is anyone's own")
    way = list(way_to(children, name))
    if name not in members or (above and above != way[:-1]):
        raise ModelError(f"the run in {folder} has no {of!r}", hint=named)
    if name not in silos and layout.personal:
        raise ModelError(
            f"{of!r} is a group, and personal tensors of the run in {folder} are its silos'",
            hint=named,
        )
    if record["kind"] == "serve":
        raise ModelError(
            f"each silo of the run in {folder} has a model of its own, and what {of!r} keeps of it "
            "(parts.personal, key layers) never left its site",
            hint="It is exported there, if it is a federation: it has a run folder of its own.",
        )
    return way


def describe_run(
    folder: Path, config: RunConfig, model: Any, tokenizers: Mapping[str, Path], **record: Any
) -> None:
    """Write what a run is into its folder: it can be exported where its data and model are not.

    Args:
        tokenizers: a folder by the silo whose own it is; "": all silos'.
        record: of run.json, which is written last.
    """
    write_resolved(config, folder / "config.resolved.toml")
    for own, source in tokenizers.items():
        shutil.copytree(source, folder / "tokenizer" / own, dirs_exist_ok=True)
    if config.model.path is not None:  # a run owns its architecture
        (folder / MODEL).mkdir(exist_ok=True)
        # Whole: defaults that another version of transformers may have are no part of the run.
        model.config.to_json_file(folder / MODEL / "config.json", use_diff=False)
    write_json(folder / "run.json", {"format": RUN_FORMAT, **record, **versions()})


def versions() -> dict[str, str]:
    """Of what decides how numbers are rounded."""
    return {"photon_version": photon_version(), "torch_version": str(torch.__version__)}


def with_own_model(config: RunConfig, folder: Path) -> RunConfig:
    """The run file with model.path at the copy that `describe_run` made in the run's folder."""
    if config.model.path is None or not (folder / MODEL / "config.json").is_file():
        return config
    return config.having(model={"path": str(folder / MODEL)})


def tokenizer_folder(folder: str | os.PathLike[str], of: str | None = None) -> Path:
    """Where a run keeps its data's tokenizer; or a silo's own, of whom `of` names as anywhere."""
    shared = Path(folder) / "tokenizer"
    own = shared / (of or "").split("/")[-1]
    return own if own.is_dir() else shared


def require_same_tokenizer(file: Path | None, data: PreparedData) -> list[str | None]:
    """Whose held-out text means something to a model: silos, None for the global set.

    That is what its own tokenizer cut; sizes prove nothing.

    Args:
        file: tokenizer.json of a run or a model; None where it has none, so that nothing is known.
        data: some of it cut by the same one, or refused.

    Raises:
        VocabularyMismatchError: another tokenizer cut the data.
    """
    own = file and tokenizer_identity(file)
    cut = {one for one in data.tokenizers if own in (None, tokenizer_identity(one))}
    if file is None or cut:
        sets = {None: data.held_out, **data.silos}
        return [name for name, one in sets.items() if one.tokenizer_file in cut]
    raise VocabularyMismatchError(
        f"the data at {data.path} was prepared with another tokenizer than {file}",
        hint=f"Prepare it again with --tokenizer {file.parent}.",
    )


@contextlib.contextmanager
def only_process(folder: Path, *, served: bool = False) -> Iterator[None]:
    """Make the run folder if need be, and hold it; a second process is refused.

    Args:
        served: the process is the loop of a `photon serve`, which holds its own lock.
    """
    busy = RunBusyError(
        f"another process is working in {folder}", hint="Wait for it, or stop it first."
    )
    with contextlib.ExitStack() as held:
        with usable(folder), writing("the run", folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(held_alone(folder / LOCK_FILE, busy))
        if not served:
            held.enter_context(hold_run(folder, served=False))
        yield
