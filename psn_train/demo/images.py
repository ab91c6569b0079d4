"""`psn demo images`: digits as images."""

from __future__ import annotations

import time

from psn_train.demo.digits import CLASSES, held_out, load_digits
from psn_train.demo.steps import finish, fresh_folder, train

RECIPE = "mnist/sew_resnet10_psn.demo"


def run(out: str) -> int:
    """The demo on images, everything in the folder `out`."""
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import ArraySource

    begin = time.monotonic()
    folder = fresh_folder(out)
    print("== real digits -> webdataset shards")
    images, labels = load_digits()
    out_of_training = held_out(labels)
    for split, chosen in (("train", ~out_of_training), ("val", out_of_training)):
        source = ArraySource(images[chosen], labels[chosen], CLASSES)
        index = write_shards(source, folder / "shards" / split, split=split, workers=2, progress=False)
        print(f"   {folder / 'shards' / split}: {index.num_samples} digits in {len(index.shards)} shards")
    train(RECIPE, folder)
    finish(folder, RECIPE.partition("/")[2], "digits.png", begin)
    return 0
