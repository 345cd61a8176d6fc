"""A trained model as a Hugging Face folder that transformers and vLLM load unchanged."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from photon.errors import DiskFullError, ModelError
from photon.models.quiet import quiet_transformers
from photon.store.disk import put_in_place, require_disk

# Patterns, not everything: a tokenizer folder may be a model folder with weights of its own.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)


def export_model(
    model: torch.nn.Module,
    out: Path,
    *,
    tokenizer_folder: Path,
    readme: str,
    max_shard_size: str = "5GB",
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write weights, configuration, tokenizer and README.md into `out`, whole or not at all.

    Files: model.safetensors (or shards and their index), config.json, generation_config.json, the
    tokenizer's, README.md. The model itself is left as it is.

    Args:
        model: a Hugging Face causal LM, fp32.
        out: folder to make; its parents are made too.
        tokenizer_folder: holds tokenizer.json and whatever else belongs to the tokenizer.
        readme: README.md.
        max_shard_size: of one safetensors file, a number with unit.
        dtype: of the weights written; bfloat16 rounds them and halves the size.

    Raises:
        ModelError: `out` exists, tokenizer.json is missing, or the model can't be saved.
        DiskFullError: not enough room; nothing is left behind.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ModelError(
            f"{out} already exists", hint="Name another --out, or replace it with --overwrite."
        )
    if out.exists() and not (
        out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))
    ):
        raise ModelError(
            f"{out} is not a model folder, so it is not overwritten", hint="Name another folder."
        )
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise ModelError(f"{tokenizer_folder} has no tokenizer.json to export with the model")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch_dtype = getattr(torch, dtype)
    values = sum(p.numel() for p in model.parameters())
    needed = values * torch_dtype.itemsize + (16 << 20)
    require_disk(out.parent, needed, "exporting", "Free space or name another --out.")
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        ids = _write_tokenizer(tokenizer_folder, part)
        _save_weights(model, part, max_shard_size, torch_dtype, ids)
        (part / "README.md").write_text(readme, encoding="utf-8")
        # What writes safetensors lets nobody else read them.
        os.umask(mask := os.umask(0))
        for file in part.iterdir():
            file.chmod(0o666 & ~mask)
        part.chmod(0o777 & ~mask)
        put_in_place(part, out)
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        # safetensors has an error of its own around the operating system's.
        if "No space left" in str(error):
            raise DiskFullError(f"no room left while exporting to {out}") from error
        raise ModelError(f"the model can't be exported to {out}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def license_of(folder: Path) -> str | None:
    """What the model card in a Hugging Face folder gives as its licence; None without one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = text.split("---\n")[1] if text.startswith("---\n") else ""
    found = re.search(r"^license:\s*[\"']?([\w.-]+)", front, re.MULTILINE)
    return found[1] if found else None


def _save_weights(
    model: Any, folder: Path, max_shard_size: str, dtype: torch.dtype, ids: dict[str, int]
) -> None:
    """Weights and configurations; `ids` of the tokens that begin and end a text and fill it up."""
    config, generation = model.config, model.generation_config
    text = config.get_text_config()
    before = [dict(vars(one)) for one in (config, text, generation)]
    # Training turns the cache off; whoever samples from the export wants it.
    config.use_cache = generation.use_cache = True
    for name, number in ids.items():
        setattr(generation, name, number)
        # Not in config.json: transformers would not train that row of the embedding any more.
        if name != "pad_token_id":
            setattr(text, name, number)
    try:
        with quiet_transformers():
            tensors = {
                name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in model.state_dict().items()
            }
            model.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size)
    finally:
        for one, was in zip((config, text, generation), before, strict=True):
            vars(one).clear()
            vars(one).update(was)
    if dtype != model.dtype:
        file = folder / "config.json"
        written = json.loads(file.read_text(encoding="utf-8"))
        written["dtype"] = str(dtype).removeprefix("torch.")
        file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(source: Path, folder: Path) -> dict[str, int]:
    """The tokenizer's files, so that it cuts text as for training; returns its special ids.

    For training nothing was put around a text: what a tokenizer.json would add (a first token that
    the model never saw, an end that closes a prompt) is taken out of it.
    """
    for pattern in _TOKENIZER_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    if tokenizer.num_special_tokens_to_add(is_pair=False):
        record = json.loads(file.read_text(encoding="utf-8")) | {"post_processor": None}
        file.write_text(json.dumps(record, ensure_ascii=False, indent=2), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    # Without that file, transformers 5 picks a class by model type, and its LlamaTokenizer rebuilds
    # the pre-tokenizer: other tokens than the model was trained on. This class reads tokenizer.json
    # as it is.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("eos_token") is not None:  # batches can be filled up, before the prompts
        settings = {"pad_token": settings["eos_token"], "padding_side": "left"} | settings
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    ids: dict[str, int] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is not None:
            ids[f"{name}_id"] = number
    return ids
