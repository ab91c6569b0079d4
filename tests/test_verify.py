"""Every kind of damage is done for real, and found."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psn_train.data.index import INDEX_NAME, ShardError, load_index
from psn_train.data.shards import index_shards, write_shards
from psn_train.data.sources import ArraySource, ImageFolder
from psn_train.data.verify import verify_shards


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """24 JPEGs of two classes in four shards."""
    root = tmp_path_factory.mktemp("pristine")
    for i in range(24):
        path = root / f"images/{'ab'[i % 2]}/{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    write_shards(ImageFolder(root / "images"), root / "out", split="train", num_shards=4, workers=1, progress=False)
    return root / "out"


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    shutil.copytree(pristine, tmp_path / "shards")
    return tmp_path / "shards"


def verify(folder, **options):
    return verify_shards(folder, **{"workers": 1, "progress": False, **options})


def problems(folder, **options) -> list[str]:
    report = verify(folder, **options)
    assert report.ok == (not report.problems)
    return [str(problem) for problem in report.problems]


def edit_index(folder: Path, change) -> None:
    document = json.loads((folder / INDEX_NAME).read_text())
    change(document)
    (folder / INDEX_NAME).write_text(json.dumps(document))


def edit_shard(folder: Path, change, name: str = "train-000001.tar") -> None:
    data = bytearray((folder / name).read_bytes())
    changed = change(data)
    (folder / name).write_bytes(data if changed is None else changed)


@pytest.mark.parametrize("workers", [1, 3])
def test_whole_shards(folder, workers):
    report = verify(folder, workers=workers)
    assert report.ok and "ok" in str(report) and "24 images decoded" in str(report)
    assert (report.num_shards, report.num_samples, report.num_decoded) == (4, 24, 24)
    assert report.class_histogram == [12, 12]
    assert report.num_bytes == load_index(folder).num_bytes
    assert verify(folder, decode=False).num_decoded == 0


@pytest.mark.parametrize("where", ["header", "label", "image", "padding", "end"])
def test_every_flipped_byte_is_found(folder, where):
    shard = load_index(folder).shards[1]
    start = shard.offsets[2]
    at = {
        "header": start + 3,
        "label": start + 512,
        "image": start + 1536 + 300,
        "padding": start + 512 + 100,
        "end": shard.offsets[-1] + 700,
    }[where]

    def flip(data):
        data[at] ^= 1

    edit_shard(folder, flip)
    for decode in (True, False):
        found = problems(folder, decode=decode)
        assert any("train-000001.tar: its bytes changed: sha256" in problem for problem in found)
        if where == "header":
            assert any(f"no tar header at byte {start}" in problem for problem in found)
        if where == "label":
            # 0 becomes 1 or 1 becomes 0
            assert any("class histogram" in problem for problem in found)


def test_missing_shard(folder):
    (folder / "train-000002.tar").unlink()
    found = problems(folder)
    assert any("train-000002.tar: cannot be read" in problem for problem in found)
    assert any("class histogram" in problem for problem in found)


def test_extra_and_left_over_shards(folder):
    shutil.copy(folder / "train-000000.tar", folder / "train-000004.tar")
    (folder / ".train-000001.tar.tmp").write_bytes(b"half")
    assert problems(folder) == [
        "train-000004.tar is not in the index",
        ".train-000001.tar.tmp is left of a run that was killed",
    ]


@pytest.mark.parametrize("length", [0, 100, 512, 5000, -512, -10240])
def test_cut_shard(folder, length):
    edit_shard(folder, lambda data: data[:length])
    found = problems(folder)
    assert any("train-000001.tar: has" in problem and "bytes, the index says" in problem for problem in found)
    assert any("cut short at byte" in problem for problem in found) or length == -512


def test_longer_shard(folder):
    edit_shard(folder, lambda data: data + b"x")
    assert any("bytes, the index says" in problem for problem in problems(folder))


def test_wrong_numbers_in_the_index(folder):
    def samples(document):
        document["shards"][0]["num_samples"] -= 1
        document["shards"][0]["offsets"].pop()
        del document["shards"][0]["crc32"]
        document["num_samples"] -= 1

    edit_index(folder, samples)
    assert any("train-000000.tar: has 6 samples, the index says 5" in problem for problem in problems(folder))


def test_wrong_offsets_in_the_index(folder):
    def offsets(document):
        document["shards"][3]["offsets"][2] += 512

    edit_index(folder, offsets)
    assert len(problems(folder)) == 1
    assert "train-000003.tar: sample 2 starts at byte" in problems(folder)[0]


def test_wrong_histogram_in_the_index(folder):
    edit_index(folder, lambda document: document.update(class_histogram=[13, 11]))
    assert problems(folder) == ["class histogram: class a has 12 samples, the index says 13"]
    edit_index(folder, lambda document: document.update(class_histogram=[24]))
    assert problems(folder) == ["class histogram: 1 entries for 2 classes"]


def test_swapped_shards(folder):
    (folder / "train-000000.tar").rename(folder / "x")
    (folder / "train-000001.tar").rename(folder / "train-000000.tar")
    (folder / "x").rename(folder / "train-000001.tar")
    found = problems(folder)
    assert sum("its bytes changed" in problem for problem in found) == 2


def test_shard_in_place_of_another(folder):
    shutil.copy(folder / "train-000000.tar", folder / "train-000001.tar")
    assert any("6 keys occur more than once" in problem for problem in problems(folder))


def test_edited_companions(folder):
    (folder / "classes.txt").write_text("b\na\n")
    (folder / "sizes.json").unlink()
    assert problems(folder) == ["classes.txt differs from the index"]


def foreign(folder: Path, members: list[tuple[str, bytes]], **options) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_shards(str(folder / "a.tar"), folder, split="val", workers=1, progress=False, **options)
    return folder


def test_images_that_cannot_be_decoded(tmp_path):
    """The hashes are right: the files were broken when the shards were written."""
    jpeg, png = picture(0), picture(0, "PNG")
    members = []
    for key, data in {
        "whole": jpeg,
        "cut_jpeg": jpeg[: len(jpeg) // 2],
        "cut_png": png[: len(png) // 2],
        "empty": b"",
        "text": b"not an image",
        "bomb": bomb(),
    }.items():
        members += [(f"{key}.jpg", data), (f"{key}.cls", b"0")]
    shards = foreign(tmp_path / "shards", members)
    report = verify(shards)
    assert {problem.key for problem in report.problems} == {"cut_jpeg", "cut_png", "empty", "text", "bomb"}
    assert report.num_decoded == 1
    assert all("cannot be decoded" in problem.what for problem in report.problems)
    assert "a.tar: cut_jpeg: cannot be decoded" in str(report)
    assert verify(shards, decode=False).ok


def bomb() -> bytes:
    """A PNG header that promises a terabyte of pixels."""
    data = bytearray(picture(0, "PNG"))
    data[16:24] = (1 << 20).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_notes_do_not_fail(tmp_path):
    members = [
        ("p.JPEG", picture(0, "PNG")),
        ("p.cls", b"0"),
        ("q.png", picture(1)),
        ("q.cls", b"0"),
        ("r.jpg", picture(2, "JPEG", "CMYK")),
        ("r.cls", b"1"),
    ]
    report = verify(foreign(tmp_path / "shards", members))
    assert report.ok and report.num_decoded == 3
    assert (report.png_in_jpeg, report.misnamed, report.cmyk) == ([("a.tar", "p")], [("a.tar", "q")], [("a.tar", "r")])
    assert "1 CMYK images" in str(report) and "1 PNG files called JPEG" in str(report)


def test_many_problems_are_summed_up(tmp_path):
    members = [member for i in range(100) for member in ((f"{i}.jpg", b"x"), (f"{i}.cls", b"0"))]
    report = verify(foreign(tmp_path / "shards", members))
    assert len(report.problems) == 21 and report.problems[-1].what == "... and 80 more"


def test_labels_that_are_no_class(folder):
    edit_index(folder, lambda document: document.update(classes=["a"], class_histogram=[12]))
    assert any("class 1, but there are 1" in problem for problem in problems(folder))


def test_no_index(tmp_path):
    with pytest.raises(ShardError, match="no shards at"):
        verify_shards(tmp_path)


def test_over_http(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert verify(url, workers=2).ok
        (folder / "train-000000.tar").unlink()
        assert any("train-000000.tar: cannot be read" in problem for problem in problems(url))
    finally:
        server.shutdown()
        server.server_close()


def test_arrays(tmp_path):
    source = ArraySource(np.zeros((5, 8, 8), np.uint8), [0] * 5, ["zero"])
    write_shards(source, tmp_path, split="test", workers=1, progress=False)
    assert verify(tmp_path).ok
