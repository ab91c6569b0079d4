"""An index for shards that someone else wrote, wherever they are."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psn_train.data.events import Recording, make_events
from psn_train.data.events.codec import encode_events
from psn_train.data.fetch import Patience
from psn_train.data.index import ShardError, load_index
from psn_train.data.shards import index_shards, write_shards
from psn_train.data.sources import ArraySource
from psn_train.data.verify import verify_shards

RECORDING = encode_events(Recording(make_events([0], [1], [2], [1]), (8, 8)))


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write_foreign(folder: Path, shards: int = 3, label: str = "cls") -> list[str]:
    """Shards of webdataset's own writer, with members that are no samples between them."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(shards):
        paths.append(str(folder / f"x-{number:03d}.tar"))
        with webdataset.TarWriter(paths[-1]) as writer:
            writer.write({"__key__": "__meta__/info", "json": b"{}"})
            for i in range(4):
                sample = {"__key__": f"{number}/{i}", "jpeg": picture(i), "json": b'{"caption": "x"}'}
                if label == "cls":
                    sample["cls"] = f"{i}\n"
                else:
                    sample["json"] = json.dumps({label: i}).encode()
                writer.write(sample)
    return paths


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class CutShort(Quiet):
    """Promises more than it sends: within a sample, or only the padding behind the archive's end."""

    length = 2048

    def copyfile(self, source, outputfile):
        data = source.read()
        outputfile.write(data[: self.length] if self.path.endswith("1.tar") else data)


class CutPadding(CutShort):
    length = -512


@pytest.fixture
def serve():
    servers = []

    def start(folder: Path, handler=Quiet) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def index(urls, out, **options):
    return index_shards(urls, out, split="train", **{"workers": 1, "progress": False, **options})


@pytest.mark.parametrize("label", ["cls", "label", "target"])
def test_local_shards(tmp_path, label):
    paths = write_foreign(tmp_path / "shards", label=label)
    for workers in (1, 2):
        made = index(paths, tmp_path / "shards", workers=workers)
        assert made == load_index(tmp_path / "shards")
        assert [shard.name for shard in made.shards] == ["x-000.tar", "x-001.tar", "x-002.tar"]
        assert made.classes == ["0", "1", "2", "3"] and made.class_histogram == [3, 3, 3, 3]
        assert made.kind == "images" and made.num_samples == 12
    for shard in made.shards:
        data = (tmp_path / "shards" / shard.name).read_bytes()
        for i, (start, stop) in enumerate(zip(shard.offsets, shard.offsets[1:], strict=False)):
            with tarfile.open(fileobj=io.BytesIO(data[start:stop] + bytes(1024))) as tar:
                assert tar.extractfile(next(m for m in tar if m.name.endswith(".jpeg"))).read() == picture(i)
    assert verify_shards(tmp_path / "shards", workers=1, progress=False).ok


def test_names_hang_on_the_folder_of_the_index(tmp_path, monkeypatch):
    write_foreign(tmp_path / "out/deep")
    write_foreign(tmp_path / "other", shards=1)
    monkeypatch.chdir(tmp_path)
    made = index(["out/deep/x-{000..002}.tar", "other/x-000.tar"], "out")
    assert [shard.name for shard in made.shards] == [
        "deep/x-000.tar",
        "deep/x-001.tar",
        "deep/x-002.tar",
        str(tmp_path / "other/x-000.tar"),
    ]
    # all may be read, but two shards have the same keys
    report = verify_shards("out", workers=1, progress=False)
    assert [str(problem) for problem in report.problems] == ["4 keys occur more than once"]
    (tmp_path / "out").rename(tmp_path / "moved")
    assert not any("cannot" in str(problem) for problem in verify_shards("moved", workers=1, progress=False).problems)


def test_class_names(tmp_path):
    paths = write_foreign(tmp_path)
    assert index(paths, tmp_path, classes=list("abcde")).class_histogram == [3, 3, 3, 3, 0]
    with pytest.raises(ShardError, match="class 3, but there are 3 classes"):
        index(paths, tmp_path, classes=list("abc"))
    data = [("a.jpg", picture(0)), ("a.cls", b"dog")]
    bare(tmp_path / "named.tar", data)
    assert index(str(tmp_path / "named.tar"), tmp_path / "named", classes=["cat", "dog"]).class_histogram == [0, 1]
    assert verify_shards(tmp_path / "named", workers=1, progress=False).ok
    with pytest.raises(ShardError, match=r"a: label 'dog' is not a class"):
        index(str(tmp_path / "named.tar"), tmp_path / "named")


def bare(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("psn_train.data.foreign.PATIENCE", Patience(attempts=3, first_wait_s=0.01))


def test_over_http(tmp_path, serve):
    write_foreign(tmp_path / "shards")
    base = serve(tmp_path / "shards")
    made = index(base + "/x-{000..002}.tar", tmp_path / "out", workers=2)
    assert made.shards[1].name == base + "/x-001.tar"
    assert made.num_samples == 12
    assert verify_shards(tmp_path / "out", workers=2, progress=False).ok
    with pytest.raises(ShardError, match="404"):
        index(base + "/nothing.tar", tmp_path / "out")
    with pytest.raises(ShardError, match="cannot be read"):
        index("http://127.0.0.1:9/x.tar", tmp_path / "out")


@pytest.mark.parametrize("handler", [CutShort, CutPadding])
def test_a_cut_connection_is_no_end(tmp_path, serve, handler):
    write_foreign(tmp_path / "shards")
    base = serve(tmp_path / "shards", handler)
    with pytest.raises(ShardError, match=r"x-001\.tar.*(connection was cut after|cut short)"):
        index(base + "/x-{000..002}.tar", tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()


def test_through_a_pipe(tmp_path):
    paths = write_foreign(tmp_path / "shards")
    zipped = tmp_path / "x-001.tar.gz"
    zipped.write_bytes(gzip.compress(Path(paths[1]).read_bytes()))
    urls = [f"pipe:cat {paths[0]}", f"pipe:gzip -dc {zipped}"]
    made = index(urls, tmp_path / "out")
    assert [shard.name for shard in made.shards] == urls and made.num_samples == 8
    assert verify_shards(tmp_path / "out", workers=1, progress=False).ok
    with pytest.raises(ShardError, match=r"ended with status 1|cut short at byte 0"):
        index(f"pipe:cat {tmp_path}/nothing", tmp_path / "out")
    with pytest.raises(ShardError, match="ended with status 3"):
        index(f"pipe:cat {paths[0]}; exit 3", tmp_path / "out")


def test_commands_can_be_forbidden(tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    with pytest.raises(ShardError, match="WDS_SECURE"):
        index(f"pipe:touch {tmp_path}/harm", tmp_path / "out")
    assert not (tmp_path / "harm").exists()


def test_what_cannot_be_indexed(tmp_path):
    for members, message in [
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"1")], r"1 of 2 samples.*\n  a: no \.cls"),
        ([("a.cls", b"1"), ("a.txt", b"x")], r"a: no image and no \.events among cls, txt"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "label -1"),
        ([("a.jpg", b"x"), ("a.cls", b"1.5")], "label 1.5"),
        ([("a.jpg", b"x"), ("a.json", b'{"caption": 3}')], "label None"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "a: "),
        ([("a.jpg", b"x"), ("a.JPG", b"x"), ("a.cls", b"1")], "is there twice"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.events", RECORDING), ("b.cls", b"1")], "others are events"),
        ([], "no samples"),
    ]:
        with pytest.raises(ShardError, match=message):
            index(bare(tmp_path / "a.tar", members), tmp_path / "out")
    path = bare(tmp_path / "a.tar", [("a.jpg", b"x" * 5000), ("a.cls", b"1")])
    whole = Path(path).read_bytes()
    for data, message in [
        (whole[:3000], "cut short at byte 3000"),
        (gzip.compress(whole), "compressed"),
        (whole + b"more", "more follows the end"),
        (b"", "cut short at byte 0"),
    ]:
        Path(path).write_bytes(data)
        with pytest.raises(ShardError, match=message):
            index(path, tmp_path / "out")
    Path(path).write_bytes(whole)
    with pytest.raises(ShardError, match="named twice"):
        index([path, path], tmp_path / "out")
    with pytest.raises(ShardError, match="cannot be read"):
        index(str(tmp_path / "nothing.tar"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_own_shards_get_the_same_index(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    source = ArraySource(images, [i % 3 for i in range(30)], list("abc"))
    own = write_shards(source, tmp_path, split="train", num_shards=4, workers=1, progress=False)
    again = index(str(tmp_path / "train-{000000..000003}.tar"), tmp_path, classes=list("abc"))
    assert again.shards == own.shards and again.class_histogram == own.class_histogram
