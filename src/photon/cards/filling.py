"""What Photon knows, read from a run folder and from prepared data; nothing is asked, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.config import RunConfig, load_run_config
from photon.data.shards import HELD_OUT, TRAIN, read_manifest, read_splits
from photon.energy.account import figures
from photon.errors import CardError, DataError, RunNotFoundError, some
from photon.examine.exchange import read_examination
from photon.membership.audit import AUDIT_FILE, MEMBER
from photon.store.disk import file_sha256
from photon.telemetry.events import Evaluated, LocalFinished, RoundFinished, RoundMerged
from photon.telemetry.history import RunHistory, read_history


@dataclass(frozen=True)
class Truth:
    """What a data card is held against, by silo.

    Attributes:
        trained_on: sha256 of the manifest of the prepared folder that it trained from.
        now: sha256 of the silo's own manifest in the folder that is here now.
        keys: fingerprint of the member's key, of a served run.
    """

    trained_on: dict[str, str] = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def truth_of(run: Path) -> Truth:
    """From run.json, the prepared folder if it is here, and the audit log of a served run."""
    record, members = _record(run), _members(run)
    if record["kind"] == "serve":
        return Truth(
            trained_on={name: one.get("data_sha256", "") for name, one in members.items()},
            keys={name: one["fingerprint"] for name, one in members.items()},
        )
    root, now = Path(_config(run).data.path), {}
    if (root / "manifest.json").is_file():
        silos = (root / "silos").iterdir() if (root / "silos").is_dir() else ()
        manifests = {one.name: one / "manifest.json" for one in silos}
        now = {name: file_sha256(path) for name, path in manifests.items() if path.is_file()}
    return Truth({silo: str(record["data_sha256"]) for silo in record["silos"]}, now)


def project_facts(run: Path) -> dict[str, Any]:
    """Of the run, as questions.toml describes them."""
    record, history = _record(run), read_history(run)
    started = history.started
    trained = {one.silo for one in history.of(LocalFinished)} & set(record["silos"])
    finished = history.of(RoundFinished)
    return _known(
        run=started.run,
        how=record["kind"],
        started_at=started.started_at,
        photon_version=started.photon_version,
        rounds=finished[-1].round if finished else 0,
        silos=sorted(trained) or sorted(record["silos"]),
        data_sha256=record["data_sha256"],
        **_energy(_newest_state(run), _config(run), history),
    )


def data_facts(run: Path, silo: str) -> dict[str, Any] | None:
    """Of a silo of a run whose data is here; None where it is at the site."""
    root = Path(_config(run).data.path)
    return facts_of_data(root, silo) if (root / "silos" / silo).is_dir() else None


def facts_of_data(root: Path, silo: str) -> dict[str, Any]:
    """Of a silo of a prepared folder, likewise; a folder's only silo goes by the member's name.

    Raises:
        DataError: no such folder or silo, or it can't be read.
    """
    whole = read_manifest(root / "manifest.json")
    held = list(whole["silos"])
    if silo not in held and len(held) != 1:
        raise DataError(f"no silo {silo!r} in {root}", hint=f"It has {', '.join(held)}.")
    path = root / "silos" / (silo if silo in held else held[0]) / "manifest.json"
    record = read_manifest(path)
    splits = read_splits(record, path)
    shards = [one for sources in splits.values() for found in sources.values() for one in found]
    sources, held = splits.get(TRAIN, {}), splits.get(HELD_OUT, {})
    tokens = {name: sum(one.tokens for one in found) for name, found in sources.items()}
    return {
        "silo": silo,
        "data_sha256": file_sha256(path),
        "folder_sha256": file_sha256(root / "manifest.json"),
        "tokenizer_sha256": record["tokenizer_sha256"],
        "train_tokens": sum(tokens.values()),
        "held_out_tokens": sum(one.tokens for found in held.values() for one in found),
        "documents": sum(one.documents for one in shards),
        "bytes": sum(one.bytes for one in shards),
        "sources": tokens,
        "shards": {one.file: one.sha256 for one in shards},
    }


def facts_of_examination(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an examination of the data that these facts are of let out; CardError of other data."""
    record, hint = read_examination(path), "Examine the text as it is now: `photon data examine`."
    for key in ("silo", "data_sha256"):
        if (was := getattr(record, key)) != facts[key]:
            raise CardError(f"{path} is stale: its {key} is {was}, not {facts[key]}", hint=hint)
    return {"examined": record.figures(), "examination_sha256": file_sha256(path)}


def model_facts(run: Path) -> dict[str, dict[str, Any]]:
    """Of the tokenizer, the model that was begun with, and the newest checkpoint, by name."""
    record, config, history = _record(run), _config(run), read_history(run)
    made = {"what": "tokenizer", "vocab_size": record["vocab_size"]}
    found = {"tokenizer": made | _known(files=_hashes(run / "tokenizer"))}
    if config.model.init == "pretrained":
        begun = {"what": "initial", "architecture": config.model.path}
        found["initial"] = begun | _known(files=_hashes(run / "model"))
    if state := _newest_state(run):
        found[f"round-{state['round']}"] = _checkpoint(state, config, history, record)
    return {name: {"name": name, **facts} for name, facts in found.items()}


def _checkpoint(
    state: dict[str, Any], config: RunConfig, history: RunHistory, record: dict[str, Any]
) -> dict[str, Any]:
    started, number, tokens = history.started, state["round"], state["total_tokens"]
    scores = {one.silo or "": one for one in history.of(Evaluated) if one.round <= number}
    merged = [name for one in history.of(RoundMerged) for name in one.participants]
    flops = started.flops_per_token
    summary = history.summary or {"rounds": None}
    privacy = config.privacy.model_dump(exclude_none=True)
    return _known(
        what="checkpoint",
        round=number,
        weights_sha256=summary["weights_sha256"] if summary["rounds"] == number else None,
        files=state.get("files"),
        architecture=config.model.preset and f"{config.model.family}, {config.model.preset}",
        parameters=started.parameters,
        vocab_size=record["vocab_size"],
        sequence_length=started.sequence_length,
        tokens=tokens,
        flops_per_token=float(flops) if flops else None,
        training_flops=float(flops) * tokens if flops else None,
        flops_method=started.flops_method or None,
        hardware={"device": started.device, "precision": started.precision}
        | {"threads": str(started.threads), "workers": str(started.workers)},
        recipe=_recipe(config),
        participants=sorted(set(merged)) or sorted(started.silos),
        held_out={
            silo: _known(
                **one.model_dump(include={"loss", "perplexity", "bits_per_byte", "tokens"})
            )
            for silo, one in scores.items()
        },
        privacy={key: str(value) for key, value in privacy.items()},
        **_energy(state, config, history),
    )


def _newest_state(run: Path) -> dict[str, Any]:
    states = sorted((run / "checkpoints").glob("round-*/state.json"))
    return json.loads(states[-1].read_text(encoding="utf-8")) if states else {}


def _energy(state: dict[str, Any], config: RunConfig, history: RunHistory) -> dict[str, Any]:
    """Up to a checkpoint; of the last one, with what came after it."""
    if not state.get("energy"):
        return {}
    summary = history.summary or {"rounds": None}
    over = summary["rounds"] == state["round"]
    told = summary["energy"] if over else figures(state, config.energy)
    return {"energy_kwh": told["kwh"], "energy_method": told["how"]}


def _recipe(config: RunConfig) -> dict[str, str]:
    tree = config.model_dump(exclude_none=True, exclude={"federation": {"children", "branches"}})
    sections = ("model", "federation", "local", "outer")
    return {f"{one}.{key}": str(value) for one in sections for key, value in tree[one].items()}


def _record(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(path.parent.name for path in run.glob("*/run.json"))
        hint = f"There are runs in it: {some(inside, 8)}." if inside else "Name a run's folder."
        text = f"no run in {run}: {run / 'run.json'} does not exist"
        raise RunNotFoundError(text, hint=hint) from None
    except (OSError, ValueError) as error:
        raise RunNotFoundError(f"no run in {run}: can't read run.json: {error}") from error


def _config(run: Path) -> RunConfig:
    return load_run_config(run / "config.resolved.toml")


def _members(run: Path) -> dict[str, dict[str, Any]]:
    """Bodies of the audit log's member lines, the newest of each name."""
    path = run / AUDIT_FILE
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # no torn line
    bodies = [one["body"] for one in map(json.loads, whole) if one["kind"] == MEMBER]
    return {one["name"]: one for one in bodies}


def _hashes(folder: Path) -> dict[str, str] | None:
    if not folder.is_dir():
        return None
    return {one.name: file_sha256(one) for one in sorted(folder.iterdir()) if one.is_file()}


def _known(**facts: Any) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}
