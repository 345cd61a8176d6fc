"""The aggregator's desk and the run's store, as a node with a key reaches them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from photon.config import NodeConfig
from photon.membership.keys import NodeKey
from photon.silo.desk_client import DeskClient
from photon.silo.policy import Membership
from photon.store.granted_store import GrantedStore
from photon.store.transfer import Transfer


def outside(
    ca_file: Path, node: NodeConfig, membership: Membership, key: NodeKey
) -> tuple[DeskClient, Callable[[str], Transfer]]:
    """The desk, and for a task's id the way to the store, by the desk's grants."""
    desk = DeskClient(membership.address, ca_file, key)
    cap = node.network.mbit_per_s

    def carrier(task_id: str) -> Transfer:
        grants = desk.grants(task_id)
        store = GrantedStore(
            grants,
            membership.store_origin,
            allowed=membership.store_allowed(node.network),
            trust=desk.trust if membership.store is None else None,
        )
        return Transfer(
            store,
            streams=node.network.streams,
            bytes_per_s=cap * 1e6 / 8 if cap is not None else None,
            silence_s=node.network.silence_s,
            announce=grants.expect,
        )

    return desk, carrier
