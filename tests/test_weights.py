"""ANN weights into spiking networks: every tensor accounted for, nothing loaded by halves."""

import argparse
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from psn_train.models import SEWResNet, load_ann
from psn_train.models.weights import read_source


@pytest.fixture(scope="module")
def ann():
    torch.manual_seed(0)
    return timm.create_model("resnet18").state_dict()


@pytest.fixture
def file(ann, tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_file(ann, path)
    return path


def build(depth=18, **kwargs):
    return timm.create_model(f"sew_resnet{depth}_psn", **kwargs)


def test_every_tensor_of_the_ann_arrives_and_the_neurons_stay(ann, file):
    model = build(pe=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    account = load_ann(model, file)
    after = model.state_dict()
    assert sorted(account.matched) == sorted(ann) and not account.left and not account.adapted
    assert all(torch.equal(after[name], ann[name]) for name in ann)
    assert len(account.missing) == 41 and account.missing["pe"].startswith("time embedding")
    assert all(torch.equal(after[name], before[name]) for name in account.missing)
    text = str(account)
    assert f"weights from {file}: 122 matched, 0 adapted, 0 left, 41 missing" in text
    assert "layer2.0.downsample_sn.{weight,bias}" in text and "neuron, keeps its own initialisation" in text
    assert max(map(len, text.splitlines()[1:])) <= 120


def test_the_network_then_computes_with_the_ann_weights(ann, file):
    ours, theirs = build().eval(), timm.create_model("resnet18").eval()
    load_ann(ours, file)
    theirs.load_state_dict(ann)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(ours.bn1(ours.conv1(x)), theirs.bn1(theirs.conv1(x)))


@pytest.mark.parametrize("in_chans", [1, 2, 6])
def test_channels_are_adapted_and_another_head_is_left_out(ann, file, in_chans):
    model = build(in_chans=in_chans, num_classes=10)
    fresh = model.fc.weight.clone()
    account = load_ann(model, file)
    assert account.adapted == {
        "conv1.weight": f"3 input channels to {in_chans}",
        "fc.weight": "1000 classes, the model has 10: not loaded",
        "fc.bias": "1000 classes, the model has 10: not loaded",
    }
    assert torch.equal(model.fc.weight, fresh)
    grey = torch.randn(1, 1, 32, 32)
    if in_chans != 2:  # a grey image gives what it gave as three channels
        out = model.conv1(grey.expand(1, in_chans, 32, 32))
        expected = torch.conv2d(grey.expand(1, 3, 32, 32), ann["conv1.weight"], stride=2, padding=3)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_classifier_leaves_it(file):
    account = load_ann(build(num_classes=0), file)
    assert account.left == dict.fromkeys(("fc.weight", "fc.bias"), "the model has no classifier")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"state_dict": sd, "epoch": 3},
        lambda sd: {"model": {f"module.{name}": t for name, t in sd.items()}, "optimizer": {"state": {}}},
        lambda sd: {"net": sd},
        lambda sd: {"model_ema": {f"_orig_mod.{name}": t for name, t in sd.items()}},
        lambda sd: {"state_dict": {"model": sd}},
    ],
)
def test_checkpoints_are_unwrapped(ann, tmp_path, wrap):
    torch.save(wrap(ann), tmp_path / "x.pth")
    assert sorted(read_source(tmp_path / "x.pth")) == sorted(ann)


def test_what_lies_beside_the_weights_is_accounted_for(ann, tmp_path):
    content = {"model": ann, "epoch": 3, "optimizer": {"state": [torch.zeros(2)]}}
    torch.save(content, tmp_path / "x.pth")
    account = load_ann(build(), tmp_path / "x.pth")
    beside = {"epoch": "beside the weights: no tensor", "optimizer": "beside the weights: training state, 1 tensors"}
    assert account.left == beside and len(account.matched) == len(ann)
    # which of two sets of weights is meant is the user's word
    torch.save({**content, "model_ema": {"fc.bias": torch.ones(1000)}}, tmp_path / "two.pth")
    model = build()
    before = model.conv1.weight.clone()
    with pytest.raises(
        ValueError, match=r"two\.pth holds tensors beside .* no place: model_ema\.fc\.bias; nothing was"
    ):
        load_ann(model, tmp_path / "two.pth")
    assert torch.equal(model.conv1.weight, before)
    account = load_ann(model, tmp_path / "two.pth", allow=["model_ema.*"])
    assert account.left == {**beside, "model_ema.fc.bias": "ignored, as asked"}
    assert torch.equal(model.fc.bias, ann["fc.bias"])


def test_older_files_without_counters_are_taken(ann, tmp_path):
    torch.save({name: t for name, t in ann.items() if "num_batches" not in name}, tmp_path / "x.pth")
    account = load_ann(build(), tmp_path / "x.pth")
    assert account.missing["bn1.num_batches_tracked"] == "counter, starts at 0"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 34}, "missing in the source: layer1.2.conv1.weight [64, 64, 3, 3]"),
        ({"depth": 10}, "not in the model: layer1.1.bn1.bias [64]"),
        ({"stem": "3x3"}, "conv1.weight: got shape [64, 3, 7, 7], wanted [64, 3, 3, 3]"),
        ({"width": 32}, "bn1.weight: got shape [64], wanted [32]"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(file, kwargs, message):
    model = build(**kwargs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_ann(model, file)
    assert message in str(error.value) and "nothing was loaded" in str(error.value)
    assert "in Python, load_ann's `allow` names what may differ" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("in_chans", [3, 1])
def test_complex_and_not_finite_numbers_are_named(ann, tmp_path, in_chans):
    tensors = {**ann, "conv1.weight": ann["conv1.weight"] * 1j, "bn1.bias": ann["bn1.bias"] / 0}
    torch.save(tensors, tmp_path / "x.pth")
    model = build(in_chans=in_chans)
    before = model.bn1.weight.clone()
    with pytest.raises(ValueError) as error:
        load_ann(model, tmp_path / "x.pth")
    assert "conv1.weight: its numbers are complex (torch.complex64), wanted real ones" in str(error.value)
    assert "bn1.bias: 64 of its 64 numbers are infinite or no numbers (torch.float32)" in str(error.value)
    assert torch.equal(model.bn1.weight, before)


def test_what_is_allowed_to_differ_is_named_in_the_account(ann, file):
    model = build(stem="3x3")
    account = load_ann(model, file, allow=["conv1.weight"])
    assert account.adapted["conv1.weight"].endswith("allowed, not loaded")
    assert torch.equal(model.layer1[0].conv1.weight, ann["layer1.0.conv1.weight"])
    account = load_ann(build(10), file, allow=["layer?.1.*"])
    assert set(account.left.values()) == {"allowed"} and all(".1." in name for name in account.left)
    account = load_ann(build(34), file, allow=["layer?.[1-9].*"])
    assert account.missing["layer1.2.conv1.weight"] == "allowed"


def test_names_of_timm_and_torchvision_are_read(ann, monkeypatch):
    class Model:
        def state_dict(self):
            return ann

    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append((name, pretrained)) or Model())
    assert read_source("timm:resnet18.tv_in1k") is ann and asked == [("resnet18.tv_in1k", True)]
    models = pytest.importorskip("torchvision").models

    def fetch(self, progress):
        return {"from": self}

    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", fetch)
    assert read_source("torchvision:resnet50")["from"] is models.ResNet50_Weights.IMAGENET1K_V1
    assert read_source("torchvision:resnet50.IMAGENET1K_V2")["from"] is models.ResNet50_Weights.IMAGENET1K_V2
    with pytest.raises(ValueError, match=r"could not get torchvision:resnet50\.NONE.*give its path"):
        read_source("torchvision:resnet50.NONE")


def test_no_network_is_an_error_in_words(monkeypatch):
    def fail(name, pretrained):
        raise OSError("connection refused")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"could not get timm:resnet18: connection refused.*download the file"):
        read_source("timm:resnet18")


def test_bad_files_are_refused_and_code_in_them_is_not_run(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*nowhere\.pth; wanted a \.safetensors"):
        read_source(tmp_path / "nowhere.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_source(tmp_path / "empty.pth")
    # the options of a training script are the one class that is read
    torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    assert list(read_source(tmp_path / "args.pth")) == ["a"]

    class Bomb:
        def __reduce__(self):
            return (exec, ("import sys; sys.exploded = True",))

    torch.save({"model": {"a": torch.zeros(1)}, "x": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="code in it is not executed"):
        read_source(tmp_path / "bomb.pth")
    assert not hasattr(sys, "exploded")


def test_a_model_that_timm_did_not_build_has_the_same_names(file):
    assert len(load_ann(SEWResNet(18), file).matched) == 122
