"""What comes out of a run: a Hugging Face model, its scores, its words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from photon.cards.folder import cards_folder, has_cards, read_cards, unasked_cards
from photon.config import ComputeConfig
from photon.data import PreparedData, held_out_text, load_tokenizer, open_data
from photon.errors import ModelError, VocabularyMismatchError
from photon.evaluation import HeldOutScore, evaluate_loss, score
from photon.evaluation.tasks import run_tasks
from photon.forms.export import model_card
from photon.forms.reading import Reading
from photon.membership.keys import NodeKey
from photon.models import (
    HUB_PREFIX,
    HeadLoss,
    context_length,
    export_model,
    generate_tokens,
    license_of,
    load_pretrained,
    sequences_at_once,
    tokenizer_file_of,
)
from photon.release.check import verify_release
from photon.release.seal import seal
from photon.runs import load_weights, require_same_tokenizer, tokenizer_folder
from photon.store.disk import put_in_place
from photon.training import MicroBatch, Ranks, plan_compute, within_memory


@dataclass(frozen=True)
class Evaluation:
    """Scores on the global held-out set and each silo's own: those that its tokenizer cut."""

    overall: HeldOutScore | None
    per_silo: dict[str, HeldOutScore]


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a run's (and not an exported model)."""
    return (Path(folder) / "run.json").is_file()


def export(
    run_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    license: str | None = None,
    languages: Sequence[str] = (),
    of: str | None = None,
) -> Path:
    """Write a run's newest checkpoint as a Hugging Face folder, README.md from its cards if any.

    Args:
        of: whose model, where silos or groups have parts of their own: a name, or a path such as
            eu/bank; the card's scores are of all silos.
        license: for the model card, as the hub spells it; a pretrained model's own by default.
        languages: of the text, for the model card, as the hub spells them.

    Raises:
        RunNotFoundError: no run there.
        ModelError: `out` exists and `overwrite` is not set, or see `load_weights`.
        CardError: the run has cards that can't be read, or none of the newest checkpoint.
    """
    model, config = load_weights(run_folder, of)
    run, base = Path(run_folder), config.model.path if config.model.init == "pretrained" else None
    cards = read_cards(run, whole=True) if has_cards(run) else unasked_cards(run)
    otherwise = license_of(Path(base)) if base else None
    export_model(
        model,
        Path(out),
        tokenizer_folder=tokenizer_folder(run_folder, of),
        readme=model_card(Reading(cards, public=True), license, languages, otherwise),
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    return Path(out)


def release(
    run_folder: str | os.PathLike[str], out: str | os.PathLike[str], key: NodeKey, **exported: Any
) -> None:
    """`export` (which takes more arguments) and `seal` a run into `out`, whole or not at all.

    Raises:
        ModelError, RunError, AuditError: see both; or the key is not the one that signed the log.
    """
    run, out = Path(run_folder), Path(out)
    if out.exists():
        raise ModelError(f"{out} already exists", hint="Name another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as part:
        made = export(run, Path(part) / "release", **exported)
        seal(made, run, key, cards_folder(run))
        verify_release(made, key.fingerprint).require_good()
        put_in_place(made, out)


def evaluate(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    sequence_length: int | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    of: str | None = None,
) -> Evaluation:
    """Score a run folder or a Hugging Face folder on prepared data.

    A run is scored as it evaluates itself: on the same sample of the text for the same lengths, and
    with documents apart where it was trained so.

    Args:
        sequence_length: context of a scored window; the run's own, or for other models the
            smaller of 1,024 and what the model reads.
        of: whose model, where silos or groups have parts of their own.

    Raises:
        ModelError: neither a run nor a model is there. The hub is asked for "hf:OWNER/NAME" only.
        VocabularyMismatchError: the data was cut by another tokenizer than the model's.
    """
    text = open_data(data, only_to_score=True, own_vocabularies=True)
    if is_run(folder):
        model, config = load_weights(folder, of)
        names = require_same_tokenizer(tokenizer_folder(folder, of) / "tokenizer.json", text)
        length = sequence_length or config.data.sequence_length
        documents = config.local.document_mask
    else:
        _require_model(folder, of)
        names = require_same_tokenizer(tokenizer_file_of(str(folder)), text)
        model = load_pretrained(str(folder))
        length = sequence_length or min(1024, context_length(model.config) or 1024)
        documents = False
    _require_vocabulary(model, text, folder)
    plan = plan_compute(ComputeConfig(device=device))
    plan.apply()
    model.to(plan.device)

    head = HeadLoss.of(model)
    batch = MicroBatch(batch_size, asked=sequences_at_once(model, length))

    def scored(silo: str | None) -> HeldOutScore:
        held_out = held_out_text(text, silo)
        total = within_memory(
            lambda sequences: evaluate_loss(
                model,
                held_out.windows(length, max_tokens, documents=documents),
                device=plan.device,
                batch_size=sequences,
                autocast_dtype=plan.autocast_dtype,
                head=head,
            ),
            batch,
            plan.device,
            Ranks.alone(),
        )
        return score(total)

    overall = scored(None) if None in names else None
    return Evaluation(overall, {silo: scored(silo) for silo in names if silo is not None})


def evaluate_tasks(
    folder: str | os.PathLike[str],
    tasks: Sequence[str],
    data: str | os.PathLike[str] | None = None,
    of: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a run or Hugging Face folder by `run_tasks`; any tokenizer may have cut `data`."""
    text = None if data is None else open_data(data, only_to_score=True)
    device = str(plan_compute(ComputeConfig()).device)
    if not is_run(folder):
        _require_model(folder, of)
        return run_tasks(str(folder).removeprefix(HUB_PREFIX), tasks, text, device)
    with tempfile.TemporaryDirectory() as part:
        return run_tasks(str(export(folder, Path(part) / "model", of=of)), tasks, text, device)


def generate(
    folder: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    seed: int = 0,
    of: str | None = None,
) -> str:
    """Continue a prompt with a run's model or one in a Hugging Face folder.

    Args:
        prompt: text to continue; empty begins a document.
        of: whose model, where silos or groups have parts of their own.

    Returns:
        The continuation alone: `prompt + generate(...)` is the whole text.

    Raises:
        ModelError: the folder is neither a run nor a model.
        DataError: its tokenizer can't be read.
        InvalidValueError: a sampling setting is out of bounds.
    """
    if is_run(folder):
        model, _ = load_weights(folder, of)
        tokenizer = load_tokenizer(tokenizer_folder(folder, of))
    else:
        _require_model(folder, of)
        model = load_pretrained(str(folder))
        tokenizer = load_tokenizer(folder)
    network: Any = model
    others = network.generation_config.eos_token_id or ()
    others = {others} if isinstance(others, int) else {*others}
    # As text was cut for training: nothing is put around it, and nothing in it is special.
    start = tokenizer.encode([prompt])[0] or [tokenizer.eos_id]
    ids = generate_tokens(
        model,
        start,
        {tokenizer.eos_id, *others},
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    # Decoding the new tokens alone would lose the space before the first word of some tokenizers.
    decode = tokenizer.tokenizer.decode
    before, whole = decode(start), decode(ids)
    return whole[len(before) :] if whole.startswith(before) else decode(ids[len(start) :])


def _require_model(folder: str | os.PathLike[str], of: str | None) -> None:
    if not Path(folder).exists() and not str(folder).startswith(HUB_PREFIX):
        raise ModelError(
            f"no run or model in {folder}: there is no such folder",
            hint="Name the folder of a run or of a Hugging Face model. A model on the hub is named "
            f"{HUB_PREFIX}OWNER/NAME; nothing else is looked up there.",
        )
    if of is not None:
        raise ModelError(f"{folder} is one model, not a run with one for each silo")


def _require_vocabulary(model: nn.Module, data: PreparedData, folder: object) -> None:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ModelError(f"{folder} holds a model without token embeddings")
    if weight.shape[0] < data.vocab_size:
        raise VocabularyMismatchError(
            f"the model in {folder} knows {weight.shape[0]} tokens, the data at {data.path} uses "
            f"a vocabulary of {data.vocab_size}",
            hint="Prepare the data with the model's own tokenizer (--tokenizer).",
        )
