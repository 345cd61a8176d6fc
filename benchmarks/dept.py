"""A vocabulary for each silo against one for all (DEPT, arXiv 2410.05021), in bits per byte.

    python benchmarks/dept.py --corpus DIR --work DIR [--seeds 3] [--out results/FILE.md]
    python benchmarks/dept.py --text FOLDER --work DIR --quick

DIR has zstd-compressed JSON Lines, one file for each of LEAVES; FOLDER a folder of text for each
silo. Four ways, from the same seed and, but for the last, for as many steps of as many tokens:

- own: each silo has a vocabulary, embedding and head of its own; the body is shared (DEPT's SPEC).
- local: one vocabulary for all; embedding and head are each silo's own (FedPer on both ends).
- shared: one vocabulary, and one model: plain FedAvg.
- longer: as local, with so many more steps a round that as much text is read as by own.

Each leaf is scored on all its held-out text with the model that it would go on with. Bits per byte
are nats / ln 2 / bytes of the text: tokens of two vocabularies don't compare. Where a token stands
for more text, the same steps read more of it, which is part of what is measured; bytes read are in
the table. Every run is a folder under --work, and what is there is not run again. Of two ways one
is better where it is so for every seed, three at least, and the mean difference of the leaves' mean
exceeds twice its standard error (worldlm.py has the rule).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
from pathlib import Path

import zstandard

from codec_quality import small_llama
from photon.config import RunConfig, parse_run_config
from photon.data import PrepareOptions, held_out_text, open_data, prepare
from photon.runs import read_summary, resume, simulate
from photon.telemetry import read_history
from photon.telemetry.events import Evaluated
from trainer import machine, table
from worldlm import verdict

#: Languages, in three scripts.
LEAVES = ("packages-de", "packages-ja", "packages-ru", "wiki-es")
_ENDS = ["*embed_tokens*", "lm_head*"]
#: By way: whether silos have vocabularies of their own, and what is personal.
WAYS: dict[str, tuple[bool, list[str]]] = {
    "own": (True, _ENDS),
    "local": (False, _ENDS),
    "shared": (False, []),
    "longer": (False, _ENDS),
}


def text_of(options: argparse.Namespace) -> Path:
    """A folder for each leaf with the beginning of its file, as JSON Lines."""
    if options.text is not None:
        return options.text
    folder: Path = options.work / "text"
    for name in LEAVES:
        leaf, file = folder / name, options.corpus / f"lang/{name}.jsonl.zst"
        if (leaf / "text.jsonl").exists():
            continue
        leaf.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as raw:
            reader = zstandard.ZstdDecompressor().stream_reader(raw)
            lines, left = [], options.leaf_bytes
            for line in io.TextIOWrapper(reader, encoding="utf-8"):
                left -= len(line.encode())
                if left < 0:
                    break
                lines.append(line)
        (leaf / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def data_of(options: argparse.Namespace, own: bool) -> Path:
    data: Path = options.work / ("data-own" if own else "data-one")
    if not (data / "manifest.json").exists():
        one = {"silo_folders": True, "vocab_size": options.vocabulary, "own_vocabulary": own}
        prepare(PrepareOptions(input=text_of(options), out=data, **one))
    return data


def config_of(options: argparse.Namespace, way: str, seed: int, model: Path) -> RunConfig:
    own, personal = WAYS[way]
    steps = options.steps
    if way == "longer":
        steps = round(steps * _text_per_token(options, True) / _text_per_token(options, False))
    return parse_run_config(
        {
            "run": {"seed": seed, "keep_checkpoints": 1, "log_every": 1000},
            "model": {"path": str(model)},
            "data": {"path": str(data_of(options, own)), "sequence_length": 128},
            "compute": {"threads": 1},
            "parts": {"personal": personal},
            "federation": {"rounds": options.rounds, "optimizer_state": "keep"},
            "local": {
                "steps": steps,
                "batch_size": options.batch_size,
                "optimizer": "muon",
                "lr": options.lr,
                "warmup_steps": options.steps,
            },
            "eval": {"every": 0, "per_silo": True},
        }
    )


def scores(options: argparse.Namespace, way: str, seed: int, model: Path) -> dict[str, float]:
    """Bits per byte by leaf of a run, which is done, taken up, or there already."""
    folder = options.work / f"{way}-{seed}"
    if read_summary(folder) is None:
        if (folder / "run.json").exists():
            resume(folder)
        else:
            simulate(config_of(options, way, seed, model), run_dir=folder)
    told = {one.silo: one.bits_per_byte for one in read_history(folder).of(Evaluated) if one.silo}
    return {leaf: told[leaf] or 0.0 for leaf in sorted(told)}


def bytes_per_token(options: argparse.Namespace, own: bool) -> dict[str, float]:
    """Of each leaf's held-out text, as its vocabulary cuts it."""
    data, found = open_data(data_of(options, own), own_vocabularies=True), {}
    for silo in sorted(data.silos):
        windows = list(held_out_text(data, silo).windows(128, None))
        tokens = sum(len(one.tokens) - 1 for one in windows)
        found[silo] = sum(one.bytes for one in windows) / tokens
    return found


def _text_per_token(options: argparse.Namespace, own: bool) -> float:
    return statistics.fmean(bytes_per_token(options, own).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--text", type=Path, help="in the place of a corpus")
    parser.add_argument("--work", type=Path, required=True, help="runs are kept here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--leaf-bytes", type=int, default=1_500_000)
    parser.add_argument("--quick", action="store_true", help="a small one, to see that it runs")
    parser.add_argument("--out", type=Path, help="the report; beside it .json with every score")
    options = parser.parse_args()
    if (options.corpus is None) == (options.text is None):
        parser.error("name --corpus or --text")
    if options.quick:
        options.seeds, options.rounds, options.steps, options.vocabulary = 1, 2, 2, 300
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.work / "model"
    if not model.exists():
        small_llama(model, options.width, options.layers, options.vocabulary)
    found: dict[str, dict[int, dict[str, float]]] = {way: {} for way in WAYS}
    for seed, way in itertools.product(range(1, options.seeds + 1), WAYS):
        found[way][seed] = scores(options, way, seed, model)
        print(f"{way}, seed {seed}: {statistics.fmean(found[way][seed].values()):.4f}", flush=True)
    text = report(options, found)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def report(options: argparse.Namespace, found: dict[str, dict[int, dict[str, float]]]) -> str:
    leaves = list(next(iter(found["own"].values())))
    means = {
        way: [statistics.fmean(one.values()) for one in seeds.values()]
        for way, seeds in found.items()
    }
    rows = []
    for way, seeds in found.items():
        spread = f" ± {statistics.stdev(means[way]):.4f}" if len(seeds) > 1 else ""
        each = [statistics.fmean(one[leaf] for one in seeds.values()) for leaf in leaves]
        mean = f"{statistics.fmean(means[way]):.4f}{spread}"
        rows.append([way, str(len(seeds)), mean, *(f"{one:.4f}" for one in each)])
    tokens = options.rounds * options.steps * options.batch_size * 128
    read = []
    for own in (True, False):
        sizes = bytes_per_token(options, own)
        which = "own" if own else "one for all"
        kilobytes = statistics.fmean(sizes.values()) * tokens / 1000
        read.append([which, *(f"{sizes[leaf]:.2f}" for leaf in leaves), f"{kilobytes:,.0f}"])
    pairs = []
    for one, other in itertools.combinations(("own", "longer", "local", "shared"), 2):
        by_seed = [a - b for a, b in zip(means[one], means[other], strict=True)]
        away = statistics.fmean(by_seed) / statistics.fmean(means[other])
        each = ", ".join(f"{difference:+.4f}" for difference in by_seed)
        pairs.append([f"{one} against {other}", f"{away:+.1%}", each, verdict(by_seed)])
    lines = [
        machine(),
        f"{options.rounds} rounds of {options.steps} steps of {options.batch_size} sequences of "
        f"128 tokens a silo; Llama of {options.layers} layers of {options.width}, "
        f"{options.vocabulary} tokens a vocabulary, muon at {options.lr:g}, {len(leaves)} silos. "
        "Bits per byte on all held-out text of each leaf's own, of the model that it would go on "
        "with; ± standard deviation of seeds.",
        "",
        table(["way", "seeds", "mean", *leaves], rows),
        "",
        "Bytes of held-out text for each token, and kilobytes of text read by a silo, about:",
        "",
        table(["vocabulary", *leaves, "read"], read),
        "",
        table(["", "mean", "by seed", "so it is"], pairs),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
