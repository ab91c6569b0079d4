"""An HTTP server that fails by a seeded plan: refusals, cut connections, stalls, trickles, wrong lengths, no ranges."""

from __future__ import annotations

import collections
import contextlib
import http.server
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FAULTS = ("refuse", "cut", "stall", "short", "trickle")


@dataclass
class Plan:
    """What goes wrong. Each file fails `failures` times at most, then it is served whole."""

    seed: int = 0
    faults: tuple[str, ...] = ()
    failures: int = 3
    ranges: bool = True
    stall_s: float = 3.0
    retry_after: str | None = "0"
    status: int = 503
    answers: dict[str, int] = field(default_factory=dict)  # path -> a status that is its answer always
    headers: dict[str, str] = field(default_factory=dict)  # of every body


@dataclass
class Served:
    """What was asked for and sent, by path."""

    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range)
    sent: collections.Counter = field(default_factory=collections.Counter)  # bytes of bodies
    whole: collections.Counter = field(default_factory=collections.Counter)  # bodies that were sent to their end
    faults: collections.Counter = field(default_factory=collections.Counter)
    authorization: str | None = None


@contextlib.contextmanager
def flaky_server(folder: Path, plan: Plan) -> Iterator[tuple[str, Served]]:
    """Serve a folder; yields its URL and what was served."""
    served, lock = Served(), threading.Lock()
    draws: dict[str, random.Random] = {}
    failed: collections.Counter = collections.Counter()

    def fault_of(path: str, size: int) -> tuple[str | None, int]:
        """(what goes wrong, after how many bytes): a function of the seed, the path and how often it was asked for."""
        with lock:
            draw = draws.setdefault(path, random.Random(f"{plan.seed} {path}"))
            if failed[path] >= plan.failures or not plan.faults:
                return None, size
            failed[path] += 1
            fault = draw.choice(plan.faults)
            served.faults[fault] += 1
            return fault, draw.randrange(size) if size else 0

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, length: int, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("Connection", "close")
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.close_connection = True

        def do_GET(self):
            path, wanted = self.path, self.headers.get("Range")
            with lock:
                served.requests.append((path, wanted))
                served.authorization = self.headers.get("Authorization", served.authorization)
            file = folder / urllib.parse.unquote(path.lstrip("/").partition("?")[0])
            if path in plan.answers or not file.is_file():
                return self.answer(plan.answers.get(path, 404), 0)
            data = file.read_bytes()
            fault, after = fault_of(path, len(data))
            if fault == "refuse":
                headers = {} if plan.retry_after is None else {"Retry_After": plan.retry_after}
                return self.answer(plan.status, 0, **headers)
            headers = {"ETag": f'"{hash(data)}"', **plan.headers}
            start = 0
            if plan.ranges and wanted and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
                headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body = data[start:]
            if fault == "short":
                # a length that is true of what comes, which is not all
                body = body[: after % (len(body) + 1)]
                headers.pop("Content_Range", None)
                self.answer(
                    206 if start else 200,
                    len(body),
                    **headers,
                    **({"Content_Range": f"bytes {start}-{start + len(body) - 1}/*"} if start else {}),
                )
            else:
                self.answer(206 if start else 200, len(body), **headers)
            stop = min(after, len(body)) if fault in ("cut", "stall") else len(body)
            if fault not in ("cut", "stall"):
                # before its last byte, with which the client goes on
                with lock:
                    served.whole[path] += 1
            self.send(path, body[:stop], slow=fault == "trickle")
            if fault == "stall":
                time.sleep(plan.stall_s)

        def send(self, path: str, body: bytes, slow: bool) -> None:
            step = max(1, len(body) // 20) if slow else 1 << 16
            for at in range(0, len(body), step):
                try:
                    self.wfile.write(body[at : at + step])
                except OSError:
                    return
                with lock:
                    served.sent[path] += len(body[at : at + step])
                if slow:
                    time.sleep(0.02)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", served
    finally:
        server.shutdown()
        server.server_close()
