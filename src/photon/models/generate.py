"""Text from an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from photon.errors import InvalidValueError, ModelError
from photon.models.build import context_length, load_pretrained
from photon.models.quiet import quiet_transformers


def load_exported(folder: Path) -> tuple[Any, Any]:
    """Model (fp32, CPU, evaluation mode) and tokenizer of a Hugging Face folder; never a download.

    Raises:
        ModelError: the folder is missing or its files can't be loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"model folder {str(folder)!r} does not exist")
    model = load_pretrained(str(folder.resolve()))
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise ModelError(f"the tokenizer of {folder} can't be loaded: {error}") from error
    return model.eval(), tokenizer


def generate_text(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> str:
    """Continue a prompt. The same arguments on the same kind of device give the same text.

    Past the model's context length the text goes on from its newest half, so no call reaches
    positions the model was not trained on.

    Args:
        folder: an exported model.
        prompt: text to continue; empty starts a new document.
        max_new_tokens: at most so many; the end-of-text token ends earlier.
        temperature: 0 always takes the likeliest token.
        top_k: sample among the k likeliest; None or 0 among all.
        top_p: sample among the likeliest that together reach this probability.
        seed: of the sampling; no global random state is left changed.
        device: to run on.

    Returns:
        The continuation alone: `prompt + generate_text(...)` is the whole text.

    Raises:
        InvalidValueError: a sampling setting is out of bounds.
        ModelError: the folder can't be loaded.
    """
    _check("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    _check("temperature", temperature, temperature >= 0, "0 or above")
    _check("top_k", top_k, top_k is None or top_k >= 0, "0 or above")
    _check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
    model, tokenizer = load_exported(folder)
    model.to(device)
    start = list(tokenizer(prompt)["input_ids"]) or [_first_token(model)]
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(), quiet_transformers():
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        ids = _continue(model, start, max_new_tokens, settings)
    return _decode_after(tokenizer, start, ids)


def _continue(model: Any, start: list[int], more: int, settings: dict[str, Any]) -> list[int]:
    """All tokens, `start` included; `more` at most are added, in stretches that fit the context."""
    limit = context_length(model.config) or len(start) + more
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    ids = list(start)
    target = len(start) + more
    while len(ids) < target and (len(ids) == len(start) or ids[-1] not in ends):
        context = ids if len(ids) < limit else ids[-max(1, limit // 2) :]
        room = max(1, min(target - len(ids), limit - len(context)))
        given = torch.tensor([context], device=model.device)
        made = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=room,
            pad_token_id=min(ends, default=0),
            use_cache=True,
            **settings,
        )
        ids += made[0, len(context) :].tolist()
    return ids


def _first_token(model: Any) -> int:
    text = model.config.get_text_config()
    for token in (text.bos_token_id, text.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _decode_after(tokenizer: Any, start: list[int], ids: list[int]) -> str:
    # Decoding the new tokens alone would lose the space before the first word of some tokenizers.
    before = tokenizer.decode(start, skip_special_tokens=True)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(ids[len(start) :], skip_special_tokens=True)


def _check(name: str, value: object, fine: bool, allowed: str) -> None:
    if not fine:
        raise InvalidValueError(f"{name} = {value!r} is out of bounds", hint=f"Allowed: {allowed}.")
