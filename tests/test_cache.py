"""The cache of shards: bounded, shared, whole after any kill, and of no use only where it says so."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flaky_server import Plan, flaky_server

from psn_train.data.cache import CacheError, Claims, ShardCache, _locked
from psn_train.data.fetch import Patience
from psn_train.data.index import Shard, ShardError, ShardIndex
from psn_train.data.reader import SampleReader

QUICK = Patience(attempts=4, stall_s=2.0, first_wait_s=0.01)
SIZE = 300_000


@pytest.fixture
def web(tmp_path):
    """Six files of noise in a folder, and their entries in an index."""
    folder = tmp_path / "web"
    folder.mkdir()
    shards = []
    for number in range(6):
        data = np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
        (folder / f"{number}.tar").write_bytes(data)
        shards.append(Shard(f"{number}.tar", 1, SIZE, hashlib.sha256(data).hexdigest(), [0, SIZE]))
    return folder, shards


def tars(folder) -> set[str]:
    return {path.name for path in folder.glob("*.tar")}


def rest(folder) -> list[str]:
    """Temporary files."""
    return [path.name for path in folder.glob(".*.tmp")]


def test_the_bound_holds_and_what_was_used_last_stays(web, tmp_path):
    folder, shards = web
    cache = ShardCache(tmp_path / "cache", 3.5 * SIZE, QUICK)
    with flaky_server(folder, Plan()) as (url, served):
        for number in (0, 1, 2, 0, 3):
            path = cache.fetch(f"{url}/{number}.tar", shards[number])
            assert path.read_bytes() == (folder / f"{number}.tar").read_bytes()
            # the clock of the file system may be coarse
            time.sleep(0.02)
        assert tars(cache.folder) == {cache.path_of(shards[n]).name for n in (0, 2, 3)}
        assert served.whole["/0.tar"] == 1
        with pytest.raises(CacheError, match=r"0\.tar has 0\.0003 GB, data\.cache_gb is 0\.0001"):
            ShardCache(tmp_path / "small", 1e5, QUICK).fetch(f"{url}/0.tar", shards[0])
    assert not rest(cache.folder)


def test_claims_are_kept_until_their_process_lets_go(web, tmp_path):
    folder, shards = web
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, Patience(attempts=4, stall_s=0.5, first_wait_s=0.01))
    with flaky_server(folder, Plan()) as (url, _):
        claims = Claims(cache)
        claims.set(shards[:1])
        for number in range(3):
            cache.fetch(f"{url}/{number}.tar", shards[number])
            time.sleep(0.02)
        assert cache.path_of(shards[0]).exists() and not cache.path_of(shards[1]).exists()
        claims.set([shards[0], shards[2]])
        with pytest.raises(CacheError, match=r"no room for 3\.tar, 0\.0006 of data\.cache_gb = 0\.0006 GB are in use"):
            cache.fetch(f"{url}/3.tar", shards[3])
        claims.close()
        cache = ShardCache(cache.folder, 2 * SIZE, QUICK)
        cache.fetch(f"{url}/3.tar", shards[3])
    assert not list(cache.folder.glob(".claims.*"))


def _fetch_all(folder, url, shards, bound, order, barrier):
    cache = ShardCache(folder, bound, QUICK)
    barrier.wait()
    for number in order:
        cache.fetch(f"{url}/{number}.tar", shards[number])


def test_processes_fetch_a_shard_once_for_all(web, tmp_path):
    folder, shards = web
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    with flaky_server(folder, Plan(faults=("trickle",), failures=9)) as (url, served):
        orders = ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2])
        processes = [
            context.Process(target=_fetch_all, args=(tmp_path / "cache", url, shards, 1e9, order, barrier))
            for order in orders
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            assert process.exitcode == 0
    assert dict(served.whole) == {f"/{n}.tar": 1 for n in range(4)}


def test_processes_share_the_bound(web, tmp_path):
    folder, shards = web
    context = multiprocessing.get_context("fork")
    barrier, largest, stop = context.Barrier(3), 0, threading.Event()

    def watch():
        nonlocal largest
        while not stop.is_set():
            sizes = {}
            with contextlib.suppress(FileNotFoundError), _locked(tmp_path / "cache" / ".room.lock"):
                for pattern in ("*.tar", ".*.tar.tmp"):
                    for path in (tmp_path / "cache").glob(pattern):
                        stat = path.stat()
                        sizes[stat.st_ino] = stat.st_size
            largest = max(largest, sum(sizes.values()))

    with flaky_server(folder, Plan(faults=("trickle",), failures=99)) as (url, _):
        (tmp_path / "cache").mkdir()
        thread = threading.Thread(target=watch)
        orders = ([0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2], [5, 4, 3, 2, 1, 0])
        arguments = [(tmp_path / "cache", url, shards, 3 * SIZE, order, barrier) for order in orders]
        processes = [context.Process(target=_fetch_all, args=args) for args in arguments]
        for process in processes:
            process.start()
        thread.start()
        for process in processes:
            process.join(100)
            assert process.exitcode == 0
        stop.set()
        thread.join()
    assert 0 < largest <= 3 * SIZE


def _fetch_many(folder, web, shards, seed, failures):
    cache = ShardCache(folder, 60 * 1000, QUICK)
    for number in np.random.default_rng(seed).permutation(np.tile(np.arange(len(shards)), 3)).tolist():
        try:
            cache.fetch(f"pipe:cat {web}/{number}", shards[number])
        except Exception as error:
            failures.put(f"{type(error).__name__}: {error}")


def test_processes_that_fetch_many_shards_do_not_stumble_over_each_other(tmp_path):
    """A shard gets its name while another process counts what is there."""
    web, shards = tmp_path / "web", []
    web.mkdir()
    for number in range(80):
        data = number.to_bytes(2, "big") * 500
        (web / str(number)).write_bytes(data)
        shards.append(Shard(f"{number}.tar", 1, 1000, hashlib.sha256(data).hexdigest(), [0, 1000]))
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    arguments = [(tmp_path / "cache", web, shards, seed, failures) for seed in range(6)]
    processes = [context.Process(target=_fetch_many, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()


def test_files_of_others_are_none_of_the_cache(web, tmp_path):
    """A cache in a folder with archives, and with shards that are being written there."""
    folder, shards = web
    others = ["photos.tar", ".photos.tar.tmp", "deadbeef.tar"]
    (tmp_path / "cache").mkdir()
    for name in others:
        (tmp_path / "cache" / name).write_bytes(bytes(2 * SIZE))
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, QUICK)
    with flaky_server(folder, Plan()) as (url, _):
        for number in range(4):
            cache.fetch(f"{url}/{number}.tar", shards[number])
            time.sleep(0.02)
    assert tars(cache.folder) == {"photos.tar", "deadbeef.tar", *(cache.path_of(shards[n]).name for n in (2, 3))}
    assert all((cache.folder / name).stat().st_size == 2 * SIZE for name in others)


def test_what_a_killed_process_kept_apart_in_part_is_removed(web, tmp_path):
    folder, shards = web
    cache = ShardCache(tmp_path / "cache", 1e9, QUICK)
    with flaky_server(folder, Plan()) as (url, _):
        cache.fetch(f"{url}/0.tar", shards[0])
        left = cache.folder / f".{cache.held_path(shards[0], [0]).name}.tmp"
        left.write_bytes(b"part")
        cache.fetch(f"{url}/1.tar", shards[1])
        assert not left.exists()
        cache.keep(shards[0], [0])
    assert cache.held_path(shards[0], [0]).stat().st_size == SIZE and not rest(cache.folder)


def test_a_file_system_without_locks_is_named(web, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("psn_train.data.cache.fcntl.flock", flock)
    with pytest.raises(CacheError, match=r"Function not implemented: there are no locks .* Set data\.cache_dir"):
        ShardCache(tmp_path / "cache", 1e9, QUICK).fetch("http://127.0.0.1:9/0.tar", web[1][0])


def test_a_copy_that_was_cut_is_fetched_again(web, tmp_path):
    import io
    import tarfile

    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        member = tarfile.TarInfo("a.cls")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"12"))
    (web[0] / "t.tar").write_bytes(raw.getvalue())
    size = len(raw.getvalue())
    shard = Shard("t.tar", 1, size, hashlib.sha256(raw.getvalue()).hexdigest(), [0, 1024])
    with flaky_server(web[0], Plan()) as (url, served):
        reader = SampleReader(
            ShardIndex("images", "train", ["a"], [1], [shard], {}, url), ShardCache(tmp_path / "cache", 1e9, QUICK)
        )
        assert reader.read(0)["cls"] == b"12"
        os.truncate(reader.cache.path_of(shard), 700)
        assert reader.read(0)["cls"] == b"12" and served.whole["/t.tar"] == 2
        reader.close()


def test_a_killed_fetch_leaves_nothing_for_long(web, tmp_path):
    folder, shards = web
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, QUICK)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        with flaky_server(folder, Plan(faults=("stall",), failures=1, stall_s=30)) as (url, _):
            barrier = context.Barrier(1)
            process = context.Process(target=_fetch_all, args=(cache.folder, url, shards, 1e9, [0], barrier))
            process.start()
            deadline = time.monotonic() + 60
            while not rest(cache.folder) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert rest(cache.folder) and not tars(cache.folder)
            with flaky_server(folder, Plan()) as (other, _):
                # of another shard, so that it is no matter of one's own name
                cache.fetch(f"{other}/1.tar", shards[1])
            assert not rest(cache.folder)
            cache.path_of(shards[1]).unlink()


def test_a_claim_ends_with_its_process(web, tmp_path):
    folder, shards = web
    cache = ShardCache(tmp_path / "cache", SIZE, QUICK)

    def claim(claimed):
        claims = Claims(ShardCache(tmp_path / "cache", SIZE, QUICK))
        claims.set(shards[:1])
        claimed.set()
        time.sleep(1000)

    context = multiprocessing.get_context("fork")
    claimed = context.Event()
    process = context.Process(target=claim, args=(claimed,))
    process.start()
    assert claimed.wait(60)
    with flaky_server(folder, Plan()) as (url, _):
        cache.fetch(f"{url}/0.tar", shards[0])
        short = ShardCache(cache.folder, SIZE, Patience(stall_s=0.3))
        with pytest.raises(CacheError, match="are in use"):
            short.fetch(f"{url}/1.tar", shards[1])
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cache.fetch(f"{url}/1.tar", shards[1])
    assert tars(cache.folder) == {cache.path_of(shards[1]).name}
    assert not list(cache.folder.glob(".claims.*"))


def test_what_is_not_the_shard_is_tried_twice_and_refused(web, tmp_path):
    folder, shards = web
    wrong = dataclasses.replace(shards[0], sha256=shards[1].sha256)
    with flaky_server(folder, Plan()) as (url, served):
        cache = ShardCache(tmp_path / "cache", 1e9, QUICK)
        with pytest.raises(ShardError, match=r"0\.tar: got 300000 bytes with sha256 .* the index wants 300000 with"):
            cache.fetch(f"{url}/0.tar", wrong)
        assert served.whole["/0.tar"] == 2
        # the next samples of it do not ask again
        with pytest.raises(ShardError, match="got 300000 bytes"):
            cache.fetch(f"{url}/0.tar", wrong)
        assert served.whole["/0.tar"] == 2
        longer = dataclasses.replace(shards[2], num_bytes=SIZE - 5)
        with pytest.raises(ShardError, match="got more than 299995 bytes"):
            cache.fetch(f"{url}/2.tar", longer)
    assert not rest(cache.folder) and not tars(cache.folder)


def test_a_shard_that_changes_on_its_way_is_fetched_from_the_start(web, tmp_path):
    folder, shards = web
    right = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(right[::-1])
    with flaky_server(folder, Plan(seed=1, faults=("cut",), failures=1)) as (url, served):
        cache = ShardCache(tmp_path / "cache", 1e9, QUICK)
        blocks = cache._blocks

        def changing(*args):
            cache._blocks = blocks
            stream = blocks(*args)
            yield next(stream)
            (folder / "0.tar").write_bytes(right)
            yield from stream

        cache._blocks = changing
        assert cache.fetch(f"{url}/0.tar", shards[0]).read_bytes() == right
    # the rest, which was of another version; then all
    assert [wanted is None for _, wanted in served.requests] == [True, False, True]


def test_a_full_disk(web, tmp_path, monkeypatch):
    """Shards that nobody needs make room; where there are none the message says what to do."""
    folder, shards = web
    cache = ShardCache(tmp_path / "cache", 1e9, Patience(attempts=2, stall_s=0.3, first_wait_s=0.01))
    room, write = [3 * SIZE - 1], os.write
    # bytes by inode: how many blocks a file has is up to the file system, and to when it writes them
    written: dict[int, int] = {}

    def taken() -> int:
        files = [*cache.folder.glob("*.tar"), *cache.folder.glob("*.tmp")]
        return sum(written.get(inode, 0) for inode in {path.stat().st_ino for path in files})

    def writing(file, data):
        inode = os.fstat(file).st_ino
        if os.lseek(file, 0, os.SEEK_CUR) == 0:
            written[inode] = 0
        if taken() + len(data) > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[inode] = written.get(inode, 0) + len(data)
        return write(file, data)

    monkeypatch.setattr("psn_train.data.cache.os.write", writing)
    with flaky_server(folder, Plan()) as (url, _):
        for number in range(4):
            cache.fetch(f"{url}/{number}.tar", shards[number])
            time.sleep(0.02)
        assert len(tars(cache.folder)) == 2 and cache.path_of(shards[3]).exists()
        room[0] = SIZE // 2
        with pytest.raises(CacheError, match=r"No space left on device, and no shard there can be spared\. Make room"):
            cache.fetch(f"{url}/4.tar", shards[4])
        assert not rest(cache.folder) and not tars(cache.folder)
        # what is free is known before a byte is asked for
        monkeypatch.setattr("psn_train.data.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(CacheError, match=r"no room for 5\.tar, 1e-06 GB are free on that disk, 0\.0003 are wanted"):
            cache.fetch(f"{url}/5.tar", shards[5])


def test_a_cache_that_cannot_be_written(web, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CacheError, match=r"file: .* the cache of shards; make room there, or set data\.cache_dir"):
        ShardCache(tmp_path / "file", 1e9, QUICK).fetch("http://127.0.0.1:9/0.tar", web[1][0])


def test_what_was_removed_is_closed_and_fetched_again(web, tmp_path):
    """A reader keeps no room on the disk for shards that the cache removed."""
    folder, shards = web
    index = ShardIndex("images", "train", ["a"], [6], shards, {}, "")
    with flaky_server(folder, Plan()) as (url, served):
        index = dataclasses.replace(index, location=url)
        reader = SampleReader(index, ShardCache(tmp_path / "cache", 2 * SIZE, QUICK))
        for number in (0, 1, 2, 3, 0):
            assert len(reader._bytes(number, 0)) == SIZE
            time.sleep(0.02)
        opened = [os.readlink(f"/proc/self/fd/{file}") for file in reader._files.values()]
        assert sum("(deleted)" in name for name in opened) <= 1 and served.whole["/0.tar"] == 2
        reader.close()


def test_locks_do_not_outlive_a_fetch(web, tmp_path):
    folder, shards = web
    cache = ShardCache(tmp_path / "cache", 1e9, QUICK)
    with flaky_server(folder, Plan(answers={"/1.tar": 404})) as (url, _):
        cache.fetch(f"{url}/0.tar", shards[0])
        with pytest.raises(ShardError, match=r"1\.tar: HTTP 404"):
            cache.fetch(f"{url}/1.tar", shards[1])
    for path in cache.folder.glob(".*.lock"):
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
