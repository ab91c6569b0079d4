"""CIFAR's files, ImageNet's archives and parquet files as sources; none of them may run code or be half read."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psn_train.data.shards import write_shards
from psn_train.data.sources import open_source
from psn_train.data.verify import verify_shards

SHARED = Path(os.environ.get("PSN_SHARED_DATA", Path(__file__).parents[1].parent / "shared/data"))


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def read_all(source, tmp_path) -> list[bytes]:
    def run(function, jobs, label, unit, total):
        for job in jobs:
            function(job, lambda count: None)

    reader = source.reader(tmp_path / "scratch", run)
    reader = pickle.loads(pickle.dumps(reader))
    return [reader(source.reference(i))["image"] for i in range(len(source))]


def cifar10(folder: Path, per_file: int = 4, protocol: int = 2) -> np.ndarray:
    """Small files in CIFAR-10's layout; returns the training pixels, uint8 [n, H, W, C]."""
    folder.mkdir(parents=True)
    rng, all_pixels = np.random.default_rng(0), []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        labels = [int(label) for label in rng.integers(0, 10, per_file)]
        batch = {b"data": pixels, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a.png"] * per_file}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
        if name != "test_batch":
            all_pixels.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    meta = {b"label_names": [f"class {i}".encode() for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    return np.concatenate(all_pixels)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10(tmp_path, protocol):
    pixels = cifar10(tmp_path / "cifar-10-batches-py", protocol=protocol)
    for src in (tmp_path, tmp_path / "cifar-10-batches-py"):
        splits = open_source(src)
        assert {split: len(source) for split, source in splits.items()} == {"train": 20, "test": 4}
        assert splits["train"].classes[3] == "class 3"
        decoded = [np.asarray(Image.open(io.BytesIO(data))) for data in read_all(splits["train"], tmp_path)]
        np.testing.assert_array_equal(np.stack(decoded), pixels)


def test_cifar100_has_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        batch = {"data": np.zeros((3, 3072), np.uint8), "fine_labels": [99, 0, 5], "coarse_labels": [1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": ["coarse"] * 20}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    source = open_source(tmp_path)["train"]
    assert len(source.classes) == 100 and source.labels.tolist() == [99, 0, 5]


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


class MaliceByName:
    """Reaches for a harmless-looking function of the codecs."""

    def __reduce__(self):
        import _codecs

        return (_codecs.encode, ("x", "rot13"))


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_code_in_a_cifar_file_does_not_run(tmp_path, name):
    cifar10(tmp_path / "cifar-10-batches-py")
    harm = tmp_path / "harm"
    batch = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0] * 4, b"more": Malice(str(harm))}
    (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match=rf"{name}.*mkdir"):
        open_source(tmp_path)
    assert not harm.exists()
    # the same bytes do harm when they are trusted
    pickle.loads(pickle.dumps(batch))
    assert harm.exists()
    (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({b"x": MaliceByName()}))
    with pytest.raises(ValueError, match="rot13"):
        open_source(tmp_path)


def test_damaged_cifar_files_are_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    cifar10(folder)
    whole = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="data_batch_2"):
        open_source(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": np.zeros((4, 100), np.uint8), "labels": [0] * 4}))
    with pytest.raises(ValueError, match=r"uint8 \[n, 3072\], got uint8 \[4, 100\]"):
        open_source(tmp_path)
    (folder / "data_batch_2").unlink()
    with pytest.raises(ValueError, match=r"data_batch_2 is missing"):
        open_source(tmp_path)


def tar_of(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1234567
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def imagenet(folder: Path, photographs: dict[str, list[bytes]], val: int = 3) -> list[tuple[str, str, bytes]]:
    """Archives in ILSVRC2012's layout; returns (name, wnid, bytes) of the validation images in order."""
    folder.mkdir(exist_ok=True)
    classes = list(photographs)
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": data for i, data in enumerate(photographs[wnid])})
        for wnid in reversed(classes)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    rng = random.Random(0)
    answers = []
    for i in range(val):
        wnid = rng.choice(classes)
        answers.append((f"ILSVRC2012_val_{i + 1:08d}.JPEG", wnid, rng.choice(photographs[wnid])))
    in_any_order = answers[1:] + answers[:1]
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of({name: data for name, _, data in in_any_order}))
    return answers


def wnids(count: int) -> dict[str, list[bytes]]:
    return {f"n{10_000_000 + i}": [picture(10 * i + j) for j in range(1 + i % 3)] for i in range(count)}


def devkit(path: Path, answers: list[tuple[str, str, bytes]], classes: list[str]) -> None:
    """A development kit whose ids are not in the wnids' order, as in the real one."""
    scipy_io = pytest.importorskip("scipy.io")
    ids = {wnid: len(classes) - i for i, wnid in enumerate(classes)}
    rows = [(ids[wnid], wnid, "some words") for wnid in classes] + [(len(classes) + 1, "n00001740", "inner node")]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    mat = io.BytesIO()
    scipy_io.savemat(mat, {"synsets": synsets})
    truth = "".join(f"{ids[wnid]}\n" for _, wnid, _ in answers)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in (("ILSVRC2012_validation_ground_truth.txt", truth.encode()), ("meta.mat", mat.getvalue())):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(out.getvalue())


@pytest.mark.parametrize("labels", ["devkit", "wnids", "caffe", "kaggle", "named"])
def test_imagenet_archives_are_read_in_place(tmp_path, labels):
    photographs = wnids(7)
    answers = imagenet(tmp_path, photographs, val=12)
    classes = sorted(photographs)
    val_labels = None
    if labels == "devkit":
        devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", answers, classes)
    elif labels == "wnids":
        text = "".join(f"{wnid}\n" for _, wnid, _ in answers)
        (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text(text)
    elif labels == "caffe":
        lines = [f"{name} {classes.index(wnid)}\n" for name, wnid, _ in answers]
        random.Random(1).shuffle(lines)
        (tmp_path / "val.txt").write_text("".join(lines))
    elif labels == "kaggle":
        lines = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4\n" for name, wnid, _ in answers]
        (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    else:
        val_labels = tmp_path / "my labels.txt"
        val_labels.write_text("".join(f"{wnid}\n" for _, wnid, _ in answers))
    splits = open_source(tmp_path, val_labels=val_labels)
    train, val = splits["train"], splits["val"]
    assert train.classes == val.classes == classes
    expected = [(data, label) for label, wnid in enumerate(classes) for data in photographs[wnid]]
    assert list(zip(read_all(train, tmp_path), train.labels.tolist(), strict=True)) == expected
    assert read_all(val, tmp_path) == [data for _, _, data in answers]
    assert [val.classes[label] for label in val.labels] == [wnid for _, wnid, _ in answers]
    assert train.keys()[0] == f"{classes[0]}/{classes[0]}_0"
    assert val.keys()[0] == "ILSVRC2012_val_00000001"


def test_imagenet_errors(tmp_path):
    photographs = wnids(3)
    imagenet(tmp_path, photographs)
    with pytest.raises(ValueError, match=r"no labels in it.*--val-labels"):
        open_source(tmp_path)
    for text, message in [
        ("n10000000\n", "1 labels, the archive 3 images"),
        ("17\n23\n5\n", "name the whole kit"),
        ("n10000000\nn10000001\nn99999999\n", "n99999999 are not among the 3 training classes"),
        ("ILSVRC2012_val_00000001.JPEG 0\n", "no label for 2 images"),
        ("ILSVRC2012_val_00000001.JPEG cat\n", "not `name label`"),
        ("a.JPEG 0\na.JPEG 1\n", "two labels"),
    ]:
        (tmp_path / "val.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path)
    train = tmp_path / "ILSVRC2012_img_train.tar"
    assert list(open_source(train)) == ["train"]
    with pytest.raises(ValueError, match=r"is for ILSVRC2012_img_val\.tar"):
        open_source(train, val_labels=tmp_path / "val.txt")
    # an interrupted download
    train.write_bytes(train.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short at byte"):
        open_source(train)
    train.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ValueError, match="no tar header at byte 0"):
        open_source(train)


def hugging_face(path: Path, labels: list[int], *, names=None, struct=True, column="image", label="label", seed=0):
    """A parquet file as the `datasets` library writes it. Returns the images' bytes."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [picture(seed * 1000 + i) for i in range(len(labels))]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    values = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)] if struct else images
    table = pa.table({column: pa.array(values, kind), label: pa.array(labels, pa.int64())})
    if names is not None:
        features = {column: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return images


def test_parquet_with_features(tmp_path):
    names = ["cat", "dog", "emu"]
    first = hugging_face(tmp_path / "data/train-00000-of-00002.parquet", [0, 1] * 10, names=names, seed=1)
    second = hugging_face(tmp_path / "data/train-00001-of-00002.parquet", [2, 0, 1], names=names, seed=2)
    hugging_face(tmp_path / "data/validation-00000-of-00001.parquet", [1, 1], names=names)
    hugging_face(tmp_path / "data/test-00000-of-00001.parquet", [-1, -1], names=names)
    splits = open_source(tmp_path)
    assert list(splits) == ["train", "val"]
    assert splits["train"].classes == splits["val"].classes == names
    assert splits["train"].labels.tolist() == [0, 1] * 10 + [2, 0, 1]
    assert read_all(splits["train"], tmp_path) == first + second


def test_parquet_of_bare_bytes(tmp_path):
    images = hugging_face(tmp_path / "train.parquet", [3, 1], struct=False, column="img", label="fine_label")
    hugging_face(tmp_path / "test.parquet", [0], struct=False, column="img", label="fine_label")
    splits = open_source(tmp_path)
    assert splits["train"].classes == splits["test"].classes == ["0", "1", "2", "3"]
    assert read_all(splits["train"], tmp_path) == images


def test_parquet_errors(tmp_path):
    hugging_face(tmp_path / "train-0.parquet", [0, 1], column="photo")
    with pytest.raises(ValueError, match=r"no image column among photo"):
        open_source(tmp_path)
    hugging_face(tmp_path / "train-0.parquet", [0, 1], label="text")
    with pytest.raises(ValueError, match=r"no label column"):
        open_source(tmp_path)
    hugging_face(tmp_path / "train-0.parquet", [0, 1])
    hugging_face(tmp_path / "other/train-0.parquet", [0, 1])
    with pytest.raises(ValueError, match=r"several folders"):
        open_source(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"nonsense")
    (tmp_path / "other/train-0.parquet").unlink()
    with pytest.raises(ValueError, match=r"train-0.parquet cannot be read as parquet"):
        open_source(tmp_path)


def test_damaged_pages_of_parquet(tmp_path):
    hugging_face(tmp_path / "train.parquet", [0, 1] * 20)
    data = bytearray((tmp_path / "train.parquet").read_bytes())
    data[40:4000] = bytes(3960)
    (tmp_path / "train.parquet").write_bytes(data)
    source = open_source(tmp_path)["train"]
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"train\.parquet cannot be read: "):
            write_shards(source, tmp_path / "out", split="train", workers=workers, progress=False)
        assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["archives", "parquet", "cifar"])
def test_every_source_through_the_writer(tmp_path, kind, workers):
    src = tmp_path / "src"
    if kind == "archives":
        answers = imagenet(src, wnids(12))
        (src / "val.txt").write_text("".join(f"{name} {int(wnid[-2:])}\n" for name, wnid, _ in answers))
    elif kind == "parquet":
        for i in range(3):
            hugging_face(src / f"train-{i}.parquet", [0, 1, 2] * 5, names=["a", "b", "c"], seed=i)
    else:
        cifar10(src / "cifar-10-batches-py")
    for split, source in open_source(src).items():
        index = write_shards(source, tmp_path / split, split=split, num_shards=3, workers=workers, progress=False)
        assert index.num_samples == len(source) and index.plan["source"]["type"] == source.type
        assert index.class_histogram == np.bincount(source.labels, minlength=len(source.classes)).tolist()
        # the scratch files are gone, too
        assert sorted(path.suffix for path in (tmp_path / split).iterdir()) == [".json"] * 3 + [".tar"] * 3 + [".txt"]
        assert verify_shards(tmp_path / split, workers=workers, progress=False).ok
        again = write_shards(source, tmp_path / "again" / split, split=split, num_shards=3, workers=3 - workers)
        assert again.shards == index.shards


def test_extras_are_named_when_they_lack(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"psn-train\[hf\]"):
        open_source(tmp_path)


@pytest.mark.skipif(not (SHARED / "imagenet_originals").is_dir(), reason=f"no real photographs in {SHARED}")
def test_real_photographs_in_imagenet_archives(tmp_path):
    photographs: dict[str, list[bytes]] = {}
    for path in sorted((SHARED / "imagenet_originals").glob("*.JPEG")):
        photographs.setdefault(path.name.split("_")[0], []).append(path.read_bytes())
    answers = imagenet(tmp_path, photographs, val=50)
    devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", answers, sorted(photographs))
    splits = open_source(tmp_path)
    assert len(splits["train"]) == 120 and len(splits["val"]) == 50
    assert sorted(read_all(splits["train"], tmp_path)) == sorted(d for images in photographs.values() for d in images)
    assert [splits["val"].classes[label] for label in splits["val"].labels] == [wnid for _, wnid, _ in answers]
