"""Parity of training: twenty steps of SGD on real CIFAR-10, here and with SpikingJelly's neurons, loss for loss.

Batches of 4 images; momentum 0.9, a rate of 0.01 (sequential network, full size) and 0.003 (SEW-ResNet-18): at the
recipes' 0.1 such small batches drive layers silent within a few steps, and silent layers are equal for nothing.

The reference networks are made of SpikingJelly's neurons and torch's layers, with the same weights to begin with. All
layers fire in every step: batch norms are lifted.
"""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import psn_train.models  # noqa: F401 (registers)
from psn_train.data.sources.cifar import load_batch
from psn_train.neurons import SlidingPSN, set_lambda, spiking_neurons

STEPS = 20
CLOSE = 1e-5

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def cifar10(shared_data, tmp_path_factory) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 400 images of CIFAR-10, normalised float32 [400, 3, 32, 32], and their labels."""
    out = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(shared_data / "cifar10" / "unpack.py"), str(out)], check=True)
    batch = load_batch(out / "cifar-10-batches-py" / "data_batch_1")
    images = np.asarray(batch["data"][:400]).reshape(-1, 3, 32, 32)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    return (torch.tensor(images).float() / 255 - mean) / std, torch.tensor(batch["labels"][:400])


@pytest.fixture(scope="module")
def sj():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import neuron, surrogate

    def make(name: str, T: int, k: int):
        step = surrogate.ATan()
        return {
            "psn": lambda: neuron.PSN(T, step),
            "masked_psn": lambda: neuron.MaskedPSN(k, T, 0.0, step, step_mode="m"),
            "sliding_psn": lambda: neuron.SlidingPSN(k, False, step, step_mode="m"),
            "lif": lambda: neuron.LIFNode(2.0, v_reset=None, detach_reset=True, surrogate_function=step, step_mode="m"),
        }[name]()

    return make


def on_each_step(layer: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    return layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


class Sequential(nn.Module):
    """The sequential CIFAR network of torch's layers and somebody's neurons: [N, 3, 32, 32] -> [N, 10]."""

    def __init__(self, neuron):
        super().__init__()
        self.layers, channels = nn.ModuleList(), 3
        for _ in range(2):
            for _ in range(3):
                self.layers += [nn.Conv1d(channels, 128, 3, padding=1, bias=False), nn.BatchNorm1d(128), neuron()]
                channels = 128
            self.layers.append(nn.AvgPool1d(2))
        self.hidden, self.neuron, self.out = nn.Linear(1024, 256), neuron(), nn.Linear(256, 10)

    def forward(self, x):
        x_seq = x.permute(3, 0, 1, 2)
        for layer in self.layers:
            knows_time = not isinstance(layer, (nn.Conv1d, nn.BatchNorm1d, nn.AvgPool1d))
            x_seq = layer(x_seq) if knows_time else on_each_step(layer, x_seq)
        return self.out(self.neuron(self.hidden(x_seq.flatten(2)))).mean(0)


class SEWResNet18(nn.Module):
    """SpikingJelly's SEW-ResNet-18 with the average pool and the `pe` of the authors: [N, 3, H, W] -> [T, N, 10]."""

    def __init__(self, T: int, neuron, pe: bool):
        super().__init__()
        from spikingjelly.activation_based import functional, layer
        from spikingjelly.activation_based.model import sew_resnet

        self.net = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=neuron, num_classes=10)
        functional.set_step_mode(self.net, "m")
        self.net.maxpool = layer.AvgPool2d(3, 2, 1, step_mode="m")
        self.T = T
        self.pe = nn.Parameter(torch.zeros(T, 1, 1, 1, 1)) if pe else None

    def forward(self, x):
        net, x = self.net, x.unsqueeze(0)
        if self.pe is not None:
            x = net.bn1(net.conv1(x.repeat(self.T, 1, 1, 1, 1) + self.pe))
        else:
            x = net.bn1(net.conv1(x)).repeat(self.T, 1, 1, 1, 1)
        x = net.maxpool(net.sn1(x))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
        return net.fc(net.avgpool(x).flatten(2))


def lift(model: nn.Module) -> nn.Module:
    """Batch norms and sliding weights such that every layer of a fresh network fires."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.constant_(module.bias, 0.7)
        if isinstance(module, SlidingPSN):
            with torch.no_grad():
                module.weight.abs_().clamp_(min=0.5 / module.k)
    if hasattr(model, "hidden"):
        nn.init.constant_(model.hidden.bias, 1.0)
    return model


def copy_weights(ours: nn.Module, theirs: nn.Module, by_name: bool) -> None:
    source = dict(ours.named_parameters())
    reference = {name.removeprefix("net."): p for name, p in theirs.named_parameters()}
    if not by_name:
        # both define their layers in the order of the forward pass
        reference = dict(zip(source, reference.values(), strict=True))
    assert source.keys() == reference.keys()
    with torch.no_grad():
        for name, parameter in reference.items():
            parameter.copy_(source[name].view_as(parameter))


def train_both(ours, theirs, batches, loss_of, lr, lambdas=None):
    """Losses of ours and theirs, [STEPS] each, and the lowest firing rate that a layer of ours had in any step."""
    from spikingjelly.activation_based import functional

    rates = []
    for _, layer in spiking_neurons(ours):
        layer.register_forward_hook(lambda module, inputs, spikes: rates.append(spikes.mean().item()))
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9) for model in (ours, theirs)]
    losses = [[], []]
    for step, (images, labels) in enumerate(batches):
        if lambdas is not None:
            set_lambda(ours, lambdas[step])
            for module in theirs.modules():
                if hasattr(module, "lambda_"):
                    # the same float32
                    module.lambda_ = float(torch.tensor(lambdas[step]))
        for model, optimizer, seen in zip((ours, theirs), optimizers, losses, strict=True):
            loss = loss_of(model, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        functional.reset_net(theirs)
    return *losses, min(rates)


def assert_equal_losses(ours, theirs, rate):
    assert len(ours) == STEPS and rate > 0
    # it is training: the losses move
    assert np.std(ours) > 1e-3
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst <= CLOSE, f"losses differ by up to {worst:.2e}: {list(zip(ours, theirs, strict=True))}"


def batches_of(cifar10, size: int, side: int = 32):
    images, labels = cifar10
    if side != 32:
        images = F.interpolate(images[: STEPS * size], side, mode="bilinear")
    return [(images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]) for i in range(STEPS)]


RAMP = [min(8 * step / (STEPS - 1), 1.0) for step in range(STEPS)]


@pytest.mark.parametrize("neuron", ["psn", "masked_psn", "sliding_psn", pytest.param("lif", marks=pytest.mark.long)])
def test_sequential_network_trains_as_with_spikingjelly(neuron, cifar10, sj):
    torch.manual_seed(0)
    order = {"k": 32} if neuron in ("masked_psn", "sliding_psn") else {}
    ours = lift(timm.create_model(f"sequential_net_{neuron}", **order))
    theirs = Sequential(lambda: sj(neuron, 32, 32))
    copy_weights(ours, theirs, by_name=False)

    def loss_of(model, images, labels):
        return F.cross_entropy(model(images), labels, label_smoothing=0.1)

    lambdas = RAMP if neuron == "masked_psn" else None
    assert_equal_losses(*train_both(ours, theirs, batches_of(cifar10, 4), loss_of, 0.01, lambdas))


@pytest.mark.parametrize(
    ("neuron", "pe"),
    [
        ("psn", True),
        ("masked_psn", False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("psn", False), ("sliding_psn", True), ("lif", False))
        ),
    ],
)
def test_sew_resnet18_trains_as_with_spikingjelly(neuron, pe, cifar10, sj):
    torch.manual_seed(0)
    ours = lift(timm.create_model(f"sew_resnet18_{neuron}", num_classes=10, pe=pe))
    theirs = SEWResNet18(4, lambda **_: sj(neuron, 4, 2), pe)
    copy_weights(ours, theirs, by_name=True)

    def loss_of(model, images, labels):
        logits = model(images, per_step=True) if model is ours else model(images)
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(4))

    lambdas = RAMP if neuron == "masked_psn" else None
    assert_equal_losses(*train_both(ours, theirs, batches_of(cifar10, 4, side=64), loss_of, 0.003, lambdas))
