"""The blocks of the networks: convolution, batch norm and neuron; spike-element-wise residual blocks.

Legend: T time-steps, N batch, C channels, H x W pixels. Convolutions and batch norms see [T * N, C, H, W], so ordinary
nn.BatchNorm2d and SyncBatchNorm take their statistics over T * N. A neuron follows every batch norm, that of the
shortcut included; none follows the join.
"""

import contextlib
from collections.abc import Callable

from torch import Tensor, nn

from psn_train.neurons import Neuron

# ADD: sum of spikes; AND: both fire; IAND: the shortcut fires and the residual branch does not
CONNECT_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ADD": lambda identity, out: identity + out,
    "AND": lambda identity, out: identity * out,
    "IAND": lambda identity, out: identity * (1.0 - out),
}


def join(identity: Tensor, out: Tensor, connect_function: str = "ADD") -> Tensor:
    """The element-wise join of the shortcut and the residual branch, in this order in every block. [...] -> [...]."""
    return CONNECT_FUNCTIONS[connect_function](identity, out)


def per_image(x_seq: Tensor, *layers: nn.Module) -> Tensor:
    """Layers that know nothing of time. [T, N, C, ...] -> [T, N, C', ...]."""
    y = x_seq.flatten(0, 1)  # [T * N, C, ...]
    for layer in layers:
        y = layer(y)
    return y.unflatten(0, x_seq.shape[:2])


def conv(in_chans: int, out_chans: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class ConvNeuron(nn.Module):
    """3-wide convolution, batch norm, neuron, in one or two dimensions of space.

    [T, N, C, H, W] -> [T, N, C', H, W], or [T, N, C, L] -> [T, N, C', L].
    """

    def __init__(
        self, in_chans: int, out_chans: int, neuron: Callable[[int], Neuron], dims: int = 2, bias: bool = False
    ):
        super().__init__()
        conv_of, norm_of = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.conv = conv_of(in_chans, out_chans, 3, padding=1, bias=bias)
        self.bn = norm_of(out_chans)
        self.sn = neuron(out_chans)

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.sn(per_image(x_seq, self.conv), norm=self.bn)

    def forward_static(self, x: Tensor, T: int) -> Tensor:
        """One image [N, C, ...] seen at each of T steps -> [T, N, C', ...]; convolution and batch norm run once."""
        return self.sn.forward_static(self.conv(x), T, norm=self.bn)


class Block(nn.Module):
    """What the two kinds of block share: the shortcut and the join. `neuron` makes a layer for C channels."""

    expansion = 1

    def make_shortcut(
        self, in_chans: int, out_chans: int, stride: int, neuron: Callable[[int], Neuron], connect: str
    ) -> None:
        self.connect_function = connect
        self.downsample = self.downsample_sn = None
        if stride != 1 or in_chans != out_chans:
            self.downsample = nn.Sequential(conv(in_chans, out_chans, 1, stride), nn.BatchNorm2d(out_chans))
            self.downsample_sn = neuron(out_chans)

    def residual(self, x_seq: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, C, H, W] -> [T, N, C', H', W']."""
        identity = x_seq
        if self.downsample is not None:
            convolution, norm = self.downsample
            identity = self.downsample_sn(per_image(x_seq, convolution), norm=norm)
        return join(identity, self.residual(x_seq), self.connect_function)

    def extra_repr(self) -> str:
        return f"connect_function={self.connect_function}"


class BasicBlock(Block):
    """Two 3x3 convolutions, each with batch norm and neuron."""

    def __init__(
        self,
        in_chans: int,
        width: int,
        stride: int,
        neuron: Callable[[int], Neuron],
        connect: str,
        groups: int = 1,
        base_width: int = 64,
    ):
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock: got groups={groups}, base_width={base_width}; only bottlenecks have them")
        super().__init__()
        self.conv1, self.bn1, self.sn1 = conv(in_chans, width, 3, stride), nn.BatchNorm2d(width), neuron(width)
        self.conv2, self.bn2, self.sn2 = conv(width, width, 3), nn.BatchNorm2d(width), neuron(width)
        self.make_shortcut(in_chans, width, stride, neuron, connect)

    def residual(self, x_seq: Tensor) -> Tensor:
        x_seq = self.sn1(per_image(x_seq, self.conv1), norm=self.bn1)
        return self.sn2(per_image(x_seq, self.conv2), norm=self.bn2)


class Bottleneck(Block):
    """1x1, 3x3 (with the stride, as torchvision has it), 1x1 convolutions, each with batch norm and neuron.

    groups and base_width (channels of a group where the stage has 64) widen the 3x3 one: ResNeXt, wide ResNet.
    """

    expansion = 4

    def __init__(
        self,
        in_chans: int,
        width: int,
        stride: int,
        neuron: Callable[[int], Neuron],
        connect: str,
        groups: int = 1,
        base_width: int = 64,
    ):
        out_chans, inner = width * self.expansion, width * base_width // 64 * groups
        super().__init__()
        self.conv1, self.bn1, self.sn1 = conv(in_chans, inner, 1), nn.BatchNorm2d(inner), neuron(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups), nn.BatchNorm2d(inner)
        self.sn2 = neuron(inner)
        self.conv3, self.bn3, self.sn3 = conv(inner, out_chans, 1), nn.BatchNorm2d(out_chans), neuron(out_chans)
        self.make_shortcut(in_chans, out_chans, stride, neuron, connect)

    def residual(self, x_seq: Tensor) -> Tensor:
        x_seq = self.sn1(per_image(x_seq, self.conv1), norm=self.bn1)
        x_seq = self.sn2(per_image(x_seq, self.conv2), norm=self.bn2)
        return self.sn3(per_image(x_seq, self.conv3), norm=self.bn3)


@contextlib.contextmanager
def no_running_stats(stage: nn.Module):
    """Batch norms leave their running statistics and counters alone: a recomputation is no new batch."""
    norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    norms = [(m, m.momentum, m.num_batches_tracked) for m in norms if m.track_running_stats]
    for norm, _, count in norms:
        # the same operations on the same buffers, as checkpointing demands, without an effect
        norm.momentum, norm.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
