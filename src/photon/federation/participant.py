"""Who answers tasks: a node that trains, or a federation of others."""

from __future__ import annotations

from typing import Protocol

from photon.federation.engine import Version
from photon.federation.tasks import EvalReceipt, EvalTask, FitTask, Update


class Participant(Protocol):
    """A version goes down, an update comes back."""

    def fit(self, task: FitTask, version: Version) -> Update:
        """Take the task's local steps from the version.

        A loss or an update that is not finite is a receipt with a failure, not an exception: the
        round goes on. What is kept may still be on its way to disk; `settle` waits for it.
        """
        ...

    def evaluate(self, task: EvalTask, version: Version) -> EvalReceipt:
        """Score the version on held-out text."""
        ...

    def settle(self) -> None:
        """Wait until all that was kept is on disk.

        Raises:
            DiskFullError: no room for it.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...
