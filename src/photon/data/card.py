"""The data card: what a prepared folder holds, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from photon.data.prepared import PreparedData, SiloData
from photon.data.shards import HELD_OUT

_HEADINGS = ("silo", "split", "documents", "tokens", "text bytes", "bytes per token")


def data_card(data: PreparedData, manifest: Mapping[str, Any]) -> str:
    """README.md of a prepared folder, Markdown, by its top manifest."""
    options = manifest["options"]
    skipped = [name for name in ("text_key", "metadata") if options.get(name) not in (None, "text")]
    lines = [
        "# Data card",
        "",
        f"Made by `photon data prepare` {manifest['photon_version']} from {_inputs(options)}"
        + "".join(f", {name} `{options[name]}`" for name in skipped)
        + ".",
        "",
        "## What is in it",
        "",
        f"| {' | '.join(_HEADINGS)} |",
        "|---|---|---:|---:|---:|---:|",
        *(row for silo in data.silos.values() for row in _rows(silo)),
        *_rows(data.held_out),
        "",
        "Tokens count the end-of-text token of each document; bytes are of its text in UTF-8.",
        "",
        "## How it was cut",
        "",
        f"Silos: {manifest['partition']}.",
        "",
        *([_ALL_HELD_OUT] if options["held_out_only"] else _cut(data, options)),
        "",
        *_held_out_from(manifest["held_out_from"]),
        "## Tokenizer",
        "",
        f"{data.vocab_size:,} tokens, {_origin(options)}. Documents end with "
        f"`{manifest['tokenizer']['eos_token']}` (id {data.eos_id}). sha256 of "
        + "; ".join(
            f"`{file.relative_to(data.path).as_posix()}`: `{sha256}`"
            for file, sha256 in data.tokenizers.items()
        )
        + ".",
    ]
    if data.remarks:
        lines += ["", "## Remarks", "", *(f"- {remark}" for remark in data.remarks)]
    return "\n".join(lines) + "\n"


_ALL_HELD_OUT = "All of it is held out: text to score models with, and none to train on."


def _inputs(options: Mapping[str, Any]) -> str:
    given = options["input"]
    return ", ".join(f"`{name}`" for name in ([given] if isinstance(given, str) else given))


def _cut(data: PreparedData, options: Mapping[str, Any]) -> list[str]:
    sources = sorted({source for silo in data.silos.values() for source in silo.sources})
    return [
        f"Held out by document, by a hash of its text (seed {options['seed']}): "
        f"{options['global_fraction']:.1%} for the global set, {options['silo_fraction']:.1%} for "
        "the silo's own, as expected shares. Copies of one text always fall together. The choice "
        "does not depend on how documents were cut into silos, unless a remark below says that a "
        "set was empty and had to be helped, or that the input had splits of its own.",
        "",
        f"Sources inside silos: {', '.join(f'`{name}`' for name in sources)}.",
    ]


def _held_out_from(parts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Tables of what the global held-out set holds of each silo, and of each file or folder."""
    lines: list[str] = []
    for kind, counts in parts.items():
        lines += [f"| held out globally, by {kind} | documents | tokens | text bytes |"]
        lines += ["|---|---:|---:|---:|"]
        lines += [
            f"| {_cell(name)} | {' | '.join(f'{value:,}' for value in count.values())} |"
            for name, count in counts.items()
        ]
        lines += [""]
    return lines


def _rows(part: SiloData) -> list[str]:
    held_out = ("held out", part.held_out_documents, part.held_out_tokens, part.held_out_bytes)
    if part.name == HELD_OUT and not part.train_tokens:
        return [_row("(global)", *held_out)]
    train = ("train", part.train_documents, part.train_tokens, part.train_bytes)
    return [_row(part.name, *train), _row(part.name, *held_out)]


def _cell(name: str) -> str:
    # A file may be called anything; the table has to stay one.
    return "".join(c if c.isprintable() and c not in "|`<" else "?" for c in name)


def _row(name: str, split: str, documents: int, tokens: int, size: int) -> str:
    ratio = f"{size / tokens:.2f}" if tokens else "-"
    return f"| {name} | {split} | {documents:,} | {tokens:,} | {size:,} | {ratio} |"


def _origin(options: Mapping[str, Any]) -> str:
    if options["tokenizer"] is not None:
        return f"given as `{options['tokenizer']}`"
    return (
        f"a byte-level BPE{' for each silo,' * options['own_vocabulary']} trained on training text "
        f"only (at most {options['train_bytes'] / 1e6:g} MB, spread over the input)"
    )
