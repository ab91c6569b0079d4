"""How the commands of each page are run in tests: what is put where, and what is done otherwise than the page says."""

from __future__ import annotations

from pathlib import Path

from docs_commands import Way
from PIL import Image

# on two CPU cores, in seconds
SMALL = "data.workers=0 log.trackers=[]"


def digits(per_class: int, start: int = 0) -> dict[str, list[Image.Image]]:
    """{class: real handwritten digits, 28 x 28, grey}."""
    from psn_train.demo import load_digits

    images, labels = load_digits()
    return {
        str(digit): [Image.fromarray(image) for image in images[labels == digit][start : start + per_class]]
        for digit in range(10)
    }


def write_photos(folder: Path, per_class: int, start: int = 0, side: int = 64) -> None:
    """FOLDER/CLASS/NNN.jpg, colour JPEG files."""
    for name, images in digits(per_class, start).items():
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(images):
            image.convert("RGB").resize((side, side)).save(folder / name / f"{number:03d}.jpg", quality=90)


def photos(folder: Path) -> None:
    write_photos(folder / "photos" / "train", 6)
    write_photos(folder / "photos" / "test", 2, start=20)


TINY_PHOTOS = (
    "data.image_size=32 model.args.width=8 model.args.stem=3x3 data.global_batch_size=16 schedule.epochs=2 "
    f"augment.crop=none {SMALL}"
)

WAYS: dict[str, Way] = {
    "index": Way(
        prepare=photos,
        adds={"photos.yaml": TINY_PHOTOS},
    ),
}
# pages whose commands of one process take seconds: run by `make test`, too
QUICK = {"index"}
