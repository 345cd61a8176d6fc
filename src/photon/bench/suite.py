"""A suite: what is compared, at which scales, and which claims it decides. Read from one file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from photon.config import RunConfig, parse_run_config
from photon.config.load import load_file
from photon.config.section import Positive, Section
from photon.errors import ConfigError, PhotonError, some

#: What of a run file a method or a scale may say; it needs no quotes inside a key.
Settings = dict[str, Any]

#: federated: the silos together; centralised: pooled text, a step for all silos' steps; local: each
#: silo alone, on its own share of the tokens, and the mean of their losses.
Kind = Literal["federated", "centralised", "local"]
#: Where methods are compared: after as many tokens, model and optimizer FLOPs, or time.
At = Literal["tokens", "flops", "time"]

#: Options of `photon data prepare` that make silos, and leave held-out text as it is.
Cutting = Literal[
    "iid", "dirichlet", "contiguous", "silo_field", "silo_folders", "label_field", "min_documents"
]

_Title = Annotated[str, Field(min_length=1)]


class Method(Section):
    """One way to train.

    Attributes:
        set: keys of the run file, as --set has them.
        grid: keys that are searched, each with three values or more, smallest first.
        cut: of the suite's cuts, whose silos it trains on; as the scale says if there is none.
        small_batch: centralised: local.batch_size sequences a step, silos times as many steps.
            Others set local.batch_size: with half of it there are twice as many steps in a
            round and in the warm-up.
        source: where its settings come from.
    """

    kind: Kind = "federated"
    small_batch: bool = False
    set: Settings = Field(default_factory=dict)
    grid: dict[str, list[float]] = Field(default_factory=dict)
    cut: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> Method:
        for key, values in self.grid.items():
            if len(values) < 3 or values != sorted(set(values)) or values[0] <= 0:
                raise ValueError(
                    f"grid of {key}: {values}; it needs three positive values or more, rising"
                )
        return self


class Scale(Section):
    """How large the runs of a suite are.

    Attributes:
        steps: of a silo, where all take part: rounds are as many as each method's local.steps and
            federation.sample make of them.
        points: most points of its grid that a method may try; the same for all.
        silos: into which text without silos of its own is cut; None: text has folders for them.
        exchange_steps: seconds in which a model's fp32 gradients are all-reduced, in seconds of a
            centralised step: what a step costs beside its compute. The wall-time model's one
            constant.
        note: what a reader must know of it.
    """

    steps: Positive
    set: Settings = Field(default_factory=dict)
    points: Positive = 5
    silos: Positive | None = None
    vocab_size: Positive = 2048
    exchange_steps: Annotated[float, Field(ge=0)] = 1.92
    note: str = ""


class Claim(Section):
    """`one`'s measure over `other`'s is at most `most`.

    Attributes:
        measure: loss; tokens, time: what `one` takes to the other's last loss, over the other's
            all; bytes: on the wire, of a centralised run those of an all-reduce at each step.
        published: the source's own figure and its scale.
    """

    one: _Title
    other: _Title
    measure: Literal["loss", "tokens", "time", "bytes"] = "loss"
    at: At = "tokens"
    most: Annotated[float, Field(gt=0)] = 1.0
    says: _Title
    source: _Title
    published: str = ""


class Sizes(Section):
    """Losses of methods over those of others, by the model's size.

    Attributes:
        pairs: `one` and `other`, smallest models first.
        published: by whose figures: parameters, loss, the other's loss.
    """

    pairs: list[Annotated[tuple[str, str], Field(strict=False)]]
    published: dict[str, list[Annotated[tuple[float, float, float], Field(strict=False)]]]


class Suite(Section):
    """A whole suite file.

    Attributes:
        cuts: how the same text becomes silos, by name, as `PrepareOptions` has it.
    """

    title: _Title
    about: _Title
    base: Settings
    scales: dict[str, Scale]
    methods: dict[str, Method]
    cuts: dict[str, dict[Cutting, Any]] = Field(default_factory=dict)
    claims: list[Claim] = Field(default_factory=list)
    sizes: Sizes | None = None

    @model_validator(mode="after")
    def _known(self) -> Suite:
        for name, method in self.methods.items():
            if method.cut and method.cut not in self.cuts:
                raise ValueError(f"{name!r}: no cut is called {method.cut!r}")
        held = [(f"claim {claim.says!r}", (claim.one, claim.other)) for claim in self.claims]
        held += [("sizes", pair) for pair in (self.sizes.pairs if self.sizes else ())]
        for what, names in held:
            for name in names:
                if name not in self.methods:
                    raise ValueError(
                        f"{what}: no method is called {name!r}; there are {', '.join(self.methods)}"
                    )
        return self

    def cuts_of(self, scale: str) -> dict[str, dict[Cutting, Any]]:
        """Those that a method trains on."""
        silos = self.scales[scale].silos
        plain: dict[Cutting, Any] = {"iid": silos} if silos else {"silo_folders": True}
        names = sorted({method.cut for method in self.methods.values()})
        return {name: self.cuts[name] if name else plain for name in names}

    def config(
        self,
        scale: str,
        method: str,
        point: Mapping[str, float],
        seed: int,
        data: Path,
        silos: int = 1,
    ) -> RunConfig:
        """The run file of one run of a method, for data of so many silos."""
        told = self.methods[method]
        settings = self.base | self.scales[scale].set
        batch = settings.get("local.batch_size")
        settings |= {**told.set, **point, "run.seed": seed, "data.path": str(data)}
        tau, drawn = settings.get("local.steps", 1), settings.get("federation.sample") or silos
        settings["federation.rounds"] = max(1, self.scales[scale].steps * silos // (tau * drawn))
        more = silos if told.small_batch else 1.0
        if told.small_batch:
            settings["train.batch_size"] = settings["local.batch_size"]
        elif batch is not None:
            settings["local.batch_size"] = int(settings["local.batch_size"])
            more = batch / settings["local.batch_size"]
        for key in {"local.steps", "local.warmup_steps"} & settings.keys():
            settings[key] = round(more * settings[key])
        tree: dict[str, Any] = {}
        for key, value in settings.items():
            table, _, name = key.partition(".")
            tree.setdefault(table, {})[name] = value
        return parse_run_config(tree, source=f"suite, {scale}, {method}")


def suites() -> list[str]:
    """Names of those that Photon brings."""
    folder = files("photon.bench").joinpath("suites")
    return sorted(one.name[: -len(".toml")] for one in folder.iterdir())


def load_suite(name: str) -> Suite:
    """One of Photon's by name, or a file.

    Raises:
        ConfigError: there is none, it can't be read, or one of its runs can't be made.
    """
    path = Path(name)
    if not name.endswith(".toml"):
        if name not in suites():
            raise ConfigError(
                f"no suite is called {name!r}",
                hint=f"There are {', '.join(suites())}; or name a file, SUITE.toml.",
            )
        path = Path(str(files("photon.bench").joinpath("suites", f"{name}.toml")))
    suite = load_file(path, Suite, "suite", f"There are {', '.join(suites())}.")
    for scale in suite.scales:
        for method, told in suite.methods.items():
            point = {key: values[0] for key, values in told.grid.items()}
            try:
                suite.config(scale, method, point, 0, Path())
            except PhotonError as error:
                raise ConfigError(
                    f"suite {path}: {method!r} at scale {scale}: {error.message}", hint=error.hint
                ) from None
    return suite


def scale_of(suite: Suite, name: str) -> Scale:
    """Raises ConfigError where there is none of that name."""
    if name not in suite.scales:
        raise ConfigError(
            f"no scale is called {name!r}", hint=f"This suite has {some(suite.scales, 9)}."
        )
    return suite.scales[name]
