"""What a run reads, and the cores that decode it."""

from __future__ import annotations

from dataclasses import dataclass

from psn_train.data.ahead import evaluation_room, gigabytes, lag_of, least_room
from psn_train.data.event_index import split_text
from psn_train.data.index import ShardIndex
from psn_train.data.reader import SampleReader
from psn_train.data.split_checks import load_splits
from psn_train.data.stream import PREFETCH, TrainStream
from psn_train.recipe import Plan, Recipe

# ImageNet-1k in tar files at full resolution: 147.8e9 bytes of 1,281,167 photographs (litdata's published table)
PHOTO_BYTES = 147.8e9 / 1_281_167
# a set of smaller images is no photographs
PHOTO_SIDE = 160
# photographs of 500 x 375 pixels to 224, images/s of one core of a loaded AMD Zen 4, timm's transforms
PHOTO_RATES = {
    "decoding, random crop and flip": 215.0,
    "the same with a policy such as RandAugment": 162.0,
    "the same with colour jitter": 149.0,
}


@dataclass(frozen=True)
class TrainingSet:
    """What is known of the shards. `samples` are all of the training shards, those held out included."""

    samples: int
    num_classes: int
    index: ShardIndex | None
    """Of the training shards; None where they are not there."""
    source: str
    val_samples: int = 0
    """0 where neither shards nor the recipe tell, too."""
    test_samples: int = 0
    others: tuple[ShardIndex, ...] = ()
    """Of `val` and `test`, where they are there."""


@dataclass(frozen=True)
class Reading:
    """Bytes and cores; what nobody knows is None, and `*_source` says where a figure is from."""

    bytes_per_epoch: float | None
    bytes_source: str
    bytes_per_second: float | None
    """Of the whole run while it trains; known with the run's own throughput."""
    images_per_core: float | None
    decode_source: str
    cores_per_node: float | None
    """That decode as fast as the devices of a node train."""


def training_set(recipe: Recipe, samples: int | None = None) -> TrainingSet:
    """From the index of the shards; where they are not there, from the recipe or `samples`.

    Raises:
        ValueError: `psn train` would refuse the shards that are there, or nobody says how many samples there are.
    """
    absent: dict = {}
    indices = load_splits(recipe, absent=absent)
    others = {split: indices[split] for split in ("val", "test") if split in indices}
    known = {
        f"{split}_samples": others[split].num_samples
        if split in others
        else (getattr(recipe.data, split) is not None and getattr(recipe.data, f"{split}_samples")) or 0
        for split in ("val", "test")
    }
    known["others"] = tuple(others.values())
    if "train" not in absent:
        index = indices["train"]
        recordings = split_text(index, indices.get("test"))
        text = f"{index.place}, {len(index.shards)} shards" + (f", {recordings}" if recordings else "")
        return TrainingSet(index.num_samples, recipe.model.num_classes or len(index.classes), index, text, **known)
    samples, source = samples or recipe.data.train_samples, "the recipe's data.train_samples; the shards are not there"
    if samples is None:
        raise ValueError(f"how many samples are trained on is unknown; set data.train_samples. {absent['train']}")
    return TrainingSet(samples, recipe.model.num_classes or 1000, None, source, **known)


def photographs(recipe: Recipe) -> bool:
    return recipe.events is None and not recipe.data.resident and recipe.data.image_size >= PHOTO_SIDE


def assumed_rate(recipe: Recipe) -> tuple[float | None, str]:
    """(images/s of one core, where that is from) where nobody has measured it."""
    if recipe.data.resident:
        return None, "none: the images live on the device"
    if not photographs(recipe):
        return None, "unknown; --measure measures it on the shards, --decode-per-core states it"
    augment = recipe.augment
    kinds = list(PHOTO_RATES)
    kind = kinds[2] if augment.color_jitter else kinds[1] if augment.auto_augment else kinds[0]
    return PHOTO_RATES[kind], f"assumed: {kind}, photographs of 500 x 375 on a loaded AMD Zen 4; --measure measures it"


def reading(
    recipe: Recipe,
    plan: Plan,
    found: TrainingSet,
    *,
    nodes: int,
    images_per_second: float | None,
    sample_bytes: float | None = None,
    images_per_core: tuple[float, str] | None = None,
) -> Reading:
    """What a run reads.

    Args:
        images_per_second: at which all devices together train; None: unknown.
        sample_bytes: mean of a sample, where there are no shards.
        images_per_core: what one core decodes, and who says so.
    """
    if recipe.data.resident:
        per_epoch, source = 0.0, "the images live on the device"
    elif found.index is not None:
        per_epoch = found.index.num_bytes * plan.train_samples / found.index.num_samples
        source = "the shards' index"
    elif sample_bytes is not None or photographs(recipe):
        mean = sample_bytes or PHOTO_BYTES
        per_epoch = mean * plan.train_samples
        source = f"{mean / 1e3:.1f} kB a sample, " + ("as stated" if sample_bytes else "ImageNet-1k's mean, assumed")
    else:
        per_epoch, source = None, "unknown; --sample-kb states the mean of a sample"
    rate, rate_source = images_per_core or assumed_rate(recipe)
    return Reading(
        bytes_per_epoch=per_epoch,
        bytes_source=source,
        bytes_per_second=None,
        images_per_core=rate,
        decode_source=rate_source,
        cores_per_node=images_per_second / nodes / rate if images_per_second and rate else None,
    )


def cache_problems(recipe: Recipe, plan: Plan, found: TrainingSet, gpus_per_node: int) -> tuple[list[str], list[str]]:
    """(what cannot work, what is slow) about a node's cache of shards that come from URLs."""
    index, data = found.index, recipe.data
    if index is None or data.resident or not (reader := SampleReader(index)).has_remote:
        return [], []
    bound, sizes = data.cache_gb * 1e9, [shard.num_bytes for shard in index.shards]
    # of the first rank; it stands for the others
    needs = next(TrainStream(recipe, plan, reader, rank=0).needs(0))
    shards, wanted = least_room(needs, sizes, lag_of(data.workers, PREFETCH), gpus_per_node)
    least = wanted + evaluation_room(index, list(found.others), plan.held_out, gpus_per_node)
    if bound < least:
        return [
            f"data.cache_gb: got {data.cache_gb:g}, and a node reads {shards} shards at a time for each of its GPUs, "
            f"which take {gigabytes(least)} GB with those of an evaluation. Set it to more, or fewer "
            "data.streams (under data.shuffle: full all shards are read at a time)"
        ], []
    if bound < index.num_bytes:
        return [], [
            f"data.cache_gb = {data.cache_gb:g} is less than the {index.num_bytes / 1e9:.3g} GB of the shards: every "
            "epoch fetches them anew"
        ]
    return [], []
