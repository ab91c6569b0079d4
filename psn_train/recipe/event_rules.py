"""What a recipe may ask of recordings of event cameras, whose frames are made and augmented on the device."""

from __future__ import annotations

from psn_train.recipe.events import Events
from psn_train.recipe.schema import Augment, Recipe

# of images, with what there is for recordings in their place
OF_IMAGES = {
    "color_jitter": "counts of events have no colour; set it to 0",
    "auto_augment": "its policies are of photographs; leave it out, events.nda_ops and events.event_drop are there",
    "random_erasing": "it fills with a colour; set it to 0, events.cutout blanks a square",
    "eval_resize": "the evaluation resizes to data.image_size and crops nothing; leave it out",
}


def event_problems(recipe: Recipe) -> list[str]:
    """What contradicts the section `events`, or its absence, as "key: what was found, what to do"."""
    model, events = recipe.model, recipe.events
    if events is None:
        if model.in_chans != 2:
            return []
        return [
            "model.in_chans: got 2, which is of recordings alone; images have 1 or 3, for recordings add the section "
            "`events`"
        ]
    return _network_problems(recipe, events) + _frame_problems(events) + _augment_problems(recipe, events)


def takes_any_number_of_steps(recipe: Recipe) -> bool:
    """True where no parameter of the network is bound to T: sliding PSN and the serial neurons but GLIF, no `pe`."""
    name = recipe.model.name
    bound = "masked_psn" in name or name.endswith("glif") or (name.endswith("psn") and "sliding_psn" not in name)
    return not bound and not recipe.model.args.get("pe", False)


def _network_problems(recipe: Recipe, events: Events) -> list[str]:
    model, problems = recipe.model, []
    if model.name.startswith("sequential_net"):
        problems.append(
            f"model.name: {model.name} takes the columns of an image for time-steps, and recordings have steps of "
            "their own; take another network, such as vgg_snn_psn"
        )
    if model.in_chans == 3 or (model.in_chans == 1 and events.frames != "voxel"):
        voxel = events.frames == "voxel"
        signed = "; voxels may have 1, with signs" if voxel else " (1 is of events.frames: voxel alone)"
        problems.append(
            f"model.in_chans: got {model.in_chans}; frames of events have 2 channels, one for each polarity{signed}; "
            f"set it to 2{' or 1' if voxel else ''}"
        )
    if events.frames == "duration" and model.name and not takes_any_number_of_steps(recipe):
        problems.append(
            f"events.frames: duration gives each recording as many frames as it has, and {model.name}"
            f"{' with pe' if model.args.get('pe', False) else ''} has weights for T = {model.T}; take a network of "
            "sliding_psn, if, lif, lif_no_reset, plif or klif, or frames: number, time or voxel"
        )
    return problems


def _frame_problems(events: Events) -> list[str]:
    problems = []

    def wrong(condition: bool, text: str) -> None:
        if condition:
            problems.append(text)

    of_duration = events.frames == "duration"
    wrong(
        of_duration and events.duration_us is None,
        "events.duration_us: missing; frames: duration needs a frame's length in microseconds, such as 10000",
    )
    for key in ("duration_us", "max_steps"):
        value = getattr(events, key)
        wrong(
            not of_duration and value is not None,
            f"events.{key}: got {value}, but it is of frames: duration and frames is {events.frames}; leave it out, "
            "model.T says how many frames there are",
        )
    wrong(
        events.rounding == "tonic" and events.frames not in ("number", "time"),
        f"events.rounding: got tonic, but frames: {events.frames} leaves nothing to round; leave it out",
    )
    wrong(
        not events.nda_ops and events.nda_strength != Events().nda_strength,
        f"events.nda_strength: got {events.nda_strength}, but nothing is drawn by it; set events.nda_ops, too",
    )
    return problems


def _augment_problems(recipe: Recipe, events: Events) -> list[str]:
    augment, plain, problems = recipe.augment, Augment(), []

    def wrong(condition: bool, text: str) -> None:
        if condition:
            problems.append(text)

    wrong(
        augment.crop == "random_resized",
        "augment.crop: got random_resized; frames of events are cropped by `pad` or `none`",
    )
    # of photographs 0.5 is right; digits are mirrored by it, and a left hand's wave becomes a right hand's
    wrong(
        "hflip" not in augment.model_fields_set,
        "augment.hflip: missing; recordings have no default, state it: 0.0 where left and right differ (digits, "
        "gestures), 0.5 as the paper has it for CIFAR10-DVS",
    )
    for key, advice in OF_IMAGES.items():
        value = getattr(augment, key)
        wrong(value != getattr(plain, key), f"augment.{key}: got {value}; {advice}")
    side = recipe.data.image_size
    pad = augment.pad if augment.crop == "pad" else 0
    for key, pixels in (("augment.pad", pad), ("events.roll", events.roll), ("events.cutout", events.cutout)):
        wrong(pixels >= side, f"{key}: got {pixels} pixels, and the frames have {side}; wanted fewer")
    for key in ("mean", "std"):
        value = getattr(augment, key)
        wrong(
            value != getattr(plain, key),
            f"augment.{key}: got {value}; counts of events are not normalised, leave it out; events.scale multiplies "
            "them",
        )
    wrong(
        augment.interpolation == "bicubic",
        "augment.interpolation: got bicubic, which makes negative counts; set bilinear or nearest",
    )
    wrong(
        augment.interpolation == "nearest" and events.antialias,
        "events.antialias: nearest takes single pixels and smooths nothing; leave it out, or set "
        "augment.interpolation: bilinear",
    )
    wrong(
        events.frames == "duration" and (augment.mixup > 0 or augment.cutmix > 0),
        "augment.mixup: recordings of unequal length cannot be mixed, and frames: duration gives each its own number "
        "of frames; set mixup and cutmix to 0",
    )
    wrong(
        recipe.data.resident,
        "data.resident: recordings are read from the shards; set it to false (their frames are made on the device in "
        "any case)",
    )
    return problems
