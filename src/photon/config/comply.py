"""[comply]: what the cards of a served run must come to before it starts, and for each member."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from photon.config.section import LocalPath, Section


class ComplyConfig(Section):
    """[comply]. docs/cards.md says how; a prediction, not legal advice."""

    cards: LocalPath | None = Field(
        default=None,
        description="Folder with the cards: project.toml, data/SILO.toml, models/NAME.toml "
        "(`photon cards init DIR --run-file RUN.toml` writes them). `photon serve` predicts from "
        "them whenever members or cards change, and logs what changed. None: RUN/cards, and "
        "`photon serve` does not look at it.",
    )
    require: Literal["met", "unknown", "not_met"] | None = Field(
        default=None,
        description="The worst verdict that is put up with (out_of_scope is better than met; worst "
        "is prohibited). A run does not start on a worse one, and a member with whom it would be "
        "worse takes no part.",
    )
    law: LocalPath | None = Field(
        default=None,
        description="A law file of the federation's own; None: the EU's AI Act as Photon has it.",
    )

    @model_validator(mode="after")
    def _whole(self) -> ComplyConfig:
        if self.cards is None and (self.require is not None or self.law is not None):
            raise ValueError("require and law need cards, the folder to predict from")
        return self
