"""What a run says about itself: events with units in every name, and who listens; no torch."""

from photon.telemetry.events import Event
from photon.telemetry.history import RunHistory, read_events, read_history
from photon.telemetry.recorder import JsonlWriter, Listener, Recorder
