"""`psn convert`: ANNs as a start, and everything that it refuses: nothing is written, nothing pickled is run."""

import argparse
import json
import os
import pickle
import re
from functools import partial

import foreign_networks as foreign
import pytest
import timm
import torch
from safetensors.torch import save_file

import psn_train.models  # noqa: F401 (registers the networks)
from psn_train.cli import main
from psn_train.models.weight_files import read_weight_file
from psn_train.publish import convert as convert_module
from psn_train.publish.convert import convert
from psn_train.publish.hub import load_any


@pytest.fixture(scope="module")
def state():
    """A SEW-ResNet-18 of the authors with 8 channels."""
    torch.manual_seed(0)
    return foreign.AuthorsSEWResNet(18, 4, lambda: foreign.FullPSN(4), width=8, num_classes=10).state_dict()


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(content, *words) -> what the command says; it ends with 2 and leaves nothing behind."""

    def run(content, *words, name="x.pth"):
        source = tmp_path / name
        if isinstance(content, bytes):
            source.write_bytes(content)
        elif content is not None:
            torch.save(content, source)
        before = sorted(tmp_path.iterdir())
        assert main(["convert", str(source), str(tmp_path / "out"), *map(str, words)]) == 2
        assert sorted(tmp_path.iterdir()) == before
        error = capsys.readouterr().err
        assert error.startswith("psn: ") and "Traceback" not in error
        return error

    return run


# ---- ANNs


@pytest.mark.parametrize(
    ("ann", "model", "words"),
    [
        ("resnet18", "sew_resnet18_psn", ["--T", "6"]),
        ("resnet34", "sew_resnet34_sliding_psn", ["--k", "3"]),
        ("resnext50_32x4d", "sew_resnext50_32x4d_masked_psn", ["--k", "2"]),
        ("wide_resnet50_2", "sew_wide_resnet50_2_lif", []),
    ],
)
def test_an_ann_is_a_start(ann, model, words, tmp_path, capsys):
    torch.manual_seed(0)
    source = timm.create_model(ann, num_classes=10).state_dict()
    save_file(source, tmp_path / "ann.safetensors")
    assert main(["convert", str(tmp_path / "ann.safetensors"), str(tmp_path / "out"), "--model", model, *words]) == 0
    account = capsys.readouterr().out
    assert "NOT TRAINED YET" in account and f"{len(source)} matched, 0 adapted, 0 left" in account
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    mine = net.state_dict()
    assert (net.num_classes, net.T) == (10, 6 if "--T" in words else 4)
    assert all(torch.equal(mine[name], tensor) for name, tensor in source.items())


def test_names_of_torchvision_and_timm(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    state = models.resnet18().state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda self, progress: state)
    account = convert("torchvision:resnet18", tmp_path / "a", neuron="psn", T=4)
    assert len(account.matched) == 122 and len(account.missing) == 40
    monkeypatch.setattr(convert_module, "read_source", lambda source: state)
    convert("timm:resnet18.a1_in1k", tmp_path / "b", model="sew_resnet18_psn")
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert a["architecture"] == b["architecture"] == "sew_resnet18_psn"
    # timm's own preprocessing of these weights
    theirs = timm.models.get_pretrained_cfg("resnet18.a1_in1k")
    assert b["pretrained_cfg"]["crop_pct"] == theirs.crop_pct and a["pretrained_cfg"]["crop_pct"] == 0.875
    assert b["psn_train"]["converted_from"]["source"] == "timm:resnet18.a1_in1k"
    # neurons start alike each time
    first, second = (timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True) for name in "ab")
    assert torch.equal(first.sn1.weight, second.sn1.weight)
    model, recipe, _ = load_any(tmp_path / "a")
    assert recipe.model.name == "sew_resnet18_psn" and model.T == 4


def test_an_ann_needs_a_model_that_fits(refused):
    ann = timm.create_model("resnet18").state_dict()
    assert "without a tensor of any neuron: an ANN, of which --model sew_resnet18_psn" in refused(ann)
    error = refused(ann, "--model", "sew_resnet34_psn")
    assert "its tensors are those of sew_resnet18, not of sew_resnet34_psn" in error
    assert "to start from an ANN say --model sew_resnet18_psn" in refused(ann, "--neuron", "psn")
    assert "a ResNet of [2, 2, 2, 2] bottleneck blocks" in refused(timm.create_model("resnet26").state_dict())
    error = refused({**ann, "head.weight": torch.zeros(2)}, "--model", "sew_resnet18_psn")
    assert "not in the model: head.weight [2]" in error and "--ignore PATTERN" in error


@pytest.mark.parametrize("classes", [7, 0, 10])
def test_a_classifier_is_dropped_only_where_that_is_asked_for(classes, refused, tmp_path):
    ann = timm.create_model("resnet18", num_classes=10).state_dict()
    words = ["--model", "sew_resnet18_psn", "--arg", f"num_classes={classes}"]
    if classes == 7:
        error = refused(ann, *words)
        assert "fc.weight: got shape [10, 512], wanted [7, 512]" in error and "--ignore PATTERN" in error
    elif classes == 0:
        assert "not in the model: fc.weight [10, 512]" in refused(ann, *words)
    torch.save(ann, tmp_path / "x.pth")
    arguments = {"num_classes": classes}
    account = convert(
        tmp_path / "x.pth", tmp_path / "out", model="sew_resnet18_psn", ignore=["fc.*"], arguments=arguments
    )
    assert account.left == dict.fromkeys(("fc.weight", "fc.bias"), "ignored, as asked") and not account.adapted
    assert len(account.matched) == 120 and ("fc.bias" in account.missing) == (classes > 0)
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    # what is ignored is not used, even where it would fit
    assert net.num_classes == classes and (classes != 10 or not torch.equal(net.fc.weight, ann["fc.weight"]))


# ---- what does not fit


def test_a_tensor_too_many_or_too_few(state, refused, tmp_path):
    more = {**state, "aux.weight": torch.zeros(3), "layer1.0.conv9.weight": torch.zeros(1)}
    error = refused(more)
    assert "no place for aux.weight [3]" in error and "no place for layer1.0.conv9.weight [1]" in error
    assert "Name tensors that are not to be used with --ignore PATTERN" in error
    torch.save(more, tmp_path / "x.pth")
    account = convert(tmp_path / "x.pth", tmp_path / "good", ignore=["aux.*", "layer1.0.conv9.*"])
    assert account.left == dict.fromkeys(("aux.weight", "layer1.0.conv9.weight"), "ignored, as asked")
    fewer = {name: tensor for name, tensor in state.items() if name != "layer3.1.bn2.weight"}
    assert "nothing for layer3.1.bn2.weight [32]" in refused(fewer)
    # what is ignored is missing afterwards, and that is an error, too
    assert "nothing for layer4.0.bn1.bias [64]" in refused(state, "--ignore", "layer4.0.bn1.bias")
    wrong = {**state, "layer4.0.bn1.bias": torch.zeros(63)}
    assert "layer4.0.bn1.bias: got shape [63], wanted [64]" in refused(wrong)


def test_tensors_beside_the_weights(state, refused, tmp_path):
    content = {"model": state, "ema": {"conv1.weight": torch.zeros(1)}, "epoch": 1, "optimizer": [torch.zeros(1)]}
    assert "holds tensors beside its weights that have no place: ema.conv1.weight" in refused(content)
    torch.save(content, tmp_path / "x.pth")
    account = convert(tmp_path / "x.pth", tmp_path / "good", ignore=["ema.*"])
    assert account.left == {
        "epoch": "beside the weights: no tensor",
        "optimizer": "beside the weights: training state, 1 tensors",
        "ema.conv1.weight": "ignored, as asked",
    }


def test_layers_that_disagree(state, refused):
    T6 = {**state, "layer2.0.sn1.fc.weight": torch.zeros(6, 6), "layer2.0.sn1.fc.bias": torch.zeros(6)}
    error = refused(T6)
    assert "its neuron layers disagree: T=4 in sn1, " in error and "; T=6 in layer2.0.sn1; a network has one T" in error
    assert "disagree about the number of time-steps: T=4 by its neurons, T=5 by its pe" in refused(
        {**state, "pe": torch.zeros(5, 1, 1, 1, 1)}
    )
    mixed = {name: tensor for name, tensor in state.items() if not name.startswith("layer4.1.sn2.")}
    mixed |= {"layer4.1.sn2.weight": torch.zeros(2), "layer4.1.sn2.threshold": torch.zeros(())}
    error = refused(mixed)
    assert (
        "not of one kind: sn1 holds fc.weight [T, T], fc.bias [T], but weight [k], threshold [] in layer4.1.sn2"
        in error
    )
    lacks = {name: tensor for name, tensor in state.items() if name != "layer4.1.sn2.fc.bias"}
    assert "neuron layer layer4.1.sn2 holds fc.weight [4, 4]: no known neuron. Known are psn:" in refused(lacks)
    odd = {**state, "sn1.fc.weight": torch.zeros(4, 5)}
    assert "neuron layer sn1 holds fc.weight [4, 5], fc.bias [4]: no known neuron" in refused(odd)


def test_sizes_that_no_network_has(state, refused):
    for name, shape, axes in [
        ("pe", (), "1 or 5"),
        ("pe", (0,), "1 or 5"),
        ("fc.weight", (), "2"),
        ("conv1.weight", (0, 3, 7, 7), "4"),
    ]:
        error = refused({**state, name: torch.zeros(shape)})
        assert f"{name}: found shape {list(shape)}, wanted a tensor of {axes} axes, none of them of size 0" in error
    bottlenecks = timm.create_model("resnet50").state_dict()
    error = refused({**bottlenecks, "layer1.0.conv2.weight": torch.zeros(1, 64, 3, 3)}, "--model", "sew_resnet50_psn")
    assert "layer1.0.conv2.weight: 1 output channels and 64 inputs of each group; wanted a multiple" in error
    no_steps = {
        name: tensor[:0] if tensor.ndim == 1 else tensor[:0, :0] for name, tensor in state.items() if ".fc." in name
    }
    assert "holds fc.weight [0, 0], fc.bias [0]: no known neuron" in refused({**state, **no_steps})
    vgg = foreign.AuthorsVGG(partial(foreign.SlidingPSN, 4)).state_dict()
    flat = foreign.AuthorsCIFARNet(4, partial(foreign.FullPSN, 4), 2).state_dict()
    for net, name in ((vgg, "features.0.fwd.module.0.weight"), (flat, "conv.0.weight")):
        error = refused({**net, name: net[name][:0]})
        assert f"{name}: found shape [0, " in error and "none of them of size 0" in error
    assert "conv.0.weight: found shape [], wanted a tensor of 3 or 4 axes" in refused(
        {**flat, "conv.0.weight": torch.zeros(())}
    )


def test_complex_and_not_finite_numbers(state, refused):
    hole = state["conv1.weight"].double()
    hole[0, 0, 0, :2] = torch.tensor([float("nan"), 1e300])  # finite in float64 and not in the network's float32
    bad = {"bn1.weight": state["bn1.weight"] * 1j, "conv1.weight": hole, "sn1.fc.bias": torch.full((4,), -torch.inf)}
    bad["bn1.num_batches_tracked"] = torch.tensor(0.5)
    error = refused({**state, **bad})
    assert "nothing was loaded" in error
    assert "bn1.weight: its numbers are complex (torch.complex64), wanted real ones" in error
    assert "conv1.weight: 2 of its 1176 numbers are infinite or no numbers (torch.float32)" in error
    assert "sn1.fc.bias: 4 of its 4 numbers" in error
    assert "bn1.num_batches_tracked: its numbers are none of torch.int64" in error
    net = foreign.AuthorsSEWResNet(18, 4, partial(foreign.MaskedPSN, 4, 2), pe=False, width=8).state_dict()
    for value in (1j, torch.nan):
        error = refused({**net, "sn1.fc.mask1": net["sn1.fc.mask1"] * value})
        assert "sn1.fc.mask1: some of its numbers are complex or not finite" in error


def test_masks_that_disagree_or_are_none(refused):
    net = foreign.AuthorsSEWResNet(18, 4, partial(foreign.MaskedPSN, 4, 2), pe=False, width=8)
    state = net.state_dict()
    k3 = foreign.MaskedPSN(4, 3).fc.mask1
    error = refused({**state, "layer1.0.sn2.fc.mask1": k3})
    assert "disagree: k=2 in sn1, " in error and "k=3 in layer1.0.sn2; a network has one k" in error
    hole = k3.clone()
    hole[2, 1] = 0
    assert "sn1.mask0, sn1.mask1: wanted a band of k diagonals" in refused({**state, "sn1.fc.mask1": hole})
    assert "its masks are of order k=2, not 3; drop --k" in refused(state, "--k", 3)
    assert "--lambda 1.5: wanted a number from 0 to 1" in refused(state, "--lambda", 1.5)
    assert "its neurons are masked_psn" in refused(state, "--neuron", "psn")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--T", "6"], "its tensors are of T=4, not 6; drop --T"),
        (["--k", "2"], "--k is for masked and sliding PSN; its neurons are psn"),
        (["--lambda", "1"], "--lambda is for masked_psn; its neurons are psn"),
        (["--neuron", "lif"], r"its neurons are psn (fc.weight [4, 4], fc.bias [4]), not lif; drop --neuron"),
        (["--neuron", "lyf"], "--neuron lyf: wanted one of psn, masked_psn"),
        (["--neuron", "masked_psn"], "it holds no masks, so the order of its masked PSN is not known; give --k K"),
        (["--neuron", "masked_psn", "--k", "9"], "got k=9 and T=4, wanted k <= T"),
        (["--model", "sew_resnet18_lif", "--neuron", "psn"], "contradict each other; drop one"),
        (["--model", "sew_resnet18_lyf"], "wanted --model sew_resnet18_NEURON"),
        (["--arg", "T=4"], "--arg T: it has an option of its own, --T"),
        (["--arg", "stem"], "--arg stem: wanted KEY=VALUE"),
        (["--arg", "colour=red"], "unexpected keyword argument 'colour'"),
        (["--to", "spikingjelly"], "wanted a file to write, .safetensors or .pth"),
    ],
)
def test_words_against_the_tensors(state, refused, words, says):
    assert says in refused(state, *words)


def test_unknown_layouts(refused, tmp_path):
    assert "no known layout: 2 tensors, a.weight, b.weight" in refused(
        {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}
    )
    own = timm.create_model("sequential_net_psn", T=8, img_size=8, width=2, hidden=2).state_dict()
    assert "psn_train's own plain networks" in refused(own)
    vgg = foreign.AuthorsVGG(partial(foreign.SlidingPSN, 4)).state_dict()
    vgg["classifier.0.module.1.weight"] = torch.zeros(10, 290)
    assert "its first linear layer takes 290 inputs" in refused(vgg)
    assert "no such file" in refused(None, name="nowhere.pth")
    (tmp_path / "folder").mkdir()
    assert "is a folder; wanted a file of weights" in refused(None, name="folder")


# ---- files


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_not_run_and_is_named(state, refused, tmp_path, zipped):
    trap = tmp_path.parent / f"{tmp_path.name}-trap"
    # beside the weights, inside the options that may be read, and in the place of the weights
    for content in ({"model": state, "x": Bomb(trap)}, {"model": state, "args": argparse.Namespace(x=Bomb(trap))}):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        error = refused(None)
        assert "open" in error and "code in it is not executed" in error and "weights_only=False" in error
    error = refused(pickle.dumps(Bomb(trap)))
    assert not trap.exists()
    # the trap is a trap
    pickle.loads(pickle.dumps(Bomb(trap))).close()
    assert trap.exists()


def test_the_namespace_is_the_one_class_that_is_read(state, refused, tmp_path):
    from pathlib import PurePosixPath

    torch.save({"net": state, "args": argparse.Namespace(T=4, lr=0.1)}, tmp_path / "good.pth")
    assert read_weight_file(tmp_path / "good.pth").args == {"T": 4, "lr": 0.1}
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    error = refused({"net": state, "args": argparse.Namespace(data=PurePosixPath("x"))})
    assert re.search(r"holds pathlib\.\S*PurePosixPath, and code in it is not executed", error)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_broken_files(refused, state, tmp_path, name):
    torch.save(state, tmp_path / "whole.pth")
    save_file(state, tmp_path / "whole.safetensors")
    whole = (tmp_path / f"whole.{name[2:]}").read_bytes()
    for content in (b"", b"no weights at all", whole[: len(whole) // 2]):
        assert re.search("no (file that torch.save wrote whole|whole safetensors file)", refused(content, name=name))


# ---- what is there already


def test_only_an_earlier_conversion_is_replaced(state, tmp_path, capsys, monkeypatch):
    torch.save(state, tmp_path / "x.pth")
    out = tmp_path / "out"
    out.mkdir()
    convert(tmp_path / "x.pth", out)
    first = (out / "config.json").read_text()
    (out / "left-over").write_text("")
    convert(tmp_path / "x.pth", out)
    assert (out / "config.json").read_text() == first and not (out / "left-over").exists()
    # a failure in the middle of writing leaves what was there
    import timm.models

    def fail(model, where, **kwargs):
        (tmp_path / where).mkdir()
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(timm.models, "save_for_hf", fail)
        assert main(["convert", str(tmp_path / "x.pth"), str(out)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.pth"]
    assert (out / "config.json").read_text() == first
    for name in ("config.json", "notes.txt"):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("{}")
        with pytest.raises(ValueError, match="is not empty and holds no earlier conversion"):
            convert(tmp_path / "x.pth", other)
        assert [path.name for path in other.iterdir()] == [name]
    with pytest.raises(ValueError, match="is a file; wanted a folder"):
        convert(tmp_path / "x.pth", tmp_path / "x.pth")
    (tmp_path / "sj.pth").write_text("")
    with pytest.raises(ValueError, match="exists; delete it"):
        convert(out, tmp_path / "sj.pth", to="spikingjelly")
    with pytest.raises(ValueError, match="--T, --ignore: a folder of psn_train says all that itself"):
        convert(out, tmp_path / "new.pth", to="spikingjelly", T=4, ignore=["x"])


def test_a_failed_or_cut_off_rename_loses_nothing(state, tmp_path, monkeypatch, capsys):
    torch.save(state, tmp_path / "x.pth")
    out, old = tmp_path / "out", tmp_path / ".out.old"
    convert(tmp_path / "x.pth", out)
    (out / "mark").write_text("the first")
    rename = os.replace

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("device is busy")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert main(["convert", str(tmp_path / "x.pth"), str(out)]) == 2
    assert "device is busy" in capsys.readouterr().err
    assert (out / "mark").read_text() == "the first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.pth"]
    # the process died between the renames: what was there comes back, even if the next conversion is refused
    rename(out, old)
    assert main(["convert", str(tmp_path / "x.pth"), str(out), "--T", "9"]) == 2
    assert (out / "mark").read_text() == "the first" and not old.exists()
    # it died after them: the left-over goes
    convert(tmp_path / "x.pth", old)
    convert(tmp_path / "x.pth", out)
    assert not old.exists() and not (out / "mark").exists() and (out / "config.json").exists()
