"""Writing shards: what is in them, that it is always the same, and that others can read it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from psn_train.data.companions import write_timm_root
from psn_train.data.events import Recording, make_events
from psn_train.data.events.codec import encode_events
from psn_train.data.index import ShardError, load_index
from psn_train.data.shards import plan_num_shards, plan_order, plan_sizes, write_shards
from psn_train.data.sources import ArraySource, ImageFolder, Source, open_source
from psn_train.data.verify import verify_shards

SHARED = Path(os.environ.get("PSN_SHARED_DATA", Path(__file__).parents[1].parent / "shared/data"))


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def tree(root: Path, count: int = 30) -> Path:
    """`count` JPEGs in three classes."""
    for i in range(count):
        path = root / f"class{i % 3}" / f"image_{i:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(source, out, **options):
    return write_shards(source, out, split="train", **{"workers": 1, "progress": False, **options})


@given(st.integers(1, 10**7), st.data())
def test_sizes_are_even_and_add_up(num_samples, data):
    num_shards = data.draw(st.integers(1, min(num_samples, 5000)))
    sizes = plan_sizes(num_samples, num_shards)
    assert sum(sizes) == num_samples and len(sizes) == num_shards
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@given(st.integers(1, 10**8), st.integers(0, 10**13))
def test_default_number_of_shards(num_samples, num_bytes):
    num_shards = plan_num_shards(num_samples, num_bytes)
    assert 1 <= num_shards <= num_samples
    if num_shards < num_samples:
        assert num_shards & (num_shards - 1) == 0
    if num_samples >= 800:
        assert num_shards >= 8
    if num_samples >= 1000 and num_bytes < 8 * 140e6:
        assert num_shards == 8
    plan_sizes(num_samples, num_shards)


def test_default_number_of_shards_of_imagenet():
    assert plan_num_shards(1_281_167, 147_897_477_120) == 1024
    assert plan_num_shards(50_000, 6_744_924_160) == 64
    assert plan_num_shards(1, 10) == 1
    assert plan_num_shards(300, 10) == 2


@given(st.integers(0, 50), st.integers(0, 5))
def test_order_is_a_permutation_of_the_seed(count, seed):
    keys = [f"key{i}" for i in range(count)]
    order = plan_order(keys, seed)
    assert sorted(order) == list(range(count))
    # the order belongs to the keys, not to how they were listed
    assert [keys[i] for i in order] == [keys[::-1][i] for i in plan_order(keys[::-1], seed)]
    if count > 20:
        assert order != plan_order(keys, seed + 1)


def test_impossible_options(tmp_path):
    source = ArraySource(np.zeros((5, 4, 4), np.uint8), [0] * 5, ["zero"])
    for options, message in [
        ({"num_shards": 6}, "5 samples cannot fill 6 shards"),
        ({"num_shards": 2, "shard_size": 2}, "not both"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"max_side": 0}, "max_side is 0"),
        ({"quality": 101}, "quality is 101"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="split"):
        write_shards(source, tmp_path / "out", split="../train")
    with pytest.raises(ValueError, match="no samples"):
        write(ArraySource(np.zeros((0, 4, 4), np.uint8), [], ["zero"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_offsets_counts_and_original_bytes(tmp_path):
    source = ImageFolder(tree(tmp_path / "images"))
    written = write(source, tmp_path / "out", shard_size=7)
    index = load_index(tmp_path / "out")
    assert written == index
    assert [shard.num_samples for shard in index.shards] == [6] * 5
    assert index.classes == ["class0", "class1", "class2"] and index.class_histogram == [10, 10, 10]
    found = {}
    for shard in index.shards:
        data = (tmp_path / "out" / shard.name).read_bytes()
        assert len(data) == shard.num_bytes and hashlib.sha256(data).hexdigest() == shard.sha256
        for start, stop in zip(shard.offsets, shard.offsets[1:], strict=False):
            with tarfile.open(fileobj=io.BytesIO(data[start:stop] + bytes(1024))) as tar:
                label, image = tar.getmembers()
                key = label.name.removesuffix(".cls")
                assert image.name == key + ".jpg" and label.offset == 0
                found[key] = (int(tar.extractfile(label).read()), tar.extractfile(image).read())
        assert not data[shard.offsets[-1] :].strip(b"\0")
    assert found == {
        key: (int(label), (tmp_path / "images" / name).read_bytes())
        for key, label, name in zip(source.keys(), source.labels, source.names, strict=True)
    }
    assert (tmp_path / "out/classes.txt").read_text() == "class0\nclass1\nclass2\n"
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_classes_are_mixed(tmp_path):
    source = ArraySource(np.zeros((800, 4, 4), np.uint8), [i // 100 for i in range(800)], [str(i) for i in range(8)])
    index = write(source, tmp_path / "out")
    assert len(index.shards) == 8
    for shard in index.shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            labels = {tar.extractfile(member).read() for member in tar if member.name.endswith(".cls")}
        assert len(labels) == 8


def test_equal_bytes_for_any_workers_place_and_time(tmp_path):
    tree(tmp_path / "images")
    shutil.copytree(tmp_path / "images", tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*.JPEG"):
        os.utime(path, (10, 10))
    write(ImageFolder(tmp_path / "images"), tmp_path / "one", num_shards=7)
    for name, images, workers in [("two", "images", 2), ("five", "elsewhere", 5)]:
        write(ImageFolder(tmp_path / images), tmp_path / name, num_shards=7, workers=workers)
        assert files(tmp_path / name) == files(tmp_path / "one")
    write(ImageFolder(tmp_path / "images"), tmp_path / "seed", num_shards=7, seed=1)
    assert files(tmp_path / "seed") != files(tmp_path / "one")


def test_max_side(tmp_path):
    folder = tmp_path / "images/a"
    folder.mkdir(parents=True)
    (folder / "large.jpg").write_bytes(picture(0, size=(400, 100)))
    (folder / "small.jpg").write_bytes(picture(1))
    index = write(ImageFolder(tmp_path / "images"), tmp_path / "out", max_side=200, quality=80)
    assert index.plan["max_side"] == 200 and index.plan["quality"] == 80 and "pillow" in index.plan["encoder"]
    assert index.plan["remarks"]["train-000000.tar"] == {"shrunk": 1}
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        assert Image.open(tar.extractfile("a/large.jpg")).size == (200, 50)
        assert tar.extractfile("a/small.jpg").read() == picture(1)


def test_misnamed_and_odd_images_are_kept_and_noted(tmp_path):
    folder = tmp_path / "images/n02105855"
    folder.mkdir(parents=True)
    png, cmyk, bmp = picture(0, "PNG"), picture(1, "JPEG", "CMYK"), picture(2, "BMP")
    (folder / "n02105855_2933.JPEG").write_bytes(png)
    (folder / "cmyk.JPEG").write_bytes(cmyk)
    (folder / "old.bmp").write_bytes(bmp)
    index = write(ImageFolder(tmp_path / "images"), tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        assert tar.extractfile("n02105855/n02105855_2933.png").read() == png
        assert tar.extractfile("n02105855/cmyk.jpg").read() == cmyk
        assert Image.open(tar.extractfile("n02105855/old.png")).format == "PNG"
    assert index.plan["remarks"]["train-000000.tar"] == {
        "misnamed": {"n02105855/n02105855_2933": "n02105855/n02105855_2933.JPEG is png"},
        "cmyk": ["n02105855/cmyk"],
        "converted": 1,
    }
    report = verify_shards(tmp_path / "out", workers=1, progress=False)
    assert report.ok and report.num_decoded == 3
    assert report.png_in_jpeg == [("train-000000.tar", "n02105855/n02105855_2933")]
    assert report.cmyk == [("train-000000.tar", "n02105855/cmyk")]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images(tmp_path, workers, capfd):
    tree(tmp_path / "images")
    (tmp_path / "images/class0/empty.jpg").write_bytes(b"")
    (tmp_path / "images/class1/text.jpg").write_bytes(b"not an image")
    (tmp_path / "images/class2/nowhere.jpg").symlink_to(tmp_path / "gone")
    source = ImageFolder(tmp_path / "images")
    assert len(source) == 33
    with pytest.raises(ShardError, match=r"class\d/(empty|text|nowhere)\.jpg: .*--skip-bad"):
        write(source, tmp_path / "out", num_shards=3, workers=workers)
    assert not (tmp_path / "out/index.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    # the same run goes on without them, although it was begun with them
    index = write(source, tmp_path / "out", num_shards=3, workers=workers, skip_bad=True, progress=True)
    assert index.num_samples == 30 and index.class_histogram == [10, 10, 10]
    skipped = {k: v for remark in index.plan["remarks"].values() for k, v in remark.get("skipped", {}).items()}
    assert set(skipped) == {"class0/empty", "class1/text", "class2/nowhere"}
    assert skipped["class0/empty"] == "class0/empty.jpg: the file is empty"
    assert "left out, cannot be read: 3" in capfd.readouterr().err
    report = verify_shards(tmp_path / "out", workers=1, progress=False)
    assert report.ok and len(report.skipped) == 3
    with pytest.raises(ShardError, match="written with --skip-bad and lack 3 samples"):
        write(source, tmp_path / "out", num_shards=3)


def test_not_one_good_image(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.jpg").write_bytes(b"")
    with pytest.raises(ShardError, match="not one of 1 samples"):
        write(ImageFolder(tmp_path / "images"), tmp_path / "out", skip_bad=True)


class Clips(Source):
    """Samples that are no images: what the writer takes is generic."""

    kind = "events"
    type = "test recordings"

    def reader(self, scratch, run):
        return _clip


def _clip(index: int) -> dict[str, bytes]:
    recording = Recording(make_events([index, 1000], [3, 4], [5, 6], [0, 1]), (8, 8))
    return {"events": encode_events(recording), "json": b"{}"}


def test_samples_need_not_be_images(tmp_path):
    source = Clips([f"user{i}.aedat" for i in range(20)], [i % 2 for i in range(20)], ["wave", "clap"])
    index = write(source, tmp_path / "out", num_shards=4, workers=2)
    assert index.kind == "events" and index.class_histogram == [10, 10]
    with tarfile.open(tmp_path / "out" / index.shards[0].name) as tar:
        names = tar.getnames()
    assert names[0].endswith(".cls") and names[1] == names[0][:-4] + ".events" and names[2] == names[0][:-4] + ".json"
    assert verify_shards(tmp_path / "out", workers=1, progress=False).ok


def test_webdataset_reads_them(tmp_path):
    import webdataset

    source = ImageFolder(tree(tmp_path / "images"))
    write(source, tmp_path / "out", num_shards=4)
    shards = str(tmp_path / "out/train-{000000..000003}.tar")
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls")
    read = {key: (image.size, label) for key, image, label in dataset}
    assert read == {key: ((24, 16), label) for key, label in zip(source.keys(), source.labels.tolist(), strict=True)}
    sizes = json.loads((tmp_path / "out/sizes.json").read_text())
    assert sizes == {"train-000000.tar": 8, "train-000001.tar": 8, "train-000002.tar": 7, "train-000003.tar": 7}


def test_timm_reads_them(tmp_path):
    timm_data = pytest.importorskip("timm.data")
    tree(tmp_path / "images")
    (tmp_path / "images/class0/really.JPEG").write_bytes(picture(99, "PNG"))
    write(ImageFolder(tmp_path / "images"), tmp_path / "out/train", num_shards=4)
    write_shards(ImageFolder(tmp_path / "images"), tmp_path / "out/val", split="val", workers=1, progress=False)
    write_timm_root(tmp_path / "out")
    for root, split in [("out/train", "train"), ("out", "train"), ("out", "val")]:
        dataset = timm_data.create_dataset("wds/", root=str(tmp_path / root), split=split, is_training=False)
        assert len(dataset) == 31
        labels = [label for image, label in dataset if image.mode == "RGB"]
        assert np.bincount(labels).tolist() == [11, 10, 10]


@pytest.mark.skipif(not (SHARED / "imagenette_mini").is_dir(), reason=f"no real photographs in {SHARED}")
def test_imagenette(tmp_path):
    source = open_source(SHARED / "imagenette_mini")["val"]
    index = write_shards(source, tmp_path / "val", split="val", workers=2, progress=False)
    assert index.num_samples == 300 and index.class_histogram == [30] * 10
    report = verify_shards(tmp_path / "val", workers=2, progress=False)
    assert report.ok and report.num_decoded == 300
