"""Networks as others write them, in plain torch, for tests of conversion; real images and recordings for their inputs.

Nothing here uses psn_train: names, shapes and signs are those of the authors' files.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F


def step(h: Tensor) -> Tensor:
    return (h >= 0).to(h.dtype)


# ---- the authors' neurons, x_seq [T, ...]


class FullPSN(nn.Module):
    """fc.weight [T, T], fc.bias [T]."""

    def __init__(self, T: int):
        super().__init__()
        self.fc = nn.Linear(T, T)

    def forward(self, x: Tensor) -> Tensor:
        return step(torch.einsum("ts,sm->tm", self.fc.weight, x.flatten(1)) + self.fc.bias[:, None]).view(x.shape)


class MaskedLinear(nn.Module):
    """weight, bias, the buffers mask0 (ones) and mask1 (the band); the blend is a number that no file holds."""

    def __init__(self, T: int, k: int, blend: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(T, T)), nn.Parameter(torch.zeros(T))
        rows, columns = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
        self.register_buffer("mask0", torch.ones(T, T))
        self.register_buffer("mask1", ((columns <= rows) & (rows <= columns + k - 1)).float())
        self.blend = blend

    def effective(self) -> Tensor:
        return self.weight * (self.blend * self.mask1 + (1 - self.blend) * self.mask0)


class MaskedPSN(nn.Module):
    def __init__(self, T: int, k: int = 2, blend: float = 1.0):
        super().__init__()
        self.fc = MaskedLinear(T, k, blend)

    def forward(self, x: Tensor) -> Tensor:
        return step((self.fc.effective() @ x.flatten(1)) + self.fc.bias[:, None]).view(x.shape)


class SlidingPSN(nn.Module):
    """gemm: weight [k], threshold [] added. conv: weight [1, 1, k], threshold [] subtracted."""

    def __init__(self, T: int, k: int = 2, form: str = "gemm"):
        super().__init__()
        self.form, self.k = form, k
        self.weight = nn.Parameter(torch.zeros(k) if form == "gemm" else torch.zeros(1, 1, k))
        self.threshold = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[0]
        if self.form == "conv":
            h = F.conv1d(F.pad(x.flatten(1).t().unsqueeze(1), (self.k - 1, 0)), self.weight)
            return step(h.squeeze(1).t() - self.threshold).view(x.shape)
        w = x.new_zeros(T, T)
        for t in range(T):
            for tap in range(self.k):
                if (source := t - self.k + 1 + tap) >= 0:
                    w[t, source] = self.weight[tap]
        return step(w @ x.flatten(1) + self.threshold).view(x.shape)


def each_step(x: Tensor, *layers: nn.Module) -> Tensor:
    T, N = x.shape[:2]
    x = x.flatten(0, 1)
    for layer in layers:
        x = layer(x)
    return x.view(T, N, *x.shape[1:])


# ---- the authors' networks; all give logits [T, N, K]


class SEWBlock(nn.Module):
    def __init__(self, chans: int, width: int, stride: int, neuron, bottleneck: bool):
        super().__init__()
        out = width * 4 if bottleneck else width
        kernels = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        widths = [chans, width, width, out] if bottleneck else [chans, width, width]
        self.count = len(kernels)
        for i, (kernel, by) in enumerate(kernels, start=1):
            conv = nn.Conv2d(widths[i - 1], widths[i], kernel, by, kernel // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(widths[i]))
            setattr(self, f"sn{i}", neuron())
        self.downsample = None
        if stride != 1 or chans != out:
            self.downsample = nn.Sequential(nn.Conv2d(chans, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            self.downsample_sn = neuron()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"sn{i}")(each_step(y, getattr(self, f"conv{i}"), getattr(self, f"bn{i}")))
        return y + (x if self.downsample is None else self.downsample_sn(each_step(x, self.downsample)))


class AuthorsSEWResNet(nn.Module):
    """Names of paper.md's ImageNet files; images [N, 3, H, W]; average pool in the stem."""

    def __init__(self, depth: int, T: int, neuron, pe: bool = True, width: int = 64, num_classes: int = 1000):
        super().__init__()
        self.T = T
        if pe:
            self.pe = nn.Parameter(torch.zeros(T, 1, 1, 1, 1))
            nn.init.trunc_normal_(self.pe, std=0.5)
        blocks, bottleneck = {18: ([2, 2, 2, 2], False), 34: ([3, 4, 6, 3], False), 50: ([3, 4, 6, 3], True)}[depth]
        self.conv1, self.bn1, self.sn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), neuron()
        chans = width
        for stage, count in enumerate(blocks):
            layers = []
            for i in range(count):
                layers.append(SEWBlock(chans, width << stage, 2 if stage and not i else 1, neuron, bottleneck))
                chans = (width << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(chans, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        if hasattr(self, "pe"):
            x = x + self.pe
        x = self.sn1(each_step(x, self.conv1, self.bn1))
        x = F.avg_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((-2, -1)))


class AuthorsCIFARNet(nn.Module):
    """conv.{0..19}, fc.{0..3}. dims 2: images repeated T times; dims 1: a column a time-step."""

    def __init__(self, T: int, neuron, dims: int = 2, width: int = 8, hidden: int = 16, num_classes: int = 10):
        super().__init__()
        self.T, self.dims = T, dims
        conv, norm, pool = ((nn.Conv1d, nn.BatchNorm1d, nn.AvgPool1d), (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d))[
            dims - 1
        ]
        layers, chans = [], 3
        for _ in range(2):
            for _ in range(3):
                layers += [conv(chans, width, 3, padding=1, bias=False), norm(width), neuron()]
                chans = width
            layers.append(pool(2))
        self.conv = nn.Sequential(*layers)
        flat = width * (32 // 4) ** dims
        self.fc = nn.Sequential(nn.Flatten(2), nn.Linear(flat, hidden), neuron(), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(3, 0, 1, 2) if self.dims == 1 else x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        for layer in self.conv:
            x = layer(x) if hasattr(layer, "fc") or hasattr(layer, "threshold") else each_step(x, layer)
        return self.fc(x)


class SeqToANN(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.module = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return each_step(x, self.module)


class ConvNorm(nn.Module):
    def __init__(self, chans: int, out: int):
        super().__init__()
        self.fwd = SeqToANN(nn.Conv2d(chans, out, 3, padding=1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.fwd(x)


class AuthorsVGG(nn.Module):
    """features.N.fwd.module, classifier.0.module.1; frames [T, N, 2, 48, 48] (the authors' are batch first)."""

    def __init__(self, neuron, width: int = 4):
        super().__init__()
        layers, chans = [], 2
        for pair in ((width, 2 * width), (4 * width,) * 2, (8 * width,) * 2, (8 * width,) * 2):
            for out in pair:
                layers += [ConvNorm(chans, out), neuron()]
                chans = out
            layers.append(SeqToANN(nn.AvgPool2d(2)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(SeqToANN(nn.Dropout(0.25), nn.Linear(chans * 9, 10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(2))


# ---- weights that fire, files, inputs


def wake(net: nn.Module, x: Tensor, neurons: type | tuple[type, ...], seed: int = 0) -> dict[str, float]:
    """Random weights, batch norm statistics of x itself; returns the firing rate of every neuron layer."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, low: float, high: float) -> None:
        with torch.no_grad():
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    rates: dict[str, float] = {}
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            fill(module.weight, 0.7, 1.3)
            fill(module.bias, -0.2, 0.5)
            module.momentum = 1.0
        elif isinstance(module, neurons):
            for key, tensor in module.named_parameters():
                if key.endswith("weight"):
                    fill(tensor, 0.1, 0.9)
                elif key.endswith("bias"):
                    fill(tensor, -0.8, -0.1)
                elif key in ("w", "k"):
                    fill(tensor, 0.5, 1.5)
                elif key == "threshold":
                    sign = 1.0 if getattr(module, "form", "") == "conv" else -1.0
                    fill(tensor, *sorted((0.1 * sign, 0.8 * sign)))
                else:
                    fill(tensor, -0.6, 0.4)
            hooks.append(module.register_forward_hook(_keep_rate(rates, name)))
    with torch.no_grad():
        net.train()(x)
        reset_states(net)
        net.eval()(x)
        reset_states(net)
    for hook in hooks:
        hook.remove()
    assert rates and all(0.001 < rate < 0.999 for rate in rates.values()), rates
    return rates


def _keep_rate(rates: dict[str, float], name: str):
    def keep(module, inputs, output):
        rates[name] = float(output.mean())

    return keep


def reset_states(net: nn.Module) -> None:
    """Forget the potentials of SpikingJelly's neurons."""
    for module in net.modules():
        if hasattr(module, "_memories"):
            module.reset()


def save_as_authors(net: nn.Module, path: Path, key: str = "model", **options) -> Path:
    """As the training scripts do: weights, optimiser with momentum, counters, an argparse.Namespace."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 320)
    content = {
        key: net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 277,
        "args": argparse.Namespace(**{"lr": 0.1, "adam": False, "output_dir": "logs", **options}),
        "max_test_acc1": 67.63,
        "test_acc5_at_max_test_acc1": 87.494,
    }
    torch.save(content, path)
    return path


def photographs(count: int, side: int) -> Tensor:
    """[count, 3, side, side], real photographs, normalised; scikit-learn's two where the shared data is absent."""
    paths = sorted((SHARED / "imagenette_mini" / "val").glob("*/*.JPEG"))[:: 300 // count][:count]
    if not paths:
        datasets = pytest.importorskip("sklearn.datasets")
        pictures = [Image.fromarray(datasets.load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
        pictures = [pictures[i % 2].rotate(90 * (i // 2)) for i in range(count)]
    else:
        pictures = [Image.open(path).convert("RGB") for path in paths]
    pixels = np.stack([np.asarray(picture.resize((side, side)), np.float32) / 255 for picture in pictures])
    return ((torch.from_numpy(pixels) - 0.45) / 0.225).permute(0, 3, 1, 2).contiguous()


def cifar10(count: int) -> Tensor:
    """[count, 3, 32, 32] of CIFAR-10's test images, or photographs of that size."""
    pack = SHARED / "cifar10" / "pixels.npz"
    if not pack.is_file():
        return photographs(count, 32)
    with np.load(pack) as arrays:
        blob, offsets = arrays["test_blob"], arrays["test_offsets"]
    images = [Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())) for i in range(count)]
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) / 255 for image in images])
    return ((torch.from_numpy(pixels) - 0.45) / 0.2).permute(0, 3, 1, 2).contiguous()


def recordings(count: int, T: int) -> Tensor:
    """[T, count, 2, 48, 48] counts of N-MNIST's events, in T slices of equal number; random counts without the data."""
    paths = sorted((SHARED / "events" / "nmnist" / "Test").glob("*/*.bin"))[:: 100 // count][:count]
    if not paths:
        return torch.poisson(torch.full((T, count, 2, 48, 48), 0.3), generator=torch.Generator().manual_seed(0))
    frames = torch.zeros(T, count, 2, 48, 48)
    for n, path in enumerate(paths):
        events = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 5)
        for t, part in enumerate(np.array_split(events, T)):
            places = (part[:, 2] >> 7).astype(int), part[:, 1].astype(int), part[:, 0].astype(int)
            np.add.at(frames[t, n].numpy(), places, 1)
    return frames
