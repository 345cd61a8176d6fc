"""A cohort in this process: members with folders of their own, and who adds their updates up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from photon.compression import build_codec
from photon.secure.aggregator import SecureSum, require_dealt
from photon.secure.documents import Advert, Call, Closing, Cohort, Dealt, Member, Revealed, read
from photon.secure.fixed_point import FixedPoint, bits_for
from photon.secure.member import Party, Seal

SHAPES = {"weights/matrix": (137, 111), "weights/vector": (501,)}
RANGES = {"weights/matrix": 0.25, "weights/vector": 1.5}


def names_of(count: int) -> list[str]:
    return [f"silo-{index:02d}" for index in range(count)]


def update_of(name: str, scale: float = 0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(name.encode()))
    return {one: scale * torch.randn(shape, generator=draw) for one, shape in SHAPES.items()}


class Round:
    """One attempt at a round, a phase at a time; who is not named in one has dropped out."""

    def __init__(
        self, folder: Path, names, *, number=1, attempt=1, weights=None, floor=3, clip=None
    ) -> None:
        self.noise = None
        self.noised = {"clip": clip, "counted": True, "bits": 16} if clip else {}
        self.folder, self.number, self.attempt = folder, number, attempt
        self.names, self.floor = list(names), floor
        self.weights = dict(weights or dict.fromkeys(names, 1))
        self.told: list[str] = []

    def ask(self, name, phase, document, kind):
        return read(Party(self.folder / name, name).answer(phase, document.text), kind, name)

    def advertise(self, names=None) -> None:
        call = Call(run="run", round=self.number, attempt=self.attempt)
        self.adverts = {
            name: self.ask(name, "advertise", call, Advert) for name in names or self.names
        }
        self.cohort = self.cohort_of(self.adverts)

    def cohort_of(self, adverts, **changes) -> Cohort:
        members = [
            Member(name=name, weight=self.weights[name], steps=2, advert=adverts[name])
            for name in sorted(adverts)
        ]
        about = {"run": "run", "round": self.number, "attempt": self.attempt, "floor": self.floor}
        about |= {"question": "0" * 64, "bits": bits_for(len(members)), "ranges": RANGES}
        return Cohort(**about | self.noised | changes, members=members)

    def share(self, names=None) -> None:
        """Where others than these deal nothing, as another attempt without them."""
        self.dealt = {}
        for name in names or self.cohort.names:
            dealt = self.ask(name, "share", self.cohort, Dealt)
            require_dealt(self.cohort, name, dealt)
            self.dealt[name] = dealt
        if len(self.dealt) < len(self.cohort.names):
            self.attempt += 1
            self.advertise(list(self.dealt))
            self.share()
        self.sum = SecureSum(self.cohort, SHAPES)

    def sealed(self, name, update=None, *, within=True) -> dict[str, torch.Tensor]:
        """A member's masked update, as it comes out of a parcel."""
        seal = Seal(self.folder / name, name, self.cohort.text)
        update, self.count = update or update_of(name), seal.count(within=within)
        parts = {one: seal.encode(one, tensor)[0] for one, tensor in update.items()}
        seal.leave(parts.values())
        codec = build_codec(seal.codec)
        return {one: codec.decode(part, SHAPES[one]) for one, part in parts.items()}

    def collect(self, names=None) -> None:
        for name in names or self.cohort.names:
            update = self.sealed(name)
            assert self.sum.add(name, update.items()) is None

    def closing(self, survivors=None) -> Closing:
        return Closing(cohort=self.cohort, survivors=sorted(survivors or self.sum.survivors))

    def unmask(self, names=None) -> dict[str, torch.Tensor]:
        self.revealed = {
            name: self.ask(name, "unmask", self.closing(), Revealed)
            for name in names or self.sum.survivors
        }
        return self.opened()

    def opened(self) -> dict[str, torch.Tensor]:
        self.sum.open(self.dealt, self.revealed, self.told.append, self.noise)
        return dict(self.sum.mean())

    def plain(self, names) -> dict[str, torch.Tensor]:
        """The fixed-point mean of these members' updates, with no mask anywhere."""
        numbers, mean = FixedPoint.of(self.cohort), {}
        for tensor, shape in SHAPES.items():
            words = np.zeros(int(np.prod(shape)), np.uint16)
            for name in names:
                update, weight = update_of(name)[tensor], self.weights[name]
                whole, _ = numbers.whole(update, weight, RANGES[tensor])
                words += whole.numpy().view(np.uint16)
            weight = sum(self.weights[name] for name in names)
            mean[tensor] = numbers.mean(words, weight, RANGES[tensor]).view(shape)
        return mean


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
