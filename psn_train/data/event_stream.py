"""Recordings out of shards for the streams: decoded, thinned by EventDrop in training, packed for the device.

A batch's inputs are `PackedEvents`; the device makes frames of them, so that one set of shards serves every T and every
way of integrating. Order, epochs, names of bad samples and their caps are those of `stream`. What is drawn on the
device goes by the ids of the batch, so that a stand-in for a bad recording is augmented in its own way.
"""

from __future__ import annotations

import numpy as np

from psn_train.data.event_index import sensor_of
from psn_train.data.events import EVENT_DTYPE, EventError, FlatRecording, Recording
from psn_train.data.events.codec import decode_events, decode_flat
from psn_train.data.frames.batched import PackedEvents
from psn_train.data.frames.event_drop import event_drop
from psn_train.data.images import BadSample, decode_label
from psn_train.data.reader import SampleReader
from psn_train.recipe import Recipe


class EventSamples:
    """Recordings of shards, one by one and packed; what `stream.ImageSamples` is of images."""

    def __init__(self, recipe: Recipe, reader: SampleReader, training: bool):
        self.recipe, self.reader = recipe, reader
        self.drops = training and recipe.events.event_drop
        self.sensor = sensor_of(reader.index)

    def read(self, sample_id: int, epoch: int) -> tuple[Recording | FlatRecording, int, str]:
        """(recording, class, key) of a sample; in training EventDrop by (seed, epoch, sample id).

        Raises:
            BadSample, ShardError: it cannot be read, or is of another sensor than the index says.
        """
        sample = self.reader.read(sample_id)
        label = decode_label(sample, len(self.reader.index.classes), self.reader.places)
        if "events" not in sample:
            found = ", ".join(sorted(key for key in sample if not key.startswith("__")))
            raise BadSample(f"no recording; members: {found}")
        try:
            # EventDrop needs the events one by one
            decode = decode_events if self.drops else decode_flat
            recording = decode(sample["events"], sample["__key__"])
        except EventError as error:
            raise BadSample(f"undecodable recording: {error}") from error
        if recording.sensor != self.sensor:
            width, height = recording.sensor
            raise BadSample(
                f"a recording of {width} x {height} pixels; the index says {self.sensor[0]} x {self.sensor[1]}"
            )
        if self.drops:
            recording = event_drop(recording, self.recipe.seed, epoch, sample_id)
        return recording, label, sample["__key__"]

    def blank(self) -> Recording:
        """What stands in the place of a sample that cannot be evaluated: no events."""
        return Recording(np.zeros(0, EVENT_DTYPE), self.sensor)

    def stack(self, recordings: list[Recording | FlatRecording], memory: None = None) -> PackedEvents:
        """One after the other, with their times where frames need them; always in memory of their own."""
        return PackedEvents.pack(recordings, self.sensor, with_time=self.recipe.events.frames != "number")

    def flips(self, recordings: list[Recording | FlatRecording]) -> None:
        """The device augments frames, and draws the flips itself."""
