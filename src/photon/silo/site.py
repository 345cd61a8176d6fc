"""What a site brings to any run: its home, its text, its machines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from photon.config import NodeConfig, PrivacyConfig, RunConfig
from photon.config.children import privacy_of
from photon.data import PreparedData, SiloData, open_data
from photon.federation import NodeSettings, Participant
from photon.federation.envelopes import RunPart, node_config
from photon.federation.private import Purse
from photon.silo.policy import Membership, own_part
from photon.store.disk import file_sha256
from photon.telemetry import Event
from photon.training import Seat


class Build(Protocol):
    """Makes who works for a run, where that is no node; told what happens."""

    @property
    def update_privacy(self) -> PrivacyConfig: ...

    def __call__(
        self,
        run: RunPart,
        settings: NodeSettings,
        model: nn.Module,
        on_event: Callable[[Event], None],
    ) -> Participant: ...


class Site:
    """One site.

    Args:
        home: folder of the node.
        node: node.toml.
        membership: who it is.
        federation: of a site that has members in the place of text.

    Attributes:
        registered: sha256 of the data that this site takes part with.
    """

    def __init__(
        self,
        home: Path,
        node: NodeConfig,
        membership: Membership,
        federation: Build | None = None,
    ) -> None:
        self.home, self.federation = home, federation
        self.node = node
        self.membership = membership
        self._data: PreparedData | None = None
        self.registered = membership.data_sha256
        self._verified: str | None = None

    def config(self, run: RunPart) -> RunConfig:
        """The run as this site trains it.

        Raises:
            ProtocolError, ConfigError: see `node_config`.
        """
        site = {
            "compute": self.node.compute.model_dump(mode="json", exclude_none=True),
            "data": {"path": self.node.data.path},
            "energy": self.node.energy.model_dump(mode="json"),
        }
        return node_config(run, site)

    def privacy(self, config: RunConfig) -> PrivacyConfig:
        """What an answer of this site goes through."""
        if self.federation is not None:
            return self.federation.update_privacy
        return privacy_of(config, self.membership.name)

    def data(self, run: RunPart) -> PreparedData:
        """This site's text, as the one silo that is called as the member is; none of a federation,
        whose members each check the run's tokenizer.

        Raises:
            DataError: it can't be used, or no silo of it is this site's.
        """
        path = Path(self.node.data.path)
        if self.federation is not None:
            by, size = (path, run.tokenizer), (run.vocab_size, run.eos_id, np.dtype("<u4"))
            nothing = SiloData("", path, {}, *by)
            return PreparedData(path, {}, nothing, *by, *size, str(self.registered))
        with suppress(OSError):
            if self._data is not None and file_sha256(path / "manifest.json") == self._data.sha256:
                return self._data
        self._data = own_part(open_data(path), self.node.data, self.membership.name)
        self.registered = self.registered or self._data.sha256
        return self._data

    def verify(self, data: PreparedData) -> None:
        """Read through this site's text, once for each time it changes.

        Raises:
            ShardCorruptError, VocabularyMismatchError: see PreparedData.verify.
        """
        if self._verified != data.sha256:
            data.verify()
            self._verified = data.sha256

    def settings(self, run: RunPart, config: RunConfig, seat: Seat) -> NodeSettings:
        """Of this site's node in a run."""
        purse = Purse(self.home / "privacy", run.id, self.node.policy.max_epsilon)
        folder = self.home / "nodes" / run.id
        return NodeSettings(config, folder, seat=seat, apart=True, purse=purse)
