"""The environment with which another process on this machine opens an embedded store."""

from __future__ import annotations

from photon.deploy.embedded_store import REGION, EmbeddedStore


def environment_of(store: EmbeddedStore) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": store.access_key_id,
        "AWS_SECRET_ACCESS_KEY": store.secret,
    }
