"""Bytes of URLs and commands, in order and each once, through failures: retries, back-off, ranges.

A source is slow, answers 503, is cut or stalls: `fetch_blocks` goes on where it was, with a Range request where the
server allows it, else by passing over what it has had. What cannot get better (401, 403, 404, a missing package) is an
error at once. Sources: http(s) by urllib; `pipe:` commands; every scheme of fsspec whose package is here (s3, gs, hf,
...); else the schemes of webdataset's `gopen`.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import http.client
import os
import queue
import random
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from psn_train.data.progress import note_progress

_BLOCK = 1 << 20
# failures are counted in a row: one that brought this much began another row
_PROGRESS = 1 << 20
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 600.0
_PASSING = {408, 425, 429}
# characters of a URL's path and query
_AS_THEY_ARE = "%/:;,@&=+$!*'()~?[]"
# packages of fsspec's filesystems, where they are not called as fsspec says
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_PACKAGES |= {"hf": "huggingface_hub", "oci": "ocifs", "webdav": "webdav4"}
# seconds between two lines of a process about retries
_SAY_EVERY = 5.0


class FetchError(OSError):
    """Bytes of a URL or a command cannot be had; trying again was of no use, or would be of none."""


class ChangedError(FetchError):
    """What stands behind a URL became something else while it was fetched; from its start it may be had."""


class _Passing(Exception):
    """One attempt failed, another may not. `wait` is what the server asks for, seconds."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """How much failing is borne."""

    attempts: int = 8
    """Failures in a row that are one too many; `data.fetch_attempts`."""
    stall_s: float = 60.0
    """Seconds without a byte that count as a cut connection; `data.fetch_stall_s`."""
    first_wait_s: float = 1.0
    """About the wait after the first failure; it doubles with each, up to a minute."""


def fetch_blocks(url: str, patience: Patience, *, size: int | None = None) -> Iterator[bytes]:
    """The bytes behind an http(s) URL, a `pipe:` command or any scheme of fsspec and webdataset's `gopen`.

    Args:
        size: how many bytes there must be at least, where that is known: fewer are a failure.

    Raises:
        ChangedError: the server has another version than the one that was begun.
        FetchError: the failures are too many, or of a kind that does not pass.
    """
    # not the global generator, whose state a run saves
    jitter = random.Random()
    source = _source(url)
    shown = hide_password(url)
    position, failures, row_began = 0, 0, 0
    while True:
        try:
            with contextlib.closing(source(position, patience.stall_s)) as blocks:
                for block in blocks:
                    position += len(block)
                    note_progress()
                    yield block
            if size is not None and position < size:
                raise _Passing(f"ended after {position} of {size} bytes")
            return
        except _Passing as error:
            if position - row_began >= _PROGRESS:
                failures = 0
            failures, row_began = failures + 1, position
            if failures >= patience.attempts:
                raise FetchError(
                    f"{shown} cannot be fetched: {error} ({failures} failures in a row; data.fetch_attempts)"
                ) from error
            wait = min(_LONGEST_WAIT, patience.first_wait_s * 2 ** (failures - 1)) * jitter.uniform(0.5, 1.0)
            if error.wait is not None:
                wait = min(_LONGEST_RETRY_AFTER, max(wait, error.wait))
            _say(f"{shown}: {error}; attempt {failures + 1} of {patience.attempts} in {wait:.1f} s")
            _rest(wait)


def _rest(seconds: float) -> None:
    """Sleep; a wait that is meant to be counts as getting on."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        note_progress()
        time.sleep(min(1.0, left))


def fetch_bytes(url: str, patience: Patience) -> bytes:
    """All of a small file. Raises FetchError."""
    try:
        return b"".join(fetch_blocks(url, patience))
    except ChangedError:
        return b"".join(fetch_blocks(url, patience))


def hide_password(url: str) -> str:
    """A URL or a command as messages may show it: without `user:password@`, a query's values, and credentials of curl
    and wget.
    """
    text = re.sub(r"(\w://)[^/\s'\"@]*@", r"\1", url)
    text = re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", text)
    if not url.startswith("pipe:"):
        return text
    secret = r"(?i)((?:authorization|[\w-]*(?:token|key|secret|password))"
    text = re.sub(secret + r"\s*:\s*)[^'\"]+", r"\1...", text)
    text = re.sub(secret + r"=)[^'\"\s]+", r"\1...", text)
    return re.sub(r"(\s(?:-u|--user)[\s=]+)\S+", r"\1...", text)


class _Says:
    """When this process last said something of retries, and how often it kept silent since."""

    lock = threading.Lock()
    last = float("-inf")
    unsaid = 0


def _say(text: str) -> None:
    """One line on the error stream; of many within seconds one, which counts the others."""
    with _Says.lock:
        if time.monotonic() - _Says.last < _SAY_EVERY:
            _Says.unsaid += 1
            return
        more = f" (and {_Says.unsaid} retries more)" if _Says.unsaid else ""
        _Says.last, _Says.unsaid = time.monotonic(), 0
    who = f"rank {os.environ['RANK']} on {socket.gethostname()}" if "RANK" in os.environ else socket.gethostname()
    print(f"fetching ({who}): {text}{more}", file=sys.stderr, flush=True)


def _source(url: str) -> Callable[[int, float], Iterator[bytes]]:
    """What makes one attempt: source(position, stall_s) yields the bytes from `position` on."""
    if url.startswith("pipe:"):
        if os.environ.get("WDS_SECURE", "0") != "0":
            raise FetchError(f"{hide_password(url)}: WDS_SECURE forbids commands")
        return lambda position, stall_s: _passed_over(_command(url.removeprefix("pipe:"), stall_s), position)
    if url.startswith(("http://", "https://")):
        return _Http(url).attempt
    return _other(url)


def _passed_over(blocks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Blocks without their first `count` bytes."""
    with contextlib.closing(blocks):
        for block in blocks:
            if count < len(block):
                yield block[count:]
            count = max(0, count - len(block))


class _Http:
    """Attempts at one http(s) URL; knows the version that the first of them found."""

    def __init__(self, url: str):
        self.shown = hide_password(url)
        parts = urllib.parse.urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        # blanks and letters that are no ASCII; what is quoted already stays
        path, query = (urllib.parse.quote(part, safe=_AS_THEY_ARE) for part in (parts.path, parts.query))
        self.url = urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
        self.login = urllib.parse.unquote(login)
        self.version: tuple[str | None, int | None] | None = None

    def attempt(self, position: int, stall_s: float) -> Iterator[bytes]:
        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity"})
        if self.login:
            # not shown to the hosts that a server sends us on to
            coded = base64.b64encode(self.login.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {coded}")
        if position:
            request.add_header("Range", f"bytes={position}-")
            etag = self.version[0] if self.version else None
            if etag and not etag.startswith("W/"):
                request.add_header("If-Range", etag)
        try:
            with urllib.request.urlopen(request, timeout=stall_s) as response:
                yield from self._body(response, position)
        except http.client.InvalidURL as error:
            raise FetchError(f"{self.shown}: {error}; check the address") from error
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except TimeoutError as error:
            raise _Passing(f"no bytes for {stall_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise FetchError(f"{self.shown}: {reason}") from error
            if isinstance(error, FetchError):
                raise
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no answer for {stall_s:g} s") from error
            raise _Passing(str(reason) or type(reason).__name__) from error

    def _refused(self, error: urllib.error.HTTPError) -> None:
        text = f"HTTP {error.code} {error.reason}"
        if error.code in _PASSING or error.code >= 500:
            raise _Passing(text, _seconds(error.headers.get("Retry-After"))) from error
        if error.code == 416:
            raise ChangedError(f"{self.shown}: {text}: it is shorter than it was") from error
        advice = "check the address" if error.code in (404, 410) else "check the address and who may read there"
        raise FetchError(f"{self.shown}: {text}; {advice}") from error

    def _body(self, response: http.client.HTTPResponse, position: int) -> Iterator[bytes]:
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("identity", ""):
            raise FetchError(
                f"{self.shown}: the server sends it compressed (Content-Encoding: {coding}), although it was asked not "
                "to. Store it as it is, without that encoding"
            )
        length = response.headers.get("Content-Length")
        length = int(length) if length is not None and length.isdigit() else None
        start, total = 0, length
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            start = int(found[1]) if found else 0
            total = int(found[2]) if found and found[2] != "*" else None
            if start != position:
                raise FetchError(f"{self.shown}: asked for bytes from {position}, got bytes from {start}")
        version = response.headers.get("ETag"), total
        self.version = self.version or version
        # a length may be wrong; it tells where there is nothing better
        by = 0 if self.version[0] and version[0] else 1
        if None not in (self.version[by], version[by]) and self.version[by] != version[by]:
            raise ChangedError(f"{self.shown}: changed while it was fetched ({self.version}, now {version})")

        def blocks() -> Iterator[bytes]:
            got = 0
            while block := response.read1(_BLOCK):
                got += len(block)
                yield block
            # http.client takes a cut connection for the end
            if length is not None and got < length:
                raise _Passing(f"the connection was cut after {start + got} of {start + length} bytes")

        yield from _passed_over(blocks(), position - start)


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, seconds or a date, in seconds from now."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (date - datetime.datetime.now(datetime.timezone.utc)).total_seconds())


def _command(command: str, stall_s: float) -> Iterator[bytes]:
    """What a command of the shell writes. Whoever stops early ends it, its children too."""
    with tempfile.TemporaryFile() as errors:
        # a group of its own, so that the shell's children can be killed with it
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            output = process.stdout.fileno()
            poll = select.poll()
            poll.register(output, select.POLLIN)
            while True:
                if not poll.poll(stall_s * 1000):
                    raise _Passing(f"the command wrote nothing for {stall_s:g} s{_last_line(errors)}")
                block = os.read(output, _BLOCK)
                if not block:
                    break
                yield block
            try:
                status = process.wait(stall_s)
            except subprocess.TimeoutExpired as error:
                raise _Passing(f"the command did not end within {stall_s:g} s of its output's end") from error
            if status in (126, 127):
                shown = hide_password(f"pipe:{command}")
                raise FetchError(f"{shown}: there is no such command{_last_line(errors)}")
            if status:
                raise _Passing(f"the command ended with status {status}{_last_line(errors)}")
        finally:
            process.stdout.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(errors) -> str:
    errors.seek(0)
    lines = errors.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1].strip()[:300]}" if lines else ""


def _other(url: str) -> Callable[[int, float], Iterator[bytes]]:
    """Attempts at a URL of fsspec's, or where it has no such filesystem of webdataset's `gopen`."""
    import fsspec
    from webdataset.gopen import gopen, gopen_schemes

    scheme, shown = url.partition("://")[0], hide_password(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        if scheme in gopen_schemes:
            return lambda position, stall_s: _passed_over(_pumped(lambda: gopen(url), 0, stall_s), position)
        if isinstance(error, ValueError):
            raise FetchError(f"{shown}: the scheme {scheme}:// is not known") from error
        package = _PACKAGES.get(scheme) or getattr(error, "name", None) or scheme
        raise FetchError(f"{shown}: shards of {scheme}:// need a package: pip install {package}") from error
    # blocks of fsspec's files are requests; its own caching of what was read is of no use here
    return lambda position, stall_s: _pumped(
        lambda: filesystem.open(path, "rb", block_size=8 * _BLOCK), position, stall_s
    )


def _pumped(opened: Callable, position: int, stall_s: float) -> Iterator[bytes]:
    """Read in a thread, since these files know no time limit; one that hangs is left behind."""
    blocks: queue.Queue = queue.Queue(maxsize=4)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                blocks.put(item, timeout=0.2)
                return True
        return False

    def pump() -> None:
        try:
            with opened() as file:
                if position:
                    file.seek(position)
                while block := file.read(_BLOCK):
                    if not put(block):
                        return
            put(b"")
        # libraries of object stores raise what they like
        except Exception as error:
            put(error)

    threading.Thread(target=pump, daemon=True, name="fetch").start()
    try:
        while True:
            try:
                item = blocks.get(timeout=stall_s)
            except queue.Empty as error:
                raise _Passing(f"no bytes for {stall_s:g} s") from error
            if isinstance(item, (FileNotFoundError, PermissionError)):
                raise FetchError(f"{type(item).__name__}: {item}; check the address and who may read there") from item
            if isinstance(item, Exception):
                raise _Passing(f"{type(item).__name__}: {item}") from item
            if not item:
                return
            yield item
    finally:
        stopped.set()
