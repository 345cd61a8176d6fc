"""What every table of a configuration file is."""

from __future__ import annotations

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(ge=1)]

#: Of a file or folder on this machine; "~" is the home of who runs Photon.
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """A table of run.toml: frozen, and a key it does not know is an error.

    Strict: `rounds = true` or `rounds = "3"` is a mistake, not 1 or 3.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """No whole number is beyond what a float holds exactly: figures are made of them."""
        if isinstance(value, int) and value > 2**53:
            raise ValueError("it is more than anything here can count, 2^53")
        return value
