"""Shards -> batches of uint8 images or of packed recordings, for training and for evaluation.

Training: micro-batch `m` of a rank is a function of the recipe and of `m`, so a loader starts anywhere without reading
what came before. Evaluation: each rank has consecutive batches; every sample is seen exactly once. Samples that are
held out of the training shards are never trained on, and are evaluated as validation shards would be.

A sample that cannot be read is named in the batch's `bad` list. Its place is taken by a copy of the next good sample of
the micro-batch (training) or by an image of zeros, a recording without events, of no class (evaluation).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import math
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from psn_train.data import decoders
from psn_train.data.ahead import FetchAhead, Need, lag_of, shard_needs
from psn_train.data.event_stream import EventSamples
from psn_train.data.frames.batched import PackedEvents
from psn_train.data.handover import HandoverLoader, handover_here, images_in
from psn_train.data.images import (
    BadSample,
    decode_image,
    decode_label,
    eval_transform,
    seeded,
    train_transform,
)
from psn_train.data.index import ShardError
from psn_train.data.memory import keep_freed_memory
from psn_train.data.order import stream_positions
from psn_train.data.progress import adopt_progress, progress_place
from psn_train.data.reader import SampleReader
from psn_train.data.sources.source import named_error
from psn_train.data.turbo import Unflipped, jpeg_of, open_turbo
from psn_train.recipe import Plan, Recipe

# items that a decoding process has before it
PREFETCH = 4
# batches of an update that a loader has shared memory for
MOST_HELD = 8


@dataclass
class Batch:
    """Samples of one rank on their way to its device."""

    inputs: torch.Tensor | PackedEvents  # images uint8 [N, C, H, W], or recordings
    targets: torch.Tensor  # int64 [N]; -1 for a bad sample of the evaluation
    ids: np.ndarray  # int64 [N], places in the index
    epochs: np.ndarray  # int64 [N]
    keys: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # "shard.tar[17]: why", one for each sample that could not be read
    flips: torch.Tensor | None = None  # bool [2, N]: images still to be flipped horizontally, vertically; None: done

    def pin_memory(self) -> Batch:
        self.inputs = self.inputs.pin_memory()
        self.targets = self.targets.pin_memory()
        self.flips = None if self.flips is None else self.flips.pin_memory()
        return self


class ImageSamples:
    """Images of shards, one by one and stacked.

    What a stream asks for its samples; `event_stream.EventSamples` answers the same of recordings.
    """

    def __init__(self, recipe: Recipe, reader: SampleReader | None, training: bool):
        """`reader` is for `read` alone."""
        self.recipe, self.reader, self.training = recipe, reader, training
        self.transform = train_transform(recipe) if training else eval_transform(recipe)
        self.turbo = open_turbo(recipe, training)

    def read(self, sample_id: int, epoch: int) -> tuple[np.ndarray | Unflipped, int, str]:
        """(uint8 [C, H, W], class, key) of a sample; in training augmented by (seed, epoch, sample id).

        Raises:
            BadSample, ShardError: it cannot be read.
        """
        sample = self.reader.read(sample_id)
        label = decode_label(sample, len(self.reader.index.classes), self.reader.places)
        return self.prepare(sample, (self.recipe.seed, epoch, sample_id)), label, sample["__key__"]

    def prepare(self, sample: dict, entropy: tuple[int, ...] = ()) -> np.ndarray | Unflipped:
        """The image of a sample's members by their extensions: uint8 [C, H, W]; training draws from `entropy`.

        Raises:
            BadSample: it cannot be decoded.
        """
        if self.turbo is not None and (data := jpeg_of(sample)) is not None:
            image = self.turbo(data, entropy)
            if image is not None:
                return image
        with seeded(*entropy) if self.training else contextlib.nullcontext():
            return self.transform(decode_image(sample, self.recipe.model.in_chans))

    def blank(self) -> np.ndarray:
        """What stands in the place of a sample that cannot be evaluated: zeros, uint8 [C, H, W]."""
        side = self.recipe.data.image_size
        return np.zeros((self.recipe.model.in_chans, side, side), dtype=np.uint8)

    def stack(self, images: list[np.ndarray | Unflipped], memory: np.ndarray | None = None) -> torch.Tensor:
        """uint8 [N, C, H, W] in channels_last: as decoders give them, and as convolutions take them.

        Args:
            memory: where they are to lie, uint8 [bytes]; by default in memory of their own. Images that have no room
                there, which no recipe's have, have memory of their own, too.
        """
        images = [image.pixels if isinstance(image, Unflipped) else image for image in images]
        shape = len(images), *images[0].shape
        size = math.prod(shape)
        if memory is None or len(memory) < size:
            memory = np.empty(size, np.uint8)
        stacked = images_in(memory, shape)
        for place, image in zip(stacked, images, strict=True):
            place[...] = image
        return torch.from_numpy(stacked)

    def flips(self, images: list[np.ndarray | Unflipped]) -> torch.Tensor | None:
        """Which of these the device is to flip, bool [2, N]; None: none of them."""
        turned = [(i.hflip, i.vflip) if isinstance(i, Unflipped) else (False, False) for i in images]
        return torch.tensor(turned).T.contiguous() if any(map(any, turned)) else None


def open_samples(recipe: Recipe, reader: SampleReader, *, training: bool) -> ImageSamples | EventSamples:
    """The recipe's kind of samples out of a reader's shards."""
    kind = ImageSamples if recipe.events is None else EventSamples
    return kind(recipe, reader, training)


class ShardStream(Dataset):
    """What streams share: shards of URLs are fetched ahead, by the first of the processes that read a stream."""

    reader: SampleReader
    samples: ImageSamples | EventSamples
    batch_size: int  # the largest of an item
    claims: bool
    held = 0  # items that are kept beside the current one
    _ahead: FetchAhead | None = None

    def needs(self, item: int) -> Iterator[list[Need]]:
        """The shards that items from `item` on are read from, in parts."""
        raise NotImplementedError

    def look_ahead(self, item: int) -> None:
        """To be called before an item is read."""
        if not self.reader.has_remote:
            return
        info = get_worker_info()
        if info is not None and info.id:
            return
        if self._ahead is not None and item < self._ahead.item:
            self._ahead.close()
            self._ahead = None
        if self._ahead is None:
            lag = lag_of(0 if info is None else info.num_workers, PREFETCH)
            self._ahead = FetchAhead(self.reader, self.needs(item), lag=lag, claims=self.claims)
        self._ahead.advance(item)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_ahead"}


class TrainStream(ShardStream):
    """Item `m` is micro-batch `m` of this rank, counted from the start of training."""

    claims = True

    def __init__(self, recipe: Recipe, plan: Plan, reader: SampleReader, rank: int):
        self.recipe, self.plan, self.reader, self.rank = recipe, plan, reader, rank
        self.shard_sizes = tuple(shard.num_samples for shard in reader.index.shards)
        self.samples = open_samples(recipe, reader, training=True)
        self.batch_size = plan.micro_batch_size
        # an update keeps its batches to its end
        self.held = min(plan.grad_accum_steps - 1, MOST_HELD)

    def __len__(self) -> int:
        return self.plan.total_steps * self.plan.grad_accum_steps

    def positions(self, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids) of a micro-batch, int64 [its size] each."""
        taken = self.plan.micro_batch(self.rank, micro_step)
        return self._stand_at(taken.start, len(taken))

    def _stand_at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        data = self.recipe.data
        return stream_positions(
            start,
            count,
            self.shard_sizes,
            global_batch_size=self.plan.global_batch_size,
            seed=self.recipe.seed,
            shuffle=data.shuffle,
            streams=data.streams,
            hold_out=self.plan.held_out,
            hold_out_seed=data.hold_out_seed,
        )

    def needs(self, item: int) -> Iterator[list[Need]]:
        """A part ends with the update that ends an epoch."""
        plan = self.plan
        steps, samples, batch = plan.grad_accum_steps, plan.train_samples, plan.global_batch_size
        while item < len(self):
            step = item // steps
            stop = min(plan.total_steps, -(-(step * batch // samples + 1) * samples // batch))
            _, ids = self._stand_at(step * batch, (stop - step) * batch)
            taken = [plan.micro_batch(self.rank, number) for number in range(item, stop * steps)]
            own = [ids[micro.start - step * batch : micro.stop - step * batch] for micro in taken]
            yield shard_needs(self.reader, own, item)
            item = stop * steps

    def __getitem__(self, micro_step: int) -> Batch:
        return self.read(micro_step)

    def read(self, micro_step: int, memory: np.ndarray | None = None) -> Batch:
        """The item, with its images in `memory`, uint8 [bytes], if that is given."""
        self.look_ahead(micro_step)
        epochs, ids = self.positions(micro_step)
        samples, targets, keys, bad = [], [], [], []
        for epoch, sample_id in zip(epochs.tolist(), ids.tolist(), strict=True):
            try:
                sample, label, key = self.samples.read(sample_id, epoch)
            except (BadSample, ShardError) as error:
                bad.append(named_error(self.reader.name(sample_id), error))
                sample, label, key = None, -1, ""
            samples.append(sample)
            targets.append(label)
            keys.append(key)
        good = [i for i, sample in enumerate(samples) if sample is not None]
        if not good:
            raise ShardError("no sample of a micro-batch could be read:\n  " + "\n  ".join(bad))
        for i, sample in enumerate(samples):
            if sample is None:
                stand_in = next((g for g in good if g > i), good[0])
                samples[i], targets[i], keys[i] = samples[stand_in], targets[stand_in], keys[stand_in]
        inputs = self.samples.stack(samples, memory)
        return Batch(inputs, torch.tensor(targets), ids, epochs, keys, bad, self.samples.flips(samples))


class EvalStream(ShardStream):
    """Item `i` is batch `first + i` of the samples `ids`, int64 [num_samples]; by default all.

    Ranks have consecutive batches, so that each needs shards of its own.
    """

    claims = False

    def __init__(
        self,
        recipe: Recipe,
        reader: SampleReader,
        batch_size: int,
        rank: int,
        world_size: int,
        ids: np.ndarray | None = None,
    ):
        self.recipe, self.reader, self.batch_size = recipe, reader, batch_size
        self.rank, self.world_size = rank, world_size
        self.ids = np.arange(reader.index.num_samples) if ids is None else ids
        self.samples = open_samples(recipe, reader, training=False)

    @property
    def num_samples(self) -> int:
        """Over all ranks."""
        return len(self.ids)

    def _batches(self) -> range:
        """Those of this rank."""
        batches = -(-self.num_samples // self.batch_size)
        most = -(-batches // self.world_size)
        return range(self.rank * most, (self.rank + 1) * most)[: max(0, batches - self.rank * most)]

    def __len__(self) -> int:
        return len(self._batches())

    def ids_of(self, item: int) -> np.ndarray:
        """Samples of a batch, int64."""
        start = self._batches()[item] * self.batch_size
        return self.ids[start : start + self.batch_size]

    def needs(self, item: int) -> Iterator[list[Need]]:
        yield shard_needs(self.reader, [self.ids_of(number) for number in range(item, len(self))], item)

    def __getitem__(self, item: int) -> Batch:
        return self.read(item)

    def read(self, item: int, memory: np.ndarray | None = None) -> Batch:
        """As `TrainStream.read`."""
        self.look_ahead(item)
        ids = self.ids_of(item)
        samples, targets, keys, bad = [], [], [], []
        for sample_id in ids.tolist():
            try:
                sample, label, key = self.samples.read(sample_id, 0)
            except (BadSample, ShardError) as error:
                bad.append(named_error(self.reader.name(sample_id), error))
                sample, label, key = self.samples.blank(), -1, ""
            samples.append(sample)
            targets.append(label)
            keys.append(key)
        return Batch(self.samples.stack(samples, memory), torch.tensor(targets), ids, np.zeros_like(ids), keys, bad)


def _start_worker(progress: str | None, worker: int) -> None:
    decoders.leave_group()
    decoders.end_with_trainer()
    # a decoding process with as many threads as cores fights the others for them
    torch.set_num_threads(1)
    keep_freed_memory()
    adopt_progress(progress)
    # a rank that finds its loader stuck asks where; see training/watch.py
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    with contextlib.suppress(AttributeError):
        # PR_SET_PDEATHSIG, on Linux: one that is stuck would not notice that its rank was killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def make_loader(
    stream: ShardStream, *, start: int, stop: int, workers: int, pin_memory: bool, keep_workers: bool = False
) -> DataLoader | HandoverLoader:
    """Items start to stop - 1 of a stream, in order, prepared by `workers` processes; images come in shared memory.

    Args:
        keep_workers: the processes outlive an iteration, for a loader that is gone through again and again.
    """
    if workers:
        decoders.start_server()
    # said at each start of more processes than cores, which do no harm
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    items = range(start, stop)
    arguments = {
        "prefetch_factor": PREFETCH if workers else None,
        "persistent_workers": keep_workers and workers > 0,
        "worker_init_fn": functools.partial(_start_worker, progress_place()),
        "multiprocessing_context": decoders.METHOD if workers else None,
        # else every start of a loader would draw from the global generator, and a resumed run would go on otherwise
        "generator": torch.Generator(),
    }
    if workers and items and isinstance(stream.samples, ImageSamples) and handover_here():
        return HandoverLoader(
            stream, items=items, workers=workers, pin_memory=pin_memory, held=stream.held, **arguments
        )
    return DataLoader(stream, batch_size=None, sampler=items, num_workers=workers, pin_memory=pin_memory, **arguments)
