"""The paper's plain convolutional networks with any neuron: cifar_net, sequential_net and vgg_snn.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes. Every convolution is 3 wide with padding 1, followed
by batch norm and neuron; every stage ends in an average pool of 2; every time-step has its own logits.

Source: Fang et al., "Parallel Spiking Neurons", NeurIPS 2023, arXiv 2304.12760, and its authors' code.
"""

import torch
from torch import Tensor, nn

from psn_train.models.blocks import ConvNeuron, per_image
from psn_train.models.network import SpikingNetwork
from psn_train.models.registration import register_family

__all__ = ["VGGSNN", "CIFARNet", "SequentialNet"]


class Stage(nn.Sequential):
    """Layers of `ConvNeuron`, then an average pool of 2 in each dimension of space."""

    def __init__(self, layers: list[ConvNeuron], dims: int):
        super().__init__(*layers)
        self.pool = nn.AvgPool1d(2) if dims == 1 else nn.AvgPool2d(2)

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, C, ...] -> [T, N, C', ...], half as large in space."""
        return self.after_first(self[0](x_seq))

    def after_first(self, x_seq: Tensor) -> Tensor:
        """What comes behind the first layer: a static image passes that one by another way."""
        for layer in list(self)[1:-1]:
            x_seq = layer(x_seq)
        return per_image(x_seq, self.pool)


class ConvNet(SpikingNetwork):
    """Stages of convolutions, then linear layers; a kind of it fixes the sizes. Names: layer1.0.conv, .bn, .sn, ...

    Args, beside those of `SpikingNetwork`:
        stages: channels of each convolution, stage by stage.
        img_size: side of the square that enters, in pixels (timm gives a pair); the first linear layer depends on it.
        dims: of space, 1 or 2. hidden: width of a linear layer with neurons before the classifier; 0: none.
        conv_bias: convolutions have a bias.
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        img_size: int | tuple[int, int],
        dims: int,
        hidden: int,
        conv_bias: bool,
        in_chans: int,
        num_classes: int,
        **network,
    ):
        super().__init__(in_chans=in_chans, num_classes=num_classes, **network)
        side, other = (img_size, img_size) if isinstance(img_size, int) else img_size
        left = side >> len(stages)
        if side != other or left < 1 or min(map(min, stages)) < 1 or hidden < 0:
            raise ValueError(
                f"{self._where}: got img_size={img_size}, channels {stages}, hidden {hidden}; wanted a square of at "
                f"least {2 ** len(stages)} pixels, for the {len(stages)} pools, and channels of at least 1"
            )
        self.dims, self.side = dims, side
        self.stage_names = [f"layer{number}" for number in range(1, len(stages) + 1)]
        chans = in_chans
        for name, widths in zip(self.stage_names, stages, strict=True):
            layers = []
            for width in widths:
                layers.append(ConvNeuron(chans, width, self.make_neuron, dims, conv_bias))
                chans = width
            self.add_module(name, Stage(layers, dims))
        self.num_features = chans
        flat = chans * left**dims
        self.hidden = nn.Linear(flat, hidden) if hidden else None
        self.hidden_sn = self.make_neuron(hidden) if hidden else None
        self.head_hidden_size = hidden or flat
        self.reset_classifier(num_classes)

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

    Args, beside those of `SpikingNetwork`: width of the convolutions, hidden layer, img_size (pixels), drop_rate.
    """

    def __init__(
        self,
        neuron: str = "psn",
        T: int = 4,
        k: int | None = None,
        surrogate: str = "atan",
        alpha: float = 2.0,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 256,
        hidden: int = 4096,
        img_size: int | tuple[int, int] = 32,
        drop_rate: float = 0.0,
        **neuron_options,
    ):
        super().__init__(
            ((width,) * 3,) * 2,
            img_size,
            2,
            hidden,
            False,
            in_chans,
            num_classes,
            neuron=neuron,
            T=T,
            k=k,
            surrogate=surrogate,
            alpha=alpha,
            drop_rate=drop_rate,
            neuron_options=neuron_options,
        )


class SequentialNet(ConvNet):
    """The paper's network for sequential CIFAR: one column of the image a time-step, convolutions along the column.

    [N, C, H, W] with W = T columns -> [N, K]; step by step a column [N, C, H]. Two stages of three convolutions, a
    hidden layer, a classifier. 520,810 parameters with PSN and T = 32. PyTorch's own initialisation.

    Args, beside those of `SpikingNetwork`: width of the convolutions, hidden layer, img_size (pixels), drop_rate.
    """

    def __init__(
        self,
        neuron: str = "psn",
        T: int = 32,
        k: int | None = None,
        surrogate: str = "atan",
        alpha: float = 2.0,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 128,
        hidden: int = 256,
        img_size: int | tuple[int, int] = 32,
        drop_rate: float = 0.0,
        **neuron_options,
    ):
        super().__init__(
            ((width,) * 3,) * 2,
            img_size,
            1,
            hidden,
            False,
            in_chans,
            num_classes,
            neuron=neuron,
            T=T,
            k=k,
            surrogate=surrogate,
            alpha=alpha,
            drop_rate=drop_rate,
            neuron_options=neuron_options,
        )

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

    Args, beside those of `SpikingNetwork`: width of the first convolution, img_size (pixels), drop_rate.
    """

    def __init__(
        self,
        neuron: str = "psn",
        T: int = 10,
        k: int | None = None,
        surrogate: str = "atan",
        alpha: float = 2.0,
        num_classes: int = 10,
        in_chans: int = 2,
        width: int = 64,
        img_size: int | tuple[int, int] = 48,
        drop_rate: float = 0.25,
        **neuron_options,
    ):
        super().__init__(
            ((width, 2 * width), (4 * width, 4 * width), (8 * width, 8 * width), (8 * width, 8 * width)),
            img_size,
            2,
            0,
            True,
            in_chans,
            num_classes,
            neuron=neuron,
            T=T,
            k=k,
            surrogate=surrogate,
            alpha=alpha,
            drop_rate=drop_rate,
            neuron_options=neuron_options,
        )
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
        "license": "apache-2.0",
    }


_CIFAR10 = _cfg(32, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
register_family(__name__, CIFARNet, {"cifar_net": {}}, _CIFAR10)
register_family(__name__, SequentialNet, {"sequential_net": {}}, _CIFAR10)
register_family(__name__, VGGSNN, {"vgg_snn": {}}, _cfg(48, 2, (0.0, 0.0), (1.0, 1.0)))
