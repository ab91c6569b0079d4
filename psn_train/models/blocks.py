"""The blocks of the networks: convolution, batch norm and neuron; spike-element-wise residual blocks.

Legend: T time-steps, N batch, C channels, H x W pixels. Convolutions and batch norms see [T * N, C, H, W], so ordinary
nn.BatchNorm2d and SyncBatchNorm take their statistics over T * N. A neuron follows every batch norm, that of the
shortcut included; none follows the join.
"""

from collections.abc import Callable

from torch import Tensor, nn

from psn_train.models.lean import can_run_again, run_again
from psn_train.models.packed_layers import Join, SpikeConv1d, SpikeConv2d
from psn_train.neurons import Neuron
from psn_train.neurons.kernels.packing import SPIKES, Levels, Packed
from psn_train.neurons.layout import to_images, to_sequence


def per_image(x_seq: Tensor, *layers: nn.Module) -> Tensor:
    """Layers that know nothing of time. [T, N, C, ...] -> [T, N, C', ...]."""
    y = to_images(x_seq)  # [T * N, C, ...]
    for layer in layers:
        y = layer(y)
    return to_sequence(y, x_seq.shape[:2])


def conv(in_chans: int, out_chans: int, kernel: int, stride: int = 1, groups: int = 1) -> SpikeConv2d:
    return SpikeConv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def layer(
    x_seq: Tensor,
    convolution: SpikeConv1d | SpikeConv2d,
    norm: nn.Module,
    neuron: Neuron,
    add: Tensor | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """Convolution, batch norm and neuron, whose spikes are added to `add`. [T, N, C, ...] -> [T, N, C', ...].

    Args:
        packed: what `convolution.pack` made of the images [T * N, C, ...].
    """
    images = to_images(x_seq)  # [T * N, C, ...]
    packed = convolution.pack(images) if packed is None else packed
    lean = packed is not None and convolution.memory == "lean"
    modules = (convolution, norm, neuron)
    if lean and not neuron.joins(norm, x_seq.device) and can_run_again(*modules):
        # what is run again must not hold x_seq itself, which would be kept behind autograd's back
        steps = x_seq.shape[:2]
        spikes = run_again(lambda images: _in_turn(images, packed, steps, *modules), images, packed, modules)
        return spikes if add is None else add + spikes
    y_seq = to_sequence(convolution(images, packed), x_seq.shape[:2])
    ways = {"again": convolution.again(packed) if lean else None, "norm_again": convolution.keeps_less()}
    if add is None or not neuron._forward_hooks:
        return neuron(y_seq, norm=norm, add=add, **ways)
    # somebody looks at the spikes
    return add + neuron(y_seq, norm=norm, **ways)


def _in_turn(images, packed, steps, convolution, norm, neuron) -> Tensor:
    return neuron(to_sequence(convolution(images, packed), steps), norm=norm)


class ConvNeuron(nn.Module):
    """3-wide convolution, batch norm, neuron, in one or two dimensions of space.

    [T, N, C, H, W] -> [T, N, C', H, W], or [T, N, C, L] -> [T, N, C', L].
    """

    def __init__(
        self, in_chans: int, out_chans: int, neuron: Callable[[int], Neuron], dims: int = 2, bias: bool = False
    ):
        super().__init__()
        conv_of, norm_of = (SpikeConv1d, nn.BatchNorm1d) if dims == 1 else (SpikeConv2d, nn.BatchNorm2d)
        self.conv = conv_of(in_chans, out_chans, 3, padding=1, bias=bias)
        self.bn = norm_of(out_chans)
        self.sn = neuron(out_chans)

    def forward(self, x_seq: Tensor) -> Tensor:
        return layer(x_seq, self.conv, self.bn, self.sn)

    def forward_static(self, x: Tensor, T: int) -> Tensor:
        """One image [N, C, ...] seen at each of T steps -> [T, N, C', ...]; convolution and batch norm run once."""
        return self.sn.forward_static(self.conv(x), T, norm=self.bn)


class Block(nn.Module):
    """What the two kinds of block share: the shortcut and the join. `neuron` makes a layer for C channels."""

    expansion = 1

    def make_shortcut(
        self, in_chans: int, out_chans: int, stride: int, neuron: Callable[[int], Neuron], connect: str
    ) -> None:
        self.join = Join(connect)
        self.downsample = self.downsample_sn = None
        if stride != 1 or in_chans != out_chans:
            self.downsample = nn.Sequential(conv(in_chans, out_chans, 1, stride), nn.BatchNorm2d(out_chans))
            self.downsample_sn = neuron(out_chans)

    def expect(self, levels: Levels) -> Levels:
        """Say what the block's input is made of; returns what its output is."""
        self.conv1.levels = levels
        for convolution in (self.conv2, getattr(self, "conv3", None)):
            if convolution is not None:
                convolution.levels = SPIKES
        if self.downsample is not None:
            self.downsample[0].levels = levels
            levels = SPIKES
        self.join.levels = SPIKES
        most = levels.most + (levels.parts if self.join.connect_function == "ADD" else 0)
        return Levels(most, levels.parts)

    def residual(self, x_seq: Tensor, packed: Packed | None, add: Tensor | None = None) -> Tensor:
        """The spikes of the branch, plus `add`; `packed`: see `layer`."""
        raise NotImplementedError

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, C, H, W] -> [T, N, C', H', W']."""
        identity, packed = x_seq, self.conv1.pack(to_images(x_seq))
        shortcut = packed
        if self.downsample is not None:
            identity, shortcut = layer(x_seq, *self.downsample, self.downsample_sn, packed=packed), None
        if self.join.connect_function == "ADD":
            return self.residual(x_seq, packed, add=identity)
        out = self.residual(x_seq, packed)
        return to_sequence(self.join(to_images(identity), to_images(out), shortcut), x_seq.shape[:2])


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

    def residual(self, x_seq: Tensor, packed: Packed | None, add: Tensor | None = None) -> Tensor:
        x_seq = layer(x_seq, self.conv1, self.bn1, self.sn1, packed=packed)
        return layer(x_seq, self.conv2, self.bn2, self.sn2, add)


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

    def residual(self, x_seq: Tensor, packed: Packed | None, add: Tensor | None = None) -> Tensor:
        x_seq = layer(x_seq, self.conv1, self.bn1, self.sn1, packed=packed)
        x_seq = layer(x_seq, self.conv2, self.bn2, self.sn2)
        return layer(x_seq, self.conv3, self.bn3, self.sn3, add)
