"""The harness of hosts does what tests on several machines rely on."""

import subprocess
import sys
import time

from hosts import _namespaces, hosts

SERVER = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('up', flush=True); s.accept()[0].recv(9)"


def ask(host, code: str, log) -> str:
    assert host.start([sys.executable, "-c", code], log).wait(60) == 0, log.read_text()
    return log.read_text()


def reaches(host, address: str, seconds: int = 1) -> bool:
    """Whether a TCP connection to port 7000 of another host comes about within some seconds."""
    code = f"import socket; socket.create_connection(({address!r}, 7000), {seconds})"
    return host.start([sys.executable, "-c", code], host.folder / "client.log").wait(60) == 0


def test_hosts_have_names_addresses_and_cables_and_die_as_a_whole(tmp_path):
    with hosts(3, tmp_path) as (first, second, third):
        known = ask(
            second, "import socket; h = socket.gethostname(); print(h, socket.gethostbyname(h))", tmp_path / "a"
        )
        assert known.split() == ["host1", "10.77.0.2"]
        assert ask(third, "import socket; print(socket.gethostbyname('host0'))", tmp_path / "b").strip() == "10.77.0.1"

        def serve():
            log = tmp_path / "server.log"
            log.unlink(missing_ok=True)
            running = first.start([sys.executable, "-c", SERVER], log)
            deadline = time.monotonic() + 60
            while "up" not in log.read_text():
                assert time.monotonic() < deadline and running.poll() is None, log.read_text()
                time.sleep(0.05)

        serve()
        second.cut()
        assert not reaches(second, first.address)
        second.mend()
        # the bridge's port forwards again after a moment
        assert reaches(second, first.address, 30)
        first.kill()
        serve()
        # a handshake is there and back, after the question for the address, which is so, too
        third.shape(delay_ms=150)
        begin = time.monotonic()
        assert reaches(third, first.address, 30) and time.monotonic() - begin > 0.3
        first.kill()
        serve()
        third.shape(loss_percent=100)
        assert not reaches(third, first.address)

        # a process of a session of its own dies with its host, too, and other hosts live on
        bystander = second.start(["sleep", "600"], tmp_path / "c")
        first.start(["sh", "-c", "setsid sleep 600 & setsid sleep 600 & wait"], tmp_path / "c")
        deadline = time.monotonic() + 60
        while len(first.processes()) < 4:
            assert time.monotonic() < deadline, first.processes()
            time.sleep(0.05)
        first.kill()
        assert first.processes() == [] and bystander.poll() is None
        mine = {host.namespace for host in (first, second, third)} | {first.switch}
        assert mine <= set(_namespaces())
    assert bystander.poll() is not None
    assert not mine & set(_namespaces())


def test_hosts_go_after_a_failed_test_and_after_a_killed_one(tmp_path):
    try:
        with hosts(2, tmp_path) as made:
            running = made[0].start(["sleep", "600"], tmp_path / "a")
            raise RuntimeError("as a failing assertion")
    except RuntimeError:
        pass
    assert running.poll() is not None and not {host.namespace for host in made} & set(_namespaces())
    code = "import os, pathlib, sys; sys.path.insert(0, sys.argv[1]); from hosts import hosts\n"
    code += "with hosts(2, pathlib.Path(sys.argv[2])) as made:\n  print(made[0].namespace, flush=True); os._exit(1)"
    folders = [str(tmp_path), str(tmp_path)]
    left = subprocess.run([sys.executable, "-c", code, __file__.rsplit("/", 1)[0], folders[0]], stdout=subprocess.PIPE)
    (namespace,) = left.stdout.decode().split()
    assert namespace in _namespaces()
    with hosts(2, tmp_path):
        assert namespace not in _namespaces()
