"""Shards that change, vanish or are damaged while they are read: noticed, named, and not trained on."""

import json
import os
import re
import shutil
import zlib

import pytest
from conftest import results_of, train_here, without_crcs
from flaky_server import Plan, flaky_server

from psn_train.data.cache import ShardCache
from psn_train.data.fetch import Patience
from psn_train.data.index import ShardError, load_index, pack_crcs
from psn_train.data.reader import SampleReader
from psn_train.data.verify import verify_shards
from psn_train.training.checkpoint import find_checkpoint, read_meta


@pytest.fixture
def folder(digit_shards, tmp_path):
    return shutil.copytree(digit_shards / "train", tmp_path / "shards")


def flip(folder, shard, position: int, at: int = 1200) -> None:
    """Change one bit of a sample."""
    with open(folder / shard.name, "r+b") as file:
        file.seek(shard.offsets[position] + at)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_an_index_has_the_crc_of_every_sample(folder):
    index = load_index(folder)
    for shard in index.shards:
        data = (folder / shard.name).read_bytes()
        parts = [data[shard.offsets[i] : shard.offsets[i + 1]] for i in range(shard.num_samples)]
        assert shard.crcs().tolist() == [zlib.crc32(part) for part in parts]
    assert pack_crcs([1, 2**32 - 1]) == "AQAAAP////8="
    document = json.loads((folder / "index.json").read_text())
    document["shards"][0]["crc32"] = document["shards"][0]["crc32"][4:]
    (folder / "index.json").write_text(json.dumps(document))
    with pytest.raises(ShardError, match="has not as many CRC-32 as samples"):
        load_index(folder)


def test_indices_without_crcs_are_read(folder):
    before = load_index(folder)
    without_crcs(folder)
    assert "crc32" not in (folder / "index.json").read_text()
    index = load_index(folder)
    assert index.shards[0].crcs() is None and index.fingerprint == before.fingerprint
    assert SampleReader(index).read(7) == SampleReader(before).read(7)
    assert verify_shards(folder, workers=1, progress=False).ok


@pytest.mark.parametrize("at", [3, 515, 600, 1200])
def test_any_flipped_bit_is_named(folder, at):
    index = load_index(folder)
    reader = SampleReader(index)
    shard = index.shards[2]
    first = int(reader.first_ids[2])
    assert reader.read(first + 4)
    flip(folder, shard, 4, at)
    with pytest.raises(
        ShardError, match=rf"^{shard.name}\[4\]: its bytes changed since the index was made \(CRC-32 \w"
    ):
        reader.read(first + 4)
    assert reader.read(first + 3) and reader.read(first + 5)


def test_verify_names_the_sample(folder):
    index = load_index(folder)
    shard = index.shards[2]
    key = SampleReader(index).read(sum(s.num_samples for s in index.shards[:2]) + 4)["__key__"]
    # a bit of the padding, which nothing decodes
    flip(folder, shard, 4, 600)
    problems = [str(problem) for problem in verify_shards(folder, workers=1, progress=False).problems]
    assert len(problems) == 2 and problems[0].startswith(f"{shard.name}: its bytes changed: sha256")
    assert re.match(rf"{shard.name}: {key}: its bytes changed: CRC-32 \w+, the index says \w+", problems[1])


def test_a_damaged_copy_in_the_cache_is_fetched_again(folder, tmp_path):
    with flaky_server(folder, Plan()) as (url, served):
        index = load_index(url)
        cache = ShardCache(tmp_path / "cache", 1e9, Patience(first_wait_s=0.01))
        reader, plain = SampleReader(index, cache), SampleReader(load_index(folder))
        assert reader.read(4) == plain.read(4)
        shard = index.shards[0]
        copy = cache.path_of(shard)
        data = bytearray(copy.read_bytes())
        data[shard.offsets[4] + 1200] ^= 1
        copy.write_bytes(data)
        assert reader.read(4) == plain.read(4)
        assert served.whole[f"/{shard.name}"] == 2


@pytest.mark.parametrize("how", ["deleted", "replaced", "unreadable"])
def test_a_shard_that_goes_while_it_is_open_is_noticed(folder, how, monkeypatch):
    reader = SampleReader(load_index(folder))
    assert reader.read(0)
    shard = folder / reader.index.shards[0].name
    if how == "deleted":
        shard.unlink()
    elif how == "replaced":
        shutil.copy(shard, folder / "other")
        os.replace(folder / "other", shard)
    else:

        def fails(*_):
            raise OSError(116, "Stale file handle")

        monkeypatch.setattr(os, "pread", fails)
    wanted = "cannot be read: .*Stale" if how == "unreadable" else "was deleted or replaced while it was read"
    with pytest.raises(ShardError, match=rf"{shard.name}\[1\]: .*{wanted}"):
        reader.read(1)
    monkeypatch.undo()
    if how == "deleted":
        with pytest.raises(ShardError, match="cannot be opened"):
            reader.read(2)
    else:
        assert reader.read(2)


@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_damage_in_mid_epoch_ends_the_run_with_nothing_of_it_saved(small, folder, how, monkeypatch):
    """The last checkpoint is of before; the run goes on from it when the shard is whole again."""
    index = load_index(folder)
    # one that is used throughout
    shard = index.shards[1]
    whole = (folder / shard.name).read_bytes()
    document = small(data={"train": str(folder)}, checkpoint={"every_steps": 1, "every_epochs": None})
    import psn_train.training.step as step_module

    run = step_module.Updater.run

    def damaging(self, batches, step):
        if step == 8:
            if how == "deleted":
                (folder / shard.name).unlink()
            else:
                for position in range(shard.num_samples):
                    flip(folder, shard, position)
        return run(self, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(step_module.Updater, "run", damaging)
        with pytest.raises(ShardError, match=rf"unreadable samples.*(.|\n)*{shard.name}\[\d+\]"):
            train_here(document)
    saved = read_meta(find_checkpoint(document["run_dir"], "last"))["step"]
    assert 8 <= saved < 19
    with pytest.raises(ShardError, match="unreadable samples"):
        train_here(document)
    assert read_meta(find_checkpoint(document["run_dir"], "last"))["step"] == saved
    (folder / shard.name).write_bytes(whole)
    assert train_here(document) == 0
    undisturbed = small("whole", data={"train": str(folder)}, checkpoint={"every_steps": 1, "every_epochs": None})
    assert train_here(undisturbed) == 0
    from conftest import assert_same_run

    assert_same_run(document["run_dir"], undisturbed["run_dir"])


def test_damage_is_counted_where_that_is_allowed(small, folder):
    shard = load_index(folder).shards[3]
    for position in (2, 7):
        flip(folder, shard, position)
    document = small(data={"train": str(folder), "max_bad_samples": 99}, schedule={"epochs": 1})
    assert train_here(document) == 0
    bad = results_of(document)["bad_samples"]
    assert len(bad) >= 1 and all("its bytes changed" in name for name in bad)
    assert {name.partition(":")[0] for name in bad} <= {f"{shard.name}[2]", f"{shard.name}[7]"}


@pytest.mark.long
def test_a_run_from_a_failing_server_is_that_from_files(small, digit_shards, tmp_path):
    from conftest import assert_same_run

    plan = Plan(seed=4, faults=("refuse", "cut", "short", "trickle"), failures=3)
    with flaky_server(digit_shards, plan) as (url, served):
        data = {"train": f"{url}/train", "val": f"{url}/val", "cache_dir": str(tmp_path / "cache")}
        assert train_here(small("served", data=data)) == 0
    assert sum(served.faults.values()) > 5
    assert train_here(small("files")) == 0
    assert_same_run(tmp_path / "served", tmp_path / "files")
