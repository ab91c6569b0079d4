"""SEW-ResNet with any spiking neuron, registered with timm as ARCHITECTURE_NEURON: sew_resnet18_psn, and so on.

The architectures are torchvision's ResNets of 18 to 152 layers, a smaller one of 10, ResNeXts and wide ResNets.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes, F features before the classifier.
A block maps [T, N, C, H, W] to [T, N, C', H', W']; convolutions and batch norms see [T * N, C, H, W], so ordinary
nn.BatchNorm2d and SyncBatchNorm take their statistics over T * N.

Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks", NeurIPS 2021, arXiv 2102.04159, with the
neurons and the ImageNet set-up of "Parallel Spiking Neurons", NeurIPS 2023, arXiv 2304.12760: a neuron after every
batch norm, the down-sampling path included; none after the join; average pool in the stem.
"""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from psn_train.models.blocks import BasicBlock, Block, Bottleneck, conv, layer, per_image
from psn_train.models.network import SpikingNetwork, choose
from psn_train.models.packed_layers import CONNECT_FUNCTIONS
from psn_train.models.packed_pools import SpikeAvgPool2d, SpikeMaxPool2d
from psn_train.models.registration import register_family
from psn_train.neurons.kernels.packing import SPIKES, Levels

__all__ = ["ARCHITECTURES", "DEPTHS", "SEWResNet"]

STEM_POOLS = {"avg": SpikeAvgPool2d, "max": SpikeMaxPool2d}
STEMS = ("7x7", "3x3")
GLOBAL_POOLS = ("avg", "max", "")

# depth -> kind of block, blocks per stage; 10 is for small images and for tests
DEPTHS: dict[int, tuple[type[Block], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

# the name of an architecture without its neuron -> the arguments that make it
ARCHITECTURES: dict[str, dict[str, int]] = {
    **{f"sew_resnet{depth}": {"depth": depth} for depth in DEPTHS},
    "sew_resnext50_32x4d": {"depth": 50, "groups": 32, "base_width": 4},
    "sew_resnext101_32x8d": {"depth": 101, "groups": 32, "base_width": 8},
    "sew_wide_resnet50_2": {"depth": 50, "base_width": 128},
    "sew_wide_resnet101_2": {"depth": 101, "base_width": 128},
}


class SEWResNet(SpikingNetwork):
    """SEW-ResNet. Static images [N, C, H, W] or frames [T, N, C, H, W] -> logits [N, K]; see `forward`.

    All arguments are JSON scalars; neuron, T, k, surrogate, alpha and those of the neuron are `SpikingNetwork`'s.

    Args:
        depth: 10, 18, 34, 50, 101 or 152.
        connect_function: ADD, AND or IAND.
        stem: "7x7" convolution of stride 2 and a pool, for ImageNet; "3x3" of stride 1 without, for 28 to 64 pixels.
        stem_pool: "avg" as in the paper's code, "max" as in SpikingJelly.
        pe: add a learned number per time-step to the image, as the authors' released code does; the stem then
            runs at every step.
        width: channels of the first stage.
        groups, base_width: of the bottlenecks' 3x3 convolutions, as torchvision has them in ResNeXt and wide ResNet.
        drop_rate: dropout before the classifier. global_pool: "avg", "max", or "" (needs num_classes=0).

    Errors: ValueError that lists the choices.
    """

    def __init__(
        self,
        depth: int = 18,
        neuron: str = "psn",
        T: int = 4,
        k: int | None = None,
        connect_function: str = "ADD",
        surrogate: str = "atan",
        alpha: float = 2.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: str = "7x7",
        stem_pool: str = "avg",
        pe: bool = False,
        width: int = 64,
        groups: int = 1,
        base_width: int = 64,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **neuron_options,
    ):
        where = "SEWResNet"
        super().__init__(neuron, T, k, surrogate, alpha, num_classes, in_chans, drop_rate, neuron_options)
        choose(where, "depth", depth, DEPTHS)
        choose(where, "connect_function", connect_function, CONNECT_FUNCTIONS)
        choose(where, "stem", stem, STEMS)
        choose(where, "stem_pool", stem_pool, STEM_POOLS)
        if min(width, groups, base_width) < 1:
            raise ValueError(
                f"{where}: got width={width}, groups={groups}, base_width={base_width}; wanted at least 1 of each"
            )
        block, blocks = DEPTHS[depth]
        self.depth, self.connect_function = depth, connect_function

        # one axis, because model.to(memory_format=torch.channels_last) refuses a parameter of five
        self.pe = nn.Parameter(torch.empty(T)) if pe else None
        large = stem == "7x7"
        self.conv1 = conv(in_chans, width, 7, 2) if large else conv(in_chans, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.sn1 = self.make_neuron(width)
        self.stem_pool = STEM_POOLS[stem_pool](3, 2, 1) if large else nn.Identity()
        chans, reduction = width, 2 if large else 1
        self.feature_info = [{"num_chs": chans, "reduction": reduction, "module": "sn1"}]
        reduction *= 2 if large else 1
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(
                    block(chans, width * 2**stage, stride, self.make_neuron, connect_function, groups, base_width)
                )
                chans = width * 2**stage * block.expansion
            reduction *= 2 if stage > 0 else 1
            self.feature_info.append({"num_chs": chans, "reduction": reduction, "module": f"layer{stage + 1}"})
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self._expect_levels(large, stem_pool)
        self.num_features = self.head_hidden_size = chans
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def _expect_levels(self, pooled: bool, stem_pool: str) -> None:
        """Tell every layer what its input is made of, so that it is kept small for the backward pass."""
        levels = SPIKES
        if pooled:
            self.stem_pool.levels = SPIKES
            # of a window of nine spikes
            levels = Levels(9, 9) if stem_pool == "avg" else SPIKES
        for stage in self._stages():
            for block in stage:
                levels = block.expect(levels)

    def init_weights(self) -> None:
        """Convolutions kaiming_normal (fan out, ReLU gain), pe normal with std 0.02; the rest initialises itself."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.pe is not None:
            trunc_normal_(self.pe, std=0.02)

    @property
    def first_neuron(self):
        return self.sn1

    # ---- forward

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> [T, N, F, H', W']. With `pe` the stem runs at every step."""
        x_seq = per_image(self._stem(x), self.stem_pool)
        for stage in self._stages():
            x_seq = self.run_stage(stage, x_seq)
        return x_seq

    def forward_head(self, x_seq: Tensor, pre_logits: bool = False, per_step: bool = False) -> Tensor:
        """[T, N, F, H', W'] -> [N, K], or with pre_logits [N, F]; per_step keeps T in front."""
        return self.classify(self._pool(x_seq), pre_logits, per_step)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's feature interface: level 0 the stem's spikes, 1 to 4 the stages, each the mean over T [N, C, H, W].

        A mean of spikes is a firing rate; after ADD joins it is a mean sum of spikes. The first of the pair returned
        without intermediates_only is [T, N, F, H', W'].
        """
        choose("SEWResNet", "output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(len(self.feature_info), indices)
        x_seq = self._stem(x)
        levels = [x_seq.mean(0)] if 0 in take else []
        x_seq = per_image(x_seq, self.stem_pool)
        for level, stage in enumerate(self._stages(), start=1):
            if stop_early and level > last:
                break
            x_seq = self.run_stage(stage, x_seq)
            if level in take:
                levels.append(x_seq.mean(0))
        return levels if intermediates_only else (x_seq, levels)

    def _stem(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> spikes [T, N, width, H', W'], before the pool."""
        self.check_input(x)
        if self.pe is not None:
            pe = self.pe[self._t : self._t + 1] if self.is_streaming else self.pe
            x_seq = (x if x.ndim == 5 else x.unsqueeze(0)) + pe.view(-1, 1, 1, 1, 1)
        elif x.ndim == 4:
            return self.sn1.forward_static(self.conv1(x), self.T, norm=self.bn1)
        else:
            x_seq = x
        return layer(x_seq, self.conv1, self.bn1, self.sn1)

    def _stages(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def _pool(self, x_seq: Tensor) -> Tensor:
        if self.global_pool == "":
            return x_seq
        return x_seq.mean((-2, -1)) if self.global_pool == "avg" else x_seq.amax((-2, -1))

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if self.pe is None or x.ndim == 4:
            return
        if self.is_streaming and self._t == self.T:
            raise ValueError(f"SEWResNet.step: step {self._t + 1} of T={self.T}; call reset() before a new sequence")
        if not self.is_streaming and x.shape[0] != self.T:
            raise ValueError(
                f"SEWResNet: got {x.shape[0]} frames, wanted T={self.T}, as pe has one entry for each step"
            )

    # ---- what timm's tools ask of a model

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of num_classes; 0: none, the model then returns features."""
        pool = self.global_pool if global_pool is None else global_pool
        choose("SEWResNet", "global_pool", pool, GLOBAL_POOLS)
        if pool == "" and num_classes > 0:
            raise ValueError(f"SEWResNet: got global_pool='' and num_classes={num_classes}; a classifier needs a pool")
        self.global_pool = pool
        self._new_classifier(self.num_features, num_classes, like=self.conv1.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {
            "stem": r"^(?:pe|conv1|bn1|sn1)(?:\.|$)",
            "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)",
        }

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages above the highest of the levels asked for; returns the levels as positive indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for level in range(last + 1, len(self.feature_info)):
            self.add_module(f"layer{level}", nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        return take


register_family(
    __name__,
    SEWResNet,
    ARCHITECTURES,
    {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
    },
    feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"},
)
