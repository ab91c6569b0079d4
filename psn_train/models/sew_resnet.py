"""SEW-ResNet with any spiking neuron, registered with timm as sew_resnet{10,18,34,50,101,152}_{neuron}.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes, F features before the classifier.
A block maps [T, N, C, H, W] to [T, N, C', H', W']; convolutions and batch norms see [T * N, C, H, W], so ordinary
nn.BatchNorm2d and SyncBatchNorm take their statistics over T * N.

Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks", NeurIPS 2021, arXiv 2102.04159, with the
neurons and the ImageNet set-up of "Parallel Spiking Neurons", NeurIPS 2023, arXiv 2304.12760: a neuron after every
batch norm, the down-sampling path included; none after the join; average pool in the stem.
"""

import contextlib
from collections.abc import Callable

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psn_train.models.blocks import CONNECT_FUNCTIONS, BasicBlock, Block, Bottleneck, conv, no_running_stats, per_image
from psn_train.neurons import NEURONS, Neuron, build_neuron, reset, set_step_mode, spiking_neurons

__all__ = ["DEPTHS", "SEWResNet"]

STEM_POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}
STEMS = ("7x7", "3x3")
GLOBAL_POOLS = ("avg", "max", "")


def _choose(where: str, name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{where}: got {name}={value!r}, wanted one of {', '.join(map(repr, choices))}")


# depth -> kind of block, blocks per stage; 10 is for small images and for tests
DEPTHS: dict[int, tuple[type[Block], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class SEWResNet(nn.Module):
    """SEW-ResNet. Static images [N, C, H, W] or frames [T, N, C, H, W] -> logits [N, K]; see `forward`.

    Args (all JSON scalars, so that they survive a model hub's config.json):
        depth: 10, 18, 34, 50, 101 or 152.
        neuron: psn, masked_psn, sliding_psn, lif or if.
        T: time-steps of a static image; frames must have as many for psn and masked_psn.
        k: order of masked and sliding PSN; default 2 (the order of the paper's convolutional network), at most T.
        connect_function: ADD, AND or IAND.
        surrogate, alpha: surrogate gradient: atan, sigmoid, triangle or rectangle, and its sharpness.
        stem: "7x7" convolution of stride 2 and a pool, for ImageNet; "3x3" of stride 1 without, for 28 to 64 pixels.
        stem_pool: "avg" as in the paper's code, "max" as in SpikingJelly.
        pe: add a learned number per time-step to the image, as the authors' released code does; the stem then
            runs at every step.
        width: channels of the first stage.
        drop_rate: dropout before the classifier. global_pool: "avg", "max", or "" (needs num_classes=0).
        exp_init: of sliding_psn. tau, decay_input: of lif. v_threshold, v_reset (None: soft), detach_reset: of lif, if.

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
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        exp_init: bool = False,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = True,
    ):
        super().__init__()
        where = "SEWResNet"
        _choose(where, "depth", depth, DEPTHS)
        _choose(where, "neuron", neuron, NEURONS)
        _choose(where, "connect_function", connect_function, CONNECT_FUNCTIONS)
        _choose(where, "stem", stem, STEMS)
        _choose(where, "stem_pool", stem_pool, STEM_POOLS)
        if T < 1 or in_chans < 1 or num_classes < 0 or width < 1:
            raise ValueError(
                f"{where}: got T={T}, in_chans={in_chans}, num_classes={num_classes}, width={width}; wanted at "
                "least 1, 1, 0 and 1"
            )
        block, blocks = DEPTHS[depth]
        accepted = NEURONS[neuron][1]
        if k is None and "k" in accepted:
            k = min(2, T)
        options = {
            "exp_init": exp_init,
            "tau": tau,
            "decay_input": decay_input,
            "v_threshold": v_threshold,
            "v_reset": v_reset,
            "detach_reset": detach_reset,
        }
        options = {name: value for name, value in options.items() if name in accepted}

        def make_neuron() -> Neuron:
            return build_neuron(neuron, T, k, surrogate, alpha, **options)

        self.depth, self.neuron, self.T, self.k, self.connect_function = depth, neuron, T, k, connect_function
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self._t = 0

        # one axis, because model.to(memory_format=torch.channels_last) refuses a parameter of five
        self.pe = nn.Parameter(torch.empty(T)) if pe else None
        large = stem == "7x7"
        self.conv1 = conv(in_chans, width, 7, 2) if large else conv(in_chans, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.sn1 = make_neuron()
        self.stem_pool = STEM_POOLS[stem_pool](3, 2, 1) if large else nn.Identity()
        chans, reduction = width, 2 if large else 1
        self.feature_info = [{"num_chs": chans, "reduction": reduction, "module": "sn1"}]
        reduction *= 2 if large else 1
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(block(chans, width * 2**stage, stride, make_neuron, connect_function))
                chans = width * 2**stage * block.expansion
            reduction *= 2 if stage > 0 else 1
            self.feature_info.append({"num_chs": chans, "reduction": reduction, "module": f"layer{stage + 1}"})
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.num_features = self.head_hidden_size = chans
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions kaiming_normal (fan out, ReLU gain), pe normal with std 0.02; the rest initialises itself."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.pe is not None:
            trunc_normal_(self.pe, std=0.02)

    # ---- forward

    def forward(self, x: Tensor, per_step: bool = False) -> Tensor:
        """Static images [N, C, H, W] or frames [T, N, C, H, W], floating point -> mean logits [N, K].

        per_step=True gives the logits of every step [T, N, K]. Of a static image the stem's convolution and batch norm
        run once, whatever T is, unless the model has `pe`.
        """
        return self.forward_head(self.forward_features(x), per_step=per_step)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> [T, N, F, H', W']."""
        x_seq = per_image(self._stem(x), self.stem_pool)
        for stage in self._stages():
            x_seq = self._run_stage(stage, x_seq)
        return x_seq

    def forward_head(self, x_seq: Tensor, pre_logits: bool = False, per_step: bool = False) -> Tensor:
        """[T, N, F, H', W'] -> [N, K], or with pre_logits [N, F]; per_step keeps T in front."""
        x_seq = self._pool(x_seq)
        if not pre_logits:
            x_seq = self.fc(nn.functional.dropout(x_seq, self.drop_rate, self.training))
        return x_seq if per_step else x_seq.mean(0)

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
        _choose("SEWResNet", "output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(len(self.feature_info), indices)
        x_seq = self._stem(x)
        levels = [x_seq.mean(0)] if 0 in take else []
        x_seq = per_image(x_seq, self.stem_pool)
        for level, stage in enumerate(self._stages(), start=1):
            if stop_early and level > last:
                break
            x_seq = self._run_stage(stage, x_seq)
            if level in take:
                levels.append(x_seq.mean(0))
        return levels if intermediates_only else (x_seq, levels)

    def _stem(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> spikes [T, N, width, H', W'], before the pool."""
        self._check_input(x)
        if self.sn1.step_mode == "s":
            raise ValueError(
                "SEWResNet: its neurons are in step_mode 's'; call set_step_mode(model, 'm'), or model.step"
            )
        if self.pe is not None:
            x_seq = (x if x.ndim == 5 else x.unsqueeze(0)) + self.pe.view(-1, 1, 1, 1, 1)
        elif x.ndim == 4:
            return self.sn1.forward_static(self.bn1(self.conv1(x)), self.T)
        else:
            x_seq = x
        return self.sn1(per_image(x_seq, self.conv1, self.bn1))

    def _stages(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def _run_stage(self, stage: nn.Module, x_seq: Tensor) -> Tensor:
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return stage(x_seq)
        # a compiled graph recomputes the batch norms without touching their buffers
        if torch.compiler.is_compiling() or isinstance(stage, nn.Identity):
            contexts = {}
        else:
            contexts = {"context_fn": lambda: (contextlib.nullcontext(), no_running_stats(stage))}
        return checkpoint(stage, x_seq, use_reentrant=False, **contexts)

    def _pool(self, x_seq: Tensor) -> Tensor:
        if self.global_pool == "":
            return x_seq
        return x_seq.mean((-2, -1)) if self.global_pool == "avg" else x_seq.amax((-2, -1))

    def _check_input(self, x: Tensor) -> None:
        wanted = f"[N, {self.in_chans}, H, W] or [{self.T}, N, {self.in_chans}, H, W]"
        if x.ndim not in (4, 5) or x.shape[-3] != self.in_chans:
            raise ValueError(f"SEWResNet: got an input of shape {tuple(x.shape)}, wanted {wanted}")
        if not x.is_floating_point():
            raise ValueError(
                f"SEWResNet: got an input of dtype {x.dtype}, wanted floating point; scale by 1/255 and normalise first"
            )
        if x.numel() == 0:
            raise ValueError(f"SEWResNet: got an empty batch, shape {tuple(x.shape)}, wanted {wanted}")
        if self.pe is not None and x.ndim == 5 and x.shape[0] != self.T:
            raise ValueError(
                f"SEWResNet: got {x.shape[0]} frames, wanted T={self.T}, as pe has one entry for each step"
            )

    # ---- one frame at a time

    def step(self, frame: Tensor) -> Tensor:
        """The next frame [N, C, H, W] -> the logits of this time-step [N, K]; state O(k) for each neuron.

        Equals the steps of forward(frames, per_step=True). Call `reset()` between sequences. ValueError with psn, with
        masked_psn while lambda < 1 or after T steps, and in training mode (batch norm would see one step at a time).
        """
        if self.training:
            raise ValueError("SEWResNet.step: the model is in training mode; call model.eval() first")
        if frame.ndim != 4:
            raise ValueError(f"SEWResNet.step: got a frame of shape {tuple(frame.shape)}, wanted [N, C, H, W]")
        self._check_input(frame)
        x = frame.unsqueeze(0)  # [1, N, C, H, W]
        if self.pe is not None:
            if self._t == self.T:
                raise ValueError(
                    f"SEWResNet.step: step {self._t + 1} of T={self.T}; call reset() before a new sequence"
                )
            x = x + self.pe[self._t]
        set_step_mode(self, "s")
        try:
            x = per_image(self.sn1(per_image(x, self.conv1, self.bn1)), self.stem_pool)
            for stage in self._stages():
                x = stage(x)
        finally:
            set_step_mode(self, "m")
        self._t += 1
        return self.forward_head(x, per_step=True)[0]

    def reset(self) -> None:
        """Forget the sequence that `step` has seen."""
        self._t = 0
        reset(self)

    # ---- what timm's tools ask of a model

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of num_classes; 0: none, the model then returns features."""
        pool = self.global_pool if global_pool is None else global_pool
        _choose("SEWResNet", "global_pool", pool, GLOBAL_POOLS)
        if pool == "" and num_classes > 0:
            raise ValueError(f"SEWResNet: got global_pool='' and num_classes={num_classes}; a classifier needs a pool")
        self.num_classes, self.global_pool = num_classes, pool
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.fc.to(device=self.conv1.weight.device, dtype=self.conv1.weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations; the results stay the same."""
        self.grad_checkpointing = enable

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


# ---- registration


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def _check_pretrained(state_dict: dict[str, Tensor], model: SEWResNet) -> dict[str, Tensor]:
    """Refuse, in words, weights whose neurons are of another T or k than the model's (timm's pretrained_filter_fn)."""
    own = model.state_dict()
    neurons = {f"{name}.{key}" for name, neuron in spiking_neurons(model) for key in neuron.state_dict()} | {"pe"}
    for name in neurons & own.keys() & state_dict.keys():
        saved, mine = state_dict[name], own[name]
        other_order = name.endswith(".order") and not torch.equal(saved.cpu(), mine.cpu())
        if saved.shape != mine.shape or other_order:
            got, wanted = (int(saved), int(mine)) if other_order else (list(saved.shape), list(mine.shape))
            raise ValueError(
                f"SEWResNet: {name} is {got} in the weights and {wanted} in the model, which has T={model.T}, "
                f"k={model.k}; they were trained with another T or k: drop the override, or take pretrained=False"
            )
    return state_dict


def _create(name: str, pretrained: bool, **kwargs) -> SEWResNet:
    return build_model_with_cfg(
        SEWResNet,
        name,
        pretrained,
        pretrained_filter_fn=_check_pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"},
        **kwargs,
    )


def _entrypoint(name: str, depth: int, neuron: str) -> Callable[..., SEWResNet]:
    def build(pretrained: bool = False, **kwargs) -> SEWResNet:
        return _create(name, pretrained, depth=depth, neuron=neuron, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"SEW-ResNet-{depth} with {neuron} neurons; keywords of SEWResNet."
    return build


default_cfgs = generate_default_cfgs({f"sew_resnet{depth}_{neuron}": _cfg() for depth in DEPTHS for neuron in NEURONS})

for _depth in DEPTHS:
    for _neuron in NEURONS:
        _name = f"sew_resnet{_depth}_{_neuron}"
        globals()[_name] = register_model(_entrypoint(_name, _depth, _neuron))
