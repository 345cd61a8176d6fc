"""Trees of federations against what they are said to beat (WorldLM, arXiv 2405.14446).

    python benchmarks/worldlm.py --corpus DIR --work DIR [--tree NAME] [--kind NAME] [--method NAME]
        [--seeds 3] [--known results/FILE.json] [--report] [--out results/FILE.md]

DIR has zstd-compressed JSON Lines, one file for each leaf of TREES. All methods take as many steps
in sequence, at the same rates; a leaf is scored with the model that it would go on with, on
held-out text of its own. Every run is a folder under --work: begun again, the command goes on where
it stopped, and what is there is not run again. --report runs nothing, and lists what is missing.

Kinds of text: natural; iid, where all leaves' documents are dealt out at random; swap-25 to
swap-100, where that share of the second leaf of each group is the text of the next group's second
leaf (100: the clusters are broken); noise-Z, natural text where each silo's update is clipped to
an L2 norm of 1 and gets Gaussian noise of standard deviation Z.

Of two methods the first is better, or worse, where it is so for every seed, three at least, and the
mean difference of the leaves' mean loss exceeds twice its standard error; else it is undecided.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from codec_quality import small_llama
from photon.config import RunConfig, parse_run_config
from photon.config.baselines import METHODS, as_method
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

#: Attention, and layers that fit badly at home go where they fit; not among the baselines of a run.
RESIDUALS = "attention and residuals"
ALL = (*METHODS, RESIDUALS)

#: For kinds of text other than natural, where all methods are run.
_MAIN = ("flat FL", "HierFAVG", "attention", "mean in attention's place", "best of three")
#: By kind: methods, and whether one seed is enough.
KINDS: dict[str, tuple[Sequence[str], bool]] = {
    "natural": (ALL, False),
    "swap-100": (_MAIN, False),
    "iid": (_MAIN, False),
    "noise-0.001": (("flat FL", "HierFAVG", "attention", "attention up, own kept"), True),
    "noise-0.005": (("flat FL", "HierFAVG", "attention", "attention up, own kept"), True),
    "swap-50": (_MAIN[:3], True),
    "swap-25": (_MAIN[:3], True),
    "swap-75": (_MAIN[:3], True),
}

#: What is said of the first method against the second, on a kind of text, and who says so.
CLAIMS = (
    ("attention", "flat FL", "natural", "better", "the paper: up to 1.91x"),
    ("attention", "HierFAVG", "natural", "better", "the paper: 1.86x"),
    ("attention", "FedPer", "natural", "better", "the paper: 3.3x"),
    ("attention", "centralised", "natural", "better", "the paper, of 400M parameters: 1.39x"),
    ("local only", "attention", "natural", "better", "its reviewers, of the paper's tables"),
    ("flat FL", "attention", "iid", "better", "the paper: 145 against 167"),
    ("flat FL", "attention", "swap-100", "better", "the paper: 107 against 140"),
    ("attention", "flat FL", "noise-0.001", "better", "the paper: 102 against 725"),
    ("attention", "flat FL", "noise-0.005", "better", "the paper: 102 against 725"),
    ("attention", "mean in attention's place", "natural", "better", "nobody has published it"),
    (RESIDUALS, "attention", "natural", "better", "the paper's reason for them"),
    ("best of three", "attention", "natural", "not worse", "ours"),
    ("best of three", "mean in attention's place", "natural", "not worse", "ours"),
    ("best of three", "attention up, own kept", "natural", "not worse", "ours"),
)


@dataclass(frozen=True)
class Case:
    """One run, or of "local only" one for each leaf."""

    tree: str
    kind: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder."""
        method = self.method.replace(" ", "-").replace("'", "")
        return f"{self.tree}-{self.kind}-{method}-{self.seed}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All that is to be run, what tells most first."""
    for last in (False, True):
        for kind, (methods, one_seed) in KINDS.items():
            # Natural text with all seeds, then the first seed of all, then what is left.
            seeds = range(1, 1 + (1 if one_seed else options.seeds))
            first = seeds if kind == "natural" else seeds[:1]
            for seed in seeds[len(first) :] if last else first:
                for tree, method in itertools.product(TREES, methods):
                    chosen = (options.tree, options.kind, options.method)
                    asked = zip(chosen, (tree, kind, method), strict=True)
                    if all(one in (None, this) for one, this in asked):
                        yield Case(tree, kind, method, seed)


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]


def text_of(options: argparse.Namespace, tree: str, kind: str) -> Path:
    """A folder for each leaf with the beginning of its file, as JSON Lines."""
    share = int(kind.removeprefix("swap-")) if kind.startswith("swap") else 0
    folder = options.work / f"text-{tree}-{share}"
    if folder.exists():
        return folder
    lines = {
        name: list(_lines(options.corpus / f"{name}.jsonl.zst", options.leaf_bytes))
        for leaves in TREES[tree].values()
        for name in leaves
    }
    second = [leaves[1] for leaves in TREES[tree].values()]
    mixed = dict(lines)
    for name, other in zip(second, second[1:] + second[:1], strict=True):
        away = [int(len(lines[one]) * share / 100) for one in (name, other)]
        mixed[name] = lines[other][: away[1]] + lines[name][away[0] :]
    for name, texts in mixed.items():
        leaf = folder.with_suffix(".part") / _leaf(name)
        leaf.mkdir(parents=True, exist_ok=True)
        (leaf / "text.jsonl").write_text("".join(texts), encoding="utf-8")
    return folder.with_suffix(".part").rename(folder)


def _lines(file: Path, most_bytes: int) -> Iterator[str]:
    with file.open("rb") as raw:
        reader = zstandard.ZstdDecompressor().stream_reader(raw)
        taken = 0
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            yield line
            taken += len(line.encode())
            if taken > most_bytes:
                return


def data_of(options: argparse.Namespace, tree: str, kind: str) -> Path:
    """Prepared, with the vocabulary of the natural text."""
    like = kind if kind == "iid" or kind.startswith("swap") else "natural"
    data = options.work / f"data-{tree}-{like}"
    if not (data / "manifest.json").exists():
        leaves = sum(len(one) for one in TREES[tree].values())
        how = {"iid": leaves} if kind == "iid" else {"silo_folders": True}
        text = text_of(options, tree, kind)
        prepare(PrepareOptions(input=text, out=data, vocab_size=options.vocabulary, **how))
    return data


def config_of(options: argparse.Namespace, case: Case, data: Path, model: Path) -> RunConfig:
    silos = iter(sorted(open_data(data).silos))
    children = {}
    for name, leaves in TREES[case.tree].items():
        members = [next(silos) if case.kind == "iid" else _leaf(leaf) for leaf in leaves]
        children[name] = {"silos": members, "rounds": 2}
    federation = {"rounds": options.rounds, "optimizer_state": "keep", "children": children}
    parts = {"key": ["last:0.3"]}
    if case.method == RESIDUALS:
        parts |= METHODS["attention"]["key"]
        federation["policy"] = {"residuals": "both"}
    privacy = {}
    if case.kind.startswith("noise-"):
        noise = float(case.kind.removeprefix("noise-"))
        privacy = {"mechanism": "client", "clip_norm": 1.0, "noise_multiplier": noise}
    tree = parse_run_config(
        {
            "run": {"seed": case.seed, "keep_checkpoints": 1, "log_every": 1000},
            "model": {"path": str(model)},
            "data": {"path": str(data), "sequence_length": options.sequence_length},
            "compute": {"threads": 1},
            "parts": parts,
            "federation": federation,
            "privacy": privacy,
            "local": {
                "steps": options.steps,
                "batch_size": options.batch_size,
                "optimizer": "muon",
                "lr": options.lr,
                "warmup_steps": options.steps,
            },
            "eval": {"every": 0, "max_tokens": options.eval_tokens},
        }
    )
    return as_method(tree, case.method if case.method in METHODS else None)


def scores(
    folder: Path, config: RunConfig, silos: list[str] | None, *, run: bool
) -> dict[str, float] | None:
    """Perplexity by leaf of a run, which is done, taken up, or there already; else None."""
    summary = read_summary(folder)
    if summary is None and run:
        if (folder / "run.json").exists():
            result = resume(folder)
        elif silos is not None:
            result = train(config, silos=silos, run_dir=folder)
        else:
            result = simulate(config, run_dir=folder)
        summary = result.summary
    return None if summary is None else summary["per_silo"]


def leaves_of(options: argparse.Namespace, case: Case) -> dict[str, float] | None:
    """A method's perplexity on each leaf's held-out text; None where it was not run."""
    run, folder = not options.report, options.work / case.name
    if not run and not (options.work / f"data-{case.tree}-natural").exists():
        return None
    data = data_of(options, case.tree, case.kind)
    model = options.work / f"model-{case.tree}"
    if not model.exists():
        small_llama(model, options.width, options.layers, open_data(data).vocab_size)
    config = config_of(options, case, data, model)
    silos = sorted(open_data(data).silos)
    if case.method == "centralised":
        return scores(folder, config, silos, run=run)
    if case.method != "local only":
        return scores(folder, config, None, run=run)
    told = {}
    for silo in silos:
        alone = scores(folder.with_name(f"{case.name}-{silo}"), config, [silo], run=run)
        if alone is None:
            return None
        told[silo] = alone[silo]
    return told


def mean_loss(told: dict[str, float]) -> float:
    """Of the leaves, nats per token; perplexities' geometric mean is its exponential."""
    return statistics.fmean(math.log(one) for one in told.values())


Found = dict[Case, dict[str, float]]


def verdict(differences: Sequence[float]) -> str:
    """Of the first method's loss less the second's, by seed: see the rule above."""
    if len(differences) < 3:
        return "undecided"
    mean = statistics.fmean(differences)
    certain = abs(mean) > 2 * statistics.stdev(differences) / math.sqrt(len(differences))
    if certain and all(one < 0 for one in differences):
        return "better"
    if certain and all(one > 0 for one in differences):
        return "worse"
    return "undecided"


def judged(found: Found) -> Iterator[list[str]]:
    """Rows: a claim, what was measured, and whether it stands."""
    for tree, (one, other, kind, said, source) in itertools.product(TREES, CLAIMS):
        seeds = sorted(
            case.seed
            for case in found
            if (case.tree, case.kind, case.method) == (tree, kind, one)
            and Case(tree, kind, other, case.seed) in found
        )
        if not seeds:
            continue
        losses = [
            [mean_loss(found[Case(tree, kind, method, seed)]) for seed in seeds]
            for method in (one, other)
        ]
        by_seed = [a - b for a, b in zip(*losses, strict=True)]
        is_so = verdict(by_seed)
        opposite = "worse" if said in ("better", "not worse") else "better"
        stands = "undecided"
        if is_so == said or (said == "not worse" and is_so in ("better", "undecided")):
            stands = "confirmed" if len(seeds) > 2 else "undecided"
        elif is_so == opposite:
            stands = "refuted"
        ratio = math.exp(-statistics.fmean(by_seed))
        text = f"{one}: {said} than {other}"
        yield [tree, kind, text, source, f"{ratio:.3f}x ({len(seeds)} seeds)", stands]


def report(options: argparse.Namespace, found: Found) -> str:
    lines = [
        f"{machine()}",
        f"{options.rounds} rounds of {options.steps} steps of {options.batch_size} sequences of "
        f"{options.sequence_length} tokens a silo; Llama of {options.layers} layers of "
        f"{options.width}, {options.vocabulary} tokens, muon at {options.lr:g}, the same for all. "
        "Perplexity on held-out text of each leaf's own, of the model that it would go on with; "
        "the mean of leaves is geometric, and so is that of seeds; ± standard deviation of seeds.",
        "",
    ]
    for tree, kind in itertools.product(TREES, KINDS):
        here = {
            case: told for case, told in found.items() if (case.tree, case.kind) == (tree, kind)
        }
        if not here:
            continue
        leaves = list(next(iter(here.values())))
        rows = []
        for method in ALL:
            told = [one for case, one in here.items() if case.method == method]
            if not told:
                continue
            means = [math.exp(mean_loss(one)) for one in told]
            spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
            mean = f"{statistics.geometric_mean(means):.2f}{spread}"
            each = [
                f"{statistics.geometric_mean(one[leaf] for one in told):.1f}" for leaf in leaves
            ]
            rows.append([method, str(len(told)), mean, *each])
        lines += [f"## {tree}, {kind}", "", table(["method", "seeds", "mean", *leaves], rows), ""]
    lines += ["## Claims", "", __doc__.strip().rpartition("\n\n")[2].replace("\n", " "), ""]
    lines += ["Ratio: the second's perplexity over the first's; above 1 the first is better.", ""]
    heads = ["tree", "text", "claim", "said by", "measured", "so it is"]
    lines += [table(heads, list(judged(found))), ""]
    left = [case.name for case in cases(options) if case not in found]
    lines += ["## Not run", "", ", ".join(left) or "nothing"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="runs are kept here")
    parser.add_argument("--tree", choices=list(TREES))
    parser.add_argument("--kind", choices=list(KINDS))
    parser.add_argument("--method", choices=ALL)
    parser.add_argument("--known", type=Path, help="an earlier .json: its cases are not run again")
    parser.add_argument("--report", action="store_true", help="of what is there; runs nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--leaf-bytes", type=int, default=600_000)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="the report; beside it .json with every score")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.known.read_text("utf-8")) if options.known else {}
    found: Found = {}
    for case in cases(options):
        told = known.get(case.name) or leaves_of(options, case)
        if told is not None:
            found[case] = told
            if not options.report:
                print(f"{case.name}: {math.exp(mean_loss(told)):.2f}", flush=True)
    text = report(options, found)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
        record = {
            case.name: {leaf: round(x, 3) for leaf, x in told.items()}
            for case, told in found.items()
        }
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
