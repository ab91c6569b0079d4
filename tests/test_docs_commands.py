"""Every command of every page of docs/ is run, in the order of its page; see docs_commands.py."""

import contextlib

import pytest
from conftest import ROOT
from docs_commands import LONGEST, Reader, blocks
from docs_ways import QUICK, WAYS
from slurm import slurm, why_not

PAGES = {str(page.relative_to(ROOT / "docs").with_suffix("")): page for page in sorted((ROOT / "docs").rglob("*.md"))}
PAGES["../README"] = ROOT / "README.md"
WITH_COMMANDS = [
    name
    for name, page in PAGES.items()
    if any(block.language == "sh" or block.text.startswith("$ ") for block in blocks(page))
]


@pytest.mark.parametrize("name", [name for name in WITH_COMMANDS if name in QUICK])
def test_commands_of_one_process_run(name, tmp_path):
    """Those that need no launcher and no shell; all of them in test_commands_run."""
    Reader(tmp_path, WAYS[name], quick=True).read(PAGES[name])


@pytest.fixture(scope="module")
def submit(tmp_path_factory):
    """submit(reader, variables, words of sbatch): a job on a Slurm of two nodes without GPUs, until it is over."""
    running = contextlib.ExitStack()

    def run(reader: Reader, variables: dict[str, str], words: list[str]) -> None:
        if not hasattr(run, "cluster"):
            # munge's socket must have a short path
            run.cluster = running.enter_context(slurm(tmp_path_factory.mktemp("s")))
        log = reader.folder / "job.log"
        log.unlink(missing_ok=True)
        env = {**reader.env, "CPU_PROCESSES": "1", **variables}
        # flags stand before the script
        words = ["--gpus-per-node=0", f"--chdir={reader.folder}", *words]
        job = run.cluster.submit(words, env=env, cwd=reader.folder, log=log)
        state = run.cluster.wait(job, LONGEST)
        text = log.read_text() if log.exists() else ""
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), f"{state}{text}{run.cluster.logs()}"

    with running:
        yield run


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_run(name, tmp_path, submit):
    jobs = any("sbatch " in block.text for block in blocks(PAGES[name]) if block.language == "sh")
    # it installs a Slurm where it can
    reason = why_not() if jobs else None
    reader = Reader(tmp_path, WAYS[name], None if reason else submit)
    reader.read(PAGES[name])
    if reader.left:
        pytest.skip(f"all but these ran: {'; '.join(reader.left)}: {reason}")
