"""The walk through tar archives agrees with `tarfile` and webdataset on whole ones, and sees what they overlook."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from psn_train.data.tar import (
    HashingReader,
    RangeReader,
    TarDamage,
    is_meta,
    split_member_name,
    tar_end,
    tar_member,
    walk_members,
    walk_samples,
)


def archive(members: list[tuple[str, bytes]], format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.endswith("/"):
                info.type, info.size = tarfile.DIRTYPE, 0
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


MEMBERS = [
    ("folder/", b""),
    ("folder/a.jpg", b"x" * 1000),
    ("folder/" + "long" * 60 + ".jpg", b"y" * 512),
    ("ünïcode.cls", b"3"),
    ("empty.txt", b""),
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("from_file", [False, True])
def test_walk_agrees_with_tarfile(tmp_path, format, from_file):
    members = [m for m in MEMBERS if format != tarfile.USTAR_FORMAT or len(m[0]) < 100]
    data = archive(members, format)
    (tmp_path / "a.tar").write_bytes(data)
    with open(tmp_path / "a.tar", "rb") as file:
        reader = RangeReader(file.fileno()) if from_file else HashingReader(file)
        mine = [(m.name, m.offset, m.data_offset, m.size, m.read()) for m in walk_members(reader, "a") if m.is_file]
        if not from_file:
            assert reader.drain() == b""
            assert reader.position == len(data) and reader.digest.digest() == hashlib.sha256(data).digest()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [
            (m.name, m.offset, m.offset_data, m.size, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()
        ]
    assert mine == theirs


def test_own_members_are_what_tarfile_reads():
    data = b"".join(tar_member(name, value) for name, value in [("a/b.cls", b"7"), ("a/b.jpg", b"z" * 700)])
    data += tar_end(len(data))
    assert len(data) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.mtime, m.uid, m.uname, m.mode) for m in tar] == [
            ("a/b.cls", 0, 0, "", 0o444),
            ("a/b.jpg", 0, 0, "", 0o444),
        ]
    with pytest.raises(UnicodeEncodeError):
        tar_member("ü.jpg", b"")
    with pytest.raises(ValueError):
        tar_member("x" * 101, b"")


def walk(data: bytes) -> list[str]:
    return [member.name for member in walk_members(HashingReader(io.BytesIO(data)), "a.tar")]


def test_every_cut_is_seen():
    whole = archive([("a.jpg", b"x" * 600), ("b.jpg", b"y" * 100)], tarfile.GNU_FORMAT)
    end = 512 + 1024 + 512 + 512
    assert walk(whole) == walk(whole[: end + 512]) == ["a.jpg", "b.jpg"]
    for length in [*range(0, end, 100), 1536, end, end + 511]:
        with pytest.raises(TarDamage, match="cut short at byte"):
            walk(whole[:length])


def test_damaged_headers_are_seen():
    whole = bytearray(archive([("a.jpg", b"x" * 600), ("b.jpg", b"y" * 100)], tarfile.GNU_FORMAT))
    for at in (0, 100, 130, 1536, 1536 + 124):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        # tarfile itself ends without a word at the second header
        with pytest.raises(TarDamage, match=f"no tar header at byte {0 if at < 1536 else 1536}"):
            walk(bytes(damaged))
    with pytest.raises(TarDamage, match="compressed"):
        import gzip

        walk(gzip.compress(bytes(whole)) + bytes(512))


@given(st.binary(max_size=3000))
@example(b"\0" * 511)
def test_random_bytes_are_no_archive(data):
    with pytest.raises(TarDamage):
        walk(data.lstrip(b"\0") + b"\1")


@given(st.data())
def test_mutated_archives_never_do_anything_else(data):
    whole = bytearray(archive([m for m in MEMBERS if m[0] != "folder/"], tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        names = walk(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except TarDamage:
        return
    assert len(names) <= 4


names = st.text("ab._/J", max_size=12)


@given(names)
@example("dir/.hidden.jpg")
@example("a.b/c")
@example("/.x")
def test_names_split_as_in_webdataset(name):
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    assert split_member_name(name) == (None if key is None else (key, extension.lower()))


@given(st.lists(st.tuples(st.text("ab_./", min_size=1, max_size=8), st.binary(max_size=5)), max_size=8))
def test_samples_group_as_in_webdataset(members):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    data = archive([(name.strip("/") or "a", value) for name, value in members], tarfile.GNU_FORMAT)
    try:
        files = tar_file_expander([{"url": "a", "stream": io.BytesIO(data)}])
        theirs = [{k: v for k, v in sample.items() if k != "__url__"} for sample in group_by_keys(files)]
    except ValueError as error:
        assert "duplicate" in str(error)
        with pytest.raises(TarDamage, match="is there twice"):
            list(walk_samples(HashingReader(io.BytesIO(data)), "a", lambda extension: True))
        return
    mine = list(walk_samples(HashingReader(io.BytesIO(data)), "a", lambda extension: True))
    assert [{"__key__": sample.key, **sample.data} for sample in mine] == theirs
    for sample in mine:
        part = data[sample.offset : sample.stop] + bytes(1024)
        again = list(walk_samples(HashingReader(io.BytesIO(part)), "part", lambda extension: True))
        assert [(s.key, s.data) for s in again] == [(sample.key, sample.data)]


def test_meta_members():
    assert is_meta("__index__/a.jpg") and is_meta("__x__") and is_meta("____/a.jpg")
    assert not is_meta("__x/a.jpg") and not is_meta("a/__x__/b.jpg") and not is_meta("___")
