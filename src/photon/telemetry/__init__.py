"""What a run says about itself: events with units in every name, and who listens; no torch."""

from photon.telemetry.events import EVENTS, Event, parse_event
from photon.telemetry.history import RunHistory, read_events, read_history
from photon.telemetry.recorder import JsonlWriter, Listener, Recorder

__all__ = [
    "EVENTS",
    "Event",
    "JsonlWriter",
    "Listener",
    "Recorder",
    "RunHistory",
    "parse_event",
    "read_events",
    "read_history",
]
