"""The command line."""

import os

# Threads of PyTorch spin while they wait for each other. Beside any other busy process that halves
# the speed of training (LAB.md), so they sleep instead; read when PyTorch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
