"""SpikingJelly's, tonic's and faery's code for recordings, and what the tests of recordings share."""

import importlib.machinery
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED

from psn_train.data.events import EVENT_DTYPE, Recording, make_events

EVENTS = SHARED / "events"
needs_recordings = pytest.mark.skipif(not EVENTS.is_dir(), reason=f"no recordings at {EVENTS}; set PSN_SHARED_DATA")


def spikingjelly_datasets() -> SimpleNamespace:
    """SpikingJelly 2.0's dataset code, whatever state torchaudio is in.

    Returns:
        load_cifar10_dvs(file) -> {t, x, y, p}: one .aedat file as CIFAR10-DVS's conversion reads it.
        load_aedat_v3(file), load_ATIS_bin(file) -> {t, x, y, p}; load_npz_frames(file) -> float32 [T, 2, H, W].
        integrate_events_by_fixed_frames_number(events, split_by, frames_num, H, W) -> [T, 2, H, W].
        integrate_events_by_fixed_duration(events, duration, H, W) -> [T, 2, H, W].
        utils, cifar10_dvs, dvs128_gesture, n_mnist, n_caltech101, transform: its modules.

    Skips the test if SpikingJelly is not installed.
    """
    pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed (2.0 needs Python 3.11)")
    if "spikingjelly.datasets" not in sys.modules:
        # its package imports torchaudio for Speech Commands, and a torchaudio of another CUDA than torch's raises
        real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchaudio"}
        stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = stub
        try:
            import spikingjelly.datasets  # noqa: F401
        finally:
            del sys.modules["torchaudio"]
            sys.modules.update(real)
    from spikingjelly.datasets import cifar10_dvs, dvs128_gesture, n_caltech101, n_mnist, transform, utils

    return SimpleNamespace(
        load_cifar10_dvs=cifar10_dvs._load_origin_data,
        load_aedat_v3=utils.load_aedat_v3,
        load_ATIS_bin=utils.load_ATIS_bin,
        load_npz_frames=utils.load_npz_frames,
        integrate_events_by_fixed_frames_number=utils.integrate_events_by_fixed_frames_number,
        integrate_events_by_fixed_duration=utils.integrate_events_by_fixed_duration,
        utils=utils,
        cifar10_dvs=cifar10_dvs,
        dvs128_gesture=dvs128_gesture,
        n_mnist=n_mnist,
        n_caltech101=n_caltech101,
        transform=transform,
    )


def tonic_package():
    """The module `tonic`; skips the test if it is not installed."""
    pytest.importorskip("tonic", reason="tonic is not installed")
    import tonic
    import tonic.io
    import tonic.transforms

    return tonic


def write_with_faery(path, recording, **options) -> None:
    """A recording as faery writes it: .aedat4, .dat or .raw by the suffix; skips if faery is not installed.

    Args:
        options: of `to_file`: version ("dat2", "evt2", "evt3"), compression (None, ("lz4", 1), ("zstd", 1)).
    """
    faery = pytest.importorskip("faery", reason="faery is not installed")
    events = np.zeros(len(recording), faery.EVENTS_DTYPE)
    for theirs, ours in zip(faery.EVENTS_DTYPE.names, "txyp", strict=True):
        events[theirs] = recording.events[ours]
    if path.suffix != ".aedat4":
        # else it writes times from the first event on
        options["zero_t0"] = False
    faery.events_stream_from_array(events, recording.sensor).to_file(path, **options)


def assert_same(recording: Recording, columns) -> None:
    """`columns` holds t, x, y, p by name, of whatever integer type."""
    assert recording.events.dtype == EVENT_DTYPE
    for name in "txyp":
        theirs = np.asarray(columns[name]).astype(np.int64)
        np.testing.assert_array_equal(recording.events[name].astype(np.int64), theirs, err_msg=name)


def random_recording(seed: int, count: int, sensor=(128, 128), last: int = 1 << 22) -> Recording:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, last, count))
    columns = rng.integers(0, sensor[0], count), rng.integers(0, sensor[1], count), rng.integers(0, 2, count)
    return Recording(make_events(t, *columns), sensor)
