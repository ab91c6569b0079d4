"""What a network sees of a recording: integrated, resized and, in training, augmented, by the trainer's own code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from psn_train.data.frames.batched import PackedEvents
from psn_train.data.frames.event_drop import event_drop
from psn_train.data.stream import Batch
from psn_train.recipe import Recipe
from psn_train.training.inputs import EventInputs
from psn_train.view.frames import by_sign
from psn_train.view.source import Seen

EPOCHS = 4


def network_rows(seen: Seen, recipe: Recipe) -> list[tuple[str, np.ndarray]]:
    """(name, frames [T, 2, H, W]) of the evaluation and of the epochs 0 to 3 of training.

    What is drawn for a sample follows from seed, epoch and the sample's number in its shards, as in a run: a file is
    taken for the first sample. Of random erasing, mixup and cutmix, which need a whole batch, nothing is seen.
    """
    inputs = EventInputs(recipe, torch.device("cpu"))
    rows = []
    for epoch in (None, *range(EPOCHS)):
        recording = seen.recording
        if epoch is not None and recipe.events.event_drop:
            recording = event_drop(recording, recipe.seed, epoch, seen.sample_id)
        # repairs are of the file
        packed = PackedEvents.pack([replace(recording, repairs={})], with_time=True)
        ids, epochs = np.array([seen.sample_id]), np.array([epoch or 0])
        batch = Batch(packed, torch.zeros(1, dtype=torch.int64), ids, epochs)
        frames, _ = inputs(batch, training=epoch is not None)
        rows.append(("evaluation" if epoch is None else f"epoch {epoch}", by_sign(frames[:, 0].numpy())))
    return rows
