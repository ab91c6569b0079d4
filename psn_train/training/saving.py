"""Saving beside training: a copy in the host's memory, which a thread writes.

Training stops for the copy alone. A thread writes it, at most one at a time, and tries again where the disk or the
store fails. What it has to say waits in `messages`, for the thread that trains to show.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable

import torch
from torch import nn

from psn_train.recipe import Recipe
from psn_train.training.checkpoint import Checkpoint, CheckpointError, checkpoint_path, last_checkpoint
from psn_train.training.checkpoint_files import checkpoint_bytes, save_checkpoint
from psn_train.training.storage import Place, StorageError, check_place, free_bytes, place

# state tensors of a parameter's size that an optimiser keeps: others keep two, as Adam does
_STATES = {"sgd": 1, "momentum": 1, "lion": 1, "adafactor": 1}


def checkpoints_place(recipe: Recipe) -> Place:
    """Where the recipe's run has its checkpoints: `checkpoint.dir`, or `checkpoints` in the run's folder."""
    return place(recipe.checkpoint.dir) if recipe.checkpoint.dir is not None else recipe.run_path / "checkpoints"


def check_room(recipe: Recipe, model: nn.Module) -> None:
    """Look, before a device is touched, whether the run's checkpoints will have a place.

    Warns where some will fit, but not `keep_last`, the best and the one being written; the first process counts for
    all, whose disk it is.

    Raises:
        CheckpointError: a store's package is missing; or the run is new, and not even one fits.
    """
    folder = checkpoints_place(recipe)
    try:
        check_place(folder)
    except StorageError as error:
        raise CheckpointError(f"checkpoint.dir: {error}") from error
    free = free_bytes(folder)
    if free is None or os.environ.get("RANK", "0") != "0":
        return
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    weights = parameters + sum(buffer.nbytes for buffer in model.buffers())
    one = weights * (2 if recipe.ema.decay is not None else 1) + parameters * _STATES.get(recipe.optim.name.lower(), 2)
    count = recipe.checkpoint.keep_last + 2
    there = sum(file.stat().st_size for file in folder.glob("step_*/*")) if folder.is_dir() else 0
    found = f"{free / 1e9:.2f} GB are free at {folder}, and a checkpoint takes about {one / 1e9:.2f} GB"
    if one > free and last_checkpoint(folder) is None:
        raise CheckpointError(
            f"{found}: not even one fits; make room, or set checkpoint.dir or run_dir to another disk"
        )
    if one * count > free + there:
        warnings.warn(
            f"{found}, of which up to {count} are there at a time (checkpoint.keep_last = "
            f"{recipe.checkpoint.keep_last}, the best, and the one that is written); make room, or keep fewer",
            stacklevel=2,
        )


class HostMemory:
    """Memory of the host for one checkpoint, used again by the next: new memory costs several times the copy."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}

    def copy(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint whose tensors are this memory's, and contiguous; training may change its own from now on.

        Tensors on a GPU come through copies into pinned memory that run one after the other, and one wait for the last.
        """
        devices: set[torch.device] = set()

        def part(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            copied = {}
            for key, value in tensors.items():
                value = value.detach()
                buffer = self.buffers.get((name, key))
                if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                    on_gpu = value.device.type == "cuda"
                    buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
                    self.buffers[name, key] = buffer
                buffer.copy_(value, non_blocking=True)
                if value.device.type == "cuda":
                    devices.add(value.device)
                copied[key] = buffer
            return copied

        copied = Checkpoint(
            meta=copy.deepcopy(checkpoint.meta),
            model=part("model", checkpoint.model),
            ema=part("ema", checkpoint.ema) if checkpoint.ema is not None else None,
            optimizer={**checkpoint.optimizer, "tensors": part("optimizer", checkpoint.optimizer["tensors"])},
            # copies already: see RankState.capture
            ranks=checkpoint.ranks,
        )
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copied


class Saver:
    """The main process's writer of checkpoints.

    Attributes:
        messages: warnings that are to be shown.
    """

    def __init__(self, recipe: Recipe, good: Place | None):
        """`good`: the newest checkpoint that is there."""
        section = recipe.checkpoint
        self.folder, self.keep_last = checkpoints_place(recipe), section.keep_last
        self.attempts, self.retry_seconds = section.write_attempts, section.retry_seconds
        self.good = good.name if good is not None else None
        self.messages: deque[str] = deque()
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._mistake: BaseException | None = None
        self._failed: str | None = None
        # the best so far, with its mark, where that could not be written: it is tried again before each save
        self._owed: tuple[Checkpoint, dict] | None = None

    def start(self, checkpoint: Checkpoint, best: dict | None, before: Callable[[], None]) -> None:
        """Copy a checkpoint, and write it in a thread; nothing else is being written.

        Args:
            best: its mark, if it is the best so far.
            before: called first, in the thread; an OSError of it is no failure of the save.
        """
        assert self._thread is None
        copied = self._memory.copy(checkpoint)
        # a daemon: a second Ctrl-C leaves without waiting, as a kill does
        self._thread = threading.Thread(target=self._save, args=(copied, best, before), name="save", daemon=True)
        self._thread.start()

    def busy(self, seconds: float) -> bool:
        """True when something is still being written after `seconds` of waiting for its end."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return True
            self._thread = None
        if self._mistake is not None:
            mistake, self._mistake = self._mistake, None
            raise mistake
        return False

    @property
    def lost(self) -> str | None:
        """What was to be saved and is not; None when everything is. Asked when nothing is being written."""
        advice = "Make room, or set checkpoint.dir to another place with a copy of what is there, and start again."
        if self._failed is not None:
            return f"{self._failed}. {self._stands()}; the run goes on from there. {advice}"
        if self._owed is not None:
            path = checkpoint_path(self.folder, self._owed[0].meta["step"])
            return f"the best checkpoint, {path}, could not be written and is lost. {self._stands()}. {advice}"
        return None

    def _stands(self) -> str:
        if self.good is None:
            return "There is no good checkpoint yet"
        return f"The last good checkpoint is {self.good}"

    def _save(self, checkpoint: Checkpoint, best: dict | None, before: Callable[[], None]) -> None:
        try:
            with contextlib.suppress(OSError):
                before()
            # a newer best goes before the one that is owed
            owed, self._owed = (None if best is not None else self._owed), None
            if owed is not None and self._write(*owed, attempts=1, last=False) is not None:
                self._owed = owed
            error = self._write(checkpoint, best, attempts=self.attempts, last=True)
            path = checkpoint_path(self.folder, checkpoint.meta["step"])
            if error is None:
                self.good, self._failed = path.name, None
                return
            times = f"{self.attempts} attempts" if self.attempts > 1 else "one attempt"
            self._failed = f"{path} could not be written in {times}: {error}"
            self.messages.append(
                f"warning: {self._failed}. {self._stands()}; training goes on, the next save tries anew"
            )
            if best is not None:
                self._owed, self._memory = (checkpoint, best), HostMemory()
        except BaseException as mistake:
            self._mistake = mistake

    def _write(self, checkpoint: Checkpoint, best: dict | None, *, attempts: int, last: bool) -> OSError | None:
        """Returns the error of the last attempt, if none has succeeded."""
        path, failed = checkpoint_path(self.folder, checkpoint.meta["step"]), None
        for attempt in range(attempts):
            if attempt:
                time.sleep(self.retry_seconds * 2 ** (attempt - 1))
            try:
                wanted, free = checkpoint_bytes(checkpoint), free_bytes(self.folder)
                if free is not None and wanted > free:
                    text = f"{wanted / 1e6:,.1f} MB are wanted and {free / 1e6:,.1f} MB are free at {self.folder}"
                    raise OSError(errno.ENOSPC, text)
                save_checkpoint(
                    self.folder, checkpoint, keep_last=self.keep_last, best=best, last=last, say=self.messages.append
                )
            except OSError as error:
                failed = error
                continue
            if failed is not None:
                self.messages.append(f"warning: {path} was written at attempt {attempt + 1} only: {failed}")
            return None
        return failed
