"""One file -> what evaluation would read of it out of shards: images uint8 [C, H, W], or a recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psn_train.data.events import EventError, Recording, parse_recording
from psn_train.data.events.readers import guess_format
from psn_train.data.image_files import BadImage, prepare_image
from psn_train.data.images import BadSample
from psn_train.data.sources.source import named_error
from psn_train.data.stream import ImageSamples
from psn_train.predict.files import IMAGES, RECORDINGS, Kind, other
from psn_train.recipe import Recipe

# these leave the sensor open, so that the smallest known one that holds the events would be taken
_OPEN = ("bin", "npy", "npz")


class Unreadable(ValueError):
    """A file that cannot be predicted. The message names it and says why."""

    def __init__(self, file: str, why: str):
        super().__init__(f"{file}: {why}")
        self.file, self.why = file, why


def _bytes_of(path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(path, error.strerror or str(error)) from error
    # an embedded null byte
    except ValueError as error:
        raise Unreadable(path, str(error)) from error
    if not data:
        raise Unreadable(path, "the file is empty")
    return data


def _named(path: str, error: Exception, kind: Kind) -> Unreadable:
    hint = f" (this network takes {kind.name})" if other(kind).takes(path) else ""
    return Unreadable(path, named_error(path, error).removeprefix(f"{path}: ") + hint)


class ImageFiles:
    """Images as `psn shards images` stores them and evaluation decodes them; of an animation, the first picture."""

    kind = IMAGES

    def __init__(self, recipe: Recipe):
        self.samples = ImageSamples(recipe, None, training=False)

    def __call__(self, path: str, data: bytes | None = None) -> np.ndarray:
        """uint8 [C, H, W]. Args: data: what stands in the file; None: it is read.

        Raises:
            Unreadable: it is none, or it is damaged.
        """
        data = _bytes_of(path) if data is None else data
        try:
            # jpg, png and webp stay as they are, anything else becomes a PNG
            image = prepare_image(data)
            return self.samples.prepare({image.extension: image.data})
        except (BadImage, BadSample) as error:
            raise _named(path, error, self.kind) from error


class RecordingFiles:
    """Recordings of event cameras, read as `psn shards events` reads them.

    Args:
        format: of `events.FORMATS`; None: told by each file.
        sensor: (width, height) that a user gave; None: as each file has it.
        trained: (width, height) that the network was trained on; None: nobody knows.

    Raises:
        ValueError: the given sensor is not the one that the network was trained on.
    """

    kind = RECORDINGS

    def __init__(self, format: str | None, sensor: tuple[int, int] | None, trained: tuple[int, int] | None):
        if None not in (sensor, trained) and sensor != trained:
            raise ValueError(
                f"--sensor {sensor[0]}x{sensor[1]}: the network was trained on recordings of {trained[0]} x "
                f"{trained[1]} pixels; drop --sensor, or take another network"
            )
        self.format, self.sensor, self.trained = format, sensor, trained

    def __call__(self, path: str, data: bytes | None = None) -> Recording:
        """The recording, on the sensor that the network knows. Args: data: what stands in the file; None: it is read.

        Raises:
            Unreadable: it is none, is damaged, has no events, or is of another sensor.
        """
        data = _bytes_of(path) if data is None else data
        try:
            recording = self._parse(data, path)
        except EventError as error:
            raise _named(path, error, self.kind) from error
        if not len(recording):
            raise Unreadable(path, "no events in it")
        if self.trained is not None and recording.sensor != self.trained:
            (width, height), (known_width, known_height) = recording.sensor, self.trained
            raise Unreadable(
                path,
                f"of a sensor of {width} x {height} pixels, and the network was trained on one of "
                f"{known_width} x {known_height}",
            )
        return recording

    def _parse(self, data: bytes, path: str) -> Recording:
        format = self.format or self._guess(data, path)
        wanted = self.sensor or (self.trained if format in _OPEN else None)
        try:
            return parse_recording(data, format, wanted, path)
        except EventError:
            # a file that does not say its sensor, in a format whose files mostly do
            if wanted is not None or self.trained is None:
                raise
            return parse_recording(data, format, self.trained, path)

    def _guess(self, data: bytes, path: str) -> str:
        try:
            return guess_format(data, Path(path).suffix, path)
        except EventError as error:
            raise EventError(f"{error}; --format names it") from error


def open_reading(
    recipe: Recipe, meta: dict, format: str | None, sensor: tuple[int, int] | None
) -> ImageFiles | RecordingFiles:
    """What reads the files of a network's kind.

    Args:
        meta: as `load_any` gives it.

    Raises:
        ValueError: options of recordings for a network of images, or a sensor that is not the network's.
    """
    if recipe.events is None:
        for name, given in (("--format", format), ("--sensor", sensor)):
            if given is not None:
                raise ValueError(f"{name} is of recordings, and this network takes images; leave it out")
        return ImageFiles(recipe)
    split = meta.get("psn_train", meta).get("split") or {}
    trained = split.get("sensor")
    return RecordingFiles(format, sensor, None if trained is None else tuple(trained))
