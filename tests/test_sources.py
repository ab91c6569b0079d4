"""What `open_source` finds in folders and archives, and what it refuses."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from psn_train.data.image_files import BadImage, prepare_image
from psn_train.data.sources import ArraySource, ImageFolder, make_keys, open_source

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


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_image_folder_with_odd_names(tmp_path):
    files = {
        "b class/x.y.z.JPEG": picture(0),
        "b class/UPPER.JPG": picture(1),
        "b class/über maß.png": picture(2, "PNG"),
        "b class/same.jpg": picture(3),
        "b class/same.png": picture(4, "PNG"),
        "b class/deep/er/x.webp": picture(5, "WEBP"),
        "__a__/1.jpg": picture(6),
        "b class/.hidden.jpg": picture(7),
        "b class/._x.jpg": b"apple",
        "b class/notes.txt": b"text",
        "b class/Thumbs.db": b"",
        ".git/x.jpg": picture(8),
    }
    write_tree(tmp_path, files)
    (tmp_path / "c empty").mkdir()
    source = open_source(tmp_path)["train"]
    assert source.classes == ["__a__", "b class", "c empty"]
    assert len(source) == 7
    assert source.notes == {"hidden": 2, "not images": 2, "empty classes": 1}
    assert source.labels.tolist() == [0, 1, 1, 1, 1, 1, 1]
    keys = source.keys()
    assert len(set(keys)) == 7
    for key, name in zip(keys, source.names, strict=True):
        assert key.isascii() and "." not in key and not key.startswith("__")
        assert unquote(key) in (name, os.path.splitext(name)[0])
    assert read_all(source, tmp_path) == [files[name] for name in source.names]


def test_plain_names_are_their_own_keys(tmp_path):
    write_tree(tmp_path, {"n01440764/n01440764_10026.JPEG": picture(0)})
    assert open_source(tmp_path)["train"].keys() == ["n01440764/n01440764_10026"]


def test_splits_share_the_classes_of_all(tmp_path):
    write_tree(tmp_path, {"train/a/1.png": picture(0), "train/c/2.png": picture(1), "validation/b/3.png": picture(2)})
    (tmp_path / "test").mkdir()
    splits = open_source(tmp_path)
    assert list(splits) == ["train", "val"]
    assert splits["train"].classes == splits["val"].classes == ["a", "b", "c"]
    assert splits["train"].labels.tolist() == [0, 2]
    assert splits["val"].labels.tolist() == [1]


def test_a_class_may_be_called_train(tmp_path):
    write_tree(tmp_path, {"train/1.png": picture(0), "car/2.png": picture(1)})
    splits = open_source(tmp_path)
    assert list(splits) == ["train"] and splits["train"].classes == ["car", "train"]


def test_two_folders_of_one_split_are_refused(tmp_path):
    write_tree(tmp_path, {"val/a/1.png": picture(0), "valid/a/2.png": picture(1)})
    with pytest.raises(ValueError, match="the same split"):
        open_source(tmp_path)


def test_links_in_a_circle_end(tmp_path):
    write_tree(tmp_path, {"a/1.png": picture(0)})
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert "a/1.png" in ImageFolder(tmp_path).names


def test_nothing_found_says_what_was_looked_for(tmp_path):
    (tmp_path / "readme.txt").write_text("no images")
    with pytest.raises(ValueError, match=r"(?s)ILSVRC2012_img_train.tar.*cifar-10-batches-py.*parquet.*<class>"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images found"):
        open_source(tmp_path / "readme.txt")


def test_fingerprint_ignores_location_and_time(tmp_path):
    files = {"a/1.png": picture(0), "b/2.png": picture(1)}
    one = ImageFolder(write_tree(tmp_path / "one", files))
    two = ImageFolder(write_tree(tmp_path / "elsewhere", files))
    os.utime(tmp_path / "elsewhere/a/1.png", (1, 1))
    assert one.fingerprint() == two.fingerprint()
    (tmp_path / "elsewhere/a/1.png").write_bytes(picture(0) + b"x")
    assert ImageFolder(tmp_path / "elsewhere").fingerprint() != one.fingerprint()


# what a file system may hold: any bytes but two
file_names = st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name)


@given(st.lists((file_names.map(os.fsdecode) | st.text("a.%é_", min_size=1)), unique=True, max_size=20))
def test_keys_are_unique_and_fit_tar_headers(names):
    keys = make_keys([f"class/{name}" for name in names])
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert key.isascii() and "." not in key and key.startswith("class/")
        tarfile.TarInfo(key + ".events.npz").tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def test_key_of_a_name_that_looks_encoded():
    keys = make_keys(["a.jpg", "a.png", "a.jpg.png"])
    assert len(set(keys)) == 3


def test_arrays_become_png(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    source = ArraySource(images, [0, 1, 1, 0, 1], ["no", "yes"])
    for data, pixels in zip(read_all(source, tmp_path), images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    grey = ArraySource(images[..., 0], [0] * 5, ["only"])
    assert Image.open(io.BytesIO(read_all(grey, tmp_path)[0])).mode == "L"
    assert grey.fingerprint() != ArraySource(images[..., 1], [0] * 5, ["only"]).fingerprint()
    with pytest.raises(ValueError, match="uint8"):
        ArraySource(images / 255, [0] * 5, ["only"])
    with pytest.raises(ValueError, match="labels run from 0 to 2"):
        ArraySource(images, [0, 1, 2, 0, 0], ["no", "yes"])
    with pytest.raises(ValueError, match="5 samples"):
        ArraySource(images, [0, 1], ["no", "yes"])


def test_prepare_image():
    jpeg, png, cmyk = picture(0), picture(0, "PNG"), picture(0, "JPEG", "CMYK")
    for data, extension in ((jpeg, "jpg"), (png, "png"), (cmyk, "jpg"), (picture(0, "WEBP"), "webp")):
        prepared = prepare_image(data)
        assert (prepared.extension, prepared.data, prepared.changed) == (extension, data, False)
        assert prepared.cmyk == (data is cmyk)
    bmp = prepare_image(picture(0, "BMP"))
    assert (bmp.extension, bmp.found, bmp.changed) == ("png", "bmp", True)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(bmp.data))), np.asarray(Image.open(io.BytesIO(png))))
    for bad in (b"", b"\xff\xd8\xff", b"text" * 100, png[:20]):
        with pytest.raises(BadImage):
            prepare_image(bad)


@pytest.mark.parametrize(
    "kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P")]
)
def test_max_side_only_shrinks(kind, mode):
    data = picture(0, kind, mode, size=(300, 200))
    assert prepare_image(data, max_side=300).data == data
    small = prepare_image(data, max_side=150)
    image = Image.open(io.BytesIO(small.data))
    assert image.size == (150, 100) and image.format == "JPEG" and image.mode == ("L" if mode == "L" else "RGB")
    assert len(prepare_image(data, max_side=150, quality=30).data) < len(small.data)


@pytest.mark.skipif(not (SHARED / "imagenette_mini").is_dir(), reason=f"no real photographs in {SHARED}")
def test_imagenette():
    splits = open_source(SHARED / "imagenette_mini")
    assert {split: len(source) for split, source in splits.items()} == {"train": 1000, "val": 300}
    assert splits["train"].classes == splits["val"].classes and len(splits["val"].classes) == 10
    assert np.bincount(splits["train"].labels).tolist() == [100] * 10
