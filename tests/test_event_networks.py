"""SEW-ResNets on two-channel frames of real recordings: shapes, a training step, memory layout, frame by frame."""

import pytest
import timm
import torch
from event_data import moving_dot, read_nmnist

from psn_train.data.frames.batched import PackedEvents, integrate_packed
from psn_train.neurons import spiking_neurons
from psn_train.recipe.schema import Loss
from psn_train.training.losses import compute_loss

T = 4


@pytest.fixture(scope="module", params=["dots", "nmnist"])
def frames(request) -> torch.Tensor:
    """[T, 4, 2, H, W] counts."""
    if request.param == "dots":
        found = [moving_dot(number % 3, number, sensor=(34, 34)) for number in range(4)]
    else:
        found = read_nmnist("Test", 1)[0][:4]
    counts = integrate_packed(PackedEvents.pack(found), T)
    assert counts.shape == (T, 4, 2, 34, 34) and counts.sum() == sum(map(len, found))
    return counts


def make(name: str, stem: str = "3x3", **options):
    torch.manual_seed(0)
    return timm.create_model(name, T=T, in_chans=2, num_classes=5, stem=stem, width=16, **options)


def laid_out(frames: torch.Tensor) -> torch.Tensor:
    return frames.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, frames.shape[:2])


@pytest.mark.parametrize(
    ("neuron", "stem"), [("psn", "3x3"), ("psn", "7x7"), ("masked_psn", "7x7"), ("sliding_psn", "7x7"), ("lif", "7x7")]
)
def test_training_steps(frames, neuron, stem):
    k = 2 if neuron in ("masked_psn", "sliding_psn") else None
    model = make(f"sew_resnet10_{neuron}", stem, k=k)
    assert model.conv1.weight.shape[1] == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    labels, losses = torch.tensor([0, 1, 2, 3]), []
    for _ in range(6):
        logits = model(frames, per_step=True)
        assert logits.shape == (T, 4, 5)
        loss = compute_loss(Loss(name="tet", mse_weight=1e-3), logits, labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert model.conv1.weight.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(frames), model(frames, per_step=True).mean(0))


@pytest.mark.parametrize("neuron", ["psn", "sliding_psn", "lif"])
def test_channels_last_stays_and_changes_nothing(frames, neuron):
    """Every convolution and every neuron sees it; in float64, where no potential lies at the threshold."""
    outcomes, seen = [], []
    for last in (False, True):
        model = make(f"sew_resnet10_{neuron}", k=2 if neuron == "sliding_psn" else None).double()
        x = frames.double()
        if last:
            model, x = model.to(memory_format=torch.channels_last), laid_out(x)
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
            for _, layer in spiking_neurons(model):
                layer.register_forward_hook(lambda _m, _i, spikes: seen.append(spikes.flatten(0, 1)))
        logits = model(x, per_step=True)
        logits.square().sum().backward()
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in seen)
        outcomes.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
        assert len(seen) == (24 if last else 0)
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0])
    for name, gradient in outcomes[0][1].items():
        torch.testing.assert_close(outcomes[1][1][name], gradient, msg=name)


@pytest.mark.parametrize("architecture", ["sew_resnet10", "sew_resnet18", "sew_resnet50", "sew_resnext50_32x4d"])
def test_every_architecture_takes_two_channels(architecture):
    with torch.device("meta"):
        model = timm.create_model(f"{architecture}_psn", T=3, in_chans=2, num_classes=11)
        assert model(torch.zeros(3, 2, 2, 128, 128)).shape == (2, 11)
        assert model.conv1.weight.shape[1] == 2


def test_frame_by_frame(frames):
    model = make("sew_resnet10_sliding_psn", k=2, init="exp").eval()
    with torch.no_grad():
        whole = model(frames, per_step=True)
        torch.testing.assert_close(torch.stack([model.step(frame) for frame in frames]), whole)


def test_other_channels_are_refused_in_words(frames):
    model = make("sew_resnet10_psn")
    with pytest.raises(ValueError, match=r"got an input of shape \(4, 4, 3, 34, 34\), wanted"):
        model(frames[:, :, [0, 1, 1]])


def test_a_frame_that_is_alone_stays_channels_last():
    """What PyTorch no longer tells as such it lays out anew, in the pools and at every join."""
    model = make("sew_resnet10_sliding_psn", "7x7", k=2).to(memory_format=torch.channels_last).eval()
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.AvgPool2d)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    images = []
    for module in layers:
        module.register_forward_hook(lambda _m, inputs, output: images.append((*inputs[:1], output)))
    with torch.no_grad():
        model.step(torch.randn(1, 2, 64, 64))
    assert len(images) == len(layers) > 20
    inner = [x for x, _ in images[1:]] + [y for _, y in images]
    assert all(
        x.stride() == x.contiguous(memory_format=torch.channels_last).stride() for x in inner if x[0, 0].numel() > 1
    )
