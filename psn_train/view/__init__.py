"""`psn view`: pictures of a recording: its frames, its event rate, and what a network sees of it in training."""

from __future__ import annotations

from pathlib import Path

from psn_train.data.events import EventError
from psn_train.recipe import Recipe
from psn_train.view.animation import write_gif
from psn_train.view.figure import figure_class, write_png
from psn_train.view.frames import Cut, cut_of_recipe, make_frames
from psn_train.view.source import open_recording

__all__ = ["Cut", "run_view"]

SUFFIXES = (".png", ".gif")


def run_view(
    where: str,
    *,
    out: str | None = None,
    cut: Cut | None = None,
    recipe: Recipe | None = None,
    format: str | None = None,
    sensor: tuple[int, int] | None = None,
    sample: str | None = None,
) -> int:
    """Draw a recording: one figure as PNG, its frames one after the other as GIF.

    Args:
        where: a file that `read_recording` takes, or a folder or URL of shards.
        out: NAME.png or NAME.gif for that one, NAME for both. None: both, in runs/view, named after the recording.
        cut: how the recording becomes frames; None: as the recipe has it, else 10 frames of equally many events.
        recipe: of a network whose input is drawn as well, as it is evaluated and as it is trained in epochs 0 to 3.
        format, sensor: as in `read_recording`.
        sample: of shards, its key or number; None: the first.

    Raises:
        ValueError: nothing can be read there, or matplotlib is missing.
    """
    base, suffixes = _targets(out)
    if ".png" in suffixes:
        figure_class()
    if recipe is not None:
        cut = cut_of_recipe(recipe)
    seen = open_recording(where, format=format, sensor=sensor, sample=sample)
    frames = make_frames(seen.recording, cut or Cut())
    base = base or Path("runs") / "view" / seen.name
    rows = None
    if recipe is not None and ".png" in suffixes:
        from psn_train.view.network import network_rows

        rows = network_rows(seen, recipe)
    for line in seen.lines():
        print(line)
    if remark := frames.remark():
        print(f"{frames.cut.words(len(frames))}: {remark}")
    base.parent.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        path = base.with_name(base.name + suffix)
        if suffix == ".png":
            write_png(path, seen, frames, rows, recipe)
        else:
            write_gif(path, frames)
        print(path)
    return 0


def _targets(out: str | None) -> tuple[Path | None, tuple[str, ...]]:
    if out is None:
        return None, SUFFIXES
    path = Path(out)
    if path.name in ("", ".", "..") or path.is_dir():
        raise EventError(f"--out: {out} is a folder; wanted NAME.png, NAME.gif, or NAME for both")
    if path.suffix.lower() in SUFFIXES:
        return path.with_suffix(""), (path.suffix.lower(),)
    if path.suffix:
        raise EventError(
            f"--out: {out} ends in {path.suffix}; wanted NAME.png, NAME.gif, or NAME without a dot for both"
        )
    return path, SUFFIXES
