"""`photon plan`: what a run will take, before it is begun."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from photon.cli.options import AsJson, RunFile, Sets
from photon.cli.screen import console, show, show_facts, show_json, show_table
from photon.dashboard.wording import count, duration, size


def plan(
    run_file: RunFile,
    overrides: Sets = None,
    mbit: Annotated[
        float, typer.Option(help="Mbit/s of an aggregator's link, up and down together.", min=1e-3)
    ] = 100.0,
    steps_per_s: Annotated[
        float | None,
        typer.Option(help="Local steps that a silo takes in a second; photon profile measures it."),
    ] = None,
    silos: Annotated[
        int | None, typer.Option(help="How many silos, where the data is not here.", min=1)
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="Tokens of the vocabulary, where the data is not here.", min=2)
    ] = 50_368,
    as_json: AsJson = False,
) -> None:
    """Tell what a run will take, before any of it is trained.

    Bytes of each federation in it, memory of a silo's device, hours, and whether the link or the
    training binds; by the wall-time model of the paper (docs/planning.md).

    Example: `photon plan run.toml --mbit 1000 --steps-per-s 2.5`
    """
    with console().status("Planning ..."):
        found = _planned(run_file, overrides or [], mbit, steps_per_s, silos, vocab_size)
    if as_json:
        show_json(found)
        return
    _show(found, mbit)


def _planned(run_file, overrides, mbit, steps_per_s, silos, vocab_size) -> dict[str, Any]:
    from photon.config import load_run_config
    from photon.config.children import with_branches
    from photon.data import open_data
    from photon.errors import ConfigError, PhotonError
    from photon.runs.plan import plan as planned

    config = load_run_config(run_file, overrides)
    named = {
        silo for name, one in config.federation.children.items() for silo in one.silos_of(name)
    }
    try:
        data = open_data(config.data.path, own_vocabularies=True)
        names, vocab_size = sorted(data.silos), data.vocab_size
    except PhotonError:
        if silos is None and not named:
            raise ConfigError(
                f"no prepared text at {config.data.path}, so how many silos there are is unknown",
                hint="Say --silos N (and --vocab-size), or prepare the text first.",
            ) from None
        others = range(max(0, (silos or len(named)) - len(named)))
        names = sorted(named) + [f"silo-{number + 1}" for number in others]
    config = with_branches(config, names)
    return planned(
        config,
        dict.fromkeys(names, 1),
        vocab_size=vocab_size,
        bytes_per_s=mbit * 1e6 / 8,
        steps_per_s=steps_per_s,
    )


def _show(found: dict[str, Any], mbit: float) -> None:
    show_facts(
        [
            ("parameters", count(found["parameters"])),
            ("memory", f"{size(found['memory_bytes'])} of a silo's device, at the least"),
            ("a silo trains on", f"{count(found['tokens_per_silo'])} tokens"),
            ("on the links", f"{size(found['bytes'])} in all"),
            ("", f"{found['fewer_bytes']:,.0f} times less than an all-reduce after each step"),
        ]
    )
    rows = [
        [
            "  " * len(one["inside"]) + one["name"],
            str(one["members"]),
            str(one["rounds"]),
            str(one["steps"]),
            size(one["bytes_up"]),
            size(one["bytes_down"]),
            size(one["bytes"]),
        ]
        for one in found["levels"]
    ]
    heads = ["federation", "members", "rounds", "tau", "up, a round", "down, a round", "all"]
    show_table(heads, rows, right=range(1, 7))
    link = f"{duration(found['link_s'])} at {mbit:g} Mbit/s"
    if found["steps_per_s"] is None:
        show(
            f"The links take {link}, as long as training at "
            f"{found['even_at_steps_per_s']:.3g} steps a second: a slower silo trains longer than "
            "that. With --steps-per-s (photon profile measures it) this tells hours."
        )
        return
    parallel = duration(found["data_parallel_wall_s"])
    show(
        f"Training takes {duration(found['train_s'])} and the links {link}: "
        f"{duration(found['wall_s'])} in all, bound by {found['bottleneck']}. Exchanging gradients "
        f"after each step, around a ring of such links, would take {parallel}."
    )
