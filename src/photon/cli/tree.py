"""`photon tree`: the federations of a run file as a tree, and who decides what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from photon.cli.options import AsJson, Quiet, RunDir, RunFile, Sets
from photon.cli.screen import console, show, show_json, show_table, view_of_run
from photon.cli.side_by_side import Training, at_once, train_missing
from photon.config import load_run_config
from photon.config.baselines import METHODS, as_method, folder_of
from photon.config.children import with_branches
from photon.dashboard import write_report
from photon.dashboard.digest import read_digest
from photon.dashboard.tree import BASELINES, described, leaf_scores
from photon.dashboard.wording import perplexity

if TYPE_CHECKING:
    from photon.config import RunConfig


def tree(
    run_file: RunFile,
    overrides: Sets = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Run it, and methods that it is held against.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help=f"Of them: {', '.join(METHODS)}. Repeatable.")
    ] = None,
    run_dir: RunDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw the federations of a run, one inside another, with who decides what.

    Each line is a federation: how often it merges, after how many local steps, whom it draws, how
    it merges, with which clip and noise updates leave its silos and itself, its policy on
    residuals, and in which file that is written. Below it are its members; silos take steps.

    With `--baselines` it is run, and so is what it is held against, in runs/NAME/baselines; called
    again, it goes on where it stopped. It ends with each leaf's perplexity by method.

    Examples: `photon tree run.toml`, `photon tree run.toml --only "flat FL" --only "local only"`
    """
    config = load_run_config(run_file, overrides or ())
    if baselines or only:
        for name in set(only or ()) - set(METHODS):
            raise typer.BadParameter(f"no baseline is called {name!r}", param_hint="--only")
        folder = run_dir or Path("runs") / config.run.name
        _against(config, folder, only or (), quiet=quiet)
        _show_scores(folder, as_json=as_json)
        return
    silos = _silos(config)
    root = described(with_branches(config, silos), run_file.name, silos)
    if as_json:
        show_json(root)
        return
    console(stderr=False).print(_drawn(root, Tree(_line(root))))


def _against(config: RunConfig, folder: Path, only: Sequence[str], *, quiet: bool) -> None:
    """The tree's run, and the methods beside it, so far as they are not done yet."""
    silos = tuple(_silos(config))
    config = with_branches(config, silos)
    if (folder / "run.json").exists():  # it is what the others are held against
        kept = load_run_config(folder / "config.resolved.toml")
        config = kept.having(compute=config.compute)
    trainings, known = dict[str, Training](), [as_method(config)]
    for name in [name for name in METHODS if not only or name in only]:
        changed, base = as_method(config, name), folder / BASELINES / folder_of(name)
        if (runs := METHODS[name]["runs"]) == "alone":
            for one in silos:
                trainings[f"{name}: {one}"] = Training(base / one, changed, (one,))
        elif runs == "pooled" or changed not in known:  # two are the same on one level
            trainings[name] = Training(base, changed, silos if runs == "pooled" else None)
            known.append(changed)
    Training(folder, known[0], None).go(view_of_run(quiet=quiet))
    processes = 1 if config.federation.workers else at_once(config, len(trainings))
    train_missing(trainings, processes, quiet=quiet)


def _show_scores(folder: Path, *, as_json: bool) -> None:
    """The report, and on each leaf every method's perplexity: the best in bold."""
    page, (rows, best) = write_report(folder), leaf_scores(read_digest(folder), {})
    names = {leaf: leaf or "mean" for leaf in sorted(best)}
    if as_json:
        told = {run: {names[leaf]: row[leaf] for leaf in row} for run, row in rows.items()}
        show_json({"run_dir": str(folder), "report": str(page), "perplexity": told})
        return
    lines = [
        [run]
        + [Text(perplexity(row.get(x)), "bold" if row.get(x) == best[x] else "") for x in names]
        for run, row in rows.items()
    ]
    show_table(("perplexity", *names.values()), lines, right=range(1, 1 + len(names)), frame=False)
    show(f"\nReport: {page}")


def _silos(config: RunConfig) -> list[str]:
    """Of the data, where that is here."""
    from photon.data import open_data
    from photon.errors import PhotonError

    try:
        return list(open_data(config.data.path, own_vocabularies=True).silos)
    except PhotonError:
        return []


def _drawn(one: dict[str, Any], branch: Tree) -> Tree:
    for member in one["members"]:
        if "members" in member:
            _drawn(member, branch.add(_line(member)))
        else:
            branch.add(Text(member["name"]))
    return branch


def _line(one: dict[str, Any]) -> Text:
    key = f", key layers: {one['key_rule']} up, {one['key_down']} down" if "key_rule" in one else ""
    rounds = f"{one['rounds']} round{'s' * (one['rounds'] != 1)} of {one['steps']} steps"
    drawn = ", silos and groups in turn" if one["levels"] == "in_turn" else ""
    drawn += f", {one['sample']} drawn ({one['sampling']})" if one["sample"] else ""
    for who, name in (("silos", "privacy"), ("its own", "update_privacy")):
        key += f", {who}: {one[name]}" if one.get(name) else ""
    for name, said in one["policy"].items():
        key += f", {name.replace('_', ' ')} {said if isinstance(said, str) else ' '.join(said)}"
    how = f": {rounds}{drawn}, {one['merging_rule']}, {one['outer']}, {one['update_codec']}{key} "
    return Text.assemble((one["name"], "bold"), how, (f"({one['written_in']})", "dim"))
