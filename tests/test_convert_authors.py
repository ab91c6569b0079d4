"""`psn convert` on files in the authors' layouts: the converted networks give the same logits on real images.

Logits are compared in float64. A spike is 0 or 1, so where a potential lies within rounding of the threshold, another
order of summation in float32 would flip it and the logits would differ by a whole spike's weight; in float64 none lies
so close. The weights themselves are float32, as in the files.
"""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import foreign_networks as foreign
import pytest
import timm
import torch
from torch import nn

import psn_train.models  # noqa: F401 (registers the networks)
from psn_train.cli import main
from psn_train.models import load_ann
from psn_train.publish import convert as convert_module
from psn_train.publish.hub import load_any

AUTHORS_NEURONS = (foreign.FullPSN, foreign.MaskedPSN, foreign.SlidingPSN)


def make_sew(x, depth=18, T=4, neuron=foreign.FullPSN, pe=True, **sizes):
    torch.manual_seed(depth + T)
    net = foreign.AuthorsSEWResNet(depth, T, partial(neuron, T), pe=pe, **sizes)
    foreign.wake(net, x, AUTHORS_NEURONS)
    return net


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(file, ...) -> (the model that timm loads, config.json, the account as printed)."""

    def run(file, *words):
        out = tmp_path / "out"
        assert main(["convert", str(file), str(out), *map(str, words)]) == 0, capsys.readouterr().err
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        return model, json.loads((out / "config.json").read_text()), capsys.readouterr().out

    return run


def assert_same_logits(model, net, x):
    model, net, x = model.double().eval(), net.double().eval(), x.double()
    with torch.no_grad():
        ours, theirs = model(x, per_step=True), net(x)
    assert theirs.std() > 0.01, "the logits tell nothing apart"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), theirs.mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("depth", "T", "pe", "sizes"),
    [(18, 4, True, {}), (18, 6, False, {"width": 16}), (34, 4, True, {"width": 8}), (50, 4, False, {"width": 16})],
)
def test_sew_resnet_of_the_authors(convert, tmp_path, depth, T, pe, sizes):
    x = foreign.photographs(3, 64)
    net = make_sew(x, depth, T, pe=pe, **sizes)
    file = foreign.save_as_authors(net, tmp_path / "checkpoint_max_test_acc1.pth", T=T, model=f"sew_resnet{depth}")
    model, config, account = convert(file)
    assert config["architecture"] == f"sew_resnet{depth}_psn" and model.T == T
    assert (model.pe is not None) == pe and isinstance(model.stem_pool, nn.AvgPool2d)
    assert ("so the stem runs at every step" in account) == pe
    assert "sn1.fc.{weight,bias} -> sn1 layer1.0.sn1.fc.{weight,bias} -> layer1.0.sn1\n" in account
    assert "training state" in account and "optimizer" in account and "args" in account
    assert_same_logits(model, net, x)
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ([3, 224, 224], 0.875, "bilinear")
    assert cfg["mean"] == [0.485, 0.456, 0.406] and cfg["std"] == [0.229, 0.224, 0.225]


def test_the_folder_says_where_it_comes_from(convert, tmp_path):
    import hashlib

    x = foreign.photographs(2, 32)
    net = make_sew(x, width=8)
    file = foreign.save_as_authors(net, tmp_path / "max.pth", T=4)
    _, config, account = convert(file)
    note = config["psn_train"]["converted_from"]
    assert note["source"] == "max.pth" and note["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert note["layout"] == "the authors' SEW-ResNet"
    # 163 tensors: 40 of neurons by another name, pe of another shape, the rest as it is
    assert note["account"] == {"matched": 122, "renamed": 40, "adapted": 1, "left": 6, "missing": 0}
    assert "weights from max.pth: 122 matched, 40 renamed, 1 adapted, 6 left, 0 missing" in account
    model, recipe, _ = load_any(tmp_path / "out")
    assert recipe.data.image_size == 224 and model.T == 4


def test_every_way_of_wrapping(convert, tmp_path):
    x = foreign.photographs(2, 32)
    net = make_sew(x, width=8, pe=False)
    state = net.state_dict()
    for number, content in enumerate((state, {"net": {f"module.{name}": t for name, t in state.items()}})):
        torch.save(content, tmp_path / f"{number}.pth")
        model, _, _ = convert(tmp_path / f"{number}.pth")
        assert_same_logits(model.float(), net.float(), x)


@pytest.mark.filterwarnings("ignore:.*lambda < 1")
@pytest.mark.parametrize(("T", "blend"), [(4, 1.0), (6, 0.25), (4, 0.0)])
def test_masked_psn_takes_its_order_from_the_mask_and_lambda_from_the_user(convert, tmp_path, T, blend):
    x = foreign.photographs(3, 32)
    net = make_sew(x, T=T, neuron=partial(foreign.MaskedPSN, k=3, blend=blend), pe=False, width=8)
    file = foreign.save_as_authors(net, tmp_path / "masked.pth", neu="if5pmd8")
    model, config, account = convert(file, *(() if blend == 1.0 else ("--lambda", blend)))
    assert config["architecture"] == "sew_resnet18_masked_psn" and model.k == 3
    assert "THE FILE DOES NOT HOLD LAMBDA" in account and ("THE MASK IS NOT CLOSED" in account) == (blend < 1)
    assert ("taken because nobody said" in account) == (blend == 1.0)
    assert_same_logits(model, net, x)


def test_masked_psn_whose_masks_are_missing_or_named_otherwise(convert, tmp_path, capsys):
    x = foreign.photographs(2, 32)
    net = make_sew(x, neuron=partial(foreign.MaskedPSN, k=2), pe=False, width=8)
    state = net.state_dict()
    without = {name: t for name, t in state.items() if "mask" not in name}
    torch.save({"net": without}, tmp_path / "a.pth")
    model, _, _ = convert(tmp_path / "a.pth", "--neuron", "masked_psn", "--k", 2)
    assert_same_logits(model, net.float(), x)
    # the tensors directly in the neuron, the masks the other way round as in SpikingJelly
    swap = {"mask0": "mask1", "mask1": "mask0"}
    plain = {}
    for name, tensor in state.items():
        last = name.rpartition(".")[2]
        plain[name.replace(".fc.", ".").removesuffix(last) + swap.get(last, last)] = tensor
    torch.save(plain, tmp_path / "b.pth")
    model, config, _ = convert(tmp_path / "b.pth")
    assert config["architecture"] == "sew_resnet18_masked_psn"
    assert_same_logits(model, net, x)
    # without masks it is a PSN by its tensors; its options and the user have to settle it
    foreign.save_as_authors(net.float(), tmp_path / "c.pth", neu="if5pmd8")
    content = torch.load(tmp_path / "c.pth", weights_only=False)
    content["model"] = without
    torch.save(content, tmp_path / "c.pth")
    assert main(["convert", str(tmp_path / "c.pth"), str(tmp_path / "c")]) == 2
    assert "give --neuron masked_psn --k K" in capsys.readouterr().err


@pytest.mark.parametrize("dims", [2, 1], ids=["static", "sequential"])
@pytest.mark.parametrize("neuron", [foreign.FullPSN, foreign.MaskedPSN, foreign.SlidingPSN])
def test_cifar_networks(convert, tmp_path, dims, neuron):
    torch.manual_seed(0)
    x, T = foreign.cifar10(8), 4 if dims == 2 else 32
    net = foreign.AuthorsCIFARNet(T, partial(neuron, T), dims, num_classes=100 if dims == 1 else 10)
    foreign.wake(net, x, AUTHORS_NEURONS)
    file = foreign.save_as_authors(net, tmp_path / "checkpoint_max.pth", key="net", T=T)
    model, config, _ = convert(file)
    names = {foreign.FullPSN: "psn", foreign.MaskedPSN: "masked_psn", foreign.SlidingPSN: "sliding_psn"}
    assert config["architecture"] == f"{'cifar_net' if dims == 2 else 'sequential_net'}_{names[neuron]}"
    assert model.T == T and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    mean = [0.4914, 0.4822, 0.4465] if dims == 2 else [0.50708, 0.48655, 0.44092]
    assert config["pretrained_cfg"]["mean"] == mean
    assert_same_logits(model, net, x)


def test_both_forms_of_sliding_psn_give_the_same_network(convert, tmp_path):
    torch.manual_seed(0)
    frames = foreign.recordings(3, 10)
    nets = {form: foreign.AuthorsVGG(partial(foreign.SlidingPSN, 10, 3, form)) for form in ("gemm", "conv")}
    foreign.wake(nets["gemm"], frames, AUTHORS_NEURONS)
    state = {}
    for name, tensor in nets["gemm"].state_dict().items():
        # the other form of the same neuron
        if name.endswith("threshold"):
            tensor = -tensor
        state[name] = tensor.view(1, 1, 3) if tensor.shape == (3,) and name.endswith("weight") else tensor
    nets["conv"].load_state_dict(state)
    logits = []
    for form, net in nets.items():
        content = {"model": net.state_dict(), "optimizer": {}, "scheduler": {}, "epoch": 172, "best_acc": 85.9}
        torch.save(content, tmp_path / f"{form}.pth")
        model, config, account = convert(tmp_path / f"{form}.pth", "--T", 10)
        assert config["architecture"] == "vgg_snn_sliding_psn" and model.k == 3
        assert f"of the {form} form" in account and ("negated" in account) == (form == "conv")
        assert config["pretrained_cfg"]["input_size"] == [2, 48, 48]
        assert_same_logits(model, net, frames)
        logits.append(model(frames.double()))
    torch.testing.assert_close(*logits, atol=0, rtol=0)
    # neither the tensors of a sliding PSN nor such a file say T; the network's own is taken, and said
    model, _, account = convert(tmp_path / "gemm.pth")
    assert model.T == 10 and "T=10, because neither its tensors nor --T say" in " ".join(account.split())


def test_sliding_psn_of_the_conv_form_in_a_sew_resnet(convert, tmp_path):
    x = foreign.photographs(2, 32)
    net = make_sew(x, T=6, neuron=partial(foreign.SlidingPSN, k=4, form="conv"), pe=True, width=8)
    model, _, _ = convert(foreign.save_as_authors(net, tmp_path / "x.pth", T=6))
    assert (model.T, model.k) == (6, 4)
    assert_same_logits(model, net, x)


def test_options_are_believed_less_than_shapes(convert, tmp_path):
    x = foreign.photographs(2, 32)
    net = make_sew(x, T=4, width=8)
    file = foreign.save_as_authors(net, tmp_path / "x.pth", T=8, neu="mspsn", model="sew_resnet34")
    model, config, account = convert(file)
    account = " ".join(account.split())
    assert model.T == 4 and config["architecture"] == "sew_resnet18_psn"
    assert "its options say T=8; its tensors are of T=4 and are believed" in account
    assert "its options call the neuron 'mspsn'; its tensors are those of psn" in account
    assert "its options call the network 'sew_resnet34'" in account


def test_a_recipe_can_start_from_the_authors_checkpoint(tmp_path):
    x = foreign.photographs(2, 32)
    net = make_sew(x, width=8)
    file = foreign.save_as_authors(net, tmp_path / "x.pth", T=4)
    model = timm.create_model("sew_resnet18_psn", width=8, pe=True)
    account = load_ann(model, file)
    assert len(account.matched) == 163 and "the authors' SEW-ResNet" in str(account)
    assert_same_logits(model, net, x)
    with pytest.raises(ValueError, match=r"its neurons are psn .*, not sliding_psn"):
        load_ann(timm.create_model("sew_resnet18_sliding_psn", width=8, pe=True), file)


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[1] / "README.md"
    commands = re.findall(r"^psn (convert .*)", readme.read_text(encoding="utf-8"), re.MULTILINE)
    commands = [shlex.split(command, comments=True) for command in commands]
    # what the files are, by the words beside them
    files = {
        "checkpoint_max_test_acc1.pth": lambda: foreign.AuthorsSEWResNet(18, 4, partial(foreign.FullPSN, 4), width=8),
        "masked.pth": lambda: foreign.AuthorsSEWResNet(18, 4, partial(foreign.MaskedPSN, 4), width=8),
        "vgg.pth": lambda: foreign.AuthorsVGG(partial(foreign.SlidingPSN, 10)),
        "lif.pth": lambda: timm.create_model("resnet18", num_classes=10),  # SpikingJelly's LIFs have no tensors
    }
    monkeypatch.chdir(tmp_path)
    for name, make in files.items():
        foreign.save_as_authors(make(), Path(name))
    # nothing is fetched: torchvision:resnet18, timm:resnet50.a1_in1k
    monkeypatch.setattr(
        convert_module,
        "read_source",
        lambda name: timm.create_model(name.partition(":")[2].partition(".")[0]).state_dict(),
    )
    assert len(commands) == 7 and any("spikingjelly" in command for command in commands)
    for command in commands:
        assert main(command) == 0, f"{command}: {capsys.readouterr().err}"
        assert Path(command[2]).exists()
