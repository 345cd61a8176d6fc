"""From [model] of run.toml to a torch module."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from photon.config import ModelConfig
from photon.errors import ModelError, VocabularyMismatchError, some
from photon.models.presets import preset_config
from photon.models.quiet import quiet_transformers

#: "hf:OWNER/NAME" names a model on the hub; nothing else is ever looked up there.
HUB_PREFIX = "hf:"
_HUB_NAME = re.compile(r"hf:[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    sequence_length: int,
    eos_id: int,
    seed: int,
    attention: str = "auto",
) -> torch.nn.Module:
    """A Hugging Face causal LM on the CPU, fp32, in training mode, its cache off.

    The same arguments give the same weights, bit for bit; no global random state is touched. The
    network is used only if `config.path` is "hf:OWNER/NAME".

    Args:
        vocab_size: tokens of the data's tokenizer. A preset takes it as its own.
        sequence_length: tokens a training sequence predicts.
        eos_id: the data's token between documents. A pretrained model keeps its own.
        attention: kernels, as compute.attention names them; auto leaves it to transformers.

    Raises:
        ModelError: the folder or hub model can't be read, is not a causal LM, needs its own code,
            is quantised, lacks weights or holds some it has no place for, is too short for
            `sequence_length`, or has no such attention.
        VocabularyMismatchError: the model knows fewer tokens than the data.
    """
    hf_config = _hf_config(config, vocab_size, sequence_length, eos_id)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the accelerators too, which are not forked.
        torch.default_generator.manual_seed(seed)
        if config.init == "pretrained":
            model = load_pretrained(str(config.path), attention=attention)
            # What the architecture does not train is told by its own code, which loading skips.
            for name, parameter in _skeleton(hf_config, config, attention).named_parameters():
                model.get_parameter(name).requires_grad_(parameter.requires_grad)
        else:
            model = _from_config(hf_config, config, attention)
    model.config.use_cache = False
    # Bidirectional models (BERT) load as causal LMs, then learn by reading the answer.
    path, one, other = config.path, [0, 0, 0, 0], [0, 0, 0, 1]
    if path is not None and not _sees_no_difference(model, path, one, other, slice(3)):
        raise ModelError(
            f"model {path!r} looks at later tokens, so it is not a causal language model",
            hint="Encoders such as BERT can't be trained to predict the next token.",
        )
    return model.train()


def build_skeleton(
    config: ModelConfig,
    *,
    vocab_size: int,
    sequence_length: int,
    eos_id: int,
    attention: str = "auto",
) -> torch.nn.Module:
    """The model `build_model` would give, its parameters on the meta device: no weights, no memory.

    Buffers are real: giving parameters and persistent buffers (`carried_tensors`) memory and values
    makes it whole. A folder's weights are not read.

    Raises:
        ModelError, VocabularyMismatchError: as `build_model`.
    """
    hf_config = _hf_config(config, vocab_size, sequence_length, eos_id)
    return _skeleton(hf_config, config, attention).train()


def _skeleton(hf_config: PretrainedConfig, config: ModelConfig, attention: str) -> Any:
    with _parameters_on_meta():
        return _from_config(hf_config, config, attention)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give every parameter that a module registers meanwhile no memory."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(
        self: torch.nn.Module, name: str, param: torch.nn.Parameter | None
    ) -> None:
        if param is not None and not param.is_meta:
            param = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            param._is_hf_initialized = True  # pyright: ignore - transformers' word for: draw no values
        register(self, name, param)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def tokenizer_file_of(path: str) -> Path | None:
    """tokenizer.json of a model, to compare with the data's; None where it has none.

    Raises ModelError without such a folder, or such a model on the hub.
    """
    folder = local_folder(path)
    if folder is not None:
        return file if (file := folder / "tokenizer.json").is_file() else None
    with _model_errors(path, hub=True), quiet_transformers(progress=True):
        found = cached_file(
            path.removeprefix(HUB_PREFIX),
            "tokenizer.json",
            _raise_exceptions_for_missing_entries=False,
        )
    return Path(found) if found is not None else None


def local_folder(path: str) -> Path | None:
    """A model's name as a folder that exists here, or None if it is "hf:OWNER/NAME".

    Raises ModelError for a file, a folder that isn't there, or no name the hub could have.
    """
    if path.startswith(HUB_PREFIX):
        if not _HUB_NAME.fullmatch(path):
            raise ModelError(f"{path!r} is no model on the hub", hint="Write hf:OWNER/NAME.")
        return None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"model {path!r} is a file, not a model folder")
    raise ModelError(
        f"model folder {path!r} does not exist",
        hint="Relative paths start at the current directory. A model on the Hugging Face hub is "
        "named hf:OWNER/NAME; nothing else is looked up there.",
    )


def load_pretrained(path: str, *, attention: str = "auto") -> Any:
    """The causal LM in a folder or on the hub, fp32: every weight from its safetensors, and every
    tensor there in its place (but for those that transformers knows to be of no use).

    Raises:
        ModelError: as `build_model`.
    """
    load_config(path)
    with _reading(path) as place:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=torch.float32,
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    model, report = loaded
    _require_all_loaded(model, report, path)
    return model


def _require_all_loaded(model: Any, report: dict[str, Any], path: str) -> None:
    """The file's tensors are the model's: none missing, left over, of another shape or untied."""
    misfits = [
        f"{name!r} has shape {tuple(found)}, config.json says {tuple(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    if misfits:
        raise ModelError(
            f"the weights of model {path!r} are of another shape than its config.json says: "
            f"{some(misfits)}",
            hint="Use the config.json that belongs to the weights.",
        )
    for kind, words in (("missing", "holds no weights for"), ("unexpected", "has no place for")):
        names = sorted(map(repr, report[f"{kind}_keys"]))
        if names:
            raise ModelError(
                f"model {path!r} {words} tensors {some(names)}",
                hint="The weights are incomplete, or of another model than config.json says.",
            )
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(name) is not model.get_parameter(source):
            raise ModelError(
                f"model {path!r} has weights of its own for {name!r}, which its config.json ties "
                f"to {source!r}",
                hint="Set tie_word_embeddings = false in its config.json, or remove that tensor.",
            )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"model {path!r} has weights that are no numbers: {name!r} holds NaN or infinity",
                hint="They are damaged, or of training that diverged. Use an earlier checkpoint.",
            )


def load_config(path: str) -> PretrainedConfig:
    """The checked configuration of a causal LM in a folder or on the hub.

    Raises:
        ModelError: no config.json, an unknown or non-causal model type, custom code, quantised.
    """
    folder = local_folder(path)
    if folder is not None:
        _require_known_type(folder)
    with _reading(path) as place:
        config = AutoConfig.from_pretrained(**place)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise ModelError(
            f"model {path!r} is of type {config.model_type!r}, not a causal language model",
            hint="Photon trains models that AutoModelForCausalLM can load.",
        )
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"model {path!r} is quantised, which can't be trained in fp32",
            hint="Use the unquantised model.",
        )
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ModelError(
            f"model {path!r} asks for a loss that balances its experts (output_router_logits), "
            "which Photon does not train",
            hint="Set output_router_logits = false in its config.json to train without it.",
        )
    config.use_cache = False
    return config


@contextmanager
def _reading(path: str) -> Iterator[dict[str, Any]]:
    """What `from_pretrained` is told of where a model is; its errors become ours."""
    folder = local_folder(path)
    with _model_errors(path, hub=folder is None), quiet_transformers(progress=folder is None):
        yield {
            "pretrained_model_name_or_path": folder or path.removeprefix(HUB_PREFIX),
            "local_files_only": folder is not None,
            "trust_remote_code": False,
        }


def _hf_config(
    config: ModelConfig, vocab_size: int, sequence_length: int, eos_id: int
) -> PretrainedConfig:
    if config.preset is not None:
        return preset_config(config, vocab_size, sequence_length, eos_id)
    path = str(config.path)
    hf_config = load_config(path)
    text = hf_config.get_text_config()
    if text.vocab_size < vocab_size:
        raise VocabularyMismatchError(
            f"model {path!r} knows {text.vocab_size} tokens, the data {vocab_size}",
            hint="Prepare the data with the model's own tokenizer.",
        )
    limit = context_length(hf_config)
    if limit is not None and sequence_length > limit:
        raise ModelError(
            f"data.sequence_length = {sequence_length} exceeds the {limit} positions of {path!r}",
            hint=f"Use data.sequence_length = {limit} or less.",
        )
    if config.init == "random":
        text.eos_token_id = text.bos_token_id = eos_id
        text.pad_token_id = None
    return hf_config


def context_length(config: PretrainedConfig) -> int | None:
    """Most tokens the model was made for at once; None where its configuration names no limit."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(text, key, None)
        if limit and int(limit) > 0:  # -1 is how some say that there is none
            return int(limit)
    return None


def _from_config(hf_config: PretrainedConfig, config: ModelConfig, attention: str) -> Any:
    with _model_errors(str(config.path or config.preset)), quiet_transformers():
        return AutoModelForCausalLM.from_config(
            hf_config,
            dtype=torch.float32,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
        )


def _require_known_type(folder: Path) -> None:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder",
            hint="`photon export` writes such a folder from a run.",
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file} can't be read as a model configuration: {error}") from error
    if "auto_map" in content:
        raise ModelError(
            f"model {str(folder)!r} needs Python code of its own, which Photon never runs",
            hint="Use a model whose architecture is part of transformers.",
        )
    if not isinstance(kind, str):
        raise ModelError(f"{file} names no model_type")


def require_document_masks(model: Any, name: str) -> None:
    """Raise ModelError, by that name, if a causal LM can't keep packed documents apart."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, 6)
    one, other = [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]
    if not _sees_no_difference(model, name, one, other, slice(3, 6), position_ids=positions):
        raise ModelError(
            f"model {name!r} lets attention cross from one document to the next, so "
            "local.document_mask = true would promise what it can't keep",
            hint="Set local.document_mask = false, or use a model with causal masks of its own "
            "(Llama, Mistral, Qwen, GPT-2).",
        )


def _sees_no_difference(
    model: Any, name: str, one: list[int], other: list[int], places: slice, **inputs: torch.Tensor
) -> bool:
    """Whether two texts get the same logits at some places."""
    training = model.training
    with torch.inference_mode(), _model_errors(name):
        answer = model.eval()(input_ids=torch.tensor([one, other]), **inputs)
    model.train(training)
    logits = answer.logits[:, places].float()
    return torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4)


def attend_without_masks(model: Any) -> None:
    """Have an sdpa model leave causality to its kernel for good, as it does in training.

    transformers looks into position_ids for packed sequences, finds none, and builds no mask. Into
    a fake tensor it can't look, so it would build one; but for kernels it does not know it never
    does.
    """
    AttentionInterface.register("photon_causal", sdpa_attention_forward)
    model.set_attn_implementation("photon_causal")


@contextmanager
def _model_errors(name: str, *, hub: bool = False) -> Iterator[None]:
    # What transformers raises is not one tree: OSError, ValueError, KeyError, SafetensorError, ...
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hint = "It was looked up on the Hugging Face hub."
        if type(error).__name__ == "SafetensorError":
            hint = "A weights file is cut or damaged; copy or download it again."
        elif not hub:
            hint = None
        raise ModelError(f"model {name!r} can't be loaded: {_gist(error)}", hint=hint) from error


def _gist(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    more = lines[0].endswith(":") and len(lines) > 1
    return f"{lines[0]} {lines[1].strip()}" if more else lines[0]
