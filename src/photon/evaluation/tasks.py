"""Tasks for lm-evaluation-harness: made from held-out text, or its own by name."""

# An extra's, and missing where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import random
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib.resources import files
from typing import Any

import numpy as np

from photon.data import PreparedData, held_out_text, load_tokenizer
from photon.errors import DataError, InvalidValueError, MachineError

#: Most and fewest examples of a task, and most tokens of text that they are looked for in.
_MOST, _LEAST, _MOST_TOKENS, _WINDOW = 1000, 20, 2_000_000, 2048
#: Words of a passage, the last one not counted.
_PASSAGE = range(15, 61)
#: The harness's own, so that examples before a question are those of everybody.
_FEWSHOT_SEED = 1234
#: A word that ends a sentence.
_LAST_WORD = re.compile(r" ([^\W\d_]{3,})[.!?](?=\s|$)")
#: A term of few words, and after a mark or on the next line what it means: "Flask, n. A bottle",
#: "flask (noun): a bottle". An origin in brackets and the number of a first meaning are neither.
_ENTRY = re.compile(
    r"(?P<term>[^\W\d_][^\n.:;?!\"]{1,50}?)(?:[.:] |\n)"
    r"(?:\[[^\]]*\]\s*)?(?:1\. )?(?P<meaning>[A-Za-z(][^\n]{30,})"
)


def paragraphs(data: PreparedData) -> Iterator[str]:
    """Whole ones of the global held-out text, an even sample where there is much of it."""
    decode = load_tokenizer(data.tokenizer_file.parent).tokenizer.decode_batch
    for window in held_out_text(data, None).windows(_WINDOW, _MOST_TOKENS):
        ends = np.flatnonzero(window.tokens == data.eos_id) + 1
        texts = decode([piece.tolist() for piece in np.split(window.tokens, ends)])
        # What the window cuts is left out.
        yield from "\n\n".join(texts).split("\n\n")[1:-1]


def cloze(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Passages that end with a sentence, less their last word (as LAMBADA, arXiv 1606.06031)."""
    found = []
    for text in texts:
        ends = list(_LAST_WORD.finditer(text))
        whole = [one for one in ends if len(text[: one.start()].split()) in _PASSAGE]
        if whole:
            found.append({"passage": text[: whole[-1].start()], "word": whole[-1][1]})
    return found


def definitions(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Terms, each with its meaning among those of three others."""
    meanings: dict[str, str] = {}
    for text in texts:
        if (entry := _ENTRY.match(text)) and len(entry["term"].split()) <= 5:
            meaning = re.split(r"[.;] ", entry["meaning"])[0].rstrip(". ")
            meanings.setdefault(entry["term"], meaning)
    draw, every = random.Random(0), sorted(set(meanings.values()))
    found = []
    for term, meaning in meanings.items() if len(every) > 3 else ():
        choices = [one for one in draw.sample(every, 4) if one != meaning][:3]
        place = draw.randrange(4)
        choices.insert(place, meaning)
        found.append({"term": f"{term}:", "choices": choices, "right": place})
    return found


#: Tasks that are made from held-out text.
MADE = {"cloze": cloze, "definitions": definitions}


def run_tasks(
    model: str, names: Sequence[str], data: PreparedData | None, device: str
) -> dict[str, dict[str, Any]]:
    """Scores of a Hugging Face model, by task: "examples", and each metric with its "_stderr".

    Args:
        names: of MADE, or the harness's own, whose text it fetches from Hugging Face's hub.
        data: whose held-out text tasks are made from.

    Raises:
        DataError: `data` is needed, or has too little text of that sort.
        InvalidValueError, MachineError: no task is called so; its text can't be fetched.
        ModuleNotFoundError: lm_eval is not installed (the extra "tasks").
    """
    from datasets import Dataset
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    told = tomllib.loads(
        files("photon.evaluation").joinpath("tasks.toml").read_text(encoding="utf-8")
    )
    specs: list[Any] = [*{*names} - MADE.keys()]
    for name in MADE.keys() & {*names}:
        made = {"test": Dataset.from_list(_examples(name, data))}
        specs.append({"task": name, **told[name], "custom_dataset": lambda _made=made, **_: _made})
    try:
        # Its own are thousands of files, read one by one.
        tasks = TaskManager(include_defaults=not MADE.keys() >= {*names}).load(specs)
    except KeyError as error:
        raise InvalidValueError(
            f"no task is called so: {error.args[0]}",
            hint=f"There are {', '.join(MADE)}, and those that `lm-eval ls tasks` lists.",
        ) from error
    except OSError as error:
        raise MachineError(
            f"can't fetch the text of {', '.join(names)}: {str(error)[:200]}",
            hint=f"It is on Hugging Face's hub. {', '.join(MADE)} need --data alone.",
        ) from error
    for task in tasks["tasks"].values():  # as the harness's own command does
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    network = HFLM(pretrained=model, device=device, batch_size=16)
    with redirect_stdout(sys.stderr):
        found: Any = evaluate(network, tasks, bootstrap_iters=1000, log_samples=False)
    scores: dict[str, dict[str, Any]] = {}
    for name, values in sorted(found["results"].items()):
        scores[name] = {"examples": found["n-samples"].get(name, {}).get("effective")}
        figures = {key: value for key, value in values.items() if isinstance(value, float)}
        scores[name] |= {key.removesuffix(",none"): value for key, value in figures.items()}
    return scores


def _examples(name: str, data: PreparedData | None) -> list[dict[str, Any]]:
    if data is None:
        raise DataError(f"the task {name} is made from held-out text", hint="Say --data DIR.")
    found = MADE[name](paragraphs(data))
    if len(found) < _LEAST:
        raise DataError(
            f"the held-out text of {data.path} gives {len(found)} examples of the task {name}; at "
            f"least {_LEAST} are needed",
            hint="cloze needs sentences, definitions a dictionary's entries, a paragraph each.",
        )
    return found[:: -(-len(found) // _MOST)]
