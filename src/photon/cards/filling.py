"""What Photon knows, read from a run folder and from prepared data; nothing is asked, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.config import RunConfig, load_run_config
from photon.data import SiloData
from photon.data.shards import TRAIN, read_manifest, read_splits
from photon.energy.account import figures
from photon.errors import CardError, DataError
from photon.examine.exchange import read_examination
from photon.membership.audit import AUDIT_FILE, MEMBER
from photon.store.disk import file_sha256
from photon.store.run_folder import read_record
from photon.telemetry.events import Evaluated, LocalFinished, RoundFinished, RoundMerged, RunStarted
from photon.telemetry.history import RunHistory, read_history

_SCORES = {"loss", "perplexity", "bits_per_byte", "tokens"}


@dataclass(frozen=True)
class Known:
    """What Photon knows of a project: its cards are filled with it, and held against it.

    Attributes:
        project, models: facts as questions.toml describes them; of models by name.
        trained_on: by silo, sha256 of the manifest of the prepared folder that it trained from.
        now: by silo, sha256 of its own manifest in the folder that is here now.
        keys: by silo, fingerprint of the member's key, of a served run.
    """

    project: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trained_on: Mapping[str, str] = field(default_factory=dict)
    now: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


def known_of(run: Path) -> Known:
    """Of a run: from its folder, and from its prepared text if that is here."""
    record, history = read_record(run), read_history(run)
    config = load_run_config(run / "config.resolved.toml")
    # A federation inside another has no start of its own: it began with its parent.
    begun = next((one.model_dump() for one in reversed(history.of(RunStarted))), {})
    states = sorted((run / "checkpoints").glob("round-*/state.json"))
    state = json.loads(states[-1].read_text(encoding="utf-8")) if states else {}
    finished = [0, *(one.round for one in history.of(RoundFinished))]
    trained = {one.silo for one in history.of(LocalFinished)} & set(record["silos"])
    project = _said(
        run=begun.get("run", record.get("name")),
        how=record["kind"],
        started_at=begun.get("started_at"),
        photon_version=record["photon_version"],
        rounds=finished[-1],
        silos=sorted(trained or record["silos"]),
        data_sha256=record.get("data_sha256"),
        **_energy(state, config, history),
    )
    size = {"vocab_size": record["vocab_size"]}
    models = {"tokenizer": {"what": "tokenizer", **size, "files": _hashes(run / "tokenizer")}}
    if config.model.init == "pretrained":
        models["initial"] = {"what": "initial", "architecture": config.model.path}
        models["initial"]["files"] = _hashes(run / "model")
    if state:
        models[f"round-{state['round']}"] = size | _checkpoint(state, config, history, begun)
    models = {name: _said(name=name, **facts) for name, facts in models.items()}
    if record["kind"] == "serve":
        members = _members(run)
        trained_on = {name: str(one.get("data_sha256")) for name, one in members.items()}
        keys = {name: one["fingerprint"] for name, one in members.items()}
        return Known(project, models, trained_on, keys=keys)
    root = Path(config.data.path)
    here = root.glob("silos/*/manifest.json") if (root / "manifest.json").is_file() else ()
    now = {path.parent.name: file_sha256(path) for path in here}
    return Known(project, models, dict.fromkeys(record["silos"], str(record["data_sha256"])), now)


def facts_of_data(root: Path, silo: str) -> dict[str, Any]:
    """Of a silo of a prepared folder, likewise; a folder's only silo goes by the member's name.

    Raises:
        DataError: no such folder or silo, or it can't be read.
    """
    held = list(read_manifest(root / "manifest.json")["silos"])
    if silo not in held and len(held) != 1:
        raise DataError(f"no silo {silo!r} in {root}", hint=f"It has {', '.join(held)}.")
    path = root / "silos" / (silo if silo in held else held[0]) / "manifest.json"
    record = read_manifest(path)
    part = SiloData(silo, path.parent, read_splits(record, path), path, record["tokenizer_sha256"])
    sources = part.splits.get(TRAIN, {})
    return {
        "silo": silo,
        "data_sha256": file_sha256(path),
        "folder_sha256": file_sha256(root / "manifest.json"),
        "tokenizer_sha256": part.tokenizer_sha256,
        "train_tokens": part.train_tokens,
        "held_out_tokens": part.held_out_tokens,
        "documents": part.documents,
        "bytes": part.bytes,
        "sources": {name: sum(one.tokens for one in found) for name, found in sources.items()},
        "shards": {one.file: one.sha256 for split in part.splits for one in part.shards(split)},
    }


def facts_of_examination(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an examination of the data that these facts are of let out; CardError of other data."""
    record, hint = read_examination(path), "Examine the text as it is now: `photon data examine`."
    for key in ("silo", "data_sha256"):
        if (was := getattr(record, key)) != facts[key]:
            raise CardError(f"{path} is stale: its {key} is {was}, not {facts[key]}", hint=hint)
    return {"examined": record.figures(), "examination_sha256": file_sha256(path)}


def _checkpoint(
    state: Mapping[str, Any], config: RunConfig, history: RunHistory, begun: Mapping[str, Any]
) -> dict[str, Any]:
    number, tokens, flops = state["round"], state["total_tokens"], begun.get("flops_per_token")
    scores = {one.silo or "": one for one in history.of(Evaluated) if one.round <= number}
    merged = {name for one in history.of(RoundMerged) for name in one.participants}
    summary = history.summary or {"rounds": None}
    tree = config.model_dump(exclude_none=True, exclude={"federation": {"children", "branches"}})
    of_recipe = [(one, tree[one]) for one in ("model", "federation", "local", "outer")]
    hardware = ("device", "precision", "threads", "workers") if begun else ()
    counted = (
        {"training_flops": float(flops) * tokens, "flops_per_token": float(flops)} if flops else {}
    )
    return {
        "what": "checkpoint",
        "round": number,
        "weights_sha256": summary["weights_sha256"] if summary["rounds"] == number else None,
        "files": state.get("files"),
        "architecture": config.model.preset and f"{config.model.family}, {config.model.preset}",
        "parameters": begun.get("parameters"),
        "sequence_length": config.data.sequence_length,
        "tokens": tokens,
        **counted,
        "flops_method": begun.get("flops_method") or None,
        "hardware": {one: str(begun[one]) for one in hardware},
        "recipe": {
            f"{one}.{key}": str(told) for one, keys in of_recipe for key, told in keys.items()
        },
        "participants": sorted(merged or begun.get("silos", ())),
        "held_out": {
            silo: _said(**one.model_dump(include=_SCORES)) for silo, one in scores.items()
        },
        "privacy": {key: str(told) for key, told in tree["privacy"].items()} | _epsilon(state),
        **_energy(state, config, history),
    }


def _epsilon(state: Mapping[str, Any]) -> dict[str, str]:
    """The most that a silo's text has spent, where each that answered has a bound."""
    told = list(state.get("epsilon", {}).values())
    if not told or None in told:
        return {}
    most = max(told, key=lambda one: one["value"])
    words = f"{most['value']:.4g} at delta {most['delta']:g}, unit: {most['unit']}"
    return {"epsilon": f"{words}; zero-out adjacency, no amplification by sampling claimed"}


def _energy(state: Mapping[str, Any], config: RunConfig, history: RunHistory) -> dict[str, Any]:
    """Up to a checkpoint; of the last one, with what came after it."""
    if not state.get("energy"):
        return {}
    summary = history.summary or {"rounds": None}
    over = summary["rounds"] == state["round"]
    told = summary["energy"] if over else figures(state, config.energy)
    return {"energy_kwh": told["kwh"], "energy_method": told["how"]}


def _members(run: Path) -> dict[str, dict[str, Any]]:
    """Bodies of the audit log's member lines, the newest of each name."""
    path = run / AUDIT_FILE
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # no torn line
    bodies = [one["body"] for one in map(json.loads, whole) if one["kind"] == MEMBER]
    return {one["name"]: one for one in bodies}


def _hashes(folder: Path) -> dict[str, str] | None:
    files = [one for one in sorted(folder.glob("*")) if one.is_file()]
    return {one.name: file_sha256(one) for one in files} or None


def _said(**facts: Any) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}
