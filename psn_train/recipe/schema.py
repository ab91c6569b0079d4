"""Recipe: everything that decides a run, read from strict YAML and checked before torch is imported.

A recipe file has the sections model, data, augment, events, loss, optim, schedule, precision, ema, checkpoint, log and
watch. It may name one parent with `base:` (a path relative to itself), and single values are overridden on the
command line as `optim.lr=0.05`. All mistakes are reported at once, each with the place, what was found and what was
wanted.

YAML is read by the rules of YAML 1.2: `1e-3` is a number and `no` is a word (PyYAML's own rules have them the other way
round). Durations carry their unit in the key (`epochs`, `warmup_steps`, `every_minutes`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from psn_train.recipe.decoder import BEFORE, decoder_of, with_decoder
from psn_train.recipe.events import Events
from psn_train.recipe.section import Fraction, NonNegative, Positive, Scalar, Seconds, Section


class Model(Section):
    name: str
    """Architecture in timm's registry, such as `sew_resnet18_psn`."""
    module: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")] | None = None
    """Python module that registers a neuron of one's own; imported before the network is built."""
    T: Positive = 4
    """Time-steps."""
    k: Positive | None = None
    """Order of a masked or sliding PSN: how many steps back it looks, its own included."""
    connect_function: Literal["ADD", "AND", "IAND"] | None = None
    """How a SEW block joins its input and its spikes; by default ADD. Other networks have no blocks to join."""
    surrogate: Literal["atan", "sigmoid", "triangle", "rectangle"] = "atan"
    """Derivative that stands in for the step's in the backward pass."""
    alpha: Annotated[float, Field(gt=0)] = 2.0
    """Steepness of the surrogate."""
    num_classes: Positive | None = None
    """Outputs; by default as many as the training shards have classes."""
    in_chans: Literal[1, 2, 3] = 3
    """1: images are read as grey; 3: as RGB. Of events: 2, one channel for each polarity; 1: voxels with signs."""
    args: dict[str, Scalar] = {}
    """Further arguments of the architecture, such as `stem`, `stem_pool`, `pe`, `width`."""
    init_from: str | None = None
    """Weights to start from, of an ANN or of such a network: `timm:NAME`, `torchvision:NAME`, a file, or a folder that
    `psn publish` wrote."""
    sync_bn: bool = False
    """Batch norm statistics over the batches of all ranks."""
    memory: Literal["plain", "packed", "lean"] = "packed"
    """What layers of spikes keep for the backward pass; the gradients are the same. packed: their inputs as bits and
    bytes; lean: nothing else, what is between is computed again; plain: what PyTorch keeps."""
    grad_checkpointing: bool = False
    """Recompute whole stages in the backward pass instead of keeping them."""


class Data(Section):
    train: str
    """Folder or URL of the training shards."""
    val: str | None = None
    """Folder or URL of validation shards, on which the best epoch is chosen; goes before holding samples out."""
    test: str | None = None
    """Folder or URL of the test shards, which are looked at once, when the run is complete."""
    train_samples: Positive | None = None
    """How many samples the training shards must hold, those held out included; their index is held against it."""
    val_samples: Positive | None = None
    """How many samples the shards of `val` must hold."""
    test_samples: Positive | None = None
    """How many samples the shards of `test` must hold."""
    hold_out: Annotated[int, Field(ge=0)] | None = None
    """Samples of the training shards that are not trained on: the best epoch is chosen on them where there is no `val`.
    By default a tenth of them, at most 10,000; 0: none."""
    hold_out_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the choice of these samples. It does not follow `seed`: runs of several seeds share one split."""
    select_on: Literal["val", "test"] = "val"
    """test: the best epoch is chosen on the test shards, as the authors did, and nothing is held out. The figure is
    optimistic, and every report says so."""
    global_batch_size: Positive
    """Samples of one update, over all ranks and accumulated micro-batches."""
    resident: bool = False
    """Keep all images on the device and augment whole batches there; for sets that fit, such as CIFAR."""
    max_batch_per_device: Positive | Literal["auto"] | None = None
    """Upper bound of the micro-batch of one device; the accumulation follows from it. auto: the largest that fits the
    smallest GPU of the run's first start, by the estimate of `psn plan`; the run's own recipe then holds the number."""
    eval_batch_per_device: Positive | None = None
    """Batch of the evaluation; by default the micro-batch."""
    image_size: Positive = 224
    """Side of the square that the network sees, in pixels."""
    shuffle: Literal["full", "shards"] = "shards"
    """full: any order of all samples (random reads); shards: permuted shards, read side by side in `streams`."""
    streams: Positive = 64
    """How many shards are read side by side under `shuffle: shards`."""
    decoder: Literal["turbo", "pillow"] = "turbo"
    """Of JPEG files under `crop: random_resized`. turbo: no more is decoded than a crop needs, torch resizes; pillow:
    whole images, timm's own transforms. Pixels differ by less than 1 of 255 on average; a run goes on as it began."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Decoding processes of each rank; 0 decodes in the training process."""
    max_bad_samples: Annotated[int, Field(ge=0)] = 0
    """Unreadable samples that a run survives; each is named in the log."""
    cache_dir: str | None = None
    """Where shards of URLs are kept; by default a folder in the run's."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Bound of that folder, in 10^9 bytes; what training reads at the same time has to fit."""
    fetch_attempts: Positive = 8
    """Failures in a row after which a shard of a URL is given up; one that brought a MiB begins anew."""
    fetch_stall_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a byte of a URL after which it is asked for anew."""

    @property
    def selected_on(self) -> Literal["val", "held out", "test"] | None:
        """What is evaluated during the run and decides which epoch is the best; None: nothing is."""
        if self.select_on == "test":
            return "test"
        if self.val is not None:
            return "val"
        return None if self.hold_out == 0 else "held out"


class Augment(Section):
    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    """random_resized: a random part, resized; pad: shifted by up to `pad` pixels; none: resized as it is."""
    scale: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.08, 1.0]
    """Area of the part that `random_resized` takes, from and to."""
    ratio: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.75, 1.3333333333333333]
    """Its aspect ratio, from and to."""
    pad: Annotated[int, Field(ge=0)] = 4
    """Pixels of padding of `crop: pad`."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip. With a section `events` it has to be stated."""
    vflip: Fraction = 0.0
    """Probability of a vertical flip."""
    color_jitter: NonNegative = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    auto_augment: str | None = None
    """timm's policy string, such as `rand-m9-mstd0.5-inc1`, or `trivial` for TrivialAugmentWide."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    """Of every resize."""
    random_erasing: Fraction = 0.0
    """Probability that a part of an image is erased."""
    random_erasing_mode: Literal["const", "rand", "pixel"] = "const"
    """What it is erased to: the mean, one random colour, or noise."""
    random_erasing_area: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.02, 0.3333333333333333]
    """Share of the image that is erased, from and to; the default is timm's, torchvision's ends at 0.33."""
    random_erasing_ratio: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)] = [
        0.3,
        3.3333333333333335,
    ]
    """Aspect ratio of the erased part, from and to; the default is timm's, torchvision's ends at 3.3."""
    mixup: NonNegative = 0.0
    """alpha of mixup; 0 turns it off."""
    cutmix: NonNegative = 0.0
    """alpha of cutmix; 0 turns it off."""
    mix_prob: Fraction = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch_prob: Fraction = 0.5
    """Probability of cutmix where both are on."""
    eval_resize: Positive | None = None
    """Short side before the centre crop of the evaluation; by default image_size / 0.875, rounded."""
    mean: list[Fraction] = [0.485, 0.456, 0.406]
    """Of the channels, on the scale from 0 to 1."""
    std: list[Annotated[float, Field(gt=0, le=1)]] = [0.229, 0.224, 0.225]
    """Of the channels, on the scale from 0 to 1."""


class Loss(Section):
    name: Literal["tet", "mean_logits"] = "tet"
    """tet: mean over T of each step's cross entropy; mean_logits: cross entropy of the mean over T."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes."""
    mse_weight: Fraction = 0.0
    """lambda of TET's regulariser: (1 - lambda) * TET + lambda * MSE(logits, mse_target)."""
    mse_target: float = 1.0
    """What the regulariser draws the logits to."""


class Optim(Section):
    name: str = "sgd"
    """`sgd`, `adamw` or any optimiser of timm. Unlike timm's, `sgd` is without Nesterov unless `nesterov` says so."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate at the peak; never scaled by the number of devices."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD and those that take it."""
    nesterov: bool = False
    """Of SGD."""
    weight_decay: NonNegative = 0.0
    """Of convolutions and linear layers."""
    norm_weight_decay: NonNegative | None = None
    """Of batch norms and biases; by default `weight_decay`, as in the authors' code."""
    neuron_weight_decay: NonNegative | None = None
    """Of the neurons' weights and thresholds; by default `weight_decay`."""
    neuron_lr_scale: NonNegative = 1.0
    """Learning rate of the neurons' parameters, relative to `lr`."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; none: not clipped."""
    args: dict[str, Scalar | list[float]] = {}
    """Further arguments of the optimiser, such as `betas`, `eps`."""


class Schedule(Section):
    name: Literal["cosine", "constant"] = "cosine"
    epochs: Positive | None = None
    """Length of the run in passes over the training samples."""
    steps: Positive | None = None
    """Length of the run in updates, in place of `epochs`."""
    by: Literal["epoch", "step"] = "epoch"
    """When the learning rate moves."""
    warmup_epochs: NonNegative = 0.0
    """Length of the linear warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The same in updates."""
    warmup_lr: NonNegative = 0.0
    """Where the warm-up starts."""
    min_lr: NonNegative = 0.0
    """Where the cosine ends."""
    lambda_ramp: Annotated[float, Field(gt=0)] = 8.0
    """Masked PSN: lambda = min(lambda_ramp * e / (E - 1), 1) in epoch e of E."""
    stop_after_steps: Positive | None = None
    """End early, after that many updates, with the schedule of the whole length."""


class Precision(Section):
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of convolutions and linear layers in training (autocast); the neurons compute in float32 at any setting."""
    eval_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The same in evaluation."""
    channels_last: bool = True
    """Memory layout of images and features."""
    compile: bool = False
    """torch.compile the network."""
    kernels: Literal["auto", "reference", "compiled", "triton"] = "auto"
    """What computes PSN, masked PSN and sliding PSN: plain PyTorch (reference); Inductor (compiled), together with the
    batch norm before it: faster and with less memory, after a minute of compiling; Triton on a GPU, which has not yet
    been run on one; or auto: compiled in a run long enough for that, where it works, else plain PyTorch."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time (slower on a GPU)."""
    tf32: bool = True
    """fp32 convolutions on tensor cores, on GPUs that have them; the neurons keep all bits."""


class Ema(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the moving average of the weights; none: no average."""
    warmup: bool = False
    """Let the decay grow from 0 in the beginning."""


class Checkpoint(Section):
    every_epochs: Positive | None = 1
    """Save after that many epochs."""
    every_steps: Positive | None = None
    """Save after that many updates, too."""
    keep_last: Positive = 2
    """How many checkpoints stay, besides the best."""
    dir: str | None = None
    """Folder or URL (`s3://bucket/run`, `gs://bucket/run`, whatever fsspec knows) of the checkpoints; by default
    `checkpoints` in the run's folder, where metrics.jsonl and results.json are in any case."""
    write_attempts: Positive = 4
    """How often a checkpoint is tried to be written, before training goes on without it to the next."""
    retry_seconds: NonNegative = 5.0
    """Seconds before the second attempt; doubled before each one after it."""
    select_by: Literal["top1", "ema_top1", "loss"] | None = None
    """The figure that the best is chosen by; by default `ema_top1` with an EMA, else `top1`."""
    accept_changes: bool = False
    """Go on with a run although the recipe has changed since."""


class Log(Section):
    every_steps: Positive = 50
    """Updates between two lines; only then is a value fetched from the device."""
    eval_every_epochs: Positive = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    firing_rates: bool = True
    """Measure every neuron layer in each evaluation."""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Where the metrics go besides metrics.jsonl."""
    wandb_project: str = "psn_train"


class Watch(Section):
    start_timeout_s: Seconds = 1800.0
    """How long a process may go without progress before its first update, in a save and until an evaluation's first
    batch, which start, compile and write; and how long a collective there may wait for another rank."""
    step_timeout_s: Seconds = 300.0
    """The same from then on: without a new micro-batch, round of the evaluation, part of a file or attempt to fetch
    one. Then all ranks write their stacks to RUN/stacks, and end with status 76. A rank may fetch for longer, but the
    others wait for it no longer than this. Also how long the process of another rank may give no sign of life, at any
    time."""
    stop_grace_s: Seconds = 60.0
    """How long a process that was told to stop may go without progress, outside of a save, before it ends without
    saving."""
    heartbeat_s: Seconds = 10.0
    """Seconds between two notes of a rank in RUN/ranks: where it is, and since when."""
    slow_share: Fraction = 0.1
    """A rank is named as slow whose data, computing or saving takes this share of a step longer than the median
    rank's."""


class Recipe(Section):
    """A resolved recipe. See `load_recipe`."""

    name: str
    """Of the run and its folder; by default the file's name without `.yaml`."""
    note: str = ""
    """What it reproduces, and where it cannot be the same."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 2020
    run_dir: str | None = None
    """Folder of the run; by default `runs/NAME`."""
    model: Model
    data: Data
    augment: Augment = Augment()
    events: Events | None = None
    """How recordings become frames; none: the shards hold images."""
    loss: Loss = Loss()
    optim: Optim
    schedule: Schedule
    precision: Precision = Precision()
    ema: Ema = Ema()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    watch: Watch = Watch()

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir if self.run_dir is not None else f"runs/{self.name}")

    @property
    def decoder(self) -> Literal["turbo", "pillow"]:
        """`data.decoder` where it changes pixels; else pillow."""
        return decoder_of(self.resolved())

    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included, as plain JSON types."""
        return self.model_dump(mode="json")


def saved_recipe(document: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint or a published network was saved with, as `resolved` gave it, then or now."""
    return Recipe.model_validate(with_decoder(document))


# what may differ between two starts of one run without changing a single weight
NEUTRAL = (
    "note",
    "run_dir",
    "model.memory",
    "data.train",
    "data.val",
    "data.test",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.fetch_attempts",
    "data.fetch_stall_s",
    "data.max_bad_samples",
    "schedule.stop_after_steps",
    "checkpoint",
    "log",
    "watch",
)


def flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"optim.lr": 0.1, ...}. Empty dicts stay as values."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def decisive(document: dict[str, Any]) -> dict[str, Any]:
    """The flat values of a resolved recipe that decide the weights: all but the neutral ones.

    Where `data.val` is does not matter, but whether there is one does: without it, samples are held out.
    """
    flat = {
        key: value
        for key, value in flatten(document).items()
        if not any(key == neutral or key.startswith(neutral + ".") for neutral in NEUTRAL)
    }
    # as before there were such keys: runs go on, and published hashes stay true
    later = {"events": None, "model.module": None, "precision.kernels": "auto"}
    flat = {key: value for key, value in flat.items() if key not in later or value != later[key]}
    flat.pop("data.decoder", None)
    if (decoder := decoder_of(document)) != BEFORE:
        flat["data.decoder"] = decoder
    data = document.get("data", {})
    if data.get("val") is not None or data.get("select_on") == "test":
        flat["data.hold_out"] = 0
    return flat


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hexadecimal digits; equal for recipes that train the same weights."""
    text = json.dumps(decisive(recipe.resolved()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
