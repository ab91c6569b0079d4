"""Writing checkpoints, so that at any moment each is whole or not there; and removing them.

In a local folder, a checkpoint is written into a folder whose name starts with a dot, flushed to disk, then renamed. An
object store has no rename: there, its state.json comes last, and a folder without one is no checkpoint. Only then does
LAST move, then BEST, and only then is an old one deleted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from psn_train.data.progress import note_progress
from psn_train.training.checkpoint import (
    FORMAT,
    Checkpoint,
    checkpoint_path,
    is_whole,
    read_best,
    read_last,
    read_meta,
)
from psn_train.training.storage import Place, Url, folders, sizes, sync_folder, write_text

# bytes that go to a file in one call
_PIECE = 1 << 22
# names of types in safetensors' headers
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: BinaryIO, tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Contiguous tensors on the CPU in the safetensors format, piece by piece: (bytes written, their CRC-32).

    safetensors' own `save_file` reports a full disk without its errno, and its `save` holds all threads for the time
    of two copies.
    """
    header, begin = {}, 0
    # as safetensors orders them: each begins at a multiple of its item's size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, value in ordered:
        end = begin + value.nbytes
        header[name] = {"dtype": _TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces = [memoryview(len(text).to_bytes(8, "little") + text)]
    pieces += [memoryview(value.reshape(-1).view(torch.uint8).numpy()) for _, value in ordered if value.numel()]
    size = crc = 0
    for whole in pieces:
        for at in range(0, len(whole), _PIECE):
            piece = whole[at : at + _PIECE]
            file.write(piece)
            note_progress()
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def _files(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    ranks = {
        f"rank{rank}/{key}": value
        for rank, state in enumerate(checkpoint.ranks)
        for key, value in state.tensors.items()
    }
    # an average of checkpoints is no state of a run
    ranks = None if checkpoint.optimizer["tensors"] is None else ranks
    files = {"model.safetensors": checkpoint.model, "ema.safetensors": checkpoint.ema}
    files |= {"optimizer.safetensors": checkpoint.optimizer["tensors"], "ranks.safetensors": ranks}
    return {name: tensors for name, tensors in files.items() if tensors is not None}


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that a checkpoint takes, headers and state.json generously included."""
    tensors = [value for tensors in _files(checkpoint).values() for value in tensors.values()]
    return sum(value.nbytes + 256 for value in tensors) + len(json.dumps(checkpoint.meta)) + (1 << 16)


def _state(checkpoint: Checkpoint, written: dict[str, tuple[int, int]]) -> bytes:
    """state.json; `written`: {file: (bytes, CRC-32)}."""
    meta = {
        "format": FORMAT,
        **checkpoint.meta,
        "optimizer_scalars": checkpoint.optimizer["scalars"],
        "ranks": [state.scalars for state in checkpoint.ranks],
        "files": {name: size for name, (size, _) in written.items()},
        "crc32": {name: crc for name, (_, crc) in written.items()},
    }
    return json.dumps(meta, indent=1).encode()


def save_checkpoint(
    folder: Place,
    checkpoint: Checkpoint,
    *,
    keep_last: int,
    best: dict | None = None,
    last: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Place:
    """Write a checkpoint, move LAST (and BEST), then delete what is neither among the newest nor the best.

    Args:
        folder: `run/checkpoints`.
        checkpoint: `meta["step"]` names its folder; all its tensors are contiguous and on the CPU.
        keep_last: how many stay besides the best.
        best: {"metric", "value", ...} if this one is the best so far.
        last: False for one that comes late, when there is a newer one: LAST stays, and nothing is deleted.
        say: called with a warning where an old one cannot be deleted.

    Raises:
        OSError: it could not be written. What was there before still stands, and nothing half-written is left, as far
            as the disk lets it be removed.
    """
    path = checkpoint_path(folder, checkpoint.meta["step"])
    write_checkpoint(path, checkpoint)
    if last:
        write_text(folder / "LAST", path.name + "\n")
    if best is not None:
        write_best(folder, path, best)
    if last:
        try:
            delete_old(folder, keep_last, path.name)
        except OSError as error:
            say(f"warning: an old checkpoint in {folder} cannot be deleted: {error}")
    return path


def write_checkpoint(path: Place, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to a folder of that name, whole, or nothing; one that is there is replaced.

    Raises:
        OSError: it could not be written.
    """
    (_write_objects if isinstance(path, Url) else _write_folder)(path, checkpoint)


def _write_folder(final: Path, checkpoint: Checkpoint) -> None:
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    aside, old = folder / f".{final.name}.tmp", folder / f".{final.name}.old"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        written = {}
        for name, tensors in _files(checkpoint).items():
            with open(aside / name, "wb", buffering=0) as file:
                written[name] = write_tensors(_Whole(file), tensors)
                os.fsync(file.fileno())
        with open(aside / "state.json", "wb") as file:
            file.write(_state(checkpoint, written))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(aside)
        # the same step saved again, after a resume: the new one has the newer results
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(aside, final)
        sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            if old.exists() and not final.exists():
                os.replace(old, final)
        shutil.rmtree(aside, ignore_errors=True)
        raise


class _Whole:
    """A file without a buffer, whose `write` writes everything; a full disk takes a part before it is an error."""

    def __init__(self, file: io.RawIOBase):
        self.file = file

    def write(self, data: memoryview) -> None:
        while len(data):
            data = data[self.file.write(data) :]


def _write_objects(path: Url, checkpoint: Checkpoint) -> None:
    present = sizes(path)
    # the same step saved again: the objects beside it stand until its state.json, one object, is replaced
    number = 1 + max([int(name.split("-")[0]) for name in present if name.split("-")[0].isdigit()], default=0)
    prefix = f"{number}-" if "state.json" in present else ""
    written = {}
    try:
        for name, tensors in _files(checkpoint).items():
            data = io.BytesIO()
            written[prefix + name] = write_tensors(data, tensors)
            (path / (prefix + name)).write_bytes(data.getvalue())
    except BaseException:
        _remove(path, list(written))
        raise
    # where this fails nothing is removed: a store may have done what it did not answer to
    (path / "state.json").write_bytes(_state(checkpoint, written))
    _remove(path, [name for name in present if name != "state.json" and name not in written])


def _remove(path: Url, names: list[str]) -> None:
    """Objects that no state.json lists; what cannot be removed now is removed when the run starts again."""
    for name in names:
        with contextlib.suppress(OSError):
            (path / name).unlink(missing_ok=True)


def write_best(folder: Place, path: Place, best: dict) -> None:
    """Let BEST name a checkpoint."""
    write_text(folder / "BEST", json.dumps({"name": path.name, **best}) + "\n")


def repair_best(folder: Place, step: int, best: dict) -> bool:
    """Let BEST name the checkpoint of `step`, as it does not where a kill came after LAST had moved.

    Returns:
        False where that checkpoint is not there.
    """
    path = checkpoint_path(folder, step)
    if not is_whole(path):
        return False
    if (read_best(folder) or {}).get("name") != path.name:
        write_best(folder, path, best)
    return True


def forget_best(folder: Place) -> None:
    """Remove BEST; its checkpoint stays until the next save."""
    (folder / "BEST").unlink(missing_ok=True)
    if isinstance(folder, Path):
        sync_folder(folder)


def delete_old(folder: Place, keep_last: int, last: str) -> None:
    """Delete all checkpoints but the best and `keep_last` up to `last`: those after it are of a run that was left."""
    best, steps = read_best(folder), folders(folder, "step_")
    done = [path for path in steps if path.name <= last]
    for path in [*done[:-keep_last], *steps[len(done) :]]:
        if best is None or path.name != best["name"]:
            _delete(path)
    if isinstance(folder, Path):
        for doomed in folder.glob(".step_*.old"):
            shutil.rmtree(doomed, ignore_errors=True)


def _delete(path: Place) -> None:
    """A kill in the middle of it leaves no half checkpoint under a whole one's name."""
    if isinstance(path, Url):
        for name in sorted(sizes(path), key=lambda name: name != "state.json"):
            (path / name).unlink(missing_ok=True)
    else:
        os.replace(path, path.with_name(f".{path.name}.old"))


def clean(folder: Place) -> None:
    """Remove what a kill left half-written or half-deleted."""
    if isinstance(folder, Url):
        for path in folders(folder, "step_"):
            present = sizes(path)
            listed = read_meta(path)["files"] if "state.json" in present else {}
            _remove(path, [name for name in present if name != "state.json" and name not in listed])
        return
    last = read_last(folder)
    for path in [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")]:
        name = path.name[1:].rsplit(".", 1)[0]
        # killed between the two renames of a save: the old one is still what LAST means
        if path.suffix == ".old" and name == last and not (folder / name).exists():
            os.replace(path, folder / name)
        else:
            shutil.rmtree(path, ignore_errors=True)
