"""Recordings of event cameras: reading them whatever their format, and coding them without loss."""

from __future__ import annotations

from psn_train.data.events.readers import FORMATS, parse_recording, read_recording
from psn_train.data.events.recording import EVENT_DTYPE, REPAIRS, EventError, FlatRecording, Recording, make_events

__all__ = [
    "EVENT_DTYPE",
    "FORMATS",
    "REPAIRS",
    "EventError",
    "FlatRecording",
    "Recording",
    "make_events",
    "parse_recording",
    "read_recording",
]
