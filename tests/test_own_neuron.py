"""Neurons of one's own: registered from outside, trained, evaluated, published; and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, merged, small_document
from registries import kept_registries
from torch import nn

from psn_train.cli import main
from psn_train.models import NETWORKS, import_module, register_neuron
from psn_train.neurons import LIF, NEURONS, Neuron, functional, set_step_mode
from psn_train.recipe import check_recipe, recipe_hash
from psn_train.recipe.schema import decisive

MODULE = """
import torch
from torch import nn
from psn_train.models import register_neuron
from psn_train.neurons import Neuron, functional

class Scaled(Neuron):
    def __init__(self, gain=1.0, surrogate="atan", alpha=2.0):
        super().__init__(surrogate, alpha)
        self.gain = nn.Parameter(torch.tensor(gain))

    def parallel(self, x_seq):
        h = x_seq.cumsum(0, dtype=functional.compute_dtype(x_seq)) * self.gain - 1.0
        return functional.fire(h, self.surrogate, self.alpha).to(x_seq.dtype)

register_neuron("scaled", Scaled, takes=["gain"])
"""


@pytest.fixture
def registered():
    """register_neuron, undone when the test ends."""
    with kept_registries():
        yield register_neuron


class Sum(Neuron):
    """Fires where the sum of its inputs so far reaches 1."""

    def __init__(self, T: int, extra: float = 0.0, surrogate: str = "atan", alpha: float = 2.0):
        super().__init__(surrogate, alpha)
        self.T, self.extra = T, extra

    def parallel(self, x_seq):
        return functional.fire(x_seq.cumsum(0) - 1.0 + self.extra, self.surrogate, self.alpha)


@pytest.mark.parametrize("architecture", ["sew_resnet10", "cifar_net", "sequential_net", "vgg_snn"])
def test_every_architecture_gets_it(registered, architecture):
    registered("sum", Sum, takes=["T", "extra"])
    channels, side = (2, 48) if architecture == "vgg_snn" else (3, 32)
    T = 32 if architecture == "sequential_net" else 3
    model = timm.create_model(f"{architecture}_sum", T=T, extra=0.25, num_classes=5, width=4)
    kinds = [module for module in model.modules() if isinstance(module, Neuron)]
    assert kinds and all(type(module) is Sum and (module.T, module.extra) == (T, 0.25) for module in kinds)
    images = torch.rand(2, channels, side, side)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # the same image at each step is what T frames of it are
    if architecture != "sequential_net":
        frames = images.unsqueeze(0).repeat(T, 1, 1, 1, 1)
        torch.testing.assert_close(model.eval()(images), model(frames))
    with pytest.raises(TypeError, match="unexpected keyword argument 'gain'"):
        timm.create_model(f"{architecture}_sum", gain=1.0)


def test_without_step_it_takes_whole_sequences_alone(registered):
    with pytest.raises(ValueError, match=r"Sum\(.*whole sequences alone; frame by frame needs a method step"):
        set_step_mode(nn.Sequential(Sum(3)), "s")
    registered("sum", Sum, takes=["T"])
    with pytest.raises(ValueError, match="whole sequences alone"):
        timm.create_model("sew_resnet10_sum", T=3, width=4).eval().step(torch.rand(1, 3, 32, 32))


def test_a_cell_that_is_run_again_replaces_it(registered):
    registered("sum", Sum, takes=["T"])
    again = type("Sum", (Sum,), {"__qualname__": "Sum"})
    count = len(NETWORKS)
    registered("sum", again, takes=["T"])
    assert len(NETWORKS) == count == len(set(NETWORKS))
    assert type(timm.create_model("sew_resnet10_sum", width=4).sn1) is again


@pytest.mark.parametrize(
    ("name", "cls", "takes", "says"),
    [
        ("my_psn", Sum, ["T"], "without psn"),
        ("my_glif", Sum, ["T"], "not ending in glif"),
        ("My", Sum, ["T"], "wanted a-z"),
        ("lif", Sum, ["T"], "the name is taken by psn_train.neurons.serial.LIF"),
        ("lif", LIF, [], "the name is taken by a neuron of psn_train"),
        ("sum", nn.ReLU, [], "wanted a subclass of psn_train.neurons.Neuron with a method parallel"),
        ("sum", Neuron, [], "with a method parallel"),
        ("sum", Sum, ["T", "gain"], r"Sum\(\) has no argument gain"),
        (
            "sum",
            type("Sum", (Sum,), {"__init__": lambda self, T, width, surrogate, alpha: None}),
            ["width"],
            "width: an",
        ),
    ],
)
def test_refusals(registered, name, cls, takes, says):
    known, networks = dict(NEURONS), list(NETWORKS)
    with pytest.raises(ValueError, match=says):
        registered(name, cls, takes)
    assert known == NEURONS and networks == NETWORKS


def test_modules_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_neuron.py").write_text("import psn_train\n1 / 0\n")
    (tmp_path / "needing_neuron.py").write_text("import no_such_package.inner\n")
    with pytest.raises(ValueError, match=r"there is no Python module 'no_such.neuron'.*put no_such/neuron.py there"):
        import_module("no_such.neuron")
    with pytest.raises(ValueError, match="broken_neuron cannot be imported: ZeroDivisionError"):
        import_module("broken_neuron")
    with pytest.raises(ValueError, match=r"needing_neuron imports no_such_package(\.inner)?, which is not installed"):
        import_module("needing_neuron")
    import_module(None)


def test_the_recipe_key(small):
    plain = check_recipe(small())
    assert "model.module" not in decisive(plain.resolved())
    own = check_recipe(small(model={"module": "my_neuron", "name": "sew_resnet10_scaled", "k": 2}))
    assert decisive(own.resolved())["model.module"] == "my_neuron"
    # its hash is that of before there was such a key
    document = plain.resolved()
    del document["model"]["module"]
    assert decisive(document) == decisive(plain.resolved())
    assert recipe_hash(own) != recipe_hash(plain)
    with pytest.raises(ValueError, match=r"model\.module"):
        check_recipe(small(model={"module": "../my_neuron.py"}))


@pytest.mark.long
def test_from_a_recipe_to_a_published_folder(digit_shards, tmp_path, capsys):
    """By programs that start in the folder of the module, and know nothing else of it."""
    (tmp_path / "scaled_neuron.py").write_text(MODULE)
    own = {"name": "sew_resnet10_scaled", "module": "scaled_neuron", "args": {"gain": 0.75}}
    document = merged(small_document(digit_shards, tmp_path / "run"), {"model": own, "schedule": {"epochs": 1}})
    (tmp_path / "scaled.yaml").write_text(json.dumps(document))

    def psn(*words: str, folder=tmp_path) -> tuple[int, str]:
        # as the installed program: its own folder is in the place of the current one on Python's path
        program = "import sys; sys.path.pop(0); from psn_train.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    status, output = psn("train", "scaled.yaml")
    assert status == 0, output
    shards = ["--shards", str(digit_shards / "val"), "--workers", "0"]
    status, output = psn("publish", "run", "--to-folder", "out", "--license", "mit", "--workers", "0")
    assert status == 0, output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import scaled_neuron  # the network's neuron: not part of psn_train" in card
    assert "of the module `scaled_neuron`, which is not part of psn_train and has to be there" in card
    assert not list((tmp_path / "out").glob("*.py"))
    status, output = psn("eval", "out", *shards, "--json")
    assert status == 0 and json.loads(output)["count"] == 50
    # where the module is not, nothing is loaded
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for what in ("out", "run"):
        status, output = psn("eval", str(tmp_path / what), *shards, folder=elsewhere)
        assert status == 2 and "there is no Python module 'scaled_neuron'" in output and "Traceback" not in output
    shutil.copy(tmp_path / "scaled.yaml", elsewhere)
    status, output = psn("train", "scaled.yaml", "run_dir=other", folder=elsewhere)
    assert status == 2 and "neither in the folder" in output and not (elsewhere / "other").exists()
    assert main(["recipe", str(tmp_path / "scaled.yaml")]) == 0
    assert "scaled_neuron" in capsys.readouterr().out
