"""Models: the paper's shapes, any Hugging Face causal LM, and the way back to Hugging Face."""

from photon.models.build import (
    HUB_PREFIX,
    attend_without_masks,
    build_model,
    build_skeleton,
    context_length,
    load_pretrained,
    require_document_masks,
    tokenizer_file_of,
)
from photon.models.export import export_model, license_of
from photon.models.generate import generate_tokens
from photon.models.head_loss import HeadLoss, rows_at_once, sequences_at_once
from photon.models.loss import held_out_loss, training_loss
from photon.models.parameters import (
    carried_tensors,
    hidden_matrices,
    model_fingerprint,
    trainable_parameters,
    transformer_blocks,
)
from photon.models.presets import SHAPES
