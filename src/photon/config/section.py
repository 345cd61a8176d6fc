"""What every table of a configuration file is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A table of run.toml: frozen, and a key it does not know is an error.

    Strict: `rounds = true` or `rounds = "3"` is a mistake, not 1 or 3.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
