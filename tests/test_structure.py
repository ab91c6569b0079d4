"""The shape of the project: which way imports go, how long files are, and that the documents tell the truth."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import psn_train
from psn_train.cli import _parser

ROOT = Path(__file__).parents[1]
PACKAGE = "psn_train"
LONGEST = 400

# a room -> the rooms that it may import from, beside itself
ROOMS = {
    "recipe": set(),
    "neurons": set(),
    "models": {"neurons"},
    "data": {"recipe"},
    "training": {"recipe", "neurons", "models", "data"},
    "plan": {"recipe", "neurons", "models", "data", "training"},
    "energy": {"recipe", "neurons", "models", "data", "training"},
    "publish": {"recipe", "neurons", "models", "data", "training", "energy"},
    "bench": {"recipe", "neurons", "models", "data", "training"},
    "average": {"recipe", "neurons", "models", "data", "training", "energy", "publish"},
    "compare": {"recipe", "neurons", "models", "data", "training", "energy", "publish", "bench"},
}
# what sees everything -> who may import it
FRONT = {
    "cli": {"train", "doctor"},
    "train": set(),
    "demo": {"cli"},
    "view": {"cli", "demo", "predict", "report"},
    "predict": {"cli"},
    "export": {"cli"},
    "report": {"cli"},
    "doctor": {"cli"},
    "recipe.show": {"cli"},
    "training.loop": {"cli"},
}
# the package's __init__ registers the networks
ROOT_IMPORTS = {"models"}
# a recipe's mistakes are reported, and shards written, without torch; these decode into tensors
WITH_TORCH = {
    *("data.images", "data.turbo", "data.stream", "data.handover", "data.batched_augment", "data.resident"),
    *("data.frames.batched", "data.frames.augment", "data.event_stream"),
}


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    """psn_train/data/index.py -> data.index; psn_train/data/__init__.py -> data; psn_train/__init__.py -> ""."""
    parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(PACKAGE)}


def imported(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, full dotted name) of all that is imported, inside functions too; relative names are resolved."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *filter(None, module.split("."))]
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, *filter(None, [base])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def own_modules(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, module of this package), the root as ""; names of functions and classes are cut off."""
    found = []
    for line, name in imported(source, module, is_package):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        inner = parts[1:]
        while inner and ".".join(inner) not in MODULES:
            inner = inner[:-1]
        found.append((line, ".".join(inner)))
    return found


def front(module: str) -> str:
    """The name under which a module stands in FRONT: all files of a folder that stands there are one."""
    room = module.split(".")[0]
    return room if room in FRONT else module


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Every import of `module` that goes against the flow."""
    room = module.split(".")[0]
    wrong = []
    for line, target in own_modules(source, module, is_package):
        target_room = target.split(".")[0]
        if front(target) in FRONT:
            allowed = front(module) in (front(target), *FRONT[front(target)])
        elif target == "" or front(module) in FRONT:
            # `import psn_train` is for the version
            allowed = True
        elif module == "":
            allowed = target_room in ROOT_IMPORTS
        else:
            allowed = target_room == room or target_room in ROOMS[room]
        if not allowed:
            wrong.append(f"{module or PACKAGE}, line {line}: imports {target}")
    return wrong


def violations_of_file(module: str) -> list[str]:
    path = MODULES[module]
    return violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def test_every_file_stands_in_a_room():
    assert [m for m in MODULES if m and front(m) not in FRONT and m.split(".")[0] not in ROOMS] == []
    assert set(FRONT) <= set(MODULES)


def test_imports_go_one_way():
    assert [wrong for module in MODULES for wrong in violations_of_file(module)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("neurons.psn", "from psn_train.models import SEWResNet"),
        ("models.blocks", "import psn_train.data.index"),
        ("data.stream", "def f():\n    from psn_train.training.step import Updater"),
        ("data.stream", "from ..training import step"),
        ("recipe.rules", "from psn_train.data.index import load_index"),
        ("recipe.file", "from .show import show_recipe"),
        ("training.run", "from psn_train.training.loop import train"),
        ("training.run", "from psn_train.training import loop"),
        ("training.run", "from psn_train.publish import hub"),
        ("publish.hub", "from psn_train import cli"),
        ("publish.hub", "from psn_train.cli.arguments import count"),
        ("publish.hub", "from psn_train.bench.timing import free_memory"),
        ("bench.neurons", "from psn_train.publish.hub import evaluate_folder"),
        ("bench.picture", "from psn_train.view.colours import paint"),
        ("training.run", "from psn_train.demo.steps import train"),
        ("view.figure", "from psn_train.demo.pictures import draw_events"),
        ("publish.hub", "from psn_train.report.record import open_run"),
        ("", "from psn_train import training"),
    ],
)
def test_a_reversed_arrow_is_seen(module, source):
    assert len(violations(source, module)) == 1


def test_allowed_arrows_pass():
    assert violations("import psn_train\nfrom psn_train.recipe import Recipe\nimport torch", "training.run") == []
    assert violations("from .index import load_index\nfrom . import tar", "data.shards") == []
    assert violations("from .schema import Recipe", "recipe", is_package=True) == []
    assert violations("from psn_train.training.loop import train", "cli") == []


def test_recipes_and_shards_are_read_and_written_without_torch():
    wrong = []
    for module in MODULES:
        if module.split(".")[0] not in ("recipe", "data") or module in WITH_TORCH:
            continue
        path = MODULES[module]
        source = path.read_text(encoding="utf-8")
        named = {name.split(".")[0] for _, name in imported(source, module, path.name == "__init__.py")}
        named |= {target for _, target in own_modules(source, module, path.name == "__init__.py")} & WITH_TORCH
        wrong += [f"{module} imports {name}" for name in sorted(named & {"torch", "torchvision", "timm", *WITH_TORCH})]
    assert wrong == []


def test_no_file_is_longer_than_a_reader_likes():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in (PACKAGE, "tests")
        for path in python_files(folder)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_drawers_for_odds_and_ends():
    assert [m for m in MODULES if m.split(".")[-1] in ("utils", "common", "base", "helpers", "misc")] == []


# ---- the documents

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "recipes/README.md",
    "recipes/sequential_cifar100/order_ablation.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]
_TRAINS = ("-m psn_train.train ", "launch/torchrun.sh ", "launch/slurm/train.sbatch ")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [text for found, text in _BLOCK.findall(read(name)) if found == language]


def inline_code(name: str) -> list[str]:
    text = _BLOCK.sub("", read(name))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def command_lines(name: str) -> list[str]:
    """The lines of a document's shell blocks, continued lines joined, without a leading prompt."""
    text = "\n".join(blocks(name, "sh") + blocks(name, ""))
    return [line.removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]


def psn_arguments(name: str) -> list[list[str]]:
    """What follows `psn`, or as `train ...` what follows a launcher, in every command that a document shows."""
    found = []
    for words in shell_words(name):
        if words[:1] == ["psn"]:
            found.append(words[1:])
        else:
            recipe = [i for i, word in enumerate(words, 1) if f"-m {word} " in _TRAINS or f"{word} " in _TRAINS]
            found += [["train", *words[i:]] for i in recipe[:1]]
    return found


def shell_words(name: str) -> list[list[str]]:
    """The words of a document's commands that train or call `psn`, without variables that are set before them."""
    found = []
    for line in command_lines(name):
        if re.match(r"psn: ", line) or not (re.search(r"(^| )psn ", line) or any(way in line for way in _TRAINS)):
            continue
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        found.append(words)
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/many_machines.md"])
def test_launches_in_documents_parse(document):
    """By accelerate's own parser, and with variables that the scripts know."""
    from accelerate.commands.launch import launch_command_parser

    launches = [words[2:] for words in shell_words(document) if words[:2] == ["accelerate", "launch"]]
    for words in launches:
        options = launch_command_parser().parse_args(words)
        assert options.module and options.training_script == "psn_train.train"
        assert options.config_file is None or (ROOT / options.config_file).exists()
    assert len(launches) >= 4
    for line in command_lines(document):
        for script in ("launch/torchrun.sh", "launch/slurm/train.sbatch"):
            if script in line:
                for variable in re.findall(r"(?:^| )([A-Z_]+)=", line.split(script)[0]):
                    assert f"${{{variable}:-" in read(script) or variable.endswith("_SOCKET_IFNAME"), line


def test_set_up_is_two_commands():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    made = [block.strip() for block in blocks("README.md", "sh") if block.startswith("make ")]
    assert made == ["make demo", "make test"]
    assert {"demo", "test"} <= targets
    assert re.search(r"^make test$", read(".ci/run"), re.MULTILINE)
    for document in DOCUMENTS:
        for code in inline_code(document):
            if match := re.fullmatch(r"make ([a-z-]+)", code):
                assert match[1] in targets, f"{document}: {code}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_parse(document, capsys):
    commands = psn_arguments(document)
    for words in commands:
        try:
            _parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{document}: psn {shlex.join(words)}\n{capsys.readouterr().err}")
    assert len(commands) >= {"README.md": 15, "recipes/README.md": 3}.get(document, 0)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_in_documents_exist(document, capsys):
    """In running text a command may be named without its arguments."""
    for code in inline_code(document):
        words = code.split()
        if words[0] != "psn" or len(words) == 1:
            continue
        verb = [word for word in words[1:3] if re.fullmatch("[a-z]+", word)]
        verb = verb if verb[:1] in (["shards"], ["bench"]) else verb[:1]
        with pytest.raises(SystemExit) as end:
            _parser().parse_args([*verb, "--help"])
        usage = capsys.readouterr().out
        assert end.value.code == 0, f"{document}: {code}"
        for option in (word for word in words if word.startswith("--")):
            assert option in usage, f"{document}: {code}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)]+)\)", read(document)):
        if not re.match(r"https?://|#", target):
            assert (folder / target.split("#")[0]).exists(), f"{document}: {target}"
    text = _BLOCK.sub("", read(document)) + "\n".join(command_lines(document))
    for path in re.findall(r"(?<![\w/.-])(?:psn_train|recipes|launch|tests)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), f"{document}: {path}"


def test_launch_configurations_name_their_own_command():
    for path in sorted((ROOT / "launch" / "accelerate").glob("*.yaml")):
        header = path.read_text(encoding="utf-8")
        assert f"accelerate launch --config_file {path.relative_to(ROOT)} " in header
        assert "-m psn_train.train RECIPE key=value" in header


def listed_files(tree: str) -> list[str]:
    """Paths in a tree that is drawn by indentation of two spaces, what is said of them left out."""
    files, folders = [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.append("".join(folders) + name)
    return files


def test_the_tree_is_the_tree():
    (tree,) = [block for block in blocks("CONTRIBUTING.md", "") if block.startswith(f"{PACKAGE}/")]
    listed = listed_files(tree)
    assert sorted(listed) == [str(path.relative_to(ROOT)) for path in python_files(PACKAGE)]
    assert len(set(listed)) == len(listed)


def test_versions_agree():
    newest = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest[1] == psn_train.__version__


def test_recipes_in_the_table_are_those_that_come_with_the_package():
    from psn_train.recipe import packaged_recipes

    rows = re.findall(r"^\| `([^`]+)` \|", read("recipes/README.md"), re.MULTILINE)
    assert sorted(rows) == packaged_recipes()


def test_recipes_in_the_readme_are_such(tmp_path):
    from psn_train.recipe import load_recipe

    recipes = []
    for text in blocks("README.md", "yaml"):
        # the first line names the file
        path = tmp_path / re.match(r"# (\S+)", text)[1]
        path.write_text(text)
        recipes.append(load_recipe(path))
    recipe, recordings = recipes
    assert recordings.events is not None
    # the commands beside it speak of its run
    assert recipe.name == "photos"
    assert f"psn eval {recipe.run_path} --shards {recipe.data.val}" in read("README.md")


def test_parameter_counts_in_the_readme():
    import timm
    import torch

    from psn_train.models import NETWORKS

    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) \|", read("README.md"), re.MULTILINE)
    assert {name.removesuffix("_psn") for name, _, _ in rows} == {
        name.removesuffix("_lif") for name in NETWORKS if name.endswith("_lif")
    }
    for name, count, steps in rows:
        with torch.device("meta"):
            model = timm.create_model(name)
        assert int(steps) == model.T
        assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" == count


@pytest.mark.parametrize("snippet", blocks("README.md", "python"), ids=lambda text: f"{len(text)} characters")
def test_python_in_the_readme_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
