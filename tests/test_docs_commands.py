"""Every command of every page of docs/ is run, in the order of its page; see docs_commands.py."""

import contextlib

import pytest
from conftest import ROOT
from docs_commands import LONGEST, Reader, Way, blocks, is_plain, machine_of, machines, on_cpus, split, with_machine
from docs_ways import QUICK, WAYS
from slurm import slurm, why_not

PAGES = {str(page.relative_to(ROOT / "docs").with_suffix("")): page for page in sorted((ROOT / "docs").rglob("*.md"))}
PAGES["../README"] = ROOT / "README.md"
# shown by results.md
PAGES["../recipes/README"] = ROOT / "recipes" / "README.md"
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


# ---- the harness itself


def test_what_is_run_elsewhere_is():
    for name, way in WAYS.items():
        assert name in WITH_COMMANDS, name
        for reason in way.elsewhere.values():
            assert (ROOT / reason.partition(":")[0]).is_file(), reason


PAGE = """
```yaml
# a.yaml
{"optim": {"lr": 1.0}}
```

```sh
psn recipe mnist/sew_resnet10_psn.demo \\
  --devices 2    # of two
```

```
$ psn recipe a.yaml
psn: 3 problems
...
```
"""


def read(tmp_path, text: str, **way) -> Reader:
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "folder").mkdir()
    reader = Reader(tmp_path / "folder", Way(**way))
    reader.read(tmp_path / "page.md")
    return reader


def test_a_page_is_read(tmp_path):
    reader = read(tmp_path, PAGE.replace("3 problems", "4 problems"), adds={"mnist/sew_resnet10_psn.demo": "seed=7"})
    assert (reader.folder / "a.yaml").read_text().startswith("# a.yaml")


@pytest.mark.parametrize(
    ("text", "way", "says"),
    [
        (PAGE, {}, "no 'psn: 3 problems' in"),
        (PAGE.replace("--devices 2", "--devices 0"), {}, r"page.md, line 8: psn recipe \S+ --devices 0: status 2"),
        ("```sh\ntrue\nfalse\n```\n", {}, "false: status 1"),
        ("```sh\nsleep 0 &\nfalse\n```\n", {}, "status 1"),
        ("```sh\ntrue\n```\n", {"changes": [("absent", "x")]}, r"nothing on the page needs \['absent'\]"),
        ("```sh\ntrue\n```\n", {"elsewhere": {"kubectl": "x"}}, r"nothing on the page needs \['kubectl'\]"),
        ("```sh\nno-such-program\n```\n", {}, "status 127"),
    ],
)
def test_what_fails_is_told_with_its_line(tmp_path, text, way, says):
    with pytest.raises(AssertionError, match=says):
        read(tmp_path, text, **way)


def test_launches_become_those_of_one_machine():
    four = "accelerate launch --config_file x/multi_node.yaml --num_machines 4 --num_processes 32 --machine_rank 0"
    four += " --main_process_ip 10.0.0.1 -m psn_train.train a"
    assert machines(four) == 4 and machine_of(with_machine(four, 3)) == 3
    words = on_cpus(four, "77").split()
    assert words[words.index("--num_processes") + 1] == "4" and words.count("--num_processes") == 1
    assert (
        "127.0.0.1" in words
        and words[words.index("--main_process_port") + 1] == "77"
        and words[-2:]
        == [
            "psn_train.train",
            "a",
        ]
    )
    assert "NPROC_PER_NODE=2" in on_cpus("launch/torchrun.sh a", "77")
    assert is_plain("psn eval a --shards b") and not is_plain("psn eval a > b") and not is_plain("psn eval *.jpg")
    assert split("a \\\n  b   # c\n# d\ne") == ["a b", "e"]
