"""Some tensors merged by a rule of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from photon.aggregation.check import Named
from photon.aggregation.rule import MergingRule

_KEY = "key/"


class KeyedRule(MergingRule):
    """Key tensors by one rule, the rest by another; both are told the norm of the whole update.

    Memory: the key tensors of one update, beside what the rules hold.

    Args:
        rule: of the rest, of which every update has some.
        key_rule: of key tensors.
        names: of key tensors.
    """

    def __init__(self, rule: MergingRule, key_rule: MergingRule, names: Collection[str]) -> None:
        self._rule = rule
        self._key_rule = key_rule
        self._names = frozenset(names)

    def refuse(self, norm: float) -> str | None:
        return self._rule.refuse(norm) or self._key_rule.refuse(norm)

    def add(self, tensors: Named, weight: float, norm: float) -> None:
        keys: list[tuple[str, Tensor]] = []

        def rest() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                if name not in self._names:
                    yield name, tensor
                else:  # copied, as it is valid until the next one only
                    keys.append((name, tensor.clone()))

        self._rule.add(rest(), weight, norm)
        self._key_rule.add(keys, weight, norm)

    def result(self) -> dict[str, Tensor]:
        return self._rule.result() | self._key_rule.result()

    def discard(self) -> None:
        self._rule.discard()
        self._key_rule.discard()

    def state_tensors(self) -> dict[str, Tensor]:
        keys = self._key_rule.state_tensors()
        return self._rule.state_tensors() | {_KEY + name: one for name, one in keys.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        keys = {name: one for name, one in tensors.items() if name.startswith(_KEY)}
        self._key_rule.load_state_tensors({name[len(_KEY) :]: one for name, one in keys.items()})
        self._rule.load_state_tensors({n: one for n, one in tensors.items() if n not in keys})
