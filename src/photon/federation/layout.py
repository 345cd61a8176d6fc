"""The role of each tensor of a model: merged with others', kept by who trains it, or never trained.

Whatever needs names of tensors takes them from here: what travels each round is `merged`, what
travels once is `once`, and together they are all that a model's values are.
A run's models are built here, laid out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from photon.config import RunConfig
from photon.config.parts import REST, ROLES, PartsConfig, Role, share_of
from photon.data import PreparedData
from photon.errors import IncompatibleConfigError, ModelError, some
from photon.models import (
    build_model,
    build_skeleton,
    carried_tensors,
    require_document_masks,
    trainable_parameters,
)


@dataclass(frozen=True)
class Layout:
    """The role of each tensor that a model carries, by name, in the model's order."""

    roles: Mapping[str, Role]

    def named(self, *roles: Role) -> tuple[str, ...]:
        """Names of the tensors in these roles."""
        return tuple(name for name, role in self.roles.items() if role in roles)

    @cached_property
    def merged(self) -> tuple[str, ...]:
        """Names of what updates are made of."""
        return self.named("shared", "key")

    @cached_property
    def personal(self) -> tuple[str, ...]:
        """Names of what each silo trains for itself."""
        return self.named("personal")

    @cached_property
    def once(self) -> tuple[str, ...]:
        """Names of what a node is given once: frozen tensors, and what personal ones begin with."""
        return self.named("personal", "frozen")

    def once_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of those tensors, fp32 on the CPU.

        Raises:
            ModelError: one holds numbers that fp32 does not.
        """
        carried, found = carried_tensors(model), {}
        for name in self.once:
            tensor = carried[name].detach()
            found[name] = tensor.to("cpu", torch.float32, copy=True)
            if not torch.equal(found[name].to(tensor), tensor):
                raise ModelError(f"tensor {name!r} holds numbers that fp32 can't carry")
        return found


_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout_of(model: nn.Module) -> Layout:
    """As `lay_out` made it; of another model, what is trained is shared."""
    return _LAYOUTS[model] if model in _LAYOUTS else lay_out(model, PartsConfig())


def lay_out(model: nn.Module, parts: PartsConfig) -> Layout:
    """Give each tensor its role; parameters that become frozen want no gradients any more.

    Args:
        model: with or without weights; each model is laid out once.

    Raises:
        IncompatibleConfigError: a pattern names no tensor, two lists name the same one, or nothing
            is left to merge.
    """
    trained = trainable_parameters(model)
    named: dict[str, tuple[Role, str]] = {}
    rest: Role | None = None
    lists: list[tuple[Role, str]] = [(one, text) for one in ROLES for text in getattr(parts, one)]
    for role, pattern in lists:
        if pattern == REST:
            if rest not in (None, role):
                raise IncompatibleConfigError(f'parts.{rest} and parts.{role} both name "*"')
            rest = role
            continue
        for name in _matching(model, trained, role, pattern):
            other, by = named.setdefault(name, (role, pattern))
            if other != role:
                raise IncompatibleConfigError(
                    f"tensor {name!r} is named by parts.{other} ({by!r}) and by parts.{role} "
                    f"({pattern!r})",
                    hint='A tensor has one role; only "*" gives way to other lists.',
                )
    given: dict[str, Role] = {name: named.get(name, (rest or "shared", ""))[0] for name in trained}
    layout = Layout({name: given.get(name, "frozen") for name in carried_tensors(model)})
    if not layout.named("shared"):
        raise IncompatibleConfigError(
            "[parts] leaves no tensor shared",
            hint="federation.merging_rule merges what is shared; if all that is merged is in "
            "parts.key, name that rule there instead.",
        )
    for name in layout.named("frozen"):
        if name in trained:
            trained[name].requires_grad_(False)
    _LAYOUTS[model] = layout
    return layout


def require_own_rows(model: nn.Module, init: str) -> None:
    """For silos with vocabularies of their own, in each of which an id means other words.

    Raises:
        IncompatibleConfigError: embedding and head are not personal, or model.init is "pretrained".
    """
    network: Any = model
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    rows = {id(one) for end in ends if end is not None for one in end.parameters()}
    personal, carried = layout_of(model).personal, carried_tensors(model)
    left = [name for name in carried if id(carried[name]) in rows and name not in personal]
    if left or init == "pretrained":
        wrong = f"parts.personal does not name {some(map(repr, left))}"
        wrong = wrong if left else 'model.init = "pretrained" brings one for all'
        raise IncompatibleConfigError(
            f"each silo of the data has a vocabulary of its own, and {wrong}",
            hint="Make embedding and head personal, and model.init random; or prepare the data "
            "without --own-vocabulary.",
        )


def _matching(
    model: nn.Module, trained: Mapping[str, Tensor], role: Role, pattern: str
) -> Sequence[str]:
    """Names of trained tensors that a pattern or share means, at least one; of frozen, any."""
    if share := share_of(pattern):
        found = list(_in_share(trained, *share))
        words, hint = "is less than half of that end's one tensor", "Tensors are taken whole."
    else:
        found = [name for name in trained if fnmatchcase(name, pattern)]
        words, hint = "is the name of no trained tensor of this model", None
    every = model.state_dict(keep_vars=True)
    others = [name for name in every if fnmatchcase(name, pattern)]
    names = {id(tensor): name for name, tensor in trained.items()}
    tied = [name for name in others if id(every[name]) in names]
    if found or (role == "frozen" and others and not tied):
        return found
    if tied:
        hint = (
            f"{tied[0]!r} is the same tensor as {names[id(every[tied[0]])]!r} (tied embeddings): "
            "name that, and the embedding of tokens goes with it; or untie them "
            "(tie_word_embeddings = false in the model's config.json)."
        )
    elif others:
        hint = f"{some(map(repr, others))} is never trained, and so frozen."
    near = difflib.get_close_matches(pattern.strip("*"), trained, 3, cutoff=0.3) or trained
    raise IncompatibleConfigError(
        f"parts.{role} names {pattern!r}, which {words}",
        hint=hint or f"Its tensors are called {some(near)}.",
    )


def _in_share(trained: Mapping[str, Tensor], end: str, share: float) -> Iterator[str]:
    """Names of the tensors whose middle lies within the share of all trained parameters.

    So first:0.7 and last:0.3 are all of them, and none twice.
    """
    total, before = sum(one.numel() for one in trained.values()), 0
    for name, tensor in trained.items():
        middle = (before + tensor.numel() / 2) / total
        if (middle <= share) if end == "first" else (middle > 1 - share):
            yield name
        before += tensor.numel()


def initial_model(config: RunConfig, data: PreparedData) -> nn.Module:
    """The run's model with its initial weights.

    Raises:
        ModelError: it can't be built, or can't do what the run file asks of it.
    """
    model = build_model(
        config.model,
        vocab_size=data.vocab_size,
        sequence_length=config.data.sequence_length,
        eos_id=data.eos_id,
        seed=config.run.seed,
        attention=config.compute.attention,
    )
    lay_out(model, config.parts)
    if config.local.document_mask:
        require_document_masks(model, str(config.model.path or config.model.preset))
    return model


def empty_model(config: RunConfig, *, vocab_size: int, eos_id: int) -> nn.Module:
    """The run's model without weights: a task brings them. A model folder's are never read."""
    model = build_skeleton(
        config.model,
        vocab_size=vocab_size,
        sequence_length=config.data.sequence_length,
        eos_id=eos_id,
        attention=config.compute.attention,
    )
    lay_out(model, config.parts)
    return model
