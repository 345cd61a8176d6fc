"""Make a release of an exported model: add the run's history to the folder, and sign it all."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from photon.errors import AuditError, RunError
from photon.membership.audit import AUDIT_FILE
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.verification import verify_audit
from photon.release import check
from photon.release.statement import SIGNATURE_FILE, sign_files
from photon.store.served import SERVE_FILE, Serving
from photon.telemetry import read_history
from photon.telemetry.events import finite
from photon.version import photon_version

#: Of an unsigned run's events, what a release tells: who took part in what.
_TOLD = {"run_started", "run_changed", "round_started", "round_merged", "update_dropped"}


def key_file(run: Path) -> Path:
    """Where a run's key for releases is: the aggregator's (which must be there), or the user's."""
    if (run / SERVE_FILE).exists():
        place = Path(Serving.read(run).home) / AGGREGATOR_KEY_FILE
        NodeKey.load(place)  # another could not stand for it
        return place
    return Path.home() / ".config" / "photon" / "release.key"


def seal(folder: Path, run: Path, key: NodeKey, cards: Path | None = None) -> None:
    """Add to an exported model what makes it a release of a run's newest checkpoint.

    Args:
        cards: the folder of the run's cards, which there may not be; RUN/cards.

    Raises:
        RunError: the model is not that checkpoint's.
        AuditError: the run's log is broken, or does not end at that checkpoint.
    """
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    newest = max((run / "checkpoints").glob("round-*"))
    number, log = int(newest.name.removeprefix("round-")), None
    exported = sorted(folder.glob("*.safetensors"))
    merged, names = check.weights_sha256([newest / "global.safetensors"], prefix="weights/")
    _, beside = check.weights_sha256(exported, without=names)
    if check.weights_sha256(exported, without=beside)[0] != merged:
        hint = "Does the run go on? Then again. Tensors must be exported under their own names."
        raise RunError(f"the model exported from {run} is not that of {newest.name}", hint=hint)
    if record["kind"] == "serve":
        report = verify_audit(shutil.copyfile(run / AUDIT_FILE, folder / AUDIT_FILE))
        report.require_good()
        log = {"lines": report.lines, "head": report.head, "root": report.root}
        if report.last_round != number:
            told = f"the log ends at round {report.last_round}, the newest checkpoint is {number}'s"
            raise AuditError(told, hint="`photon serve --resume` writes down what is missing.")
    else:
        kept = [one for one in read_history(run).events if one.name in _TOLD]
        told = [finite({"event": one.name, **one.model_dump(mode="json")}) for one in kept]
        text = "".join(json.dumps(one) + "\n" for one in told)
        (folder / check.EVENTS_FILE).write_text(text, "utf-8")
    for path in run.glob("config.*.toml"):  # what held at last, and before it was changed
        config = tomllib.loads(path.read_text(encoding="utf-8"))
        name = path.name.replace("config", "run").replace(".resolved", "")
        (folder / name).write_text(tomli_w.dumps(_without_places(config)), "utf-8")
    cards = cards or run / check.CARDS
    if cards.is_dir():
        shutil.copytree(cards, folder / check.CARDS)
    (folder / check.KEY_FILE).write_text(key.public_pem, "utf-8")
    manifest = {
        "format": "photon-release-1",
        "kind": record["kind"],
        "name": read_history(run).started.run,
        "round": number,
        "weights_sha256": merged,
        "beside": sorted(beside),
        "model_fingerprint": record["model_fingerprint"],
        "data_sha256": record["data_sha256"],
        "photon_version": photon_version(),
        "log": log,
    }
    (folder / check.MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    bundle = sign_files(key, manifest["name"], check.digests_in(folder))
    (folder / SIGNATURE_FILE).write_bytes(bundle)


def _without_places(value: Any) -> Any:
    """A run file without what is this machine's business: [serve], and where its files lie."""
    if isinstance(value, dict):
        return {name: _without_places(one) for name, one in value.items() if name != "serve"}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    place = isinstance(value, str) and value.startswith(("/", "~"))
    return Path(value).name if place else value
