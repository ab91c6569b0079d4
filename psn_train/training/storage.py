"""Where checkpoints lie: a local folder, or a folder of an object store.

A local folder is a `pathlib.Path`. A URL that fsspec knows (`s3://bucket/run`, `gs://bucket/run`, `memory://run`) is a
`Url`, which has of a Path what reading needs: `/`, `name`, `parent`, `read_bytes`, `read_text`, `exists`, `unlink`.
`file:///path` is the local folder itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# an object store is asked that often, with these seconds between
READ_WAITS = (0.5, 2.0, 8.0)
_LOCAL = re.compile(r"^(file|local)://")
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
# what to install where fsspec knows a protocol and its package is missing
_PACKAGES = {"s3": "psn-train[s3]", "s3a": "psn-train[s3]", "gs": "psn-train[gcs]", "gcs": "psn-train[gcs]"}

Result = TypeVar("Result")


class StorageError(OSError):
    """An object store does not answer, refuses, or cannot be reached for want of a package."""


class Url:
    """A folder or an object of an object store.

    Every request's failure is a FileNotFoundError or a StorageError. Reading tries again, unless the answer is that
    there is no such object or no permission; whoever writes decides on that himself.
    """

    def __init__(self, text: str):
        self.text = text.rstrip("/")

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Url({self.text!r})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Url) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        return self.text.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Url:
        return Url(self.text.rsplit("/", 1)[0])

    @property
    def _key(self) -> tuple:
        """(file system, path in it)."""
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.text)
        except ImportError as error:
            protocol = self.text.split("://", 1)[0]
            package = _PACKAGES.get(protocol, f"fsspec[{protocol}]")
            raise StorageError(f"{self}: a package is missing; pip install '{package}' ({error})") from error
        except ValueError as error:
            raise StorageError(f"{self}: {error}; wanted a folder or a URL such as s3://bucket/run") from error

    def _ask(self, request: Callable[..., Result], *, again: bool = True) -> Result:
        """`request(file system, path)`."""
        waits = [*READ_WAITS] if again else []
        while True:
            try:
                fs, path = self._key
                return request(fs, path)
            except (FileNotFoundError, StorageError):
                raise
            except Exception as error:
                # packages of stores raise errors of their own, of which few are OSErrors
                if isinstance(error, PermissionError) or not waits:
                    raise StorageError(f"{self}: {type(error).__name__}: {error}") from error
            time.sleep(waits.pop(0))

    def read_bytes(self) -> bytes:
        return self._ask(lambda fs, path: fs.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def exists(self) -> bool:
        """True for an object; a folder is not one."""
        return self.name in {name for name, _, is_folder in self.parent._entries() if not is_folder}

    def write_bytes(self, data: bytes) -> None:
        """The whole object, or the one before it still stands."""
        self._ask(lambda fs, path: fs.pipe_file(path, data), again=False)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask(lambda fs, path: fs.rm_file(path), again=False)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _entries(self) -> list[tuple[str, int, bool]]:
        """(name, bytes, whether it is a folder) of what lies directly in this folder."""

        def listing(fs, path):
            # other processes write here, too
            fs.invalidate_cache()
            return path, fs.ls(path, detail=True)

        try:
            path, found = self._ask(listing)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # stores may list the folder itself
        return [
            (entry["name"].rstrip("/").rsplit("/", 1)[-1], entry["size"] or 0, entry["type"] == "directory")
            for entry in found
            if entry["name"].strip("/") != path.strip("/")
        ]


Place = Path | Url


def place(where: str | os.PathLike | Url) -> Place:
    """A local folder, or a folder of an object store."""
    if isinstance(where, Url):
        return where
    text = os.fspath(where)
    if _LOCAL.match(text):
        return Path(_LOCAL.sub("", text))
    return Url(text) if _URL.match(text) else Path(text)


def check_place(where: Place) -> None:
    """Raises StorageError where a store's package is missing, or its protocol is not known."""
    if isinstance(where, Url):
        _ = where._key


def sizes(folder: Place) -> dict[str, int]:
    """{name: bytes} of the files that lie directly in a folder; none where there is no such folder."""
    if isinstance(folder, Url):
        return {name: size for name, size, is_folder in folder._entries() if not is_folder}
    if not folder.is_dir():
        return {}
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def folders(folder: Place, prefix: str) -> list[Place]:
    """The folders directly in a folder whose names start with `prefix`, by name."""
    if isinstance(folder, Url):
        names = {name for name, _, is_folder in folder._entries() if is_folder and name.startswith(prefix)}
        return [folder / name for name in sorted(names)]
    return sorted(path for path in folder.glob(f"{prefix}*") if path.is_dir())


def is_folder(where: Place) -> bool:
    return bool(where._entries()) if isinstance(where, Url) else where.is_dir()


def write_text(where: Place, text: str) -> None:
    """A small file, on the disk when this returns: the new text, or the old one still stands."""
    if isinstance(where, Url):
        where.write_bytes(text.encode())
        return
    aside = where.with_name(f".{where.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, where)
    sync_folder(where.parent)


def sync_folder(path: Path) -> None:
    """Names and renames in a local folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def probe(folder: Place) -> None:
    """Write a small file and remove it.

    Raises:
        OSError: nothing can be written there.
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    trial = folder / ".writable"
    trial.write_bytes(b"?")
    with contextlib.suppress(FileNotFoundError):
        trial.unlink()


def free_bytes(folder: Place) -> int | None:
    """What this user may still write there; None for an object store, which does not say."""
    if isinstance(folder, Url):
        return None
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
