"""What a reader of a page is said to have, made of real digits and recordings in the sizes of tests."""

from __future__ import annotations

import csv
import io
import os
import re
from functools import partial
from pathlib import Path

import event_trees
import foreign_networks as foreign
import numpy as np
import pytest
from conftest import ROOT, merged, small_document, train_here
from PIL import Image
from test_sources_archives import cifar10, devkit, hugging_face, imagenet

from psn_train.data.events import Recording
from psn_train.data.events.writers import encode_aedat2_dvs128, encode_bin
from psn_train.data.shards import write_shards
from psn_train.data.sources import ArraySource, open_source
from psn_train.demo import load_digits


def digits(per_class: int, start: int = 0) -> dict[str, list[Image.Image]]:
    """{class: real handwritten digits, 28 x 28, grey}."""
    images, labels = load_digits()
    return {
        str(digit): [Image.fromarray(image) for image in images[labels == digit][start : start + per_class]]
        for digit in range(10)
    }


def jpeg(image: Image.Image, side: int = 64) -> bytes:
    out = io.BytesIO()
    image.convert("RGB").resize((side, side)).save(out, "JPEG", quality=90)
    return out.getvalue()


def photos(folder: Path) -> None:
    """photos/{train,val,test}/CLASS/*.jpg: 60, 20 and 20."""
    for split, per_class, start in (("train", 6, 0), ("val", 2, 20), ("test", 2, 30)):
        for name, images in digits(per_class, start).items():
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for number, image in enumerate(images):
                (place / f"{number:03d}.jpg").write_bytes(jpeg(image))


def photo_shards(folder: Path) -> None:
    """data/photos/{train,val,test}."""
    photos(folder)
    for split, source in open_source(folder / "photos").items():
        write_shards(source, folder / "data" / "photos" / split, split=split, num_shards=3, workers=1, progress=False)


def digit_shards(folder: Path) -> None:
    """data/digits/{train,val}: 150 and 50 grey digits, and runs/digits, trained on them."""
    images, labels = load_digits()
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:20] for digit in range(10)])
    held_out = np.arange(200) % 4 == 0
    for split, which in (("train", ~held_out), ("val", held_out)):
        source = ArraySource(images[chosen[which]], labels[chosen[which]], [str(digit) for digit in range(10)])
        write_shards(source, folder / "data" / "digits" / split, split=split, num_shards=3, workers=1, progress=False)


def digits_run(folder: Path) -> None:
    digit_shards(folder)
    document = small_document(Path("data/digits"), Path("runs/digits"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        changes = {"name": "digits", "model": {"T": 4}, "checkpoint": {"every_epochs": 1, "keep_last": 2}}
        assert train_here(merged(document, changes)) == 0


def webdataset_shards(folder: Path, pattern: str, count: int, start: int = 0) -> None:
    """Shards as others write them, FOLDER/PATTERN % number, with a member .cls."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with webdataset.TarWriter(str(folder / (pattern % number))) as writer:
            for name, (image,) in digits(1, start + number).items():
                writer.write({"__key__": f"{number}_{name}", "jpg": jpeg(image), "cls": name})


def imagenet_archives(folder: Path) -> None:
    """downloads/: ILSVRC2012's archives with 4 classes of 40 photographs, 20 to validate; in1k/, as others have it."""
    photographs = {f"n{10_000_000 + int(name)}": list(map(jpeg, images)) for name, images in digits(40).items()}
    photographs = dict(list(photographs.items())[:4])
    downloads = folder / "downloads"
    answers = imagenet(downloads, photographs, val=20)
    devkit(downloads / "ILSVRC2012_devkit_t12.tar.gz", answers, sorted(photographs))
    webdataset_shards(folder / "in1k", "imagenet1k-train-%04d.tar", 4)


def imagenet_shards(folder: Path) -> None:
    """data/imagenet/{train,val} of those archives."""
    imagenet_archives(folder)
    labels = folder / "downloads" / "ILSVRC2012_devkit_t12.tar.gz"
    for split, source in open_source(folder / "downloads", val_labels=labels).items():
        write_shards(source, folder / "data" / "imagenet" / split, split=split, num_shards=4, workers=1, progress=False)


def for_many_machines(folder: Path) -> None:
    """Both sets, and the README's photos.yaml."""
    imagenet_shards(folder)
    photo_shards(folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder / "photos.yaml").write_text(re.search(r"^```yaml\n(# photos\.yaml\n.*?)^```", readme, re.M | re.S)[1])


def own_data(folder: Path) -> None:
    photos(folder)
    hugging_face(folder / "parquet" / "train-00000-of-00001.parquet", [0, 1, 2] * 5, names=["ant", "bee", "cat"])
    cifar10(folder / "cifar" / "cifar-10-batches-py")
    with (folder / "photos.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for path in sorted((folder / "photos").rglob("*.jpg")):
            split, label = path.relative_to(folder / "photos").parts[:2]
            rows.writerow([os.path.relpath(path, folder), label, split])
    webdataset_shards(folder / "in1k", "imagenet1k-train-%04d.tar", 4)
    webdataset_shards(folder / "in1k", "imagenet1k-validation-%02d.tar", 2, start=10)
    recordings(folder)
    (folder / "test.txt").write_text("left/left_0\nright/right_5\n")


def cifar_shards(folder: Path) -> None:
    """data/cifar10/{train,test}, 20 and 4 images."""
    cifar10(folder / "cifar" / "cifar-10-batches-py")
    for split, source in open_source(folder / "cifar").items():
        write_shards(source, folder / "data" / "cifar10" / split, split=split, num_shards=2, workers=1, progress=False)


def recordings(folder: Path) -> None:
    """recordings/{left,right}/*.aedat, pieces of a real one, and wave.aedat."""
    parts = event_trees.pieces(20, 400)
    for label, name in enumerate(("left", "right")):
        data = [encode_aedat2_dvs128(part) for part in parts[10 * label : 10 * label + 10]]
        event_trees.write_files(folder / "recordings" / name, {f"{name}_{i}.aedat": one for i, one in enumerate(data)})
    (folder / "wave.aedat").write_bytes(encode_aedat2_dvs128(event_trees.real_recording(20_000)))


def cifar10_dvs(folder: Path) -> None:
    """downloads/cifar10dvs: ten zips of 1,000 recordings, of 30 events each."""
    for name, files in event_trees.cifar_files().items():
        event_trees.write_zip(folder / "downloads" / "cifar10dvs" / f"{name}.zip", files)


def event_sets(folder: Path) -> None:
    """All the data sets of the page on event cameras."""
    cifar10_dvs(folder)
    downloads = folder / "downloads"
    event_trees.write_files(downloads / "DvsGesture", event_trees.gesture_files())
    for split, files in event_trees.nmnist_files().items():
        event_trees.write_zip(downloads / "nmnist" / f"{split}.zip", files)
    names = ["BACKGROUND_Google", "Faces_easy", *(f"thing_{i:02d}" for i in range(99))]
    part = event_trees.small_sensor(event_trees.pieces(1, 2_000)[0], (120, 90))
    data = encode_bin(Recording(part.events, (240, 180)))
    event_trees.write_files(
        downloads / "Caltech101", {f"{name}/image_{i + 1:04d}.bin": data for name in names for i in range(10)}
    )
    recordings(folder)
    for path in (folder / "recordings").rglob("*.aedat"):
        path.with_suffix(".bin").write_bytes(data)
        path.unlink()


def old_files(folder: Path) -> None:
    """Weights of others, by the names on the page; and images to evaluate them on."""
    imagenet_shards(folder)
    old_networks(folder)


def old_networks(folder: Path) -> None:
    import timm

    made = {
        "checkpoint_max_test_acc1.pth": foreign.AuthorsSEWResNet(18, 4, partial(foreign.FullPSN, 4), width=8),
        "masked.pth": foreign.AuthorsSEWResNet(18, 4, partial(foreign.MaskedPSN, 4), width=8),
        "vgg.pth": foreign.AuthorsVGG(partial(foreign.SlidingPSN, 10)),
        # SpikingJelly's LIFs have no tensors
        "lif.pth": timm.create_model("resnet18", num_classes=10),
    }
    for name, network in made.items():
        foreign.save_as_authors(network, folder / name)


def for_the_readme(folder: Path) -> None:
    """All that README.md speaks of."""
    own_data(folder)
    imagenet_archives(folder)
    for name, files in event_trees.cifar_files().items():
        event_trees.write_zip(folder / "downloads" / f"{name}.zip", files)
    digits_run(folder)
    old_networks(folder)
    # what has no class yet
    new = [jpeg(images[0]) for images in digits(1, 40).values()]
    (folder / "holiday.jpg").write_bytes(new[0])
    event_trees.write_files(folder / "inbox", {f"{number}.jpg": one for number, one in enumerate(new[1:])})
