"""Tokens from a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from photon.errors import InvalidValueError
from photon.models.build import context_length
from photon.models.quiet import quiet_transformers


def generate_tokens(
    model: Any,
    start: Sequence[int],
    ends: Collection[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Go on with some tokens. The same arguments on the same kind of device give the same ones.

    Past the model's context length it goes on from its newest half, so no call reaches positions
    the model was not trained on.

    Args:
        model: a Hugging Face causal LM, on the device to run on.
        start: at least one token.
        ends: tokens after which it stops.
        temperature: 0 always takes the likeliest token.
        top_k: sample among the k likeliest; None or 0 among all.
        top_p: sample among the likeliest that together reach this probability.
        seed: of the sampling; no global random state is left changed.

    Returns:
        All tokens, `start` included.

    Raises:
        InvalidValueError: a sampling setting is out of bounds.
    """
    _check("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    _check("temperature", temperature, temperature >= 0, "0 or above")
    _check("top_k", top_k, top_k is None or top_k >= 0, "0 or above")
    _check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
    device, ids = model.device, list(start)
    devices = [device] if device.type == "cuda" else []
    limit = context_length(model.config) or len(start) + max_new_tokens
    target = len(start) + max_new_tokens
    model.eval()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(), quiet_transformers():
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        while len(ids) < target and (len(ids) == len(start) or ids[-1] not in ends):
            context = ids if len(ids) < limit else ids[-max(1, limit // 2) :]
            given = torch.tensor([context], device=device)
            made = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=max(1, min(target - len(ids), limit - len(context))),
                eos_token_id=sorted(ends),
                pad_token_id=min(ends, default=0),
                use_cache=True,
                **settings,
            )
            ids += made[0, len(context) :].tolist()
    return ids


def _check(name: str, value: object, fine: bool, allowed: str) -> None:
    if not fine:
        raise InvalidValueError(f"{name} = {value!r} is out of bounds", hint=f"Allowed: {allowed}.")
