"""Scores with one rank short of memory; prints which sizes this rank tried, and what came out."""

from __future__ import annotations

import json
import os
import sys

import torch

from photon.training import MicroBatch, Ranks, Seat, within_memory


def main() -> None:
    options = json.loads(sys.argv[1])
    room = options["room"][int(os.environ["RANK"])]
    device = torch.device("cpu")
    ranks = Ranks.join(Seat.from_environment(), device, collective_s=60)
    tried: list[int] = []

    def scored(sequences: int) -> int:
        tried.append(sequences)
        if sequences > room:
            raise torch.OutOfMemoryError("out of memory")
        return sequences

    given = within_memory(scored, MicroBatch(8), device, ranks)
    ranks.close()
    print(json.dumps({"tried": tried, "given": given}))


if __name__ == "__main__":
    main()
