"""What an earlier run left in a folder of shards, and how files come to be there whole.

`.writing/` holds, as long as shards are being written: the plan, the record of every shard that is finished, a lock,
and the scratch files of the source.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from psn_train.data.index import INDEX_NAME, ShardError, load_index

STATE = ".writing"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# of a plan: what needs no words, or has others
_IN_NO_WORDS = ("sha256", "events", "remarks", "passed_over")
# of the split of recordings: what people call it -> what the plan calls it
_OF_SPLIT = {"split": "rule", "split_seed": "seed", "test_share": "test_share", "list": "sha256"}
# workers of a run that was killed see it within a second and let go of the lock
_LOCK_PATIENCE = 3.0


@contextlib.contextmanager
def guard_disk(path: str | os.PathLike, aside: str | None = None) -> Iterator[None]:
    """A full disk and the like become a ShardError, and whatever happens the file or folder `aside` is gone then."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise ShardError(f"{path} cannot be written: {error}") from error
        raise ShardError(f"{path}: {error.strerror}. Make room and start again: finished shards are kept") from error
    finally:
        if aside is not None and os.path.isdir(aside):
            shutil.rmtree(aside, ignore_errors=True)
        elif aside is not None and os.path.exists(aside):
            os.unlink(aside)


def check_writable(path: str | None, option: str, suffix: str | None = None) -> None:
    """Look, before anything is computed for a file, whether it can be written; None, and `-` for stdout, can.

    Args:
        option: of the command line that names it.
        suffix: that it must have; None: any, and `-` is stdout.

    Raises:
        ValueError: it cannot.
    """
    if path is None or (path == "-" and suffix is None):
        return
    file = Path(path)
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir():
        why = "is a folder" if file.is_dir() else "lies in no folder that there is"
        terminal = "" if suffix else ", or - for the terminal"
        raise ValueError(f"{option}: {path} {why}; name a file in a folder that exists{terminal}")
    if suffix is not None and file.suffix.lower() != suffix:
        raise ValueError(f"{option}: {path} does not end in {suffix}; name a file that does")
    # what is written aside and renamed needs the folder
    if not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ValueError(f"{option}: {path} may not be written; name another file")


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Keep other writers out of a folder.

    Raises:
        ShardError: one is at work there.
    """
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        with guard_disk(out):
            (out / STATE).mkdir(parents=True, exist_ok=True)
            lock = os.open(out / STATE / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a writer that has just finished took the folder away, and the lock with it
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(out / STATE / "lock")):
                    break
            os.close(lock)
        except OSError as error:
            os.close(lock)
            if time.monotonic() > deadline:
                raise ShardError(f"{out}: another process is writing shards there") from error
            time.sleep(0.1)
    try:
        yield
    finally:
        # whoever was turned away leaves no trace
        with contextlib.suppress(OSError):
            if os.listdir(out / STATE) == ["lock"]:
                os.unlink(out / STATE / "lock")
                os.rmdir(out / STATE)
        os.close(lock)


def save_json(path: str | os.PathLike, document: dict) -> None:
    aside = f"{path}.tmp"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sync_folder(folder: str | os.PathLike) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def finished_shards(out: Path, plan: dict, names: list[str], overwrite: bool) -> dict[str, dict]:
    """The records of the shards of this plan that are whole, by name. Whatever else was begun here is removed.

    Raises:
        ShardError: the folder holds shards of another plan or of nobody knows what, and `overwrite` is off.
    """
    state = out / STATE
    found = sorted(path.name for path in out.glob("*.tar"))
    before, records = _previous(out)
    if before is not None and before.get("sha256") == plan["sha256"]:
        whole = {}
        for name, record in records.items():
            path = out / name
            if name in names and path.is_file() and path.stat().st_size == record["shard"]["num_bytes"]:
                whole[name] = record
        strangers = sorted(set(found) - set(names))
        if strangers and not overwrite:
            raise ShardError(f"{out}: {', '.join(strangers[:5])} do not belong here; remove them or pass --overwrite")
        stale = set(found) - set(whole)
    else:
        # a run that failed before its first shard was whole leaves a plan, and nothing to lose
        if (found or (out / INDEX_NAME).exists()) and not overwrite:
            raise ShardError(
                f"{out} holds shards {_difference(before, plan)}. Choose another folder, or --overwrite to delete them"
            )
        whole, stale = {}, set(found)
    # a kill between any two of these steps leaves a folder that the next run understands
    if len(whole) < len(names):
        if before is None or before.get("sha256") != plan["sha256"]:
            _clear_state(state)
        for name, record in whole.items():
            if not (state / f"{name}.json").exists():
                save_json(state / f"{name}.json", record)
        save_json(state / "plan.json", plan)
        # the old index must be gone before the first of its shards is
        (out / INDEX_NAME).unlink(missing_ok=True)
    for name in stale:
        (out / name).unlink()
    for path in [*out.glob(".*.tar.tmp"), *out.glob(f".{INDEX_NAME}.*.tmp"), *state.glob("*.tmp")]:
        path.unlink()
    return whole


def _clear_state(state: Path) -> None:
    for path in state.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _previous(out: Path) -> tuple[dict | None, dict[str, dict]]:
    """(plan, records of shards) that earlier runs left: those of an index, or of a run that did not come to its end."""
    if (out / INDEX_NAME).exists():
        try:
            index = load_index(out)
        except ShardError:
            return {}, {}
        remarks = index.plan.get("remarks", {})
        records = {
            shard.name: {"shard": asdict(shard), "remarks": remarks.get(shard.name, {})} for shard in index.shards
        }
        return index.plan, records
    try:
        plan = json.loads((out / STATE / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, {}
    records = {}
    for path in (out / STATE).glob("*.tar.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        records[record["shard"]["name"]] = record
    return plan, records


def _difference(before: dict | None, plan: dict) -> str:
    """In what an earlier plan differs: "that were made otherwise: seed 0, now 1"."""
    if not before or "source" not in before:
        return "of unknown origin"
    was, now = _flat(before), _flat(plan)
    # another split of the same recordings lists others of them
    divided = was.keys() & now.keys() & {"split"} and any(was.get(name) != now.get(name) for name in _OF_SPLIT)
    differing = [name for name in now if was.get(name) != now[name]]
    if "split" in differing:
        # what else names a split is another rule's
        differing = [name for name in differing if name == "split" or name not in _OF_SPLIT]
    texts = [f"{name} {was.get(name)}, now {now.get(name)}" for name in differing if name != "source"]
    if "source" in differing and not (divided and before["source"]["type"] == plan["source"]["type"]):
        texts.insert(0, "another source (its files, classes or sizes differ)")
    return f"that were made otherwise: {', '.join(texts) or 'another name of the split, or others beside it'}"


def _flat(plan: dict) -> dict:
    """{option: value in words} of a plan; of recordings, an index knows totals that a plan does not."""
    flat = {name: value for name, value in plan.items() if name not in _IN_NO_WORDS}
    events = plan.get("events", {})
    if isinstance(sensor := events.get("sensor"), list):
        flat["sensor"] = " x ".join(map(str, sensor))
    flat.update({name: events[name] for name in ("codec", "format") if name in events})
    split = events.get("split") or {}
    flat.update({name: split[key] for name, key in _OF_SPLIT.items() if key in split})
    if "sha256" in split:
        flat["list"] = split["sha256"][:12]
    return flat


def check_skipped(out: Path, finished: dict[str, dict], skip_bad: bool) -> None:
    skipped = [name for record in finished.values() for name in record["remarks"].get("skipped", {}).values()]
    if skipped and not skip_bad:
        raise ShardError(
            f"{out}: its shards were written with --skip-bad and lack {len(skipped)} samples, first {skipped[0]}. "
            "Pass --skip-bad again, or --overwrite with a repaired source"
        )
