"""Two nodes of two ranks read an epoch of shards behind a failing server: every shard is fetched by one node, once."""

import itertools
import threading

import numpy as np
import pytest
from flaky_server import Plan, flaky_server
from hypothesis import given, settings
from hypothesis import strategies as st

from psn_train.data.ahead import FetchAhead, Need, check_cache, least_room, most_at_once, shard_needs
from psn_train.data.cache import ShardCache
from psn_train.data.fetch import Patience
from psn_train.data.index import ShardError, load_index
from psn_train.data.order import held_out_ids
from psn_train.data.reader import SampleReader
from psn_train.data.shards import write_shards
from psn_train.data.sources import ArraySource
from psn_train.data.stream import EvalStream, TrainStream
from psn_train.recipe import check_recipe, make_plan

QUICK = Patience(attempts=8, stall_s=5.0, first_wait_s=0.01)
WORLD, NODES = 4, 2


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Folder with 192 small images in 24 shards."""
    folder = tmp_path_factory.mktemp("many")
    images = np.random.default_rng(0).integers(0, 256, (192, 16, 16), dtype=np.uint8)
    source = ArraySource(images, np.arange(192) % 10, [str(digit) for digit in range(10)])
    write_shards(source, folder, split="train", num_shards=24, workers=1, progress=False)
    return folder


def opened(small, url, cache, **data):
    """(recipe, the streams of all ranks); ranks of a node share a folder."""
    data = {"train": url, "streams": 8, "global_batch_size": 16, "val": None, "hold_out": 0, **data}
    recipe = check_recipe(small(data=data, schedule={"epochs": data.pop("epochs", 1)}))
    index = load_index(url)
    plan = make_plan(recipe, world_size=WORLD, train_samples=index.num_samples)
    readers = [
        SampleReader(index, ShardCache(cache / f"node{rank * NODES // WORLD}", data.get("cache_gb", 1) * 1e9, QUICK))
        for rank in range(WORLD)
    ]
    return recipe, [TrainStream(recipe, plan, reader, rank) for rank, reader in enumerate(readers)]


def read_all(streams, monkeypatch) -> list[int]:
    """All ranks side by side, in step as gradients keep them; the ids of all samples."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(WORLD // NODES))
    barrier, ids, errors = threading.Barrier(WORLD), [], []

    def read(stream):
        try:
            for item in range(len(stream)):
                batch = stream[item]
                assert batch.bad == []
                ids.extend(batch.ids.tolist())
                barrier.wait(100)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in streams:
        stream._ahead.close()
        stream.reader.close()
    assert errors == []
    return ids


@pytest.mark.parametrize("faults", [(), ("refuse", "cut", "trickle")])
def test_a_shard_is_fetched_once_over_all_nodes(many, small, tmp_path, monkeypatch, faults):
    with flaky_server(many, Plan(seed=1, faults=faults)) as (url, served):
        _, streams = opened(small, url, tmp_path)
        assert sorted(read_all(streams, monkeypatch)) == list(range(192))
    sizes = {f"/{shard.name}": shard.num_bytes for shard in streams[0].reader.index.shards}
    sent = {path: count for path, count in served.sent.items() if path != "/index.json"}
    assert sent == sizes
    assert bool(sum(served.faults.values()) > 20) == bool(faults)


def test_at_a_cut_two_neighbours_need_the_same_shard(many, small, tmp_path, monkeypatch):
    """With samples held out the streams' cuts fall into shards: one more fetch at most for each node but one."""
    with flaky_server(many, Plan()) as (url, served):
        _, streams = opened(small, url, tmp_path, hold_out=16)
        assert len(set(read_all(streams, monkeypatch))) == 176
    fetched = [count for path, count in served.whole.items() if path != "/index.json"]
    assert len(fetched) == 24 and sum(fetched) <= 24 + NODES - 1


def test_a_small_cache_fetches_nothing_twice_in_an_epoch(many, small, tmp_path, monkeypatch):
    """Three epochs with as little room as is allowed: the bound holds, nothing is fetched more than once an epoch."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(WORLD // NODES))
    with flaky_server(many, Plan()) as (url, served):
        _, streams = opened(small, url, tmp_path / "probe", hold_out=16)
        sizes = [shard.num_bytes for shard in streams[0].reader.index.shards]
        least = max(most_at_once(part, sizes, 0)[1] for s in streams for part in s.needs(0)) * WORLD // NODES
        assert least < sum(sizes) / 2
        served.whole.clear()
        _, streams = opened(small, url, tmp_path, hold_out=16, cache_gb=(least + max(sizes)) / 1e9, epochs=3)
        total, largest, stop = 3 * 176, [], threading.Event()

        def watch():
            while not stop.wait(0.005):
                for node in range(NODES):
                    files = list((tmp_path / f"node{node}").glob("*.tar"))
                    largest.append(len(files) * max(sizes))

        thread = threading.Thread(target=watch)
        thread.start()
        assert len(read_all(streams, monkeypatch)) == total
        stop.set()
        thread.join()
    fetched = {path: count for path, count in served.whole.items() if path != "/index.json"}
    assert max(largest) <= least + 2 * max(sizes)
    # six of 72 may be needed by two nodes; evicted were most of the others between the epochs
    assert sum(fetched.values()) <= 3 * (24 + NODES - 1)
    assert sum(fetched.values()) > 30


def test_evaluation_fetches_a_shard_once_over_all_nodes(many, small, tmp_path, monkeypatch):
    recipe = check_recipe(small())
    with flaky_server(many, Plan()) as (url, served):
        index = load_index(url)
        ids = []
        for rank in range(WORLD):
            reader = SampleReader(index, ShardCache(tmp_path / f"node{rank * NODES // WORLD}", 1e9, QUICK))
            stream = EvalStream(recipe, reader, 8, rank, WORLD)
            ids += [i for item in range(len(stream)) for i in stream[item].ids.tolist()]
            stream._ahead.close()
    assert ids == list(range(192))
    fetched = [count for path, count in served.whole.items() if path != "/index.json"]
    assert len(fetched) == 24 and sum(fetched) <= 24 + NODES - 1


def test_the_next_shards_are_fetched_before_they_are_needed(many, small, tmp_path):
    with flaky_server(many, Plan()) as (url, _):
        _, streams = opened(small, url, tmp_path)
        stream = streams[0]
        needs = list(itertools.chain(*stream.needs(0)))
        stream[0]
        now = [need.shard for need in needs if need.first == 0]
        held = [need.shard for need in stream._ahead.held]
        assert held[: len(now)] == now and len(now) < len(held) <= 2 * len(now)
        path = stream.reader.cache.path_of(stream.reader.index.shards[held[-1]])
        for _ in range(1000):
            if path.exists():
                break
            threading.Event().wait(0.02)
        assert path.exists()
        # of these nothing is removed, and then they are let go of
        (claims,) = stream.reader.cache.folder.glob(".claims.*")
        assert len(claims.read_text().split()) == len(held)
        last = max(need.last for need in needs if need.first == 0)
        stream._ahead.advance(last + 1)
        assert not {need.shard for need in stream._ahead.held} & set(now)
        stream._ahead.close()


def test_a_cache_below_the_working_set_is_refused(many, small, tmp_path, monkeypatch):
    from psn_train.training.build import check_order, open_splits

    with flaky_server(many, Plan()) as (url, _):
        data = {"train": url, "streams": 8, "global_batch_size": 16, "val": None, "hold_out": 0}
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2"), monkeypatch.setenv("WORLD_SIZE", "4")

        def check(**changes):
            recipe = check_recipe(small(data={**data, **changes}))
            splits = open_splits(recipe)
            check_order(recipe, make_plan(recipe, world_size=4, train_samples=192), splits)
            return splits

        match = r"data\.cache_gb: got 0\.00001, but .* \(\d+ at a time by each of 2 processes\) .* Set data\.cache_gb: "
        with pytest.raises(ShardError, match=match) as caught:
            check(cache_gb=1e-5)
        least = float(str(caught.value).partition("Set data.cache_gb: ")[2].split()[0])
        assert check(cache_gb=least).train.cache.folder.parent.name == "shards"
        with pytest.raises(ShardError, match=r"data\.cache_gb: got"):
            check(cache_gb=least * 0.98)
        monkeypatch.setattr("psn_train.data.ahead.shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
        with pytest.raises(ShardError, match=r"data\.cache_dir: .* of room on its disk"):
            check()
        # files of this machine need none
        check(train=str(many), cache_gb=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 59), max_size=6), min_size=1, max_size=12), st.integers(0, 3))
def test_needs_are_what_a_loop_finds(ids, lag):
    class Reader:
        first_ids = np.arange(0, 61, 5)

    needs = shard_needs(Reader, [np.array(part, np.int64) for part in ids], 7)
    expected = {}
    for item, part in enumerate(ids, 7):
        for sample in part:
            expected.setdefault(sample // 5, [item, item])[1] = item
    assert {need.shard: [need.first, need.last] for need in needs} == expected
    assert [need.first for need in needs] == sorted(need.first for need in needs)
    sizes = list(range(10, 130, 10))
    counts = [[need.shard for need in needs if need.first - lag <= i <= need.last + lag] for i in range(0, 30)]
    assert most_at_once(needs, sizes, lag) == (
        max(map(len, counts)),
        max(sum(sizes[shard] for shard in shards) for shards in counts),
    )


@pytest.mark.parametrize("lag", [1, 3, 6])
def test_the_least_cache_holds_what_is_claimed(many, small, tmp_path, monkeypatch, lag):
    """What the start asks for is enough, where epochs meet and processes are apart, too; nothing waits for room."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with flaky_server(many, Plan()) as (url, _):
        _, streams = opened(small, url, tmp_path, hold_out=30, epochs=4)
        stream, index = streams[0], streams[0].reader.index
        sizes = [shard.num_bytes for shard in index.shards]
        least = least_room(next(stream.needs(0)), sizes, lag, 1)[1]
        assert least < sum(sizes)
        cache = ShardCache(tmp_path / "cache", least, Patience(1, 0.5, 0.01))
        reader = SampleReader(index, cache)
        check_cache(reader, next(stream.needs(0)), lag)
        ahead = FetchAhead(reader, stream.needs(0), lag=lag, claims=True)
        for item in range(len(stream)):
            ahead.advance(item)
            assert sum(sizes[shard] for shard in {need.shard for need in ahead.held}) <= least
            for sample_id in stream.positions(item)[1].tolist():
                reader.read(sample_id)
            # the processes that are as far behind as they may be
            for sample_id in stream.positions(max(0, item - lag))[1].tolist():
                reader.read(sample_id)
        ahead.close()


def test_what_failed_ahead_is_tried_when_it_is_read(many, small, tmp_path):
    """A source that was away before anybody read from it, and is there again."""
    patience = Patience(attempts=1, stall_s=1.0, first_wait_s=0.01)
    plan = Plan()
    with flaky_server(many, plan) as (url, served):
        index = load_index(url)
        reader = SampleReader(index, ShardCache(tmp_path, 1e9, patience))
        name = index.shards[0].name
        plan.answers[f"/{name}"] = 503
        ahead = FetchAhead(reader, iter([[Need(0, 9, 9)]]), lag=0, claims=True)
        ahead.advance(0)
        for _ in range(1000):
            if (f"/{name}", None) in served.requests and not list(tmp_path.glob(".*.tar.tmp")):
                break
            threading.Event().wait(0.02)
        ahead.close()
        plan.answers.clear()
        assert reader.read(0)["__key__"]


def test_what_fails_ahead_is_said_by_whoever_reads(many, small, tmp_path):
    with flaky_server(many, Plan()) as (url, _):
        _, streams = opened(small, url, tmp_path)
        stream = streams[0]
        stream[0]
        stream._ahead.close()
    gone = [need.shard for need in stream._ahead._peek() and [stream._ahead._peek()]]
    reader = SampleReader(stream.reader.index, ShardCache(tmp_path / "x", 1e9, Patience(2, 1.0, 0.01)))
    ahead = FetchAhead(reader, iter([[Need(gone[0], 0, 0)]]), lag=0, claims=True)
    ahead.advance(0)
    with pytest.raises(ShardError, match=reader.index.shards[gone[0]].name):
        reader.read(int(reader.first_ids[gone[0]]))
    ahead.close()


def test_check_cache_counts_what_an_evaluation_reads(many, tmp_path):
    index = load_index(many)
    reader = SampleReader(index, ShardCache(tmp_path, 1e5, QUICK, spared=9e4))
    check_cache(SampleReader(index, ShardCache(tmp_path, 1e5, QUICK)), [Need(0, 0, 9)], 0)
    with pytest.raises(ShardError, match="and those of an evaluation take"):
        check_cache(reader, [Need(0, 0, 9)], 0)


def test_psn_recipe_says_where_streams_and_batch_do_not_fit(small):
    from psn_train.recipe.show import streams_note

    def note(**data):
        return streams_note(check_recipe(small(data={"train": "http://example.org/train", **data})))

    assert note(streams=8) is None and note(streams=3) is None
    assert "data.streams = 7 does not divide data.global_batch_size = 24" in note(streams=7)
    assert note(streams=7).endswith("such as 6") and note(streams=64).endswith("such as 24")
    assert "every node fetches them all" in note(shuffle="full")
    assert note(streams=7, train="/data/train") is None


def test_held_out_samples_are_fetched_with_their_shard_and_stay(many, small, tmp_path):
    """Evaluated again and again they cost no fetch, though the cache has removed their shards."""
    recipe = check_recipe(small())
    held_out = held_out_ids(192, 20, 0)
    with flaky_server(many, Plan()) as (url, served):
        index = load_index(url)
        largest = max(shard.num_bytes for shard in index.shards)
        cache = ShardCache(tmp_path, 14 * largest, QUICK)
        reader, plain = SampleReader(index, cache, held_out), SampleReader(load_index(many))
        for number in range(24):
            reader.fetch(number)
        served.whole.clear()
        for _ in range(2):
            stream = EvalStream(recipe, reader, 8, 0, 1, held_out)
            for item in range(len(stream)):
                batch = stream[item]
                assert batch.bad == [] and batch.keys == [plain.read(i)["__key__"] for i in batch.ids.tolist()]
            stream._ahead.close()
        assert not served.whole
        assert sum(path.stat().st_size for path in tmp_path.glob("[!.]*")) <= 14 * largest
        # a damaged one is read out of its shard
        kept = next(tmp_path.glob("*.held"))
        kept.write_bytes(bytes(len(kept.read_bytes())))
        assert all(reader.read(i) == plain.read(i) for i in held_out.tolist())
        assert sum(served.whole.values()) <= 1
