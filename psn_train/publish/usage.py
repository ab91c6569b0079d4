"""The card's code: it runs when it is pasted, and shows where one's own image or recording goes in."""

from __future__ import annotations

from psn_train.recipe import Recipe

_HEAD = """{first}import timm
import torch
{imports}
import psn_train  # registers the networks with timm
{module}{own}
model = timm.create_model("{load}", pretrained=True).eval()
"""
_TAIL = """with torch.no_grad():
    probabilities = model({inputs}).softmax(1)[0]  # of the mean over the time-steps
names = model.pretrained_cfg.get("label_names") or range(model.num_classes)
for value, number in zip(*probabilities.topk(min(5, model.num_classes)), strict=True):
    print(f"{{names[number]}}: {{value:.1%}}")
"""
_IMAGE = """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.new("{mode}", ({side}, {side}), "gray")  # one's own: Image.open("photo.jpg").convert("{mode}")
"""
_RECORDING = """index = np.arange(1000)
events = make_events(t=50 * index, x=index % {width}, y=index // 20 % {height}, p=index % 2)
recording = Recording(events, sensor=({width}, {height}))  # one's own: read_recording("FILE")
frames = torch.from_numpy({frames}).float(){scale}  # [T, {channels}, H, W]
frames = resize_frames(frames.unsqueeze(1), {side}, {antialias}, "{interpolation}")  # [T, N, C, H, W]
"""


def usage_code(recipe: Recipe, load: str, sensor: tuple[int, int] | None = None) -> str:
    """Python that loads the network and asks it.

    Args:
        load: what `timm.create_model` takes.
        sensor: (width, height) of the recordings that it was trained on.
    """
    side, channels = recipe.data.image_size, recipe.model.in_chans
    own_module = recipe.model.module
    module = "" if own_module is None else f"import {own_module}  # the network's neuron: not part of psn_train\n"
    load = load.replace("\\", "\\\\").replace('"', '\\"')
    if recipe.events is None:
        head = _HEAD.format(first="", imports="from PIL import Image\n", module=module, own="", load=load)
        mode = "L" if channels == 1 else "RGB"
        return head + _IMAGE.format(mode=mode, side=side) + _TAIL.format(inputs="transform(image).unsqueeze(0)")
    events = recipe.events
    function, call = {
        "number": ("integrate", f'integrate(recording, {recipe.model.T}, rounding="{events.rounding}")'),
        "time": ("integrate", f'integrate(recording, {recipe.model.T}, by="time", rounding="{events.rounding}")'),
        "duration": (
            "integrate_by_duration",
            f"integrate_by_duration(recording, {events.duration_us}, max_steps={events.max_steps})",
        ),
        "voxel": ("voxel_grid", f"voxel_grid(recording, {recipe.model.T}, signed={channels == 1})"),
    }[events.frames]
    own = (
        "from psn_train.data.events import Recording, make_events, read_recording\n"
        f"from psn_train.data.frames import {function}\nfrom psn_train.data.frames.batched import resize_frames\n"
    )
    width, height = sensor or (side, side)
    body = _RECORDING.format(
        width=width,
        height=height,
        frames=call,
        scale="" if events.scale == 1.0 else f" * {events.scale!r}",
        channels=channels,
        side=side,
        antialias=events.antialias,
        interpolation=recipe.augment.interpolation,
    )
    return (
        _HEAD.format(first="import numpy as np\n", imports="", module=module, own=own, load=load)
        + body
        + _TAIL.format(inputs="frames")
    )
