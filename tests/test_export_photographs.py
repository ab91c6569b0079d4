"""ONNX files on real photographs at 224 pixels: onnxruntime against PyTorch, and what a flipped spike costs."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from foreign_networks import wake
from timm.models import save_for_hf
from torch import nn

from psn_train.cli import main
from psn_train.data.images import Normalizer
from psn_train.export.samples import open_samples
from psn_train.neurons import Neuron, spiking_neurons
from psn_train.publish.hub import load_timm_folder

# in steps of 1/64: (x - 127.5) / 32
CFG = {"mean": (0.5, 0.5, 0.5), "std": (32 / 255, 32 / 255, 32 / 255), "crop_pct": 1.0}


@pytest.fixture(scope="module")
def shards(shared_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("photographs")
    assert main(["shards", "images", str(shared_data / "imagenette_mini"), str(out), "--workers", "1"]) == 0
    return out / "val"


def save(model, folder) -> None:
    model.pretrained_cfg = {**model.pretrained_cfg, **CFG}
    save_for_hf(model.eval(), str(folder), safe_serialization=True)


def photographs(folder, shards, count: int) -> torch.Tensor:
    """What evaluation makes of them, float32 [count, 3, 224, 224]."""
    *_, x = open_samples(folder, str(shards), count, prefer="best", weights="auto", workers=0)
    return x


def on_a_grid(model, x: torch.Tensor) -> dict[str, float]:
    """Random weights under which no potential is near its threshold; returns the firing rates.

    All weights and inputs are multiples of powers of two, so that potentials are multiples of 2^-13 at least, and
    thresholds lie 2^-14 beside such a multiple: a hundred times what sums of another order round.
    """
    generator, rates = torch.Generator().manual_seed(0), {}

    def calibrate(norm, inputs) -> None:
        outputs = inputs[0]
        axes = [0, *range(2, outputs.ndim)]
        norm.weight.data.fill_(2.0 ** -round(np.log2(float(outputs.std()))))
        norm.bias.data.zero_()
        norm.running_mean.copy_((outputs.mean(axes) * 4).round() / 4)
        norm.running_var.fill_(1 - norm.eps)

    def keep(neuron, inputs, spikes) -> None:
        rates[names[neuron]] = float(spikes.mean())

    names = {neuron: name for name, neuron in spiking_neurons(model)}
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            grid = 8 if module.in_channels == 3 else 64
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.copy_(
                (torch.randn(module.weight.shape, generator=generator) * std * grid).round() / grid
            )
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(calibrate))
        elif module in names:
            module.weight.data.copy_(torch.randint(1, 4, module.weight.shape, generator=generator) / 4)
            module.bias.data.fill_(-0.5 + 2**-14)
            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return rates


@pytest.mark.slow
def test_onnxruntime_equals_pytorch_on_photographs(shards, tmp_path, capsys):
    """Where no potential is near its threshold every spike is the same, and the logits differ by rounding alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, out = tmp_path / "network", tmp_path / "photographs.onnx"
    model = timm.create_model("sew_resnet18_psn", num_classes=10)
    save(model, folder)
    x = photographs(folder, shards, 4)
    rates = on_a_grid(model, x)
    # a silent network would agree with anything
    assert min(rates.values()) > 0.02 and max(rates.values()) < 0.8 and len(rates) == 20, rates
    save(model, folder)
    words = ["--shards", str(shards), "--samples", "4", "--workers", "0", "--out", str(out), "--with-normalization"]
    assert main(["export", str(folder), "--to", "onnx", *words]) == 0
    printed = capsys.readouterr().out
    with capsys.disabled():
        print(printed)
    assert re.search("compared on 4 images of .*: 4 of 4 samples have the same logits, 4 the same class", printed)
    # other photographs, the bytes as they are
    raw = (photographs(folder, shards, 7)[1:4] * 32 + 127.5).round().to(torch.uint8)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": raw.numpy()})[0]
    model, _, _ = load_timm_folder(folder)
    with torch.no_grad():
        wanted = model(Normalizer(CFG["mean"], CFG["std"], "cpu")(raw))
    assert wanted.std(0).min() > 1e-3
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.long
def test_flipped_spikes_are_pytorchs_own(shards, tmp_path, capsys):
    """Some of millions of potentials lie within rounding of the threshold: then PyTorch differs from itself as much."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "network"
    model = timm.create_model("sew_resnet18_psn", num_classes=10)
    save(model, folder)
    rates = wake(model, photographs(folder, shards, 4), Neuron)
    assert min(rates.values()) > 1e-3 and 0.02 < np.mean(list(rates.values())) < 0.6, rates
    save(model, folder)
    words = ["--shards", str(shards), "--samples", "4", "--workers", "0", "--out", str(tmp_path / "a.onnx")]
    assert main(["export", str(folder), "--to", "onnx", *words]) == 0
    printed = capsys.readouterr().out
    apart = re.search(
        r"largest difference is ([\d.e-]+)(?:, the rms ([\d.e-]+), and ([\d.e-]+) where PyTorch)?", printed
    )
    with capsys.disabled():
        print(printed, json.dumps(apart.groups()))
    assert apart[2] is None or float(apart[2]) <= 3 * float(apart[3])
