"""Which Photon this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def photon_version() -> str:
    """Version of the installed package."""
    try:
        return version("photon-federated")
    except PackageNotFoundError:
        return "0+uninstalled"
