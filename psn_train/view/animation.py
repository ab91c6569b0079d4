"""Frames one after the other, as GIF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from psn_train.view.colours import ON, paint, scale_of
from psn_train.view.frames import Frames, evenly

# a GIF with more takes too long to load
MOST_FRAMES = 300
_SIDE = 384
_CAPTION = 22
_BAR = 6


def write_gif(path: Path, frames: Frames) -> None:
    """All frames, at most MOST_FRAMES evenly taken, enlarged by a whole number; below each its number, time and events.

    A round takes about 2 s, and no frame less than 40 ms, which viewers cannot show, or more than 400 ms.
    """
    shown = evenly(len(frames), MOST_FRAMES)
    scale = scale_of(frames.counts)
    texts = [f"{number + 1} of {len(frames)}: {frames.time(number)}, {frames.amount(number)}" for number in shown]
    font = ImageFont.load_default()
    least = max(240, int(max(map(font.getlength, texts))) + 8)
    pictures = [_picture(frames, int(number), scale, text, least) for number, text in zip(shown, texts, strict=True)]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=int(np.clip(2000 / len(shown), 40, 400)) // 10 * 10,
        loop=0,
        # frames that are alike stay frames of their own
        optimize=False,
    )


def _picture(frames: Frames, number: int, scale: float, text: str, least: int) -> Image.Image:
    """At least `least` pixels wide."""
    counts = frames.counts[number]
    image = Image.fromarray(paint(counts, scale))
    times = max(1, round(_SIDE / max(image.size)))
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    page = Image.new("RGB", (max(image.width, least), image.height + _BAR + _CAPTION), "white")
    page.paste(image, ((page.width - image.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    begin, end = frames.borders[number : number + 2]
    if frames.cut.by == "voxel":
        # its peak
        end = begin
    last = max(int(frames.borders[-1]), 1)
    draw.rectangle((0, image.height, page.width, image.height + _BAR - 1), fill="#dddddd")
    left, right = (round(time / last * (page.width - 1)) for time in (begin, end))
    draw.rectangle((left, image.height, max(left + 1, right), image.height + _BAR - 1), fill=ON)
    draw.text((4, image.height + _BAR + 5), text, fill="black", font=ImageFont.load_default())
    # one palette without dots of other colours
    return page.quantize(colors=255, dither=Image.Dither.NONE)
