"""Engines carry tasks to participants and answers back.

local: in the aggregator's process. workers: processes of this machine. remote: silos that joined,
over a post; flower/ is one. Nothing is imported here: parts of flower/ run without torch.
"""
