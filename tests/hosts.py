"""Hosts on one machine: network namespaces joined by veth pairs over a bridge, each with a host name of its own.

    with hosts(2, folder) as (first, second):
        running = first.start(["hostname"], log=folder / "log")

Every host has an interface `eth0` with an address in 10.77.0.0/24, an /etc/hosts that knows all of them, a folder of
its own for temporary files (TMPDIR), and its own host name. The file system is shared, as the disk of a
cluster's run folders is. A host is killed as a whole, its cable pulled and its link made slow or lossy. Everything goes
when the `with` block ends, however it ends; what a killed test process left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NETWORK = "10.77.0"
# files in /etc/netns/NAME take the place of those in /etc for what runs in the namespace NAME
ETC = Path("/etc/netns")
_NAMES = re.compile(r"^psn(\d+)-")
_numbers = itertools.count()


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list", check=False).splitlines() if line]


def why_not() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if shutil.which("ip") is None:
        return "hosts need ip (Debian, Ubuntu: apt install iproute2)"
    if os.geteuid() != 0:
        return "hosts need root: network namespaces"
    name = f"psn{os.getpid()}-try{next(_numbers)}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "a0", "type", "veth", "peer", "name", "a1")
        _ip("-n", name, "link", "add", "b0", "type", "bridge")
    except OSError as error:
        return f"no network namespaces here: {error}"
    finally:
        _ip("netns", "del", name, check=False)
    return None


class Host:
    """One host: what runs in its namespace, and its cable."""

    interface = "eth0"

    def __init__(self, namespace: str, name: str, address: str, switch: str, port: str, folder: Path):
        self.namespace, self.name, self.address = namespace, name, address
        self.switch, self.port, self.folder = switch, port, folder
        self.started: list[subprocess.Popen] = []
        self.cable: subprocess.Popen | None = None

    def start(
        self, command: list[str], log: Path, *, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen:
        """Run a command on this host; its output goes to `log`."""
        environment = {**os.environ, "TMPDIR": str(self.folder), **(env or {})}
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--"]
        inside += ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        with open(log, "ab") as output:
            running = subprocess.Popen(
                inside, env=environment, cwd=cwd or self.folder, stdout=output, stderr=subprocess.STDOUT
            )
        self.started.append(running)
        return running

    def processes(self) -> list[int]:
        """Process ids of everything that runs on this host, sessions and groups of their own included."""
        return [int(word) for word in _ip("netns", "pids", self.namespace, check=False).split()]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal every process of this host. SIGKILL: as if its power were cut; returns when all are gone."""
        deadline = time.monotonic() + 60
        while found := self.processes():
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            if number != signal.SIGKILL:
                return
            # those that are already dead have to be waited for by whoever started them
            for running in self.started:
                running.poll()
            assert time.monotonic() < deadline, f"{self.name}: {found} do not die"
            time.sleep(0.05)
        for running in self.started:
            running.wait(60)

    def cut(self) -> None:
        """Pull the cable: nothing comes and nothing goes, and nobody is told."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        """Put the cable back, or a quick one in the place of a slow one."""
        if self.cable is not None:
            self.cable.kill()
            self.cable.wait()
            self.cable = None
            _ip("-n", self.switch, "link", "set", self.port, "master", "bridge0")
            _ip("-n", self.switch, "link", "del", f"slow-{self.port}")
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def shape(self, *, delay_ms: float = 0.0, loss_percent: float = 0.0) -> None:
        """Delay what this host sends and what it is sent, by so many milliseconds each way, and lose some of it."""
        self.mend()
        slow, near, far = f"slow-{self.port}", f"near-{self.port}", f"far-{self.port}"
        inside = ("-n", self.switch)
        command = ["ip", "netns", "exec", self.switch, sys.executable, str(Path(__file__).with_name("slow_cable.py"))]
        command += [near, far, str(delay_ms), str(loss_percent)]
        self.cable = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.cable.stdout.readline() == b"up\n", "no tap devices here"
        _ip(*inside, "link", "add", slow, "type", "bridge")
        for device, bridge in ((self.port, slow), (near, slow), (far, "bridge0")):
            _ip(*inside, "link", "set", device, "master", bridge)
        for device in (slow, near, far):
            _ip(*inside, "link", "set", device, "up")


def _remove(namespace: str) -> None:
    for process in _ip("netns", "pids", namespace, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    _ip("netns", "del", namespace, check=False)
    shutil.rmtree(ETC / namespace, ignore_errors=True)


def _remove_leftovers() -> None:
    """Namespaces of test processes that are dead."""
    for namespace in _namespaces():
        owner = _NAMES.match(namespace)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _remove(namespace)


@contextlib.contextmanager
def hosts(count: int, folder: Path, *, names: bool = True) -> Iterator[list[Host]]:
    """`count` hosts on one switch; skips the test where they cannot be made.

    Args:
        count: 2 to 200.
        folder: gets a folder for each host.
        names: False where no host knows another's name, and each takes its own for a loopback address, as Debian does.
    """
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    _remove_leftovers()
    prefix = f"psn{os.getpid()}-{next(_numbers)}"
    switch = f"{prefix}-switch"
    made = [
        Host(f"{prefix}-{i}", f"host{i}", f"{NETWORK}.{i + 1}", switch, f"port{i}", folder / f"host{i}")
        for i in range(count)
    ]
    known = "".join(f"{host.address} {host.name}\n" for host in made)
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for host in made:
            host.folder.mkdir(parents=True, exist_ok=True)
            (ETC / host.namespace).mkdir(parents=True)
            table = known if names else f"127.0.1.1 {host.name}\n"
            (ETC / host.namespace / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
            inside = ("-n", host.namespace)
            _ip("netns", "add", host.namespace)
            _ip(*inside, "link", "add", host.interface, "type", "veth", "peer", "name", host.port, "netns", switch)
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", host.interface, "up")
            _ip("-n", switch, "link", "set", host.port, "master", "bridge0")
            _ip("-n", switch, "link", "set", host.port, "up")
        yield made
    finally:
        for host in made:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                host.kill()
            if host.cable is not None:
                host.cable.kill()
                host.cable.wait()
        for namespace in (*(host.namespace for host in made), switch):
            _remove(namespace)
