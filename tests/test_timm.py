"""The networks as timm's tools see them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

import psn_train.models  # noqa: F401 (registers)
from psn_train.models.sew_resnet import ARCHITECTURES
from psn_train.neurons import NEURONS, get_lambda, set_lambda, spiking_neurons

SHARED_DATA = Path(os.environ.get("PSN_SHARED_DATA", Path(__file__).parents[1].parent / "shared/data"))
SMALL = {"stem": "3x3", "width": 8, "num_classes": 5, "in_chans": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(name="sew_resnet10_psn", **kwargs):
    return timm.create_model(name, **{**SMALL, **kwargs})


def test_every_architecture_and_neuron_is_registered():
    assert set(NEURONS) == {"psn", "masked_psn", "sliding_psn", "if", "lif", "lif_no_reset", "plif", "klif", "glif"}
    names = {f"sew_resnet{depth}_{neuron}" for depth in (10, 18, 34, 50, 101, 152) for neuron in NEURONS}
    variants = ("sew_resnext50_32x4d", "sew_resnext101_32x8d", "sew_wide_resnet50_2", "sew_wide_resnet101_2")
    others = {f"{variant}_{neuron}" for variant in variants for neuron in NEURONS}
    assert names | others == set(timm.list_models("sew_*")) == set(timm.list_models(module="sew_resnet"))
    plain = {f"{name}_{neuron}" for name in ("cifar_net", "sequential_net", "vgg_snn") for neuron in NEURONS}
    assert plain == set(timm.list_models(module="conv_net"))
    entry = timm.model_entrypoint("sew_resnet34_masked_psn")
    assert entry.__name__ == "sew_resnet34_masked_psn" and "sew_resnet34 with masked_psn" in entry.__doc__
    for name in sorted(names | others):
        with torch.device("meta"):
            model = timm.create_model(name, width=16)
        assert name == next(a for a in ARCHITECTURES if name == f"{a}_{model.neuron}") + f"_{model.neuron}"
        assert model.depth == int(re.search(r"\d+", name)[0])
        assert model.default_cfg["architecture"] == name


def test_default_cfg():
    cfg = small().default_cfg
    wanted = {
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
        "num_classes": 1000,
    }
    assert {key: cfg[key] for key in wanted} == wanted


def test_head_and_classifier():
    model, x = small().eval(), torch.randn(3, 2, 12, 12)
    features = model.forward_features(x)
    assert features.shape == (4, 3, 64, 2, 2) and model.num_features == model.head_hidden_size == 64
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, 64)
    torch.testing.assert_close(model.fc(pooled), model(x))
    per_step = model.forward_head(features, per_step=True)
    assert per_step.shape == (4, 3, 5) and torch.equal(per_step.mean(0), model(x))
    assert model.get_classifier() is model.fc
    model.reset_classifier(9)
    assert model(x).shape == (3, 9) and model.num_classes == 9 and model.global_pool == "avg"
    model.reset_classifier(2, "max")
    assert model(x).shape == (3, 2)
    model.reset_classifier(0)
    assert model(x).shape == (3, 64) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).shape == (3, 64, 2, 2)
    assert small(num_classes=0)(x).shape == (3, 64)


def test_dropout_is_before_the_classifier_and_in_training_only():
    model, x = small(drop_rate=0.5), torch.randn(2, 2, 12, 12)
    features = model.forward_features(x)
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    model.eval()
    assert torch.equal(model.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize(("stem", "size", "reduction"), [("7x7", 64, [2, 4, 8, 16, 32]), ("3x3", 16, [1, 1, 2, 4, 8])])
def test_features_only(stem, size, reduction):
    kwargs = {**SMALL, "stem": stem}
    del kwargs["num_classes"]
    model = timm.create_model("sew_resnet10_psn", features_only=True, **kwargs).eval()
    assert model.feature_info.channels() == [8, 8, 16, 32, 64] and model.feature_info.reduction() == reduction
    maps = model(torch.randn(2, 2, size, size))
    assert [tuple(m.shape) for m in maps] == [
        (2, c, size // r, size // r) for c, r in zip([8, 8, 16, 32, 64], reduction, strict=True)
    ]
    # the first level is a firing rate over four steps
    assert set(maps[0].unique().tolist()) <= {0, 0.25, 0.5, 0.75, 1}


def test_features_only_of_some_levels_drops_the_rest():
    model = timm.create_model("sew_resnet18_psn", features_only=True, out_indices=(1, 3), width=8)
    whole = timm.create_model("sew_resnet18_psn", width=8)
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 64, 64))] == [(1, 8, 16, 16), (1, 32, 4, 4)]
    assert isinstance(model.model.layer4, nn.Identity)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters()) / 2


def test_forward_intermediates():
    model, x = small().eval(), torch.randn(2, 2, 12, 12)
    final, levels = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and len(levels) == 5
    assert torch.equal(levels[4], final.mean(0))
    some = model.forward_intermediates(x, indices=[1, -1], intermediates_only=True)
    assert torch.equal(some[0], levels[1]) and torch.equal(some[1], levels[4])
    early = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert early[0].shape == (4, 2, 8, 12, 12)
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_parameter_groups_and_optimizers():
    model = small("sew_resnet18_psn", pe=True)
    for coarse, count in ((True, 6), (False, 10)):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert len(groups) == count  # stem, stages or blocks, head
        assert {"conv1.weight", "sn1.weight", "pe"} <= set(groups[0])
        assert set(groups[count - 1]) == {"fc.weight", "fc.bias"}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


# ---- weights: save, load in a fresh process, refuse what does not fit

LOAD = """
import sys, json, timm, torch, psn_train.models
folder, x = sys.argv[1], torch.load(sys.argv[2])
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
torch.save(model(x, per_step=True), sys.argv[3])
print(json.dumps({"T": model.T, "k": model.k, "connect": model.connect_function, "alpha": model.sn1.alpha,
                  "surrogate": model.sn1.surrogate, "classes": model.num_classes, "lambda": float(model.sn1.lambda_)}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A masked network in timm's hub format, its input and its logits."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub")
    arguments = {"T": 6, "k": 3, "connect_function": "IAND", "surrogate": "sigmoid", "alpha": 4.0, "pe": True}
    model = small("sew_resnet10_masked_psn", **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
    set_lambda(model, 0.5)
    model(torch.randn(4, 2, 12, 12))  # moves the running statistics
    model.eval()
    x = torch.randn(2, 2, 12, 12)
    save_for_hf(model, folder, safe_serialization=True)
    with pytest.warns(UserWarning, match="lambda < 1"):
        return folder, arguments, x, model(x, per_step=True).detach()


def test_round_trip_through_the_hub_format_in_a_fresh_process(saved, tmp_path):
    folder, arguments, x, logits = saved
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "sew_resnet10_masked_psn"
    assert config["model_args"] == {**SMALL, **arguments, "global_pool": "avg"}
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", LOAD, folder, tmp_path / "x.pt", tmp_path / "y.pt"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    wanted = {"T": 6, "k": 3, "connect": "IAND", "alpha": 4.0, "surrogate": "sigmoid", "classes": 5, "lambda": 0.5}
    assert json.loads(run.stdout) == wanted
    assert "lambda < 1" in run.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), logits) and logits.std() > 0


def test_pretrained_weights_of_another_T_or_k_are_refused_in_words(saved):
    folder = saved[0]
    for override, message in [
        ({"T": 4}, r"is \[6(, 6)?\] in the weights and \[4(, 4)?\] in the model, which has T=4, k=3"),
        ({"k": 2}, r"order is 3 in the weights and 2 in the model, which has T=6, k=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            timm.create_model(f"local-dir:{folder}", pretrained=True, **override)
    other = timm.create_model(f"local-dir:{folder}", T=4)
    assert other.T == 4
    with pytest.raises(RuntimeError, match="No pretrained weights exist for sew_resnet10_psn"):
        timm.create_model("sew_resnet10_psn", pretrained=True)


def test_pretrained_weights_take_another_head_and_other_channels(saved):
    # saved with two input channels: timm adapts from what the pretrained_cfg says
    model = timm.create_model(f"local-dir:{saved[0]}", pretrained=True, num_classes=7)
    assert model.fc.out_features == 7 and get_lambda(model) == 0.5
    backbone = timm.create_model(f"local-dir:{saved[0]}", pretrained=True, features_only=True)
    assert len(backbone(saved[2])) == 5


def test_arguments_of_another_architecture_are_refused():
    with pytest.raises(TypeError, match="neuron"):
        timm.create_model("sew_resnet10_psn", neuron="lif")
    with pytest.raises(TypeError, match="colour"):
        small(colour="red")


# ---- a plain loop with timm's own data pipeline, without this project's trainer


def test_trains_in_a_plain_loop_on_photographs():
    folder = SHARED_DATA / "imagenette_mini" / "train"
    if not folder.is_dir():
        pytest.skip(f"no photographs: {folder} is absent; set PSN_SHARED_DATA to a folder with imagenette_mini")
    model = timm.create_model("sew_resnet10_psn", num_classes=2, width=16)
    config = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    transform = timm.data.create_transform(**config)
    dataset = timm.data.create_dataset("", root=str(folder), transform=transform)
    first = [i for i, (_, label) in enumerate(dataset.reader.samples) if label == 0][:12]
    last = [i for i, (_, label) in enumerate(dataset.reader.samples) if label == 9][:12]
    x = torch.stack([dataset[i][0] for i in first + last])
    target = torch.tensor([0] * 12 + [1] * 12)
    assert x.shape == (24, 3, 64, 64)
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3)
    losses = []
    for _ in range(50):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # 0.004 to 0.02 of it with four seeds
    assert losses[-1] < 0.1 * losses[0]
    assert len(list(spiking_neurons(model))) == 12
