"""The whole set on the device: every sample is decoded once, and batches are made there.

For sets that fit, such as CIFAR: 50,000 images of 3 x 32 x 32 are 154 MB. The order, the epochs and the rule for
samples that cannot be read are those of `stream.py`, whose classes these extend; `batched_augment.py` augments. Batches
are prepared in blocks of several micro-steps, so that the device gets few large operations in place of many small ones;
what is in a batch does not depend on the block. Nothing in here waits for the device once the images are on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from psn_train.data.batched_augment import augment_images, draw, to_device
from psn_train.data.images import fit_transform
from psn_train.data.index import ShardError
from psn_train.data.progress import note_progress
from psn_train.data.reader import SampleReader
from psn_train.data.stream import Batch, EvalStream, TrainStream, make_loader
from psn_train.recipe import Plan, Recipe

# images that are augmented at once; more gain nothing, and cost memory in float32
_BLOCK = 2048
# images that a decoding process hands over at once
_CHUNK = 250


class ResidentImages:
    """All samples of an index on one device.

    Attributes:
        images: uint8 [n, C, S, S] on the device, S the recipe's `image_size`; zeros where a sample cannot be read.
        targets: int64 [n] on the device; -1 where a sample cannot be read.
        keys: n names.
        bad: {sample id: "shard.tar[17]: why"} of those that cannot be read.
    """

    def __init__(
        self,
        reader: SampleReader,
        recipe: Recipe,
        device: torch.device | str,
        *,
        evaluation: bool = False,
    ):
        """Decode with `data.workers` processes.

        Args:
            evaluation: images as the evaluation sees them, not as training begins with them; the two differ only
                where a recipe sets `augment.eval_resize`.

        Raises:
            ShardError: the images do not fit, or more than `data.max_bad_samples` cannot be read.
        """
        self.reader, self.device = reader, torch.device(device)
        count, side, channels = reader.index.num_samples, recipe.data.image_size, recipe.model.in_chans
        _check_room(count, (channels, side, side), self.device, reader.index.place)
        images = torch.empty(count, channels, side, side, dtype=torch.uint8)
        targets = torch.empty(count, dtype=torch.int64)
        self.keys: list[str] = []
        self.bad: dict[int, str] = {}
        stream = EvalStream(recipe, reader, _CHUNK, rank=0, world_size=1)
        if not evaluation:
            stream.samples.transform = fit_transform(recipe)
        loader = make_loader(stream, start=0, stop=len(stream), workers=recipe.data.workers, pin_memory=False)
        for batch in loader:
            here = slice(int(batch.ids[0]), int(batch.ids[-1]) + 1)
            images[here], targets[here] = batch.inputs, batch.targets
            self.keys += batch.keys
            note_progress()
            self.bad.update(zip(batch.ids[batch.targets.numpy() < 0].tolist(), batch.bad, strict=True))
        allowed = recipe.data.max_bad_samples
        if len(self.bad) > allowed:
            text = f"{len(self.bad)} unreadable samples, data.max_bad_samples is {allowed}:\n  "
            text += "\n  ".join(self.bad.values())
            raise ShardError(text + "\nCheck the shards with `psn shards verify`, or allow more.")
        self.images, self.targets = images.to(self.device), targets.to(self.device)
        self.unreadable = np.zeros(count, dtype=bool)
        self.unreadable[list(self.bad)] = True

    def __len__(self) -> int:
        return len(self.keys)


def _check_room(count: int, shape: tuple[int, int, int], device: torch.device, location: str) -> None:
    wanted = count * int(np.prod(shape))
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # the network needs some of it, too
    if wanted > room // 2:
        channels, height, width = shape
        raise ShardError(
            f"{location}: {count:,} images of {channels} x {height} x {width} are {wanted / 1e9:.1f} GB, more than "
            f"half of the {room / 1e9:.1f} GB of {device}. Read them from the shards: data.resident=false."
        )


class ResidentTrainStream(TrainStream):
    """Item `m` is micro-batch `m` of this rank, on the device: ids, epochs and targets of `TrainStream`'s."""

    def __init__(self, recipe: Recipe, plan: Plan, images: ResidentImages, rank: int):
        super().__init__(recipe, plan, images.reader, rank)
        self.resident = images
        self.block_size = max(1, _BLOCK // plan.micro_batch_size)

    def __getitem__(self, micro_step: int) -> Batch:
        return self.block(range(micro_step, micro_step + 1))[0]

    def block(self, micro_steps: range) -> list[Batch]:
        """Consecutive micro-batches, augmented together; each is what it would be alone.

        Raises:
            ShardError: no sample of a micro-batch can be read.
        """
        resident = self.resident
        positions = [self.positions(micro_step) for micro_step in micro_steps]
        taken = [self._good(epochs, ids) for epochs, ids in positions]
        epochs, rows = (np.concatenate(part) for part in zip(*taken, strict=True))
        draws = draw(self.recipe, epochs, rows)
        images = augment_images(resident.images, draws, interpolation=self.recipe.augment.interpolation, rows=rows)
        targets = resident.targets.index_select(0, to_device(rows, resident.device))
        batches, end = [], 0
        for epochs, ids in positions:
            here = slice(end, end := end + len(ids))
            keys = list(map(resident.keys.__getitem__, rows[here].tolist()))
            bad = [resident.bad[sample_id] for sample_id in ids[resident.unreadable[ids]].tolist()]
            batches.append(Batch(images[here], targets[here], ids, epochs, keys, bad))
        return batches

    def _good(self, epochs: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, ids) of the images that are shown: the next good one, draws included, for each unreadable one."""
        unreadable = self.resident.unreadable[ids]
        if not unreadable.any():
            return epochs, ids
        good = np.flatnonzero(~unreadable)
        if not len(good):
            bad = [self.resident.bad[sample_id] for sample_id in ids.tolist()]
            raise ShardError("no sample of a micro-batch could be read:\n  " + "\n  ".join(bad))
        # the place of the next good one, from the first again after the last; good places are their own
        places = good[np.searchsorted(good, np.arange(len(ids))) % len(good)]
        return epochs[places], ids[places]


class ResidentEvalStream(EvalStream):
    """Item `i` is batch `i` of this rank, of the samples in the index's order, on the device."""

    block_size = 1

    def __init__(
        self,
        recipe: Recipe,
        images: ResidentImages,
        batch_size: int,
        rank: int,
        world_size: int,
        ids: np.ndarray | None = None,
    ):
        super().__init__(recipe, images.reader, batch_size, rank, world_size, ids)
        self.resident = images

    def __getitem__(self, item: int) -> Batch:
        resident, ids = self.resident, self.ids_of(item)
        rows = to_device(ids, resident.device)
        # unreadable ones are zeros of class -1 already
        images, targets = resident.images.index_select(0, rows), resident.targets.index_select(0, rows)
        bad = [resident.bad[sample_id] for sample_id in ids[resident.unreadable[ids]].tolist()]
        keys = [resident.keys[sample_id] for sample_id in ids.tolist()]
        return Batch(images, targets, ids, np.zeros_like(ids), keys, bad)

    def block(self, items: range) -> list[Batch]:
        return [self[item] for item in items]


class ResidentLoader:
    """Items `start` to `stop` - 1 of a stream, in order, each time it is gone through; in place of a DataLoader.

    Attributes:
        dataset: the stream.
    """

    def __init__(self, stream: ResidentTrainStream | ResidentEvalStream, *, start: int, stop: int):
        self.dataset: Dataset = stream
        self.items = range(start, stop)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        size = self.dataset.block_size
        for first in range(0, len(self.items), size):
            yield from self.dataset.block(self.items[first : first + size])
