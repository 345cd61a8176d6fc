"""Made-up texts, and texts prepared as silos: what tests of examinations read."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from photon.data import PreparedData, PrepareOptions, prepare

_ENGLISH = ["river", "harbour", "winter", "bread", "window", "letter", "garden", "market", "train"]
_ENGLISH += [
    "music",
    "doctor",
    "school",
    "bridge",
    "candle",
    "island",
    "forest",
    "kitchen",
    "paper",
]
_GERMAN = ["Fluss", "Hafen", "Winter", "Brief", "Garten", "Markt", "Zug", "Arzt", "Wald", "Berg"]


def sentences(number: int, words: int = 60) -> str:
    """English of a kind, another for each number."""
    draw = random.Random(number)
    told = (
        f"the {draw.choice(_ENGLISH)} and the {draw.choice(_ENGLISH)}" for _ in range(words // 5)
    )
    return ", ".join(told) + f", as it was in the year {number}."


def german(number: int) -> str:
    """Likewise."""
    draw = random.Random(number)
    told = (f"der {draw.choice(_GERMAN)} und nicht der {draw.choice(_GERMAN)}" for _ in range(12))
    return "Ich habe gesehen, wie " + ", ".join(told) + f" im Jahr {number} waren."


def prepare_texts(
    out: Path, tokenizer: Path, silos: dict[str, list[str]], held_out: Sequence[str] = ()
) -> PreparedData:
    """All texts to train on, by silo; `held_out` is the global held-out set."""
    texts = out.with_name(out.name + "-texts")
    texts.mkdir(parents=True)
    for split, by_silo in (("train", silos), ("test", {"held": held_out})):
        rows = [{"silo": silo, "text": text} for silo, all_of in by_silo.items() for text in all_of]
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (texts / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    options = PrepareOptions(
        input=[str(texts)],
        out=out,
        silo_field="silo",
        tokenizer=tokenizer,
        global_fraction=1e-9,
        silo_fraction=1e-9,
    )
    return prepare(options)
