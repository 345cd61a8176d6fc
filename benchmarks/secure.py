"""What secure aggregation costs: bytes, masking, opening and memory, without training.

    python benchmarks/secure.py --model tiny --silos 8

A member's side is timed on one silo (`Seal.encode` of a whole update, and the masks in it alone)
beside `int8` of the same tensors in the same run; the aggregator's side is a whole round: every
silo's phases, sums and opening, two silos dropped before they send. One thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from photon.compression import build_codec
from photon.compression.codec import bytes_of
from photon.config import ModelConfig
from photon.models import build_skeleton, trainable_parameters
from photon.secure.aggregator import SecureSum
from photon.secure.documents import Advert, Call, Closing, Cohort, Dealt, Member, Revealed, read
from photon.secure.fixed_point import bits_for
from photon.secure.masks import Masks
from photon.secure.member import Party, Seal

VOCABULARY = {"tiny": 2048, "125m": 50_368}


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    skeleton = build_skeleton(
        ModelConfig(preset=model), vocab_size=VOCABULARY[model], sequence_length=128, eos_id=0
    )
    return {name: tuple(one.shape) for name, one in trainable_parameters(skeleton).items()}


def update_of(shapes, seed: int):
    draw = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        yield name, 1e-3 * torch.randn(shape, generator=draw)


class Masking:
    """Seconds in `Masks.add`."""

    def __init__(self) -> None:
        self.seconds, plain = 0.0, Masks.add

        def timed(*given) -> None:
            started = time.perf_counter()
            plain(*given)
            self.seconds += time.perf_counter() - started

        Masks.add = timed


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=VOCABULARY, default="tiny")
    parser.add_argument("--silos", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shapes, names = shapes_of(given.model), [f"silo-{i:03d}" for i in range(given.silos)]
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    found: dict[str, float] = {"parameters": values, "silos": given.silos}
    with tempfile.TemporaryDirectory() as folder:
        round_trip(Path(folder), shapes, names, found)
    print(json.dumps({key: round(value, 4) for key, value in found.items()}, indent=1))


def int8_of(shapes) -> tuple[int, float]:
    """Bytes, and the best of three times."""
    codec, seconds, size = build_codec("int8"), [], 0
    for _ in range(3):
        size, taken = 0, 0.0
        for _, tensor in update_of(shapes, 0):
            started = time.perf_counter()
            parts = codec.encode(tensor)
            taken += time.perf_counter() - started
            size += bytes_of(parts)
        seconds.append(taken)
    return size, min(seconds)


def round_trip(folder: Path, shapes, names, found) -> None:
    def ask(name, phase, document, kind):
        return read(Party(folder, name).answer(phase, document.text), kind, name)

    started = time.perf_counter()
    call = Call(run="bench", round=1, attempt=1)
    members = [
        Member(name=name, weight=1, steps=1, advert=ask(name, "advertise", call, Advert))
        for name in names
    ]
    cohort = Cohort(
        run="bench", round=1, attempt=1, question="0" * 64, bits=bits_for(len(names)), floor=3,
        members=members, ranges=dict.fromkeys(shapes, 4e-3),
    )  # fmt: skip
    dealt = {name: ask(name, "share", cohort, Dealt) for name in names}
    found["keys and shares, s, all silos"] = time.perf_counter() - started
    found["bytes of documents, a silo"] = len(cohort.text) + len(dealt[names[0]].text)

    int8_bytes, int8_s = int8_of(shapes)
    timed = Masking()
    best: list[tuple[float, float]] = []
    for _ in range(3):
        seal, timed.seconds, taken, sent = Seal(folder, names[0], cohort.text), 0.0, 0.0, 0
        for name, tensor in update_of(shapes, 0):
            started = time.perf_counter()
            parts, _ = seal.encode(name, tensor)
            taken += time.perf_counter() - started
            sent += bytes_of(parts)
        best.append((taken, timed.seconds))
    whole, masking = min(best)
    found |= {"int8 encode, s": int8_s, "seal, s": whole, "masks in it, s": masking}
    found |= {"masks / int8 encode": masking / int8_s, "seal / int8 encode": whole / int8_s}
    found |= {"bytes": sent, "bytes / int8": sent / int8_bytes, "bits a value": cohort.bits}
    total, codec, adding = SecureSum(cohort, shapes), build_codec(f"ring(bits={cohort.bits})"), 0.0
    before = peak_mib()
    for index, name in enumerate(names[:-2]):
        seal, sealed = Seal(folder, name, cohort.text), {}  # the last one's is let go first
        for one, tensor in update_of(shapes, index):
            sealed[one] = seal.encode(one, tensor)[0]

        tensors = ((one, codec.decode(parts, shapes[one])) for one, parts in sealed.items())
        started = time.perf_counter()
        assert total.add(name, tensors) is None
        del tensors
        adding += time.perf_counter() - started
        if index == 1:
            found["peak MiB after 2 updates"] = peak_mib()
    found["peak MiB after all updates"] = peak_mib()
    found["peak MiB before"] = before
    started = time.perf_counter()
    closing = Closing(cohort=cohort, survivors=sorted(total.survivors))
    revealed = {name: ask(name, "unmask", closing, Revealed) for name in total.survivors}
    found["unmask, s, all silos"] = time.perf_counter() - started
    started = time.perf_counter()
    total.open(dealt, revealed, print)
    found |= {"add, s, an update": adding / len(total.survivors)}
    found["open, s"] = time.perf_counter() - started


if __name__ == "__main__":
    main()
