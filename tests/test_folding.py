"""Batch norm folded into the convolutions: the same logits, all networks, what is refused."""

import copy
import pickle

import foreign_networks as foreign
import pytest
import timm
import torch
from torch import nn

from psn_train.models import NETWORKS
from psn_train.models.conv_net import VGGSNN, SequentialNet
from psn_train.models.folding import fold_batch_norm
from psn_train.models.sew_resnet import SEWResNet
from psn_train.neurons import Neuron, spiking_neurons

SMALL = {"depth": 10, "stem": "3x3", "width": 8, "num_classes": 5, "in_chans": 2}
Norm = nn.modules.batchnorm._BatchNorm


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(model, side=32):
    """In float64 and eval mode; every layer fires, on noise whose statistics the batch norms have."""
    foreign.wake(model.double(), noise(4, model.in_chans, side), Neuron)
    return model


def noise(*sizes):
    return torch.randn(*sizes, sizes[-1], dtype=torch.double)


def assert_same_logits(model, folded, x):
    rates = []
    hooks = [n.register_forward_hook(lambda _, given, s: rates.append(s.mean())) for _, n in spiking_neurons(folded)]
    with torch.no_grad():
        want, got = model(x, per_step=True), folded(x, per_step=True)
    for hook in hooks:
        hook.remove()
    assert all(0.0 < rate < 1.0 for rate in rates), "a layer that never fires tells nothing"
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


# one of a kind: the neurons of the others stand behind the same batch norms
FEW = [name for name in NETWORKS if name.endswith(("_sliding_psn", "t_psn", "n_psn", "r_psn")) or "resnet10_" in name]
FEW += ["sew_resnet18_psn", "sew_resnet50_psn", "sew_resnext50_32x4d_psn", "sew_wide_resnet50_2_lif", "vgg_snn_lif"]


NAMES = sorted({name for name in FEW if "101" not in name and "152" not in name})


# those that have no small form take seconds each
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * ("wide" in n)) for n in NAMES])
def test_logits_of_every_kind_of_network(name):
    small = {} if "wide" in name or "resnext" in name else {"width": 8}
    side = {"vgg": 48, "seq": 32, "cif": 32}.get(name[:3], 64)
    model = trained(
        timm.create_model(name, num_classes=5, **small, **({"hidden": 64} if name[:3] in ("cif", "seq") else {})), side
    )
    folded = fold_batch_norm(model)
    assert type(folded) is type(model) and not any(isinstance(module, Norm) for module in folded.modules())
    assert_same_logits(model, folded, noise(2, model.in_chans, side))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_registered_network_has_a_convolution_for_each_batch_norm(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        folded = fold_batch_norm(model)
    assert not any(isinstance(module, Norm) for module in folded.modules())
    assert any(isinstance(module, Norm) for module in model.modules())
    convolutions = [m for m in folded.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    assert convolutions and all(convolution.bias is not None for convolution in convolutions)


@pytest.mark.parametrize(
    "change",
    [
        {"connect_function": "IAND"},
        {"pe": True},
        {"stem": "7x7"},
        {"neuron": "masked_psn", "k": 1},
        {"neuron": "glif"},
        {"depth": 50},
    ],
    ids=str,
)
def test_frames_and_static_images_pass_all_ways(change):
    model = trained(SEWResNet(**{**SMALL, **change}))
    folded = fold_batch_norm(model)
    for x in (noise(2, 2, 32), noise(4, 2, 2, 32)):
        assert_same_logits(model, folded, x)


def test_norms_without_scale_and_norms_over_all_processes():
    model = trained(SEWResNet(**SMALL))
    bare = nn.BatchNorm2d(8, affine=False).double()
    bare.running_mean, bare.running_var = model.bn1.running_mean, model.bn1.running_var
    model.bn1 = bare
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert isinstance(model.layer1[0].bn1, nn.SyncBatchNorm)
    assert_same_logits(model, fold_batch_norm(model), noise(2, 2, 32))


def test_the_original_stays_as_it_is_and_shares_nothing():
    model = trained(SEWResNet(**SMALL, neuron="sliding_psn")).to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    # with a history, as without no_grad
    assert model.step(noise(1, 2, 32)).requires_grad
    folded = fold_batch_norm(model)
    for tensor in folded.state_dict().values():
        tensor.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.folded
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    # the copy begins at rest; the original goes on
    assert folded.layer1[0].sn1._queue is None and model.layer1[0].sn1._queue is not None
    assert folded.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("neuron", ["masked_psn", "sliding_psn", "lif"])
def test_frame_by_frame_equals_the_sequence(neuron):
    folded = fold_batch_norm(trained(SEWResNet(**SMALL, neuron=neuron)))
    frames = noise(4, 2, 2, 32)
    with torch.no_grad():
        whole = folded(frames, per_step=True)
        for _ in range(2):
            folded.reset()
            torch.testing.assert_close(torch.stack([folded.step(frame) for frame in frames]), whole)


def test_features_stay_and_pickles_load():
    model = trained(SEWResNet(**SMALL))
    folded = pickle.loads(pickle.dumps(fold_batch_norm(model)))
    assert folded.folded and folded.feature_info == model.feature_info
    x = noise(2, 2, 32)
    with torch.no_grad():
        pairs = zip(folded.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want)


def test_on_photographs_in_float32_hardly_a_spike_differs(shared_data):
    """Layer by layer on the same input; in a whole network of random weights a flip goes on to flip others."""
    x = foreign.photographs(16, 128)
    model = timm.create_model("sew_resnet18_psn", num_classes=10)
    foreign.wake(model, x, Neuron)
    folded = fold_batch_norm(model.eval())
    given, spikes = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, out, name=name: given.update({name: args[0]}))
        elif isinstance(module, Neuron):
            module.register_forward_hook(lambda _, args, out, name=name: spikes.update({name: out}))
    flipped, total = 0, 0
    with torch.no_grad():
        logits = model(x), folded(x)
        for name, x_conv in given.items():
            neuron = name.replace("downsample.0", "downsample_sn").replace("conv", "sn")
            y = folded.get_submodule(name)(x_conv)
            layer = folded.get_submodule(neuron)
            got = layer.forward_static(y, 4) if name == "conv1" else layer(y.unflatten(0, (4, 16)))
            flipped += int((got != spikes.pop(neuron)).sum())
            total += got.numel()
    assert not spikes and total > 10**7
    assert flipped / total < 1e-5, f"{flipped} of {total}"
    assert (logits[0].argmax(1) == logits[1].argmax(1)).float().mean() >= 15 / 16


# ---- refusals


def test_what_cannot_be_folded_is_named():
    model = SEWResNet(**SMALL)
    with pytest.raises(ValueError, match=r"SEWResNet is in training mode; call model\.eval\(\)"):
        fold_batch_norm(model)
    model.eval()
    with pytest.raises(ValueError, match="got a Sequential, wanted a network of psn_train"):
        fold_batch_norm(nn.Sequential(model))
    model.layer1[0].bn2.train()
    with pytest.raises(ValueError, match=r"layer1\.0\.bn2 is in training mode, and the model is not"):
        fold_batch_norm(model)
    model.eval()
    model.layer1[0].bn2 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"layer1\.0\.bn2 keeps no running statistics"):
        fold_batch_norm(model)
    model.layer1[0].bn2 = nn.BatchNorm2d(9).eval()
    with pytest.raises(ValueError, match=r"layer1\.0\.bn2 stands behind SpikeConv2d\(8, 8.*wanted a convolution of 9"):
        fold_batch_norm(model)


@pytest.mark.parametrize("make", [lambda: SEWResNet(**SMALL), SequentialNet, VGGSNN])
def test_a_folded_network_is_neither_folded_again_nor_trained(make):
    folded = fold_batch_norm(make().eval())
    with pytest.raises(ValueError, match="is folded already"):
        fold_batch_norm(folded)
    with pytest.raises(ValueError, match="for inference alone; train the network that it was made of"):
        folded.train()
    assert not folded.eval().training
