"""The commands that a page shows, run in the order of the page in one folder, with real files where the page says.

A block ```sh is run command by command, or as a whole by bash where it has background jobs. A block without a language
that begins with `$ ` is run, too, and what the page shows of its output has to be in it. A block whose first line names
a file, `# photos.yaml`, is written there. What is done otherwise than the page says stands in the page's `Way`, and
each entry of it has to be used.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, checked_in_this_process
from registries import kept_registries

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.(?:yaml|py|txt))\b")
_TRAINERS = ("-m psn_train.train ", "-m psn_train.doctor ", "launch/torchrun.sh ", "launch/slurm/train.sbatch ")
INLINE = "python -c "
# verbs that start processes to decode
DECODING = ("eval", "report", "publish", "energy", "compare", "average", "export")
# seconds that a command may take, on a machine that others use
LONGEST = 500


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


@dataclass
class Way:
    """How the commands of one page are run here.

    Attributes:
        prepare: puts into the folder what the reader is said to have.
        changes: (pattern, replacement) in a command, such as a number of processes.
        adds: recipe -> overrides that are put behind it wherever it is trained or shown: sizes, steps.
        elsewhere: beginning of a command that is not run here -> the file of tests that runs it, and why.
        processes: pattern of `psn` commands that are run as processes of their own all the same.
        env: for all commands.
        around: what is there while the page is read, such as a server; gives more for `env`.
    """

    prepare: Callable[[Path], None] = lambda folder: None
    changes: list[tuple[str, str]] = field(default_factory=list)
    adds: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    processes: str = r"(?!)"
    env: dict[str, str] = field(default_factory=dict)
    around: Callable[[Path], AbstractContextManager[dict[str, str]]] = lambda folder: contextlib.nullcontext({})


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 2) for found in _BLOCK.finditer(text)]


def split(text: str) -> list[str]:
    """The commands of a block: continued lines joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [" ".join(re.sub(r"(?:^|\s)#.*$", "", line).split()) for line in lines]
    return [line for line in lines if line]


def is_script(commands: list[str]) -> bool:
    """Whether a block is to be run as a whole."""
    return any(re.search(r"(?<!&)&$|\$!|\$\(", command) for command in commands)


def is_plain(command: str) -> bool:
    """Whether it is a `psn` with nothing of the shell in it, which can be called in this process."""
    with contextlib.suppress(ValueError):
        tokens = list(shlex.shlex(command, posix=True, punctuation_chars="|&;<>"))
        shell = any(set(token) <= set("|&;<>") for token in tokens) or re.search(r"[$`*?]", command)
        return command.startswith("psn ") and not shell
    return False


@contextlib.contextmanager
def timed(command: str) -> Iterator[None]:
    """For `pytest -s`."""
    begin = time.monotonic()
    yield
    print(f"{time.monotonic() - begin:6.1f} s  {command}", flush=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Reader:
    """Somebody who does what a page says."""

    def __init__(self, folder: Path, way: Way, submit: Callable | None = None, *, quick: bool = False):
        """quick: only what can be called in this process."""
        self.folder, self.way, self.submit, self.quick = folder, way, submit, quick
        self.used: set[str] = set()
        # commands of Slurm, where there is none
        self.left: list[str] = []
        own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NPROC_PER_NODE": "1"}
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **own, **way.env}
        self.port = str(free_port())
        (folder / "bin").mkdir()
        # of this tree, whatever is installed
        program = folder / "bin" / "psn"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom psn_train.cli import main\n"
            # decoding processes import it, too
            "if __name__ == '__main__':\n    sys.exit(main())\n"
        )
        program.chmod(0o755)
        (folder / "launch").symlink_to(ROOT / "launch")

    def read(self, page: Path) -> None:
        """Run everything; AssertionError with the command's line and output where one fails."""
        with self.way.around(self.folder) as env, kept_registries(self.folder):
            self.way.env.update(env)
            self.env.update(env)
            self.way.prepare(self.folder)
            self._read(page)

    def _read(self, page: Path) -> None:
        for block in blocks(page):
            self.where = f"{page.name}, line {block.line}"
            if (file := _FILE.match(block.text)) and block.language != "sh":
                path = self.folder / file[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif block.language == "sh":
                self.run_block(split(block.text))
            elif block.language == "" and block.text.startswith("$ "):
                self.run_shown(block.text)
        entries = [pattern for pattern, _ in self.way.changes] + [*self.way.adds, *self.way.elsewhere]
        unused = [entry for entry in entries if entry not in self.used]
        assert self.quick or not unused, f"{page.name}: nothing on the page needs {unused}"

    def run_block(self, commands: list[str]) -> None:
        commands = [command for command in commands if not self.runs_elsewhere(command)]
        if self.quick:
            own = [one for one in commands if re.search(self.way.processes, one)]
            commands = [one for one in commands if one not in own and (is_plain(one) or one.startswith(INLINE))]
        if is_script(commands):
            with timed("a script"):
                self.bash("\n".join(map(self.changed, commands)))
            return
        while commands:
            several = [c for c in commands if machine_of(c) is not None]
            if commands[0] in several and machine_of(several[-1]) > 0 and several == commands[: len(several)]:
                with timed(several[0]):
                    self.together([self.changed(command) for command in several])
                commands = commands[len(several) :]
                continue
            with timed(commands[0]):
                self.run(self.changed(commands.pop(0)))

    def run_shown(self, text: str) -> None:
        command, _, shown = text.removeprefix("$ ").partition("\n")
        output = " ".join(self.psn(shlex.split(self.changed(command))[1:], wanted=None).split())
        for line in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
            assert line == "..." or line in output, f"{self.where}: no {line!r} in\n{output}"

    def runs_elsewhere(self, command: str) -> bool:
        found = [start for start in self.way.elsewhere if command.startswith(start)]
        self.used.update(found)
        return bool(found)

    def changed(self, command: str) -> str:
        """The command as it is run here."""
        command = command.replace("29500", self.port)
        for pattern, replacement in self.way.changes:
            new = re.sub(pattern, replacement, command)
            if new != command:
                self.used.add(pattern)
            command = new
        for recipe, overrides in self.way.adds.items():
            # behind the recipe of a command that trains, shows or plans it; at an option's end it is none of its own
            trains = re.search(r"\bpsn (?:train|recipe|plan) |" + "|".join(map(re.escape, _TRAINERS)), command)
            if trains and re.search(rf"{re.escape(recipe)}(?=\s|$)", command[trains.end() - 1 :]):
                self.used.add(recipe)
                command = re.sub(rf"(?<!\S){re.escape(recipe)}(?=\s|$)", f"{recipe} {overrides}", command, count=1)
        return command

    # ---- one command

    def run(self, command: str) -> None:
        assignments = re.match(r"((?:[A-Z_]+=\S* )*)", command)[1]
        rest = command[len(assignments) :]
        if command.startswith("export "):
            self.env.update(word.split("=", 1) for word in shlex.split(command)[1:])
        elif "sbatch " in command[: len(assignments) + len("sbatch ")]:
            if self.submit is None:
                self.left.append(command)
                return
            self.submit(self, dict(word.split("=", 1) for word in shlex.split(assignments)), shlex.split(rest)[1:])
        elif is_plain(command) and not re.search(self.way.processes, command):
            self.psn(shlex.split(command)[1:])
        elif self.quick and command.startswith(INLINE):
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
                patch.chdir(self.folder)
                patch.syspath_prepend(self.folder)
                exec(compile(shlex.split(command)[2], self.where, "exec"), {})
        elif machines(command) > 1 and (machine_of(command) == 0 or "--rdzv_backend c10d" in command):
            self.together([with_machine(command, number) for number in range(machines(command))])
        else:
            self.bash(on_cpus(command, self.port))

    def psn(self, words: list[str], wanted: int | None = 0) -> str:
        """`psn` in this process; what it printed."""
        from accelerate.state import AcceleratorState, PartialState

        from psn_train.cli import main

        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        if words[0] in DECODING and "--workers" not in words:
            # processes that decode would import all anew
            words = [*words, "--workers", "0"]
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, checked_in_this_process():
            patch.chdir(self.folder)
            patch.setenv("COLUMNS", "160")
            for key, value in self.way.env.items():
                patch.setenv(key, value)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    status = main(words)
                except SystemExit as end:
                    status = end.code
        said = out.getvalue()
        assert wanted is None or status == wanted, f"{self.where}: psn {shlex.join(words)}: status {status}\n{said}"
        return said

    def bash(self, script: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
        )
        assert done.returncode == 0, f"{self.where}: {script}: status {done.returncode}\n{done.stdout}"

    def together(self, commands: list[str]) -> None:
        """Those of several machines, at the same time."""
        with contextlib.ExitStack() as stack:
            running = []
            for number, command in enumerate(commands):
                log = stack.enter_context((self.folder / f"machine{number}.log").open("w+"))
                running.append(
                    subprocess.Popen(
                        ["bash", "-c", "exec env " + on_cpus(command, self.port)],
                        cwd=self.folder,
                        env={**self.env, "GLOO_SOCKET_IFNAME": "lo"},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
            try:
                status = [process.wait(LONGEST) for process in running]
            finally:
                for process in running:
                    process.kill()
        logs = [(self.folder / f"machine{number}.log").read_text() for number in range(len(commands))]
        assert set(status) == {0}, f"{self.where}: {commands[0]}: {status}\n" + "\n---\n".join(logs)


# ---- launches, on the CPUs of one machine


def machine_of(command: str) -> int | None:
    """The number of the machine on which a launch is given; None where it has none."""
    found = re.search(r"(?:--machine_rank |NODE_RANK=)(\d+)", command)
    return int(found[1]) if found else None


def machines(command: str) -> int:
    found = re.search(r"(?:--num_machines |NNODES=)(\d+)", command)
    return int(found[1]) if found else 2 if "multi_node.yaml" in command else 1


def with_machine(command: str, number: int) -> str:
    return re.sub(r"(--machine_rank |NODE_RANK=)\d+", rf"\g<1>{number}", command)


def on_cpus(command: str, port: str) -> str:
    """A launch as the page has it, with one process a machine, or two on one; addresses and ports of this machine."""
    command = re.sub(r"10\.0\.0\.1\b", "127.0.0.1", command)
    if "accelerate launch" in command:
        processes = machines(command) if machines(command) > 1 else 2
        flags = re.sub(r"--num_processes \d+|--main_process_port \d+", "", command.partition(" -m ")[0])
        flags = flags.replace("accelerate launch", f"accelerate launch --num_processes {processes}")
        flags += f" --main_process_port {port}"
        command = f"{flags} -m {command.partition(' -m ')[2]}"
    elif "torchrun.sh" in command:
        several = machines(command) > 1 or "RDZV_ENDPOINT" in command
        command = f"NPROC_PER_NODE={1 if several else 2} MASTER_PORT={port} {command}"
    return command
