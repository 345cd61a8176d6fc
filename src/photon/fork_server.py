"""The process that workers are forked from: it imports PyTorch once, while this one does the same.

Workers are not forked from the process that starts them: a fork copies locks of running thread
pools in whatever state. One that does nothing but import is forked instead.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

#: By name: they need not be imported here. The last two are what nodes would import late, each.
_PRELOADED = [
    "photon.runs",
    "photon.data.quiet_grain",
    "transformers.models.llama.modeling_llama",
]


def fork_context() -> ForkServerContext:
    """For processes of this machine that train."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def start_fork_server() -> None:
    """Have it import from now on; whoever needs it later finds it ready, or waits less."""
    fork_context()
    forkserver.ensure_running()
