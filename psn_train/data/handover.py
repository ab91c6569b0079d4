"""Batches of images from the decoding processes to the training process, through memory that both have.

A loader has a fixed number of slots, each with room for a batch. Whoever asks for an item lends the decoding process a
slot; it lays the images there and sends back nothing but their shape; the batch that the training process gets is that
slot, with no copy made on its side. Where there is a GPU the memory is page-locked, so that the copy to the device is
direct and nobody waits for it. A slot is lent again when the last tensor that shows it is gone and, on a GPU, what the
current stream had to do by then is done. If all are in use, because somebody keeps batches, a batch comes in memory of
its own, as without slots.

The memory is a file without a name (memfd), which the system frees with the last process that has it, however that
ends. It counts neither as files of /dev/shm nor against their limit.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# batches that the training process has at a time: one in use, one just done with, one that the device still reads
_IN_USE = 3


def handover_here() -> bool:
    """Whether this system has memory of this kind."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def images_in(memory: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The first of `memory`, uint8 [bytes], as images uint8 [N, C, H, W] in channels_last."""
    images, channels, height, width = shape
    return memory[: images * channels * height * width].reshape(images, height, width, channels).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class _Written:
    """Images in a slot, in place of the tensor."""

    slot: int
    shape: tuple[int, int, int, int]  # N, C, H, W


class Slots:
    """Room for `count` batches of at most `size` bytes each. Pickled, it opens the same memory in another process."""

    def __init__(self, count: int, size: int, *, pin: bool):
        self.count, self.size = count, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        file = os.memfd_create("psn_batches")
        os.ftruncate(file, self.count * self.size)
        self.place = f"/proc/{os.getpid()}/fd/{file}"
        self._map: mmap.mmap | None = mmap.mmap(file, self.count * self.size)
        self._close = weakref.finalize(self, os.close, file)
        self._free = list(range(count))
        self._read: list[tuple[torch.cuda.Event, int]] = []
        self.pinned = pin and self._register()

    def __getstate__(self) -> dict:
        return {"count": self.count, "size": self.size, "place": self.place, "_map": None}

    def _register(self) -> bool:
        memory = np.frombuffer(self._map, np.uint8)
        cudart, start = torch.cuda.cudart(), memory.ctypes.data
        if int(cudart.cudaHostRegister(start, len(memory), 0)):
            return False
        # the map outlives the arrays of it, and is unlocked before it goes
        weakref.finalize(self, cudart.cudaHostUnregister, start).atexit = False
        return True

    def memory(self, slot: int) -> np.ndarray:
        """uint8 [size], shared."""
        if self._map is None:
            with open(self.place, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), self.count * self.size)
        return np.frombuffer(self._map, np.uint8, self.size, slot * self.size)

    def take(self) -> int | None:
        """A slot that nobody uses; None: there is none."""
        while self._read and self._read[0][0].query():
            self._free.append(self._read.pop(0)[1])
        # the one that was used last, whose pages are at hand
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """Nobody shows the slot any more; the device may still read it."""
        if self.pinned:
            event = torch.cuda.Event()
            event.record()
            self._read.append((event, slot))
        else:
            self._free.append(slot)

    def tensor(self, written: _Written) -> torch.Tensor:
        """What is written in a slot, uint8 [N, C, H, W] in channels_last; it is given back with the last view of it."""
        array = images_in(self.memory(written.slot), written.shape)
        # torch keeps this very array as long as the storage lives
        weakref.finalize(array, self.give_back, written.slot).atexit = False
        return torch.from_numpy(array)


class _Places(Sampler):
    """Items, each with the slot that its batch is to be laid in."""

    def __init__(self, items: range, slots: Slots):
        self.items, self.slots = items, slots
        self.lent: set[int] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        lent = self.lent
        for item in self.items:
            slot = self.slots.take()
            if slot is not None:
                lent.add(slot)
            yield item, slot


class _Laid(Dataset):
    """A stream's items, laid in slots; in the decoding processes."""

    def __init__(self, stream: Dataset, slots: Slots):
        self.stream, self.slots = stream, slots

    def __getitem__(self, place: tuple[int, int | None]):
        item, slot = place
        batch = self.stream.read(item, None if slot is None else self.slots.memory(slot))
        # small tensors would be a file of shared memory each
        batch.targets = batch.targets.numpy()
        batch.flips = None if batch.flips is None else batch.flips.numpy()
        if slot is not None:
            batch.inputs = _Written(slot, tuple(batch.inputs.shape))
        return batch


class HandoverLoader:
    """A DataLoader over a stream of images whose batches come in slots.

    Attributes:
        dataset: the stream.
    """

    def __init__(self, stream: Dataset, *, items: range, workers: int, pin_memory: bool, held: int, **arguments):
        """
        Args:
            held: batches beside the current one that the training process keeps at a time.
            arguments: DataLoader's.
        """
        self.dataset, self.pin_memory = stream, pin_memory
        count = workers * arguments["prefetch_factor"] + _IN_USE + held
        self.slots = Slots(count, stream.batch_size * stream.samples.blank().nbytes, pin=pin_memory)
        self._places = _Places(items, self.slots)
        self._keeps = arguments["persistent_workers"]
        self._loader = DataLoader(
            _Laid(stream, self.slots), batch_size=None, sampler=self._places, num_workers=workers, **arguments
        )

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator:
        before, lent = self._places.lent, set()
        self._places.lent = lent
        batches = iter(self._loader)
        # processes that are kept have done by now what an iteration that was left early had asked of them
        self._reclaim(before if self._keeps else set())
        try:
            for batch in batches:
                yield self._shown(batch, lent)
        finally:
            # ends the processes, unless they are kept
            del batches
            if not self._keeps:
                self._reclaim(lent)

    def _reclaim(self, lent: set[int]) -> None:
        while lent:
            self.slots.give_back(lent.pop())

    def _shown(self, batch, lent: set[int]):
        batch.targets = torch.from_numpy(batch.targets)
        batch.flips = None if batch.flips is None else torch.from_numpy(batch.flips)
        if not isinstance(batch.inputs, _Written):
            return batch.pin_memory() if self.pin_memory else batch
        lent.discard(batch.inputs.slot)
        batch.inputs = self.slots.tensor(batch.inputs)
        if self.pin_memory:
            batch.targets = batch.targets.pin_memory()
            batch.flips = None if batch.flips is None else batch.flips.pin_memory()
        return batch
