"""Shards of URLs on a node's disk: fetched once for all its processes, checked, and bounded in size.

    <sha256>.tar          a whole shard; its time of change is that of its last use
    <...>.held            samples of a shard that are evaluated again and again; they stay
    .<...>.held.tmp       such samples while they are written, with the lock on the room
    .<sha256>.tar.tmp     one that is being fetched, of its final size from the beginning
    .<sha256>.tar.lock    locked by the process that fetches it; the others wait
    .room.lock            locked while room is made, a shard gets its name or loses it, or claims are changed
    .claims.<...>         names that a process needs still, and that are not removed; locked as long as it lives

Locks end with their process. So what a killed process leaves behind is known by its lock, and removed. Files of other
names are none of the cache's: they are neither counted nor removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from psn_train.data.fetch import ChangedError, FetchError, Patience, fetch_blocks, hide_password
from psn_train.data.index import Shard, ShardError
from psn_train.recipe.schema import Data

_FULL = (errno.ENOSPC, errno.EDQUOT)
# whoever sets data.cache_dir to a folder of other archives keeps these
_SHARD = re.compile(r"[0-9a-f]{16}\.tar")
_FETCHED = re.compile(r"\.[0-9a-f]{16}\.tar\.tmp")
_HELD = re.compile(r"[0-9a-f]{16}\.tar\.[0-9a-f]{8}\.held")
_HELD_WRITTEN = re.compile(r"\.[0-9a-f]{16}\.tar\.[0-9a-f]{8}\.held\.tmp")
# seconds between two looks for room
_LOOK_EVERY = 0.2
# seconds for which a process does not try again what it could not fetch
_FAILED_S = 300.0


class CacheError(ShardError):
    """The cache folder has no room, or cannot be used."""


class ShardCache:
    """The cache of one folder. Cheap to pickle."""

    def __init__(self, folder: str | os.PathLike, bound: float, patience: Patience | None = None, *, spared: float = 0):
        """
        Args:
            bound: bytes that the folder may hold at most, what is being fetched included.
            spared: how many of these `FetchAhead` leaves to other readers of the folder.
        """
        self.folder, self.bound, self.spared = Path(folder), bound, spared
        self.patience = patience or Patience()
        self._failed: dict[str, tuple[float, ShardError]] = {}

    def path_of(self, shard: Shard) -> Path:
        return self.folder / _name(shard)

    def fetch(self, url: str, shard: Shard, *, early: bool = False) -> Path:
        """The local copy of a shard; fetched and checked if there is none.

        Args:
            early: nobody reads it yet; when somebody does, a failure of now does not count.

        Raises:
            ShardError: it cannot be fetched, or what comes is not what the index says; CacheError where it is for want
                of room.
        """
        path = self.path_of(shard)
        if _touch(path):
            return path
        # every sample of such a shard is asked for, and each would take minutes
        failed_at, error = self._failed.get(path.name, (float("-inf"), None))
        if time.monotonic() - failed_at < _FAILED_S:
            raise ShardError(str(error))
        try:
            return self._fetch(url, shard, path)
        except ShardError as error:
            if not early:
                self._failed[path.name] = time.monotonic(), error
            raise

    def held_path(self, shard: Shard, positions: list[int]) -> Path:
        """Where samples of a shard are kept apart, by their positions."""
        which = hashlib.sha256(repr(positions).encode()).hexdigest()[:8]
        return self.folder / f"{_name(shard)}.{which}.held"

    def keep(self, shard: Shard, positions: list[int]) -> None:
        """Keep some samples of a shard that is here apart, one after the other, for as long as there is the folder."""
        path = self.held_path(shard, positions)
        if path.exists():
            return
        # without room, or the shard any more, they are read out of the shard when it comes again
        aside = path.with_name(f".{path.name}.tmp")
        size = sum(shard.offsets[position + 1] - shard.offsets[position] for position in positions)
        with contextlib.suppress(OSError, CacheError), self._room():
            if self._make_room(size, but=_name(shard)) is not None:
                return
            try:
                with open(self.path_of(shard), "rb") as source, open(aside, "wb") as file:
                    for position in positions:
                        start, stop = shard.offsets[position], shard.offsets[position + 1]
                        file.write(os.pread(source.fileno(), stop - start, start))
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)

    def remove(self, shard: Shard) -> None:
        """Remove the local copy of a shard, which is damaged."""
        with self._room():
            self.path_of(shard).unlink(missing_ok=True)

    def kept_bytes(self) -> int:
        """Bytes of the shards that are here."""
        return sum(size for _, size in self._files(_SHARD))

    def _room(self) -> contextlib.AbstractContextManager[None]:
        """What is counted does not change meanwhile: shards get and lose their names under this lock."""
        return _locked(self.folder / ".room.lock")

    def _files(self, pattern: re.Pattern) -> list[tuple[Path, int]]:
        """(path, bytes) of the cache's files whose names match."""
        found = []
        with _whole_folder(self.folder), os.scandir(self.folder) as entries:
            for entry in entries:
                # somebody else may remove one
                with contextlib.suppress(FileNotFoundError):
                    if pattern.fullmatch(entry.name):
                        found.append((Path(entry.path), entry.stat().st_size))
        return found

    def _fetch(self, url: str, shard: Shard, path: Path) -> Path:
        with _whole_folder(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f".{path.name}.lock"):
            # another process may have fetched it meanwhile
            if _touch(path):
                return path
            aside = self.folder / f".{path.name}.tmp"
            try:
                self._fetch_checked(url, shard, aside)
                with _whole_folder(self.folder), open(aside, "rb") as file:
                    os.fsync(file.fileno())
                with self._room():
                    os.replace(aside, path)
            except FetchError as error:
                raise ShardError(str(error)) from error
            finally:
                aside.unlink(missing_ok=True)
        return path

    def _fetch_checked(self, url: str, shard: Shard, aside: Path) -> None:
        for again in (True, False):
            self._reserve(aside, shard)
            digest, size = hashlib.sha256(), 0
            try:
                with open(aside, "r+b") as file, contextlib.closing(self._blocks(url, shard)) as blocks:
                    for block in blocks:
                        size += len(block)
                        # more than there should be is not worth its room
                        if size > shard.num_bytes:
                            break
                        digest.update(block)
                        self._write(file, block, aside)
            except ChangedError:
                if not again:
                    raise
                continue
            if size == shard.num_bytes and digest.hexdigest() == shard.sha256:
                return
        found = f"{size} bytes with sha256 {digest.hexdigest()[:16]}..."
        if size > shard.num_bytes:
            found = f"more than {shard.num_bytes} bytes"
        raise ShardError(
            f"{hide_password(url)}: got {found}, the index wants {shard.num_bytes} with {shard.sha256[:16]}... "
            "(twice, each time from the start). Put the shard there that the index is of, or make the index anew."
        )

    def _blocks(self, url: str, shard: Shard) -> Iterator[bytes]:
        return fetch_blocks(url, self.patience, size=shard.num_bytes)

    def _write(self, file, block: bytes, aside: Path) -> None:
        """Write at the file's position; from a full disk other shards are removed, as far as nobody needs them."""
        view = memoryview(block)
        while view:
            try:
                view = view[os.write(file.fileno(), view) :]
            except OSError as error:
                if error.errno not in _FULL:
                    raise CacheError(f"{aside} cannot be written: {error}") from error
                with self._room():
                    freed = self._remove_oldest()
                if not freed:
                    raise CacheError(
                        f"{self.folder}: {error.strerror}, and no shard there can be spared. Make room on that disk, "
                        "or set data.cache_dir to a folder on another one."
                    ) from error

    def _reserve(self, aside: Path, shard: Shard) -> None:
        """Make room for a shard and take it: `aside` has the shard's size. Waits while others are about to give room.

        Raises:
            CacheError: there is none.
        """
        if shard.num_bytes > self.bound:
            raise CacheError(
                f"{shard.shown} has {shard.num_bytes / 1e9:.3g} GB, data.cache_gb is {self.bound / 1e9:.3g}; "
                "set it to more"
            )
        deadline = time.monotonic() + self.patience.stall_s
        while True:
            with self._room():
                self._remove_leftovers()
                aside.unlink(missing_ok=True)
                missing = self._make_room(shard.num_bytes)
                if missing is None:
                    with _whole_folder(self.folder), open(aside, "wb") as file:
                        file.truncate(shard.num_bytes)
                    return
            if time.monotonic() > deadline:
                raise CacheError(f"{self.folder}: no room for {shard.shown}, {missing}")
            time.sleep(_LOOK_EVERY)

    def _make_room(self, wanted: int, but: str = "") -> str | None:
        """Remove the shards used longest ago, `but` for one, until there is room for `wanted` bytes; else what it
        wants for. Holds the room's lock.
        """
        while True:
            fetched = self._files(_FETCHED)
            used = self.kept_bytes() + sum(size for _, size in [*fetched, *self._files(_HELD)])
            # what is being fetched is still to take its room
            promised = sum(max(0, size - _taken(path)) for path, size in fetched)
            free = shutil.disk_usage(self.folder).free
            if used + wanted <= self.bound and wanted + promised <= free:
                return None
            if not self._remove_oldest(but):
                if used + wanted > self.bound:
                    return (
                        f"{used / 1e9:.3g} of data.cache_gb = {self.bound / 1e9:.3g} GB are in use by the shards that "
                        "are being read; set it to more, or data.streams to fewer"
                    )
                return (
                    f"{free / 1e9:.3g} GB are free on that disk, {(wanted + promised) / 1e9:.3g} are wanted, and the "
                    "shards there are in use; make room, or set data.cache_dir to a folder on another disk"
                )

    def _remove_oldest(self, but: str = "") -> bool:
        """Remove the shard that was used longest ago among those that nobody claims. Readers that have it open may
        read on. Holds the room's lock.
        """
        claimed = self._claimed() | {but}
        spare = [path for path, _ in self._files(_SHARD) if path.name not in claimed]
        if not spare:
            return False
        min(spare, key=_last_use).unlink(missing_ok=True)
        return True

    def _remove_leftovers(self) -> None:
        """Remove what killed processes were fetching or writing. Holds the room's lock."""
        for aside, _ in self._files(_FETCHED):
            lock = aside.with_suffix(".lock")
            with contextlib.suppress(BlockingIOError), _locked(lock, wait=False):
                aside.unlink(missing_ok=True)
        for aside, _ in self._files(_HELD_WRITTEN):
            aside.unlink(missing_ok=True)

    def _claimed(self) -> set[str]:
        """Names that living processes need. Holds the room's lock."""
        names: set[str] = set()
        for path in self.folder.glob(".claims.*"):
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    names.update(file.read().split())
                else:
                    # its process is gone
                    path.unlink()
        return names


def open_cache(data: Data, folder: str | os.PathLike, *, spared: float = 0) -> ShardCache:
    """The recipe's cache; in `folder` where the recipe does not say where."""
    patience = Patience(data.fetch_attempts, data.fetch_stall_s)
    return ShardCache(data.cache_dir or folder, data.cache_gb * 1e9, patience, spared=spared)


class Claims:
    """What one process needs of a cache: those shards are not removed before it lets go of them or ends."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        with _whole_folder(cache.folder):
            cache.folder.mkdir(parents=True, exist_ok=True)
        path = cache.folder / f".claims.{os.uname().nodename}.{os.getpid()}.{threading.get_native_id()}.{id(self)}"
        with _locked(cache.folder / ".room.lock"), _whole_folder(cache.folder):
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (locked as long as it is open)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._path = path

    def set(self, shards: Iterable[Shard]) -> None:
        """Claim these, and no others any more."""
        text = "\n".join(sorted({_name(shard) for shard in shards}))
        with _locked(self.cache.folder / ".room.lock"), _whole_folder(self.cache.folder):
            self._file.seek(0)
            self._file.truncate()
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def _name(shard: Shard) -> str:
    return f"{shard.sha256[:16]}.tar"


def _taken(path: Path) -> int:
    """Bytes that a file takes on the disk by now."""
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _touch(path: Path) -> bool:
    """Note that a file is in use; False where there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    # on a disk that is read-only now
    except OSError:
        return path.exists()
    return True


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Raises BlockingIOError where another has the lock and we shall not wait, CacheError where there can be none."""
    with _whole_folder(path.parent):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            raise CacheError(
                f"{path.parent}: {error.strerror}: there are no locks on that file system, and several processes use "
                "the cache of shards. Set data.cache_dir to a folder on a disk of this machine."
            ) from error
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[None]:
    """What the system says of a folder that cannot be used, with what to do."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{folder}: {error.strerror or error}. It is the cache of shards; make room there, or set data.cache_dir "
            "to a folder that can be written"
        ) from error
