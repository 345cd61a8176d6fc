"""Methods that a tree of federations is held against: each a change of [parts] and [federation]."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from photon.config.children import tables
from photon.config.load import parse_run_config
from photon.config.run import RunConfig
from photon.errors import IncompatibleConfigError

#: By name: which runs it makes, and what becomes of key layers; baselines.toml explains.
METHODS: dict[str, dict[str, Any]] = tomllib.loads(
    (files("photon.config") / "baselines.toml").read_text("utf-8")
)


def folder_of(method: str) -> str:
    """Its name as that of a folder."""
    return method.replace(" ", "-").replace("'", "").replace(",", "")


def as_method(config: RunConfig, name: str | None = None) -> RunConfig:
    """A tree's run file as one of METHODS has it, or else itself, scored in each silo.

    Raises:
        IncompatibleConfigError: no key layers, or some silos take fewer steps than others; or what
            the method makes of the file can't be.
    """
    parts, told = config.parts, config.model_dump(exclude_none=True)
    like = config.federation.branches
    groups = [one for _, one in tables(config.federation.children)] + ([like] if like else [])
    uneven = [one.sample or one.levels == "in_turn" for one in (config.federation, *groups)]
    if not parts.key or any(uneven) or any(one.privacy for one in groups):
        raise IncompatibleConfigError(
            "baselines differ in what becomes of key layers, and take the same steps in each silo: "
            f"they need parts.key (found {parts.key}), and no sample, levels in turn or privacy of "
            "groups' own anywhere",
            hint="""WorldLM has the last 30%: --set 'parts.key=["last:0.3"]'.""",
        )
    method = METHODS[name] if name else {"runs": "tree", "key": {}}
    if (key := method.get("key")) == "personal":
        lists = {"shared": parts.shared, "personal": [*parts.personal, *parts.key]}
        told["parts"] = {**lists, "frozen": parts.frozen}
    else:
        told["parts"] = parts.pooled().model_dump() if key is None else told["parts"] | key
    todo = [told["federation"]] if name else []
    for table in todo:  # only the tree itself has residuals
        table.pop("policy", None)
        todo += [*table.get("children", {}).values(), *filter(None, [table.get("branches")])]
    if method["runs"] != "tree":  # and no quorum, which is of other participants
        for out in ("children", "branches", "quorum"):
            told["federation"].pop(out, None)
    told["eval"]["per_silo"] = True
    return parse_run_config(told, source=f"the run file as {name or 'itself'} has it")
