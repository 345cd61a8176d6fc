"""Trees of federations against what they are said to beat (WorldLM, arXiv 2405.14446).

    python benchmarks/worldlm.py --corpus DIR --work DIR [--tree languages] [--seeds 3]
        [--method NAME ...] [--broken] [--iid] [--out FILE]

DIR has zstd-compressed JSON Lines, one file for each leaf of TREES. All methods take as many steps,
at the same rates; flat federations take as many in sequence as trees. A leaf is scored with the
model it would go on with, on held-out text of its own. Every run is a folder under --work: begun
again, the command goes on where it stopped, and what is there is not run again.

--broken cuts the groups across the grain: the second members of all groups are passed on by one.
--iid deals all leaves' documents out at random.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
from pathlib import Path

import zstandard

from codec_quality import small_llama
from photon.config import RunConfig, parse_run_config
from photon.data import PrepareOptions, open_data, prepare
from photon.runs import read_summary, resume, simulate, train
from trainer import machine, table

#: By tree: groups, and the files of their leaves.
TREES: dict[str, dict[str, list[str]]] = {
    "languages": {
        "german": ["lang/packages-de", "lang/guide-de"],
        "french": ["lang/packages-fr", "lang/wiki-fr"],
        "italian": ["lang/packages-it", "lang/guide-it"],
        "spanish": ["lang/wiki-es", "lang/guide-es"],
    },
    "genres": {
        "manuals": ["softwaredocs", "kernel"],
        "software": ["packages", "code"],
        "prose": ["literature", "gamefiction"],
        "public": ["speeches", "essays"],
        "reference": ["wiki", "dictionary"],
    },
}

_KEY = {"key": ["last:0.3"]}
#: By method: [parts], and whether it is a tree; None: no federation.
METHODS: dict[str, tuple[dict, bool] | None] = {
    "flat FL": ({}, False),
    "HierFAVG": ({}, True),
    "FedPer": ({"personal": ["last:0.3"]}, False),
    "FedPer in the tree": ({"personal": ["last:0.3"]}, True),
    "attention": ({**_KEY, "key_rule": "attention", "key_down": "attention"}, True),
    "mean in attention's place": ({**_KEY, "key_down": "mean"}, True),
    "attention up, own kept": ({**_KEY, "key_rule": "attention", "key_down": "keep"}, True),
    "best of three": ({**_KEY, "key_rule": "attention", "key_down": "best"}, True),
    "FedAtt": ({**_KEY, "key_rule": "fedatt"}, True),
    "local only": None,
    "centralised": None,
}


def texts(corpus: Path, folder: Path, names: list[str], most_bytes: int) -> Path:
    """A folder of each leaf with the beginning of its file, as JSON Lines."""
    for name in names:
        leaf = folder / _leaf(name)
        if leaf.exists():
            continue
        leaf.mkdir(parents=True)
        with (corpus / f"{name}.jsonl.zst").open("rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file)
            lines = io.TextIOWrapper(reader, encoding="utf-8")
            taken = 0
            with (leaf / "text.jsonl").open("w", encoding="utf-8") as out:
                for line in lines:
                    out.write(line)
                    taken += len(line.encode())
                    if taken > most_bytes:
                        break
    return folder


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]


def groups_of(tree: str, *, broken: bool) -> dict[str, list[str]]:
    groups = {name: [_leaf(leaf) for leaf in leaves] for name, leaves in TREES[tree].items()}
    if broken:
        second = [leaves[1] for leaves in groups.values()]
        for leaves, other in zip(groups.values(), second[1:] + second[:1], strict=True):
            leaves[1] = other
    return groups


def config_of(options: argparse.Namespace, data: Path, model: Path, seed: int, method: str):
    parts, in_tree = METHODS[method] or ({}, False)
    federation: dict = {"rounds": options.rounds, "optimizer_state": "keep"}
    silos = sorted(open_data(data).silos)
    if in_tree:
        groups = groups_of(options.tree, broken=options.broken)
        if options.iid:
            size = len(silos) // len(groups)
            groups = {name: silos[k * size :][:size] for k, name in enumerate(groups)}
        children = {name: {"silos": leaves, "rounds": 2} for name, leaves in groups.items()}
        federation["children"] = children
    return parse_run_config(
        {
            "run": {"seed": seed, "keep_checkpoints": 1, "log_every": 1000},
            "model": {"path": str(model)},
            "data": {"path": str(data), "sequence_length": options.sequence_length},
            "compute": {"threads": 1},
            "parts": parts,
            "federation": federation,
            "local": {
                "steps": options.steps,
                "batch_size": options.batch_size,
                "lr": options.lr,
                "warmup_steps": options.steps,
            },
            "eval": {"every": 0, "max_tokens": options.eval_tokens},
        }
    )


def scores(folder: Path, config: RunConfig, silos: list[str] | None = None) -> dict[str, float]:
    """Perplexity by leaf of a run, which is done, taken up, or there already."""
    summary = read_summary(folder)
    if summary is None:
        if (folder / "run.json").exists():
            result = resume(folder)
        elif silos is not None:
            result = train(config, silos=silos, run_dir=folder)
        else:
            result = simulate(config, run_dir=folder)
        summary = result.summary
    return summary["per_silo"]


def leaves_of(options: argparse.Namespace, data: Path, model: Path, seed: int, method: str):
    """A method's perplexity on each leaf's held-out text."""
    kind = "iid" if options.iid else "broken" if options.broken else "natural"
    name = f"{options.tree}-{kind}-{method.replace(' ', '-').replace(chr(39), '')}-{seed}"
    config = config_of(options, data, model, seed, method)
    silos = sorted(open_data(data).silos)
    if method == "centralised":
        return scores(options.work / name, config, silos)
    if method == "local only":
        alone = {silo: scores(options.work / f"{name}-{silo}", config, [silo]) for silo in silos}
        return {silo: told[silo] for silo, told in alone.items()}
    return scores(options.work / name, config)


def measure(options: argparse.Namespace) -> str:
    files = [name for leaves in TREES[options.tree].values() for name in leaves]
    text = texts(options.corpus, options.work / f"text-{options.tree}", files, options.leaf_bytes)
    data = options.work / f"data-{options.tree}-{'iid' if options.iid else 'leaves'}"
    if not (data / "manifest.json").exists():
        how = {"iid": len(files)} if options.iid else {"silo_folders": True}
        prepare(PrepareOptions(input=text, out=data, vocab_size=options.vocabulary, **how))
    model = options.work / "model"
    if not model.exists():
        small_llama(model, options.width, options.layers, open_data(data).vocab_size)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(1, options.seeds + 1):
        for method in options.method or METHODS:
            found.setdefault(method, []).append(leaves_of(options, data, model, seed, method))
            print(f"{method}, seed {seed}: {_mean(found[method][-1]):.2f}", flush=True)
    return report(options, found)


def _mean(told: dict[str, float]) -> float:
    """Of the leaves, geometric: as of their losses."""
    return math.exp(statistics.fmean(math.log(one) for one in told.values()))


def report(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> str:
    leaves = sorted(next(iter(found.values()))[0])
    rows = []
    for method, seeds in found.items():
        means = [_mean(one) for one in seeds]
        spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
        per_leaf = [f"{statistics.fmean(one[leaf] for one in seeds):.1f}" for leaf in leaves]
        rows.append([method, f"{statistics.fmean(means):.2f}{spread}", *per_leaf])
    kind = "IID text" if options.iid else "broken clusters" if options.broken else "natural"
    left = [method for method in METHODS if method not in found]
    return "\n".join(
        [
            f"{options.tree}, {kind}, {len(next(iter(found.values())))} seed(s); {machine()}",
            f"{options.rounds} rounds of {options.steps} steps, {options.layers} layers of "
            f"{options.width}; perplexity, geometric mean of leaves",
            "",
            table(["method", "mean", *leaves], rows),
            "",
            f"Not run: {', '.join(left) or 'nothing'}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="runs are kept here")
    parser.add_argument("--tree", choices=list(TREES), default="languages")
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--leaf-bytes", type=int, default=1_200_000)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--broken", action="store_true")
    which.add_argument("--iid", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = measure(options)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
