"""The role of each tensor of a model: merged with others', kept by who trains it, or never trained.

Whatever needs names of tensors takes them from here: what travels each round is `merged`, what
travels once is `once`, and together they are all that a model's values are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from photon.config.parts import REST, ROLES, PartsConfig, Role, share_of
from photon.errors import IncompatibleConfigError, ModelError, some
from photon.models import carried_tensors, trained_names


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
    if model not in _LAYOUTS:
        trained = set(trained_names(model))
        roles: dict[str, Role] = {
            name: "shared" if name in trained else "frozen" for name in carried_tensors(model)
        }
        _LAYOUTS[model] = Layout(roles)
    return _LAYOUTS[model]


def lay_out(model: nn.Module, parts: PartsConfig) -> Layout:
    """Give each tensor its role; parameters that become frozen want no gradients any more.

    Args:
        model: with or without weights; each model is laid out once.

    Raises:
        IncompatibleConfigError: a pattern names no tensor, two lists name the same one, or nothing
            is left to merge.
    """
    trained = {name: model.get_parameter(name) for name in trained_names(model)}
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


def _matching(
    model: nn.Module, trained: Mapping[str, Tensor], role: Role, pattern: str
) -> Sequence[str]:
    """Names of trained tensors that a pattern or share means, at least one; of frozen, any."""
    share = share_of(pattern)
    if share is not None:
        found = list(_in_share(trained, *share))
        if not found:
            raise IncompatibleConfigError(
                f"parts.{role} names {pattern!r}, which is less than half of that end's one tensor",
                hint="Tensors are taken whole, where more than half of one is within the share. "
                "`photon doctor RUN.toml` lists them.",
            )
        return found
    found = [name for name in trained if fnmatchcase(name, pattern)]
    by_nature = [name for name in carried_tensors(model) if fnmatchcase(name, pattern)]
    if found or (role == "frozen" and by_nature):
        return found
    words, hint = _no_such(model, trained, role, pattern, by_nature)
    raise IncompatibleConfigError(words, hint=hint)


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


def _no_such(
    model: nn.Module,
    trained: Mapping[str, Tensor],
    role: Role,
    pattern: str,
    by_nature: Sequence[str],
) -> tuple[str, str]:
    """Why a pattern means no trained tensor, and what may be meant."""
    words = f"parts.{role} names {pattern!r}, but no trained tensor of this model is called so"
    if by_nature:
        return words, f"{some(map(repr, by_nature), 3)} is never trained, and so frozen."
    first = {id(one): name for name, one in trained.items()}
    for alias, tensor in model.state_dict(keep_vars=True).items():
        if fnmatchcase(alias, pattern) and id(tensor) in first:
            return words, (
                f"{alias!r} is the same tensor as {first[id(tensor)]!r} (tied embeddings): name "
                "that, and the embedding of tokens goes with it; or untie them "
                "(tie_word_embeddings = false in the model's config.json)."
            )
    near = difflib.get_close_matches(pattern.strip("*"), trained, 3, cutoff=0.3)
    return words, f"Its tensors are called {some(near or trained, 3)}."
