"""Single samples out of shards: one `pread` of the bytes that the index names.

Shards of URLs (`http:`, `pipe:`, whatever webdataset's `gopen` knows) are fetched whole, once a node, into a cache
folder of bounded size, and checked against the index before they are used.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np

from psn_train.data.index import Shard, ShardError, ShardIndex, is_url
from psn_train.data.progress import note_progress

_OPEN_FILES = 128


class SampleReader:
    """Reads samples by id. Cheap to pickle; opens its files in the process that reads."""

    def __init__(self, index: ShardIndex, cache_dir: str | os.PathLike | None = None, cache_bytes: float = 1e11):
        self.index = index
        self.first_ids = np.concatenate([[0], np.cumsum([shard.num_samples for shard in index.shards])])
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.cache_bytes = cache_bytes
        # foreign shards may name their classes instead of counting them
        self.places = {name: number for number, name in enumerate(index.classes)}
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": collections.OrderedDict()}

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, number of the sample in it)."""
        shard = int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1
        return shard, sample_id - int(self.first_ids[shard])

    def name(self, sample_id: int) -> str:
        """Where a sample stands, for messages: `shard.tar[17]`."""
        shard, position = self.locate(sample_id)
        return f"{self.index.shards[shard].name}[{position}]"

    def read(self, sample_id: int) -> dict[str, bytes | str]:
        """The members of one sample by extension, and its `__key__`.

        Raises:
            ShardError: the shard is missing or shorter than its index says, or the bytes there are no tar members.
        """
        shard_number, position = self.locate(sample_id)
        shard = self.index.shards[shard_number]
        start, stop = shard.offsets[position], shard.offsets[position + 1]
        raw = os.pread(self._open(shard_number, shard), stop - start, start)
        if len(raw) != stop - start:
            raise ShardError(
                f"{self.name(sample_id)}: the shard ends at byte {start + len(raw)}, its index wants {shard.num_bytes}"
            )
        return parse_sample(raw, self.name(sample_id))

    def _open(self, shard_number: int, shard: Shard) -> int:
        file = self._files.pop(shard_number, None)
        if file is None:
            path = self._local_path(shard)
            try:
                file = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"shard {path} cannot be opened: {error}. See `psn shards verify`.") from error
            while len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard_number] = file
        return file

    def _local_path(self, shard: Shard) -> str:
        url = self.index.shard_url(shard)
        if not is_url(url):
            return url
        if url.startswith("file://"):
            return url.removeprefix("file://")
        if self.cache_dir is None:
            raise ShardError(f"{url}: shards of URLs need a cache folder; set data.cache_dir")
        return str(fetch_shard(url, shard, self.cache_dir, self.cache_bytes))


def parse_sample(raw: bytes, where: str) -> dict[str, bytes | str]:
    """The tar members of one sample -> {extension: bytes, "__key__": name up to the first dot}."""
    sample: dict[str, bytes | str] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw + bytes(1024)), mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, file_name = member.name.rpartition("/")
                stem, _, extension = file_name.partition(".")
                sample["__key__"] = folder + slash + stem
                sample[extension.lower()] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ShardError(f"{where}: no tar members where the index has a sample ({error})") from error
    if not sample:
        raise ShardError(f"{where}: no tar members where the index has a sample")
    return sample


def fetch_shard(url: str, shard: Shard, cache_dir: Path, cache_bytes: float) -> Path:
    """The local copy of a shard of a URL; fetched whole, checked and renamed if there is none.

    Raises:
        ShardError: what came is not what the index says.
    """
    from webdataset.gopen import gopen

    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"{shard.sha256[:16]}.tar"
    # one process of a node fetches, the others wait for it
    with open(cache_dir / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            os.utime(path)
            return path
        _make_room(cache_dir, shard.num_bytes, cache_bytes)
        aside = cache_dir / f".{path.name}.{os.getpid()}.tmp"
        digest = hashlib.sha256()
        try:
            with gopen(url) as stream, open(aside, "wb") as file:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    file.write(block)
                    note_progress()
            size = aside.stat().st_size
            if size != shard.num_bytes or digest.hexdigest() != shard.sha256:
                raise ShardError(
                    f"{url}: got {size} bytes with sha256 {digest.hexdigest()[:16]}..., "
                    f"the index wants {shard.num_bytes} with {shard.sha256[:16]}..."
                )
            os.replace(aside, path)
        except (OSError, ValueError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{url} cannot be fetched: {error}") from error
        finally:
            aside.unlink(missing_ok=True)
    return path


def _make_room(cache_dir: Path, wanted: int, bound: float) -> None:
    """Delete the shards that were used longest ago. Readers that hold one open keep it until they close it."""
    cached = sorted(cache_dir.glob("*.tar"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in cached) + wanted
    for path in cached:
        if total <= bound:
            break
        with contextlib.suppress(FileNotFoundError):
            total -= path.stat().st_size
            path.unlink()
