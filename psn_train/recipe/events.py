"""The section `events` of a recipe: how recordings of event cameras become frames."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from psn_train.recipe.section import NonNegative, Positive, Section


class Events(Section):
    """Its presence says that the shards hold recordings; without it they hold images."""

    split: Literal["given", "tebn", "random", "first90", "file"] | None = None
    """How the shards must have been split into training and test; held against their index. None: however."""
    frames: Literal["number", "time", "duration", "voxel"] = "number"
    """number: T frames of equally many events; time: T frames of equal time; duration: one frame for each
    `duration_us`, as many as the recording has; voxel: T bins, each event shared by its two neighbours in time.
    Under `duration` the shorter recordings of a batch are followed by empty frames, which count in the batch norms of
    training and nowhere else."""
    rounding: Literal["spikingjelly", "tonic"] = "spikingjelly"
    """Of `number` and `time`. spikingjelly: the last frame takes what is left; tonic: what is left is not used."""
    duration_us: Positive | None = None
    """Microseconds of a frame under `frames: duration`."""
    max_steps: Positive | None = None
    """Most frames of a recording under `frames: duration`; later events are not used. None: no bound."""
    antialias: bool = False
    """Smooth before a bilinear resize to `data.image_size`; the authors' torchvision did not."""
    event_drop: bool = False
    """EventDrop in training: of each recording nothing, a stretch of time, an area or a random share is left out."""
    roll: Annotated[int, Field(ge=0)] = 0
    """Training: roll by up to that many pixels in each direction; what leaves on one side enters on the other."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Training: rotate by up to that many degrees either way."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Training: blank a square of that side, in pixels."""
    nda_ops: Annotated[int, Field(ge=0, le=8)] = 0
    """Training: neuromorphic data augmentation, M: how many of roll, rotate and cutout are drawn for each sample, on
    top of those above."""
    nda_strength: Annotated[int, Field(ge=1, le=3)] = 2
    """Its N: roll by up to 2 N + 1 pixels, rotate by up to 15 N degrees, cutout of 8 N pixels."""
    scale: Annotated[NonNegative, Field(gt=0)] = 1.0
    """What the counts are multiplied by; the authors leave them as they are."""
