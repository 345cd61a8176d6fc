"""`photon`: every command, its help, and the exit code of every error."""

from __future__ import annotations

import os
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from photon.cli.backup import backup, restore
from photon.cli.bench import bench
from photon.cli.cards import cards_app, comply
from photon.cli.data import data_app
from photon.cli.demo import demo
from photon.cli.doctor import doctor
from photon.cli.init import init
from photon.cli.members import audit, invite, members_app
from photon.cli.options import AsJson, Folder, ModelFolder, Overwrite, Quiet, RunDir, RunFile, Sets
from photon.cli.outcome import show_outcome, show_study
from photon.cli.plan import plan
from photon.cli.profile import profile
from photon.cli.release import release, verify
from photon.cli.screen import console, guard_output, say, show, show_json, show_table, view_of_run
from photon.cli.serve import join, serve, status, stop
from photon.cli.tree import tree
from photon.config.load import load_clock
from photon.dashboard import wording
from photon.errors import INTERRUPTED_EXIT_CODE, MachineError, PhotonError
from photon.fork_server import start_fork_server

if TYPE_CHECKING:
    from photon.config import RunConfig
    from photon.runs import RunResult

Of = Annotated[
    str | None,
    typer.Option(
        "--of",
        metavar="PATH",
        help="Whose model, where silos or groups have [parts] of their own: bank, or eu/bank.",
    ),
]


#: Packages that not everybody has, and the extra that brings each.
_EXTRAS = {"obstore": "serve", "py3langid": "examine", "glin-profanity": "examine"}
_EXTRAS |= {"lm_eval": "tasks", "cyclonedx": "cards", "spdx_python_model": "cards"}


class _Photon(TyperGroup):
    """Turns PhotonError into its message on stderr and its exit code, and Ctrl-C into 130."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of use; typer has groups last."""
        return [name for commands in _PANELS.values() for name in commands] + ["version"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """With the words on its arguments."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _restore_help(command)
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PhotonError, OSError, ModuleNotFoundError) as error:
            if ctx.params["verbose"]:
                say(traceback.format_exc())
            if isinstance(error, PhotonError):
                known = error
            elif isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
                known = MachineError(
                    f"this needs the Python package {error.name}, which is not installed",
                    hint=f"pip install 'photon-federated[{_EXTRAS[error.name]}]'",
                )
            elif isinstance(error, OSError) and error.filename is not None:
                known = MachineError(f"{error.filename}: {error.strerror}")
            else:
                raise
            say(f"error: {known.message}", style="red")
            if known.hint:
                say(known.hint)
            ctx.exit(known.exit_code)
        except KeyboardInterrupt:
            say("Stopped. If a run had begun, `photon resume DIR` goes on with it.")
            ctx.exit(INTERRUPTED_EXIT_CODE)


def _restore_help(command: Any) -> None:
    """typer 0.20 sets an argument's help before click 8.5 sets it to None."""
    for child in getattr(command, "commands", {}).values():
        _restore_help(child)
    hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
    for parameter in command.params:
        for note in getattr(hints.get(parameter.name), "__metadata__", ()):
            parameter.help = parameter.help or getattr(note, "help", None)


app = typer.Typer(
    name="photon",
    cls=_Photon,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=True,
    suggest_commands=False,  # click does
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from photon.version import photon_version

        show(f"photon {photon_version()}")
        raise typer.Exit


@app.callback()
def photon(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print Photon's version."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With an error, also where in the code it came from.")
    ] = False,
) -> None:
    """Train one language model across organisations that keep their data.

    New here? Type `photon init first`: it writes a run file and a little text, and says what next.
    """


def simulate(
    run_file: RunFile,
    overrides: Sets = None,
    run_dir: RunDir = None,
    clock_file: Annotated[
        Path | None,
        typer.Option(
            "--clock",
            metavar="CLOCK.toml",
            help="Simulate time too: each silo's speed, line and failures (docs/clock.md).",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Run a whole federation on this machine.

    Example: `photon simulate run.toml --set federation.workers=2`

    Ctrl-C stops at once; `photon resume DIR` goes on from the last finished round.
    """
    clock = load_clock(clock_file) if clock_file is not None else None
    if clock is not None and clock.time_only:
        from photon.config import load_run_config
        from photon.runs.study import study_time

        show_study(study_time(load_run_config(run_file, overrides or ()), clock), as_json=as_json)
        return
    config = _checked(run_file, overrides, run_dir, overwrite)
    if config.federation.workers:
        start_fork_server()
    _loading(quiet)
    from photon.runs import simulate as start

    view = view_of_run(quiet=quiet)
    result = start(config, clock=clock, run_dir=run_dir, listener=view, overwrite=overwrite)
    _tell(result, as_json)


def train(
    run_file: RunFile,
    overrides: Sets = None,
    run_dir: RunDir = None,
    silo: Annotated[
        list[str] | None,
        typer.Option("--silo", help="Train on this silo's text only. Repeatable."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Train without a federation, on pooled text: the centralised baseline.

    Takes as many steps as the federated run, each on as many tokens as all participants together
    (`[train] batch_size` says otherwise). With `--silo`, each on as many as those silos would have
    had in the federation, unless `[train] batch_size` is that of all participants together.

    Example: `photon train run.toml --run-dir runs/central`
    """
    config = _checked(run_file, overrides, run_dir, overwrite)
    _loading(quiet)
    from photon.runs import train as start

    view, silos = view_of_run(quiet=quiet), silo or None
    result = start(config, silos=silos, run_dir=run_dir, listener=view, overwrite=overwrite)
    _tell(result, as_json)


def resume(
    folder: Folder,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="So many in all: more than it was begun with.")
    ] = None,
    overrides: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a stopped or killed run from its newest checkpoint.

    The result is the same as if it had never stopped. Rounds to come may be more, or have another
    learning rate, on record.

    Examples: `photon resume runs/demo` and, for the latter,
    `photon resume runs/demo --rounds 20 --set local.lr=1e-3`
    """
    _loading(quiet)
    from photon.runs import resume as start

    more = [f"federation.rounds={rounds}"] if rounds is not None else []
    result = start(folder, overrides=[*(overrides or []), *more], listener=view_of_run(quiet=quiet))
    _tell(result, as_json)


def report(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where; DIR/report.html. With .svg, one picture.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="LABEL=DIR", help="Another run beside it. Repeatable."),
    ] = None,
) -> None:
    """Write one self-contained HTML page with the pictures of a run.

    Example: `photon report runs/demo --compare centralised=runs/central`
    """
    from photon.dashboard import write_report

    others = dict(_pair(pair, "--compare", "LABEL=DIR") for pair in compare or [])
    page = write_report(folder, out=out, compare={k: Path(v) for k, v in others.items()})
    show(f"Report: {page}")


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="Hugging Face folder to make.")],
    bf16: Annotated[bool, typer.Option("--bf16", help="Write bfloat16 weights.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model folder that is at --out.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(help="For the model card, e.g. apache-2.0; a pretrained model's by default."),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(help="Of the text, for the model card, e.g. de. Repeatable."),
    ] = None,
    of: Of = None,
) -> None:
    """Write the model as safetensors, config.json, tokenizer and model card.

    Loads in transformers and vLLM unchanged. Example: `photon export runs/demo --out my-model`
    """
    with _imports():
        from photon.products import export as write

    path = write(
        folder,
        out,
        dtype="bfloat16" if bf16 else "float32",
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        license=license,
        languages=language or (),
        of=of,
    )
    show(f"Model: {path}")


def evaluate(
    folder: ModelFolder,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder made by `photon data prepare`.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead: tasks of lm-evaluation-harness. cloze and definitions are made from "
            "held-out text of --data; others, such as hellaswag,piqa, are fetched.",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens that the model sees at a time; the run's own by default.", min=1),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Score an even sample of so many tokens of each held-out set.", min=1),
    ] = None,
    of: Of = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity and bits per byte on the global held-out text and each silo's own.

    Examples: `photon eval runs/demo --data data/demo` and, for a model's answers,
    `photon eval my-model --data data/demo --tasks cloze,definitions`
    """
    with _imports():
        from photon.products import evaluate as run
        from photon.telemetry.events import finite

    if tasks is not None:
        _evaluate_tasks(folder, tasks, data, of, as_json)
        return
    if data is None:
        raise typer.BadParameter("needed, unless --tasks says otherwise", param_hint="--data")
    scores = run(folder, data, sequence_length=sequence_length, max_tokens=max_tokens, of=of)
    if as_json:
        told = {
            "global": scores.overall and vars(scores.overall),
            "per_silo": {silo: vars(one) for silo, one in scores.per_silo.items()},
        }
        show_json(finite(told))
        return
    rows = ({"global": scores.overall} if scores.overall else {}) | scores.per_silo
    show_table(
        ("held-out text", "perplexity", "bits per byte", "loss", "tokens"),
        (
            (
                name,
                wording.perplexity(one.perplexity, "diverged"),
                wording.decimal(one.bits_per_byte, 4),
                wording.decimal(one.loss, 4),
                f"{one.tokens:,}",
            )
            for name, one in rows.items()
        ),
        right=(1, 2, 3, 4),
    )
    if any(one.bits_per_byte is None for one in rows.values()):
        show(f"No bits per byte: {wording.UNKNOWN_TEXT}.")


def _evaluate_tasks(
    folder: Path, tasks: str, data: Path | None, of: str | None, as_json: bool
) -> None:
    from photon.products import evaluate_tasks
    from photon.telemetry.events import finite

    found = evaluate_tasks(folder, [*filter(None, tasks.split(","))], data, of)
    if as_json:
        show_json(finite(found))
        return
    rows = [
        (task, f"{scores['examples'] or 0:,}", name, f"{value:.4g} ± {scores[error]:.2g}")
        for task, scores in found.items()
        for name, value in scores.items()
        if (error := f"{name}_stderr") in scores
    ]
    show_table(("task", "examples", "metric", "score ± standard error"), rows, right=(1, 3))


def generate(
    folder: ModelFolder,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue; without one a text is begun.")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 100,
    temperature: Annotated[
        float, typer.Option(help="How freely it chooses; at 0 always the likeliest token.", min=0)
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(help="Choose among this many of the likeliest tokens.")
    ] = 50,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens that have this share together.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    of: Of = None,
) -> None:
    """Let the model continue a text.

    Example: `photon generate runs/demo --prompt "Fellow citizens"`
    """
    with _imports():
        from photon.products import generate as run

    words = run(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        of=of,
    )
    typer.echo(prompt + words)


#: Commands as a person comes to need them; `photon --help` shows them so.
_PANELS: dict[str, dict[str, Any]] = {
    "First": {"init": init, "demo": demo, "doctor": doctor, "tree": tree, "plan": plan},
    "Train on this machine": {
        "data": data_app,
        "profile": profile,
        "simulate": simulate,
        "train": train,
        "resume": resume,
    },
    "See and use what came out": {
        "report": report,
        "eval": evaluate,
        "generate": generate,
        "export": export,
        "release": release,
        "verify": verify,
    },
    "Compare": {"bench": bench},
    "Answer to an auditor": {"cards": cards_app, "comply": comply},
    "Across organisations: the aggregator's operator": {
        "serve": serve,
        "invite": invite,
        "members": members_app,
        "status": status,
        "stop": stop,
        "audit": audit,
        "backup": backup,
        "restore": restore,
    },
    "Across organisations: a silo": {"join": join},
}
for _panel, _commands in _PANELS.items():
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, rich_help_panel=_panel)(_command)


@app.command("version", hidden=True)
def version_command() -> None:
    """Print Photon's version; `photon --version` does, too."""
    _version(True)


def main() -> None:
    """Entry point of the `photon` script."""
    guard_output()
    app()


def _checked(
    run_file: Path, overrides: list[str] | None, run_dir: Path | None, overwrite: bool
) -> RunConfig:
    """The run file; what is amiss with it or the run folder is known before PyTorch is loaded."""
    from photon.config import load_run_config
    from photon.store.run_folder import require_unused

    config = load_run_config(run_file, overrides or [])
    if _is_first():  # which may have made the folder already
        require_unused(run_dir or Path("runs") / config.run.name, overwrite=overwrite)
    return config


def _is_first() -> bool:
    """Not one of torchrun's other ranks."""
    return os.environ.get("RANK", "0") == "0"


def _loading(quiet: bool) -> None:
    """A first line at once: importing PyTorch and transformers takes seconds on a cold disk."""
    if not quiet and _is_first():
        say("Loading PyTorch ...")


def _imports() -> AbstractContextManager[Any]:
    return console().status("Loading PyTorch ...")


def _tell(result: RunResult, as_json: bool) -> None:
    if result.summary:  # not so for a rank other than 0 under torchrun: rank 0 tells
        show_outcome(result.folder, result.summary, as_json=as_json)


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (equals and key and value):
        raise typer.BadParameter(f"{text!r} is not of the form {form}", param_hint=option)
    return key, value


if __name__ == "__main__":
    main()
