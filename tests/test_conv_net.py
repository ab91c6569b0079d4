"""cifar_net, sequential_net, vgg_snn: sizes as in the paper's code, shapes, columns as time-steps, frame by frame."""

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from psn_train.models import VGGSNN, CIFARNet, SequentialNet
from psn_train.neurons import NEURONS, spiking_neurons
from psn_train.publish.hub import load_timm_folder

SMALL = {"cifar_net": {"width": 8, "hidden": 16}, "sequential_net": {"width": 8, "hidden": 16}, "vgg_snn": {"width": 4}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lively(model):
    """Batch norms and the hidden layer lifted, so that a fresh network fires in every layer."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.constant_(module.bias, 0.7)
    if model.hidden is not None:
        nn.init.normal_(model.hidden.weight, std=0.5)
    return model


def small(architecture, neuron="psn", **kwargs):
    return lively(timm.create_model(f"{architecture}_{neuron}", **SMALL[architecture], **kwargs))


def example(architecture, model, batch=2):
    """Images, or frames for the network of event data."""
    if architecture == "vgg_snn":
        return torch.rand(model.T, batch, 2, 48, 48) * 3
    return torch.randn(batch, 3, 32, 32)


def count(name, **kwargs):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    return sum(p.numel() for p in model.parameters()), len(list(spiking_neurons(model)))


@pytest.mark.parametrize(
    ("name", "kwargs", "parameters", "layers"),
    [
        ("cifar_net_psn", {}, 70_113_174, 7),
        ("sequential_net_psn", {}, 520_810, 7),
        ("sequential_net_masked_psn", {"k": 32}, 520_810, 7),
        ("sequential_net_sliding_psn", {"k": 32}, 513_649, 7),
        ("sequential_net_lif", {}, 513_418, 7),
        ("sequential_net_lif_no_reset", {}, 513_418, 7),
        # the authors' network for CIFAR10-DVS, a sliding PSN of order 2
        ("vgg_snn_sliding_psn", {}, 9_271_522, 8),
    ],
)
def test_sizes_are_those_of_the_papers_code(name, kwargs, parameters, layers):
    assert count(name, **kwargs) == (parameters, layers)


@pytest.mark.parametrize("neuron", NEURONS)
def test_neurons_add_what_they_say(neuron):
    # of a sequential network with T = 32: a layer of PSN has T T + T, GLIF 7 C + T C, ...
    channels = [128] * 6 + [256]
    own = {
        "psn": 7 * (32 * 32 + 32),
        "masked_psn": 7 * (32 * 32 + 32),
        "sliding_psn": 7 * (2 + 1),
        "plif": 7,
        "klif": 7,
        "glif": sum((7 + 32) * c for c in channels),
    }
    assert count(f"sequential_net_{neuron}")[0] == 513_418 + own.get(neuron, 0)


@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize("neuron", NEURONS)
def test_every_network_trains_and_runs_frame_by_frame(architecture, neuron):
    model = small(architecture, neuron)
    x = example(architecture, model)
    logits = model(x, per_step=True)
    assert logits.shape == (model.T, 2, 10)
    # sigmoid gates and thresholds too
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        whole = model(x, per_step=True)
        torch.testing.assert_close(model(x), whole.mean(0))
        if neuron == "psn":
            with pytest.raises(ValueError, match="cannot run step by step"):
                model.step({"sequential_net": x[..., 0], "vgg_snn": x[0]}.get(architecture, x))
            return
        frames = x.permute(3, 0, 1, 2) if architecture == "sequential_net" else x
        if frames.ndim == 4 and architecture == "cifar_net":
            frames = x.expand(model.T, *x.shape)
        steps = torch.stack([model.step(frame) for frame in frames])
        torch.testing.assert_close(steps, whole)
        model.reset()
        torch.testing.assert_close(model.step(frames[0]), whole[0])
    assert whole.std() > 0


@pytest.mark.parametrize("architecture", SMALL)
def test_every_layer_fires_and_a_static_image_is_a_constant_sequence(architecture):
    model = small(architecture)
    rates = []
    for _, layer in spiking_neurons(model):
        layer.register_forward_hook(lambda module, inputs, spikes: rates.append(spikes.mean().item()))
    model(example(architecture, model))
    assert len(rates) == (8 if architecture == "vgg_snn" else 7) and min(rates) > 0
    if architecture == "sequential_net":
        return
    model = model.double().eval()
    x = torch.randn(2, model.in_chans, model.side, model.side, dtype=torch.double)
    torch.testing.assert_close(model(x, per_step=True), model(x.expand(model.T, *x.shape), per_step=True))


def test_columns_are_time_steps():
    model = small("sequential_net", "if").eval()
    x = torch.randn(2, 3, 32, 32)
    whole = model(x, per_step=True)
    # causal: a change of column 20 changes nothing before it
    changed = x.clone()
    changed[..., 20] += 1
    other = model(changed, per_step=True)
    assert torch.equal(whole[:20], other[:20]) and not torch.equal(whole[20:], other[20:])
    # a network whose neurons are not bound to T takes as many columns as there are
    assert model(x[..., :7], per_step=True).shape == (7, 2, 10)


def test_a_sliding_psn_trained_at_one_T_runs_at_another():
    for architecture, kwargs in (("sequential_net", {}), ("vgg_snn", {"T": 10})):
        model = small(architecture, "sliding_psn", k=4, **kwargs).eval()
        x = example(architecture, model)
        shorter = x[..., :6] if architecture == "sequential_net" else x[:6]
        whole, part = model(x, per_step=True), model(shorter, per_step=True)
        torch.testing.assert_close(part, whole[:6])
    weights = small("vgg_snn", "sliding_psn", k=4, T=10).state_dict()
    for T in (4, 2):
        # also at fewer steps than taps
        elsewhere = small("vgg_snn", "sliding_psn", k=4, T=T).eval()
        elsewhere.load_state_dict(weights)
        assert elsewhere(torch.rand(T, 1, 2, 48, 48)).shape == (1, 10)


@pytest.mark.parametrize("architecture", SMALL)
def test_what_timm_asks(architecture):
    model = small(architecture)
    x = example(architecture, model)
    assert model.default_cfg["first_conv"] == "layer1.0.conv" and model.default_cfg["classifier"] == "fc"
    assert model.get_submodule("layer1.0.conv").in_channels == model.in_chans
    features = model.forward_features(x)
    assert features.shape[:3] == (model.T, 2, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.fc
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.set_grad_checkpointing()
    gradients = []
    for recompute in (False, True):
        model = small(architecture) if not gradients else model
        torch.manual_seed(1)
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model.eval()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequentialNet()(torch.zeros(2, 3, 32, 28)), "got images of 28 columns, wanted T=32"),
        (lambda: SequentialNet(width=8)(torch.zeros(2, 3, 28, 32)), "got images 28 pixels high, wanted 32"),
        (lambda: SequentialNet(width=8)(torch.zeros(2, 1, 32, 32)), r"wanted \[N, 3, 32, 32\]"),
        (lambda: SequentialNet(neuron="lif").eval().step(torch.zeros(2, 3, 32, 32)), r"wanted a column \[N, 3, 32\]"),
        (lambda: CIFARNet(width=8, hidden=8)(torch.zeros(2, 3, 28, 28)), "28 x 28 pixels, wanted 32 x 32"),
        (lambda: CIFARNet(width=8, hidden=8)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), "wanted floating point"),
        (lambda: CIFARNet(img_size=3), "wanted a square of at least 4 pixels"),
        (lambda: CIFARNet(neuron="relu"), "got neuron='relu', wanted one of 'psn'"),
        (lambda: CIFARNet(width=8, hidden=8).reset_classifier(3, "avg"), "flattens its features"),
        (lambda: VGGSNN(width=4)(torch.zeros(4, 2, 2, 48, 48)), "got 4 time-steps, wanted T=10"),
        (lambda: VGGSNN(width=4, tau=2.0), "psn: got tau, which it does not take"),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'connect_function'"):
        CIFARNet(connect_function="ADD")


def test_a_folder_of_two_channel_frames_takes_recordings_as_the_authors_prepared_them(tmp_path):
    save_for_hf(small("vgg_snn", "sliding_psn", T=8), str(tmp_path / "two"), safe_serialization=True)
    model, recipe, _ = load_timm_folder(tmp_path / "two")
    assert (model.k, model.T, recipe.model.T, recipe.data.image_size) == (2, 8, 8, 48)
    events, augment = recipe.events, recipe.augment
    assert (events.frames, events.rounding, events.antialias, events.scale) == ("number", "spikingjelly", False, 1.0)
    assert (augment.crop, augment.interpolation) == ("none", "bilinear")
    save_for_hf(small("vgg_snn", in_chans=4), str(tmp_path / "four"), safe_serialization=True)
    with pytest.raises(ValueError, match="vgg_snn_psn takes frames of 4 channels, and shards hold images"):
        load_timm_folder(tmp_path / "four")
