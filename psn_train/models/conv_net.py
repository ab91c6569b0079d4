"""The paper's plain convolutional networks with any neuron: cifar_net, sequential_net and vgg_snn.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes. Every convolution is 3 wide with padding 1, followed
by batch norm and neuron; every stage ends in an average pool of 2; every time-step has its own logits.

Source: Fang et al., "Parallel Spiking Neurons", NeurIPS 2023, arXiv 2304.12760, and its authors' code.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from psn_train.models.blocks import ConvNeuron, per_image
from psn_train.models.network import SpikingNetwork
from psn_train.models.packed_pools import SpikeAvgPool1d, SpikeAvgPool2d
from psn_train.models.registration import register_family
from psn_train.neurons.kernels.packing import SPIKES, Levels

__all__ = ["VGGSNN", "CIFARNet", "SequentialNet"]


class Stage(nn.Sequential):
    """Layers of `ConvNeuron`, then an average pool of 2 in each dimension of space."""

    def __init__(self, layers: list[ConvNeuron], dims: int):
        super().__init__(*layers)
        self.pool = SpikeAvgPool1d(2) if dims == 1 else SpikeAvgPool2d(2)
        for convolution in (layer.conv for layer in layers[1:]):
            convolution.levels = SPIKES

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, C, ...] -> [T, N, C', ...], half as large in space."""
        return self.after_first(self[0](x_seq))

    def after_first(self, x_seq: Tensor) -> Tensor:
        """What comes behind the first layer: a static image passes that one by another way."""
        for layer in list(self)[1:-1]:
            x_seq = layer(x_seq)
        return per_image(x_seq, self.pool)


class Sizes(NamedTuple):
    """What a kind of network is, and the defaults of its arguments."""

    stages: tuple[tuple[int, ...], ...]  # channels of each convolution, in multiples of width
    dims: int  # of space
    conv_bias: bool
    T: int
    in_chans: int
    width: int
    hidden: int
    img_size: int
    drop_rate: float


class ConvNet(SpikingNetwork):
    """Stages of convolutions, then linear layers. Names: layer1.0.conv, .bn, .sn, ..., hidden, hidden_sn, fc.

    Further arguments are those of `SpikingNetwork`; None is the default of the kind of network, see its `sizes`.

    Args:
        width: channels that the stages are multiples of.
        hidden: width of a linear layer with neurons before the classifier; 0: none.
        img_size: side of the square that enters, in pixels (timm gives a pair); the first linear layer depends on it.
        drop_rate: dropout before the classifier.
    """

    sizes: Sizes

    def __init__(
        self,
        neuron: str = "psn",
        T: int | None = None,
        k: int | None = None,
        surrogate: str = "atan",
        alpha: float = 2.0,
        num_classes: int = 10,
        in_chans: int | None = None,
        width: int | None = None,
        hidden: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float | None = None,
        **neuron_options,
    ):
        def given(name: str, value):
            return getattr(self.sizes, name) if value is None else value

        T, in_chans, drop_rate = given("T", T), given("in_chans", in_chans), given("drop_rate", drop_rate)
        width, hidden, img_size = given("width", width), given("hidden", hidden), given("img_size", img_size)
        super().__init__(neuron, T, k, surrogate, alpha, num_classes, in_chans, drop_rate, neuron_options)
        stages, dims = self.sizes.stages, self.sizes.dims
        side, other = (img_size, img_size) if isinstance(img_size, int) else img_size
        left = side >> len(stages)
        if side != other or left < 1 or width < 1 or hidden < 0:
            raise ValueError(
                f"{self._where}: got img_size={img_size}, width={width}, hidden={hidden}; wanted a square of at least "
                f"{2 ** len(stages)} pixels, for the {len(stages)} pools, and at least 1 and 0"
            )
        self.side = side
        self.stage_names = [f"layer{number}" for number in range(1, len(stages) + 1)]
        chans = in_chans
        for name, multiples in zip(self.stage_names, stages, strict=True):
            layers = []
            for multiple in multiples:
                layers.append(ConvNeuron(chans, multiple * width, self.make_neuron, dims, self.sizes.conv_bias))
                chans = multiple * width
            if name != self.stage_names[0]:
                # averages over a window of spikes
                layers[0].conv.levels = Levels(2**dims, 2**dims)
            self.add_module(name, Stage(layers, dims))
        self.num_features = chans
        flat = chans * left**dims
        self.hidden = nn.Linear(flat, hidden) if hidden else None
        self.hidden_sn = self.make_neuron(hidden) if hidden else None
        self.head_hidden_size = hidden or flat
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """PyTorch's own initialisation, unless a kind of network says otherwise."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        found = super().defaults()
        return {**found, **{name: value for name, value in cls.sizes._asdict().items() if name in found}}

    @property
    def first_neuron(self):
        return self.layer1[0].sn

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> [T, N, F, H', W']."""
        self.check_input(x)
        first, *others = (getattr(self, name) for name in self.stage_names)
        if x.ndim == 5:
            x_seq = self.run_stage(first, x)
        else:
            x_seq = first.after_first(first[0].forward_static(x, self.T))
        for stage in others:
            x_seq = self.run_stage(stage, x_seq)
        return x_seq

    def forward_head(self, x_seq: Tensor, pre_logits: bool = False, per_step: bool = False) -> Tensor:
        """[T, N, F, H', W'] -> [N, K], or with pre_logits what enters the classifier; per_step keeps T in front."""
        x_seq = x_seq.flatten(2)
        if self.hidden is not None:
            x_seq = self.hidden_sn(self.hidden(x_seq))
        return self.classify(x_seq, pre_logits, per_step)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        self._check_side(x.shape[-2:])

    def _check_side(self, shape: torch.Size) -> None:
        if tuple(shape) != (self.side, self.side):
            raise ValueError(
                f"{self._where}: got images of {' x '.join(map(str, shape))} pixels, wanted {self.side} x {self.side}; "
                "resize them, or make the network with img_size"
            )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of num_classes; 0: none, the model then returns what enters it. There is no global pool."""
        if global_pool:
            raise ValueError(f"{self._where}: got global_pool={global_pool!r}; it flattens its features, leave it out")
        self._new_classifier(self.head_hidden_size, num_classes, like=self.layer1[0].conv.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^layer1\.0\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class CIFARNet(ConvNet):
    """The paper's network for static CIFAR-10: two stages of three convolutions, a hidden layer, a classifier.

    [N, C, 32, 32] or frames [T, N, C, 32, 32] -> [N, K]. 70,113,174 parameters with PSN and T = 4, of which the hidden
    layer has 67.1 million. PyTorch's own initialisation.
    """

    sizes = Sizes(((1, 1, 1), (1, 1, 1)), 2, False, T=4, in_chans=3, width=256, hidden=4096, img_size=32, drop_rate=0.0)


class SequentialNet(ConvNet):
    """The paper's network for sequential CIFAR: one column of the image a time-step, convolutions along the column.

    [N, C, H, W] with W = T columns -> [N, K]; step by step a column [N, C, H]. Two stages of three convolutions, a
    hidden layer, a classifier. 520,810 parameters with PSN and T = 32. PyTorch's own initialisation.
    """

    sizes = Sizes(((1, 1, 1), (1, 1, 1)), 1, False, T=32, in_chans=3, width=128, hidden=256, img_size=32, drop_rate=0.0)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [W, N, F, H'], a time-step for every column."""
        if not self.is_streaming:
            self.check_input(x)
            x = x.permute(3, 0, 1, 2)  # [W, N, C, H]
        for name in self.stage_names:
            x = self.run_stage(getattr(self, name), x)
        return x

    def check_input(self, x: Tensor) -> None:
        wanted = f"[N, {self.in_chans}, {self.side}, {self.T}]"
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"{self._where}: got an input of shape {tuple(x.shape)}, wanted {wanted}")
        self._check_values(x, wanted)
        if x.shape[2] != self.side:
            raise ValueError(f"{self._where}: got images {x.shape[2]} pixels high, wanted {self.side}; see img_size")
        bound = self.first_neuron.T
        if bound is not None and x.shape[3] != bound:
            raise ValueError(
                f"{self._where}: got images of {x.shape[3]} columns, wanted T={bound}: a column is a time-step"
            )

    def _check_frame(self, frame: Tensor) -> None:
        wanted = f"a column [N, {self.in_chans}, {self.side}]"
        if frame.ndim != 3 or tuple(frame.shape[1:]) != (self.in_chans, self.side):
            raise ValueError(f"{self._where}.step: got shape {tuple(frame.shape)}, wanted {wanted}")
        self._check_values(frame, wanted)


class VGGSNN(ConvNet):
    """The paper's network for CIFAR10-DVS: eight convolutions with bias in four stages, dropout, a classifier.

    Frames [T, N, 2, 48, 48] or images [N, C, 48, 48] -> [N, K]. What the authors call PSN on this data is a sliding PSN
    of order 2 with init="exp": vgg_snn_sliding_psn, 9,271,522 parameters. Convolutions kaiming_normal (fan out).
    """

    sizes = Sizes(
        ((1, 2), (4, 4), (8, 8), (8, 8)), 2, True, T=10, in_chans=2, width=64, hidden=0, img_size=48, drop_rate=0.25
    )

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _cfg(side: int, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict:
    return {
        "num_classes": 10,
        "input_size": (channels, side, side),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "first_conv": "layer1.0.conv",
        "classifier": "fc",
    }


_CIFAR10 = _cfg(32, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
register_family(__name__, CIFARNet, {"cifar_net": {}}, _CIFAR10)
register_family(__name__, SequentialNet, {"sequential_net": {}}, _CIFAR10)
register_family(__name__, VGGSNN, {"vgg_snn": {}}, _cfg(48, 2, (0.0, 0.0), (1.0, 1.0)))
