"""Which process of how many this is, whoever launched it, and how the processes tell each other something.

They talk through the launcher's key-value store, not through collectives: so an answer that does not come has a name,
and nobody waits longer than the timeout.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore

# beyond a stage's timeout: after a third of it nobody is waited for any more, after all of it a process ends itself
GRACE = 15.0


class Absent(RuntimeError):
    """Some ranks did not answer in time. `missing` are their numbers."""

    def __init__(self, stage: str, missing: list[int], seconds: float):
        super().__init__(f"no answer within {seconds:g} s at: {stage}")
        self.stage, self.missing = stage, missing


def adopt_slurm() -> None:
    """Under a bare `srun`, set what torchrun and accelerate would have set.

    Raises:
        ValueError: Slurm does not tell where the first host is.
    """
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))
    environment.setdefault("MASTER_ADDR", _first_host())


def _first_host() -> str:
    """The address of the first host of the job; node names need not resolve, so Slurm is asked."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        first = names.stdout.split()[0]
        node = subprocess.run(["scontrol", "show", "node", first], capture_output=True, text=True, check=True)
        return re.search(r"NodeAddr=(\S+)", node.stdout)[1]
    except (OSError, subprocess.SubprocessError, IndexError, TypeError) as error:
        raise ValueError(
            f"srun started this process and scontrol does not tell the first host's address ({error}); set MASTER_ADDR "
            "and MASTER_PORT"
        ) from error


class Meeting:
    """All processes of a launch. `hosts` is known after the first `gather`."""

    def __init__(self, timeout: float):
        adopt_slurm()
        environment = os.environ
        self.rank, self.size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        self.local_rank = int(environment.get("LOCAL_RANK", "0"))
        self.host, self.timeout = socket.gethostname(), timeout
        self.hosts: list[str] = [self.host] * self.size
        self._watch: threading.Timer | None = None
        if self.size > 1:
            self._heed_launcher()
        self.watch("meeting")
        address, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "0"))
        # torchrun and accelerate keep the store in the launcher
        serves = self.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            self.base = TCPStore(
                address, port, None, serves, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True
            )
        except (DistError, RuntimeError) as error:
            raise ValueError(
                f"rank {self.rank} ({self.host}) cannot reach rank 0's host at {address}:{port} within {timeout:g} s: "
                f"{str(error).splitlines()[0]}. Is the address that of the first host, the port open, the same command "
                "started on every host?"
            ) from error
        self.serves = serves
        self.store = PrefixStore(f"psn_doctor/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", self.base)

    def name(self, rank: int) -> str:
        """How a rank is called in messages."""
        return f"rank {rank} ({self.hosts[rank]})"

    def watch(self, stage: str) -> None:
        """From here on it is `stage`; a stage that outlasts the timeout ends this process."""
        self.rest()
        self.stage, self._deadline = stage, time.monotonic() + self.timeout
        text = f"did not get beyond: {stage} ({self.timeout:g} s)"
        self._watch = threading.Timer(self.timeout + GRACE, self._end, (text,))
        self._watch.daemon = True
        self._watch.start()

    def rest(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    def _end(self, text: str) -> None:
        os.write(1, f"problem: rank {self.rank} ({self.host}) {text}\n".encode())
        os._exit(1)

    def _heed_launcher(self) -> None:
        """Launchers end all processes when one has died: say where this one was, though it hangs in a collective."""
        heard, said = os.pipe()
        os.set_blocking(said, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(said, warn_on_full_buffer=False)

        def listen() -> None:
            while os.read(heard, 1) != bytes([signal.SIGTERM]):
                pass
            self._end(f"was ended by the launcher at: {self.stage}; another process had died, which the launcher names")

        threading.Thread(target=listen, daemon=True).start()

    def gather(self, stage: str, answer: dict) -> list[dict]:
        """Every rank's answer, by rank.

        Raises:
            Absent: not all answered in time.
        """
        if stage != self.stage:
            self.watch(stage)
        self.store.set(f"{stage}/{self.rank}", json.dumps(answer))
        end, answers = self._deadline + GRACE / 3, []
        keys = [f"{stage}/{rank}" for rank in range(self.size)]
        for key in keys:
            left = max(end - time.monotonic(), 0.01)
            try:
                self.store.wait([key], timedelta(seconds=left))
                answers.append(json.loads(self.store.get(key)))
            except (DistError, RuntimeError) as error:
                raise Absent(stage, self._missing(keys), self.timeout) from error
        return answers

    def _missing(self, keys: list[str]) -> list[int]:
        try:
            return [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        except (DistError, RuntimeError):
            # the store is gone, and it was with rank 0 or its launcher
            return [0]

    def leave(self) -> None:
        """The store's process goes last."""
        self.watch("leaving")
        try:
            self.store.set(f"left/{self.rank}", "")
            if self.serves:
                self.store.wait([f"left/{rank}" for rank in range(self.size)], timedelta(seconds=min(self.timeout, 10)))
        except (DistError, RuntimeError):
            pass
        self.rest()
