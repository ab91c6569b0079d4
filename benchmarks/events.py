"""Recordings to frames, side by side with SpikingJelly and tonic in one run: time and bytes.

    python benchmarks/events.py RECORDINGS [--count 100] [--events 200000] [--T 10] [--workers 2]

RECORDINGS is a folder of DVS128 recordings in AEDAT 2.0, the format of CIFAR10-DVS, of which `--count` files of about
`--events` events are made (`cifar10dvs_standin.py`). Three tables:

1. Read and integrate one recording: from the AEDAT file to frames. Medians of CPU time of one thread, in turns, each
   side in a process of its own, as it runs in use: ours as in its decoding and writing processes, which keep the memory
   that they free (`psn_train.data.memory`), SpikingJelly and tonic as they come, and SpikingJelly with memory kept.
2. Convert all recordings to what training reads, compression included, and read all of it once as an epoch does.
   SpikingJelly with its own settings (16 threads, compressed files) and with compression turned off; tonic with its
   disk cache, in one process, which is what it has.
3. Bytes on the disk for each recording, with what must be kept for T = 4, 8 and 10.

No figure is printed unless the frames agree to the event: ours with SpikingJelly's, and ours under tonic's rounding
with tonic's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from cifar10dvs_standin import read_words, window
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import event_peers

from psn_train.data.events import read_recording
from psn_train.data.events.codec import decode_flat, encode_events
from psn_train.data.frames import integrate
from psn_train.data.frames.batched import PackedEvents, integrate_packed
from psn_train.data.index import load_index
from psn_train.data.memory import keep_freed_memory
from psn_train.data.reader import SampleReader
from psn_train.data.shards import write_shards
from psn_train.data.sources.recordings import open_recordings

SENSOR = (128, 128)
STEPS = (4, 8, 10)


def make_tree(source: Path, out: Path, count: int, events: int) -> list[Path]:
    """`count` recordings in two class folders of a training split, as CIFAR10-DVS names them."""
    recordings = [read_words(path) for path in sorted(source.glob("*.aedat"))]
    files = []
    for number in range(count):
        name = ("airplane", "automobile")[number % 2]
        path = out / "train" / name / f"cifar10_{name}_{number // 2}.aedat"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = int(events * np.random.default_rng(number).uniform(0.6, 1.4))
        path.write_bytes(window(recordings, number, length))
        files.append(path)
    return files


def timed_process(job, arguments: tuple, kept: bool, pipe) -> None:
    """Runs the job once for each message and answers with its CPU seconds; ends at a None."""
    if kept:
        keep_freed_memory()
    torch.set_num_threads(1)
    while pipe.recv() is not None:
        begin = time.thread_time()
        job(*arguments)
        pipe.send(time.thread_time() - begin)


def in_turns(jobs: dict[str, tuple], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each job (function, arguments, whether memory is kept); they take turns."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, (job, arguments, kept) in jobs.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=timed_process, args=(job, arguments, kept, theirs), daemon=True).start()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 2):
        for name, pipe in pipes.items():
            pipe.send("go")
            seconds = pipe.recv()
            # the first rounds warm up
            if turn > 1:
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(None)
    return {name: statistics.median(found) for name, found in times.items()}


# ---- the peers


def spikingjelly_events(path: Path) -> dict:
    return event_peers.spikingjelly_datasets().load_cifar10_dvs(str(path))


def spikingjelly_frames(path: Path, T: int, by: str) -> np.ndarray:
    peer = event_peers.spikingjelly_datasets()
    return peer.integrate_events_by_fixed_frames_number(spikingjelly_events(path), by, T, SENSOR[1], SENSOR[0])


def tonic_events(path: Path) -> np.ndarray:
    """tonic's public reader of this format is broken (1.7.0), its parts work; addresses as ours has them."""
    import tonic.io

    found = tonic.io.read_aedat_header_from_file(str(path))
    raw = tonic.io.get_aer_events_from_file(str(path), found[0], found[1])
    address = raw["address"].astype(np.int64)
    return tonic.io.make_structured_array(
        127 - (address >> 8 & 127), 127 - (address >> 1 & 127), raw["timeStamp"].astype(np.int64), 1 - (address & 1)
    )


def tonic_frames(path: Path, T: int, by: str) -> np.ndarray:
    from tonic.transforms import ToFrame

    size = (*SENSOR, 2)
    to_frame = ToFrame(sensor_size=size, **{"n_event_bins" if by == "number" else "n_time_bins": T})
    return to_frame(tonic_events(path))


def our_frames(path: Path, T: int, by: str, rounding: str = "spikingjelly") -> np.ndarray:
    return integrate(read_recording(path, "dvs128"), T, SENSOR, by, rounding)


def check(files: list[Path], T: int) -> None:
    """Raises SystemExit where a frame differs."""
    for path in files:
        for by in ("number", "time"):
            same = np.array_equal(our_frames(path, T, by), spikingjelly_frames(path, T, by))
            same &= np.array_equal(our_frames(path, T, by, "tonic"), tonic_frames(path, T, by))
            if not same:
                raise SystemExit(f"{path}: frames by {by} differ from a peer's; no figure is printed")


# ---- the tables


def one_recording(path: Path, T: int, rounds: int) -> dict[str, dict[str, float]]:
    found = {}
    for by in ("number", "time"):
        arguments = (path, T, by)
        found[by] = in_turns(
            {
                "psn_train": (our_frames, arguments, True),
                "SpikingJelly": (spikingjelly_frames, arguments, False),
                "SpikingJelly, memory kept": (spikingjelly_frames, arguments, True),
                "tonic": (tonic_frames, arguments, False),
            },
            rounds,
        )
    return found


def convert_ours(tree: Path, out: Path, T: int, workers: int) -> tuple[float, float]:
    """Seconds of writing shards, and of an epoch's reading: decoded and integrated, in batches of 32, one process."""
    source = open_recordings(tree, format="dvs128", sensor=SENSOR)["train"]
    begin = time.perf_counter()
    write_shards(source, out, split="train", workers=workers, progress=False)
    wrote = time.perf_counter() - begin
    reader = SampleReader(load_index(out))
    begin = time.perf_counter()
    count = reader.index.num_samples
    for first in range(0, count, 32):
        batch = [decode_flat(reader.read(i)["events"]) for i in range(first, min(first + 32, count))]
        integrate_packed(PackedEvents.pack(batch, SENSOR, with_time=False), T, "number", "spikingjelly")
    return wrote, time.perf_counter() - begin


def convert_spikingjelly(files: list[Path], out: Path, T: int, compressed: bool) -> tuple[float, float]:
    """The same by SpikingJelly's own functions and number of threads: events to .npz, those to frames in .npz."""
    peer = event_peers.spikingjelly_datasets()
    from spikingjelly import configure

    # which its variable SJ_SAVE_DATASETS_COMPRESSED decides at import
    peer.utils.np_savez = np.savez_compressed if compressed else np.savez
    events, frames = out / "events_np", out / f"frames_number_{T}_split_by_number"
    events.mkdir(parents=True)
    frames.mkdir()
    begin = time.perf_counter()
    with ThreadPoolExecutor(configure.max_threads_number_for_datasets_preprocess) as pool:
        jobs = [
            pool.submit(peer.cifar10_dvs._read_aedat_save_to_np, path, events / f"{path.stem}.npz") for path in files
        ]
        for job in jobs:
            job.result()
        integrate_file = peer.utils.integrate_events_file_to_frames_file_by_fixed_frames_number
        jobs = [
            pool.submit(integrate_file, np.load, events / f"{path.stem}.npz", frames, "number", T, *SENSOR)
            for path in files
        ]
        for job in jobs:
            job.result()
    wrote = time.perf_counter() - begin
    begin = time.perf_counter()
    for path in sorted(frames.iterdir()):
        peer.utils.load_npz_frames(path)
    return wrote, time.perf_counter() - begin


def convert_tonic(files: list[Path], out: Path, T: int) -> tuple[float, float]:
    """Frames in tonic's disk cache: the first pass fills it, the second reads it."""
    from tonic import DiskCachedDataset

    class Frames:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int):
            return tonic_frames(files[number], T, "number"), 0

    cached, seconds = DiskCachedDataset(Frames(), cache_path=str(out)), []
    for _ in range(2):
        begin = time.perf_counter()
        for number in range(len(files)):
            cached[number]
        seconds.append(time.perf_counter() - begin)
    return seconds[0], seconds[1]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def frame_bytes(files: list[Path], out: Path) -> dict[str, float]:
    """Bytes a recording of SpikingJelly's frames for T = 4, 8 and 10 together, over a sample of the files."""
    sample = files[:: max(1, len(files) // 20)]
    compressed = plain = 0
    for path in sample:
        for T in STEPS:
            frames = spikingjelly_frames(path, T, "number").astype(np.float64)
            plain += frames.nbytes
            np.savez_compressed(out, frames=frames)
            compressed += out.stat().st_size
    return {"compressed": compressed / len(sample), "plain": plain / len(sample)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path, help="folder of DVS128 recordings, *.aedat (AEDAT 2.0)")
    parser.add_argument("--count", type=int, default=100, help="recordings that are converted (default: %(default)s)")
    parser.add_argument("--events", type=int, default=200_000, help="of a recording, on average")
    parser.add_argument("--T", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="our writing processes")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tmp", type=Path, help="where the files go; by default the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.tmp) as folder:
        run(options, Path(folder))


def run(options, folder: Path) -> None:
    console, T = Console(width=110), options.T
    # of an epoch's reading; for the peers, too
    keep_freed_memory()
    torch.set_num_threads(1)
    tree = folder / "tree"
    files = make_tree(options.recordings, tree, options.count, options.events)
    single = folder / "single.aedat"
    single.write_bytes(window([read_words(path) for path in sorted(options.recordings.glob("*.aedat"))], 0, 200_000))
    check([single, *files[:4]], T)
    result: dict = {
        "benchmark": "events",
        "T": T,
        "count": len(files),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("numpy", "torch", "spikingjelly", "tonic", "zstandard")},
    }

    result["one_recording_ms"] = {
        by: {name: 1e3 * seconds for name, seconds in found.items()}
        for by, found in one_recording(single, T, options.rounds).items()
    }
    table = Table("200,000 events, AEDAT file to frames", "by number, ms", "by time, ms", "times ours")
    ours = result["one_recording_ms"]
    for name in ours["number"]:
        number, by_time = ours["number"][name], ours["time"][name]
        ratio = f"{number / ours['number']['psn_train']:.1f}, {by_time / ours['time']['psn_train']:.1f}"
        table.add_row(name, f"{number:.2f}", f"{by_time:.2f}", ratio)
    console.print(table)

    count, raw = len(files), sum(path.stat().st_size for path in files)
    events = sum(len(read_recording(path, "dvs128")) for path in files)
    frames = frame_bytes(files, folder / "frames.npz")
    conversions = {
        "psn_train": convert_ours(tree, folder / "ours", T, options.workers),
        "SpikingJelly": convert_spikingjelly(files, folder / "sj", T, True),
        "SpikingJelly, not compressed": convert_spikingjelly(files, folder / "sj_plain", T, False),
        "tonic": convert_tonic(files, folder / "tonic", T),
    }
    kept = {
        "psn_train": folder_bytes(folder / "ours") / count,
        "SpikingJelly": folder_bytes(folder / "sj" / "events_np") / count + frames["compressed"],
        "SpikingJelly, not compressed": folder_bytes(folder / "sj_plain" / "events_np") / count + frames["plain"],
        "tonic": len(STEPS) * folder_bytes(folder / "tonic") / count,
    }
    result["conversion"] = {}
    table = Table(
        f"{count} recordings", "convert, ms each", "read, ms each", "both, times ours", "kB each, all T", "times ours"
    )
    total = sum(conversions["psn_train"])
    for name, (wrote, read) in conversions.items():
        result["conversion"][name] = {
            "convert_ms": 1e3 * wrote / count,
            "epoch_read_ms": 1e3 * read / count,
            "times_ours": (wrote + read) / total,
            "convert_times_ours": wrote / conversions["psn_train"][0],
            "bytes_all_T": kept[name],
            "bytes_times_ours": kept[name] / kept["psn_train"],
        }
        table.add_row(
            name,
            f"{1e3 * wrote / count:.1f}",
            f"{1e3 * read / count:.2f}",
            f"{(wrote + read) / total:.1f}",
            f"{kept[name] / 1e3:.0f}",
            f"{kept[name] / kept['psn_train']:.1f}",
        )
    console.print(table)

    coded = sum(len(encode_events(read_recording(path, "dvs128"))) for path in files)
    npz = zip_bytes(folder / "sj" / "events_np")
    result["bytes_an_event"] = {
        "raw AEDAT 2.0": raw / events,
        "npz of SpikingJelly": npz / events,
        "npz of SpikingJelly, not compressed": folder_bytes(folder / "sj_plain" / "events_np") / events,
        "frames of SpikingJelly for this T": folder_bytes(folder / "sj") / events - npz / events,
        "frames of SpikingJelly for this T, float64, not compressed": T * 2 * 128 * 128 * 8 * count / events,
        "tonic's cache for this T": folder_bytes(folder / "tonic") / events,
        "psn_train, coded events": coded / events,
        "psn_train, shards": folder_bytes(folder / "ours") / events,
    }
    table = Table("on the disk", "bytes an event")
    for name, value in result["bytes_an_event"].items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    shutil.rmtree(folder / "sj", ignore_errors=True)
    print(json.dumps(result))


def zip_bytes(folder: Path) -> int:
    """Bytes of the archives in a folder; each is held against its own directory first."""
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist(), path
    return folder_bytes(folder)


if __name__ == "__main__":
    main()
