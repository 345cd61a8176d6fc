"""Engines carry tasks to participants and answers back.

local: in the aggregator's process. workers: processes of this machine. remote: silos that joined,
through the desk. Nothing is imported here.
"""
