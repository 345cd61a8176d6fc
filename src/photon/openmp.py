"""How PyTorch's threads wait for one another: `import photon` decides it, as nothing can later.

They spin by default, and so steal the core that the one they wait for needs: beside any other busy
process training takes several times as long (LAB.md). Asleep they cost a few percent on a machine
that does nothing else. OpenMP reads the variable once, when PyTorch is first imported.
"""

from __future__ import annotations

import os
import sys
import warnings

#: PyTorch was here before Photon, and nobody had said how its threads are to wait.
_TOO_LATE = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # also for processes started from this one


def warn_of_spinning() -> None:
    """Says so where PyTorch's threads spin because it was imported first; once a process."""
    if _TOO_LATE:
        warnings.warn(
            "torch was imported before photon, so its threads spin while they wait; beside other "
            "busy programs training takes several times as long. Import photon first, or set "
            "OMP_WAIT_POLICY=PASSIVE before Python starts.",
            RuntimeWarning,
            stacklevel=4,
        )
