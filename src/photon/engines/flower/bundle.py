"""The app bundle that Flower wants with every run. It holds no code of ours, only where it is.

A superlink hands a run's bundle to the ServerApp (which imports what it names, from the Photon that
is installed there) and to every supernode (which keeps it unread, see `supernode`).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from photon.engines.flower.pinned import check_flower

#: Module with the ServerApp `app` that a bundle names by default.
AGGREGATOR = "photon.deploy.aggregator"

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

PROJECT = """\
[project]
name = "photon"
version = "1.0.0"
description = "Names the ServerApp of the Photon that is installed; holds no code."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "photon"

[tool.flwr.app.components]
serverapp = "photon_bundle:app"
clientapp = "photon_bundle:no_client"
"""


def build_bundle(module: str = AGGREGATOR) -> bytes:
    """The bundle for a ServerApp `app` in `module`; the same bytes every time.

    Raises:
        ValueError: `module` is no module's name.
        DeployError: another version of Flower is installed.
    """
    if not _MODULE.fullmatch(module):
        raise ValueError(f"{module!r} is no module's name, such as {AGGREGATOR!r}")
    code = f'"""Nothing but a name."""\n\nimport {module} as aggregator\n\napp = aggregator.app\n'
    return pack({"pyproject.toml": PROJECT.encode(), "photon_bundle.py": code.encode()})


def pack(files: Mapping[str, bytes | Path]) -> bytes:
    """Files as Flower packs them.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    from flwr.cli.build import build_fab_from_files

    with warnings.catch_warnings():  # Flower's own use of pathspec
        warnings.simplefilter("ignore", DeprecationWarning)
        return build_fab_from_files(files)[0]


def digest(bundle: bytes) -> str:
    """sha256, by which Flower and the superexec call a bundle."""
    return hashlib.sha256(bundle).hexdigest()
