"""`psn demo events`: digits that move before a simulated event camera."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from psn_train.demo.digits import CLASSES, held_out, load_digits
from psn_train.demo.steps import PYTHON, finish, fresh_folder, run_step, train

RECIPE = "nmnist/sew_resnet10_psn.demo_events"
PROCESSES = 2


def run(out: str) -> int:
    """The demo on events, everything in the folder `out`."""
    begin = time.monotonic()
    folder = fresh_folder(out)
    recordings = folder / "recordings"
    print("== real digits, moved before a simulated event camera -> N-MNIST's files")
    images, labels = load_digits()
    count = record_digits(images, labels, held_out(labels), recordings)
    mean = count / len(labels)
    print(f"   {recordings}: {len(labels)} recordings of {mean:,.0f} events on average (N-MNIST's have 4,100)")
    print(f"   {time.monotonic() - begin:.1f} s", flush=True)
    run_step(
        "recordings -> webdataset shards",
        [*PYTHON, "psn_train.cli", "shards", "nmnist", str(recordings), str(folder / "shards")]
        + ["--workers", str(PROCESSES)],
    )
    train(RECIPE, folder, "test")
    one = min((recordings / "Test" / "3").iterdir())
    places = {"recordings": f"{recordings} (try: psn view {one})"}
    finish(folder, RECIPE.partition("/")[2], "events.png", begin, "test", places)
    return 0


def record_digits(
    images: np.ndarray, labels: np.ndarray, test: np.ndarray, folder: Path, processes: int = PROCESSES
) -> int:
    """Recordings of a simulated camera as FOLDER/{Train,Test}/DIGIT/NUMBER.bin, as N-MNIST lies on disk.

    Args:
        images: uint8 [n, H, W].
        labels: int [n].
        test: bool [n], those of Test.
        processes: that record side by side; which one records a digit does not change the recording.

    Returns:
        the events of all recordings.
    """
    for name in ("Train", "Test"):
        for digit in CLASSES:
            (folder / name / digit).mkdir(parents=True, exist_ok=True)
    names = np.where(test, "Test", "Train")
    paths = [folder / names[n] / str(labels[n]) / f"{n:05d}.bin" for n in range(len(labels))]
    parts = np.array_split(np.arange(len(labels)), processes * 8)
    jobs = [(images[part], part.tolist(), [paths[n] for n in part]) for part in parts]
    if processes == 1:
        return sum(map(_record, jobs))
    with ProcessPoolExecutor(processes) as pool:
        return sum(pool.map(_record, jobs))


def _record(job: tuple[np.ndarray, list[int], list[Path]]) -> int:
    from psn_train.data.events.simulate import simulate_saccades
    from psn_train.data.events.writers import write_bin

    count = 0
    for image, number, path in zip(*job, strict=True):
        # each digit has noise of its own
        recording = simulate_saccades(image, rng=number)
        write_bin(path, recording)
        count += len(recording)
    return count
