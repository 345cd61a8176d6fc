"""The data card: what a prepared folder holds, in plain words."""

from __future__ import annotations

from typing import Any

from photon.data.prepared import PreparedData, TextSet
from photon.data.shards import HELD_OUT, TRAIN


def data_card(data: PreparedData, manifest: dict[str, Any]) -> str:
    """README.md of a prepared folder, Markdown."""
    options = manifest["options"]
    lines = [
        "# Data card",
        "",
        f"Made by `photon data prepare` {manifest['photon_version']} from `{options['input']}`.",
        "",
        "| silo | training documents | training tokens | held-out documents | held-out tokens "
        "| text MB |",
        "|---|---:|---:|---:|---:|---:|",
        *(_row(silo) for silo in data.silos.values()),
        _row(data.held_out),
        "",
        f"Tokenizer: {data.vocab_size:,} tokens, {_bytes_per_token(data):.2f} bytes of text a "
        f"token, sha256 `{data.tokenizer_sha256[:16]}...`; documents end with "
        f"`{manifest['tokenizer']['eos_token']}`.",
        "",
        f"Held out by document, by a hash of its text (seed {options['seed']}): "
        f"{options['global_fraction']:.1%} for the global set, {options['silo_fraction']:.1%} for "
        "the silo's own. Copies of one text always fall together, and the choice does not depend "
        "on how documents were cut into silos.",
    ]
    if manifest["remarks"]:
        lines += ["", "Remarks:", "", *(f"- {remark}" for remark in manifest["remarks"])]
    return "\n".join(lines) + "\n"


def _row(text_set: TextSet) -> str:
    size = text_set.count(TRAIN, "bytes") + text_set.count(HELD_OUT, "bytes")
    name = "(global held-out)" if text_set.name == HELD_OUT else text_set.name
    return (
        f"| {name} | {text_set.count(TRAIN, 'documents'):,} | {text_set.train_tokens:,} "
        f"| {text_set.count(HELD_OUT, 'documents'):,} | {text_set.count(HELD_OUT, 'tokens'):,} "
        f"| {size / 1e6:.2f} |"
    )


def _bytes_per_token(data: PreparedData) -> float:
    counts = {
        what: sum(
            text_set.count(split, what)
            for text_set in data.text_sets()
            for split in (TRAIN, HELD_OUT)
        )
        for what in ("bytes", "tokens")
    }
    return counts["bytes"] / max(1, counts["tokens"])
