"""What the same training would have moved otherwise: the two baselines that bytes are held against.

A task is one participant in one round; bytes are both directions together.
"""

from __future__ import annotations


def all_reduce_bytes(parameters: int, local_steps: int, tasks: int) -> int:
    """Gradients averaged after every step, in fp32: 4 bytes x parameters, up and down."""
    return 4 * parameters * 2 * local_steps * tasks


def bf16_exchange_bytes(parameters: int, tasks: int) -> int:
    """Whole models once a round, in bf16: 2 bytes x parameters, up and down."""
    return 2 * parameters * 2 * tasks
