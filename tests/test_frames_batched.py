"""Frames of a batch of packed recordings: equal to those of each recording alone, in one call, without waiting."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import any_recording, made_recording, real_recordings
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from psn_train.data.events import Recording, make_events
from psn_train.data.events.codec import decode_flat, encode_events
from psn_train.data.frames import ROUNDINGS, integrate, integrate_by_duration, voxel_grid
from psn_train.data.frames import batched as batched
from psn_train.data.frames.batched import (
    PackedEvents,
    integrate_packed,
    integrate_packed_duration,
    resize_frames,
    voxel_packed,
)

STEPS = (1, 3, 4, 10, 16)


@pytest.fixture(scope="module")
def batches() -> list[list[Recording]]:
    """Real recordings, those of one sensor together."""
    recordings = real_recordings()
    sensors = {recording.sensor for recording in recordings}
    return [[recording for recording in recordings if recording.sensor == sensor] for sensor in sorted(sensors)]


def odd_batch() -> list[Recording]:
    """Of every length and duration, empty ones at both ends and in the middle."""
    rng = np.random.default_rng(0)
    made = [made_recording(rng, n, span, start=2**32) for n in (0, 1, 3, 60, 700) for span in (0, 1, 5, 1000, 10**6)]
    return [made[0], *rng.permuted(np.array(made, dtype=object)), made[0]]


def assert_equal_to_the_law(packed: PackedEvents, recordings: list[Recording], steps=STEPS) -> None:
    for T in steps:
        for by in ("number", "time"):
            for rounding in ROUNDINGS:
                law = np.stack([integrate(r, T, by=by, rounding=rounding) for r in recordings], axis=1)
                frames = integrate_packed(packed, T, by, rounding)
                assert frames.dtype == torch.float32 and frames.is_contiguous()
                assert np.array_equal(frames.cpu().numpy(), law), (T, by, rounding)
        for signed in (False, True):
            law = np.stack([voxel_grid(r, T, signed=signed) for r in recordings], axis=1)
            voxels = voxel_packed(packed, T, signed)
            assert voxels.dtype == torch.float32
            np.testing.assert_allclose(voxels.cpu().numpy(), law, rtol=1e-6, atol=1e-6)


def assert_durations_equal_to_the_law(packed: PackedEvents, recordings, duration: int, max_steps=None) -> None:
    law = [integrate_by_duration(r, duration, max_steps=max_steps) for r in recordings]
    frames, mask = integrate_packed_duration(packed, duration, max_steps)
    assert frames.shape[:2] == mask.shape == (max(map(len, law)), len(recordings)) and mask.dtype == torch.bool
    for n, one in enumerate(law):
        assert np.array_equal(frames[: len(one), n].cpu().numpy(), one)
        assert mask[: len(one), n].all() and not mask[len(one) :, n].any()
        assert not frames[len(one) :, n].any()


def test_real_recordings_equal_the_law(batches):
    for recordings in batches:
        assert_equal_to_the_law(PackedEvents.pack(recordings, with_time=True), recordings, (1, 4, 10))


def test_real_recordings_at_fixed_duration(batches):
    for recordings in batches:
        packed = PackedEvents.pack(recordings, with_time=True)
        longest = max(recording.duration_us for recording in recordings)
        for parts, max_steps in ((30, None), (30, 7), (1, None), (100, 3)):
            assert_durations_equal_to_the_law(packed, recordings, longest // parts, max_steps)


def test_odd_recordings_equal_the_law():
    recordings = odd_batch()
    packed = PackedEvents.pack(recordings, with_time=True)
    assert_equal_to_the_law(packed, recordings)
    for duration in (999, 1000, 1001, 10**6, 10**9):
        for max_steps in (None, 1, 4, 2000):
            assert_durations_equal_to_the_law(packed, recordings, duration, max_steps)


@settings(deadline=None)
@given(st.lists(any_recording(), min_size=1, max_size=4), st.integers(1, 12), st.sampled_from([1, 3, 50, 10**7]))
def test_any_recordings_equal_the_law(recordings, T, duration):
    packed = PackedEvents.pack(recordings, with_time=True)
    assert_equal_to_the_law(packed, recordings, [T])
    assert_durations_equal_to_the_law(packed, recordings, duration, 20)


def test_a_recording_does_not_depend_on_its_neighbours():
    recordings = odd_batch()
    whole = PackedEvents.pack(recordings, with_time=True)
    other = PackedEvents.pack(recordings[::-1], with_time=True)
    for make in (integrate_packed, voxel_packed):
        assert torch.equal(make(whole, 5), make(other, 5).flip(1))


def test_voxels_do_not_depend_on_the_order_of_sums():
    """Sums of whole numbers: the same to the last bit with the events of one microsecond shuffled."""
    rng = np.random.default_rng(2)
    recording = made_recording(rng, 20_000, 50)
    events = recording.events[np.lexsort([rng.random(len(recording)), recording.events["t"]])]
    first, second = (PackedEvents.pack([e], (7, 5), with_time=True) for e in (recording.events, events))
    assert not torch.equal(first.address, second.address)
    for signed in (False, True):
        assert torch.equal(voxel_packed(first, 7, signed), voxel_packed(second, 7, signed))


def test_no_recordings_and_no_events():
    for recordings in ([], [made_recording(np.random.default_rng(0), 0, 0)]):
        packed = PackedEvents.pack(recordings, (7, 5), with_time=True)
        assert len(packed) == len(recordings)
        for by in ("number", "time"):
            assert integrate_packed(packed, 4, by).shape == (4, len(recordings), 2, 5, 7)
        assert voxel_packed(packed, 4, signed=True).shape == (4, len(recordings), 1, 5, 7)
        frames, mask = integrate_packed_duration(packed, 1000)
        assert frames.shape == (1, len(recordings), 2, 5, 7) and mask.all()


def test_large_frames_take_large_places():
    """More than 2^31 places do not fit into int32; on the meta device, which holds no memory."""
    recording = Recording(make_events([0, 5], [1279, 0], [719, 0], [1, 0]), (1280, 720))
    size = 2 * 1280 * 720
    for count, dtype in ((100, torch.int32), (120, torch.int64)):
        packed = PackedEvents.pack([recording] * count, with_time=True).to("meta")
        # (T + 1) N + 1 frames have a place, for voxels' sake
        assert (dtype == torch.int32) == ((11 * count + 1) * size < 2**31)
        lengths = torch.zeros(count, 11, dtype=torch.int64, device="meta")
        assert batched._places(packed, lengths, size).dtype == dtype
        assert integrate_packed(packed, 10).shape == (10, count, 2, 720, 1280)
    one = PackedEvents.pack([recording])
    assert np.array_equal(integrate_packed(one, 3)[:, 0].numpy(), integrate(recording, 3))


def test_the_host_never_waits_for_the_device():
    """The meta device has no values: whatever read one, or had a shape that depends on one, would raise."""
    packed = PackedEvents.pack(odd_batch(), with_time=True).to("meta")
    with pytest.raises(RuntimeError):
        packed.address.max().item()
    for by in ("number", "time"):
        for rounding in ROUNDINGS:
            frames = integrate_packed(packed, 5, by, rounding)
            assert frames.device.type == "meta" and frames.shape == (5, len(packed), 2, 5, 7)
    for signed in (False, True):
        assert voxel_packed(packed, 5, signed).device.type == "meta"
    frames, mask = integrate_packed_duration(packed, 1000)
    assert frames.shape[:2] == mask.shape == (1000, len(packed))
    assert resize_frames(frames, 48).device.type == "meta"


def test_the_path_of_other_devices_is_the_same(monkeypatch):
    """What is done in numpy on the host has a twin in torch for devices; here both run on the host."""
    recordings = odd_batch()
    packed = PackedEvents.pack(recordings, with_time=True)
    torch_repeat = []

    def repeat(values, lengths, total):
        torch_repeat.append(total)
        return torch.repeat_interleave(torch.from_numpy(values), lengths, output_size=total)

    monkeypatch.setattr(batched, "_count_on_host", batched._count_on_device)
    monkeypatch.setattr(batched, "_repeat", repeat)
    monkeypatch.setattr(batched, "_zeros", lambda size, dtype, device: torch.zeros(size, dtype=dtype))
    assert_equal_to_the_law(packed, recordings, (4,))
    assert_durations_equal_to_the_law(packed, recordings, 1000)
    assert set(torch_repeat) == {int(packed.offsets[-1])}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    recordings = odd_batch()
    packed = PackedEvents.pack(recordings, with_time=True).pin_memory().to("cuda", non_blocking=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        integrate_packed(packed, 4, "time"), voxel_packed(packed, 4), integrate_packed_duration(packed, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal_to_the_law(packed, recordings)
    assert_durations_equal_to_the_law(packed, recordings, 1000)


def test_durations_that_are_not_known_are_read_from_the_times():
    recordings = odd_batch()
    packed = PackedEvents.pack(recordings, with_time=True)
    without = PackedEvents(packed.address, packed.t, packed.offsets, packed.sensor)
    assert without.durations is None
    assert_equal_to_the_law(without, recordings, (4,))
    assert_durations_equal_to_the_law(without, recordings, 1000)


def test_packing():
    recordings = odd_batch()
    packed = PackedEvents.pack(recordings, with_time=True)
    assert packed.address.dtype == torch.int32 and packed.t.dtype == torch.int64 and packed.offsets.dtype == np.int64
    assert packed.sensor == (7, 5) and len(packed) == len(recordings)
    assert packed.offsets.tolist() == np.cumsum([0, *map(len, recordings)]).tolist()
    assert packed.durations.tolist() == [recording.duration_us for recording in recordings]
    for n, recording in enumerate(recordings):
        here, events = slice(*packed.offsets[n : n + 2]), recording.events
        x, y, p = (events[name].astype(int) for name in ("x", "y", "p"))
        assert packed.address[here].tolist() == ((p * 5 + y) * 7 + x).tolist()
        assert packed.t[here].tolist() == (events["t"] - events["t"][:1]).tolist()
    # as workers hand it to the trainer
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(integrate_packed(again, 4, "time"), integrate_packed(packed, 4, "time"))
    plain = PackedEvents.pack([recording.events for recording in recordings], (7, 5))
    assert plain.t is None and torch.equal(plain.address, packed.address)
    assert plain.to("cpu").t is None and integrate_packed(plain, 4).equal(integrate_packed(packed, 4))


def test_flat_recordings_are_packed_as_others():
    recordings = [item for item in odd_batch() if len(item)]
    flat = [decode_flat(encode_events(item)) for item in recordings]
    for with_time in (False, True):
        ours, theirs = PackedEvents.pack(flat, with_time=with_time), PackedEvents.pack(recordings, with_time=with_time)
        assert ours.address.dtype == torch.int32 and torch.equal(ours.address, theirs.address)
        assert ours.sensor == theirs.sensor and np.array_equal(ours.offsets, theirs.offsets)
        if with_time:
            assert torch.equal(ours.t, theirs.t) and np.array_equal(ours.durations, theirs.durations)
    with pytest.raises(ValueError, match="recording 0 of the batch has"):
        PackedEvents.pack(flat, (1, 1))


def test_what_cannot_be_packed_or_integrated():
    small = made_recording(np.random.default_rng(0), 9, 50)
    large = made_recording(np.random.default_rng(0), 9, 50, (240, 180))
    with pytest.raises(ValueError, match=r"recording 0 of the batch has 7 x 5 pixels and recording 1 .* 240 x 180"):
        PackedEvents.pack([small, large])
    with pytest.raises(ValueError, match=r"the sensor given has 128 x 128 pixels and recording 0 .* 7 x 5"):
        PackedEvents.pack([small], (128, 128))
    with pytest.raises(ValueError, match="no sensor is known"):
        PackedEvents.pack([small.events])
    with pytest.raises(ValueError, match=r"recording 1 of the batch: x goes from .* wanted 0 to 3"):
        PackedEvents.pack([small.events[:0], small.events], (4, 5))
    packed = PackedEvents.pack([small])
    for integration in (lambda: integrate_packed(packed, 4, "time"), lambda: voxel_packed(packed, 4)):
        with pytest.raises(ValueError, match="with_time=True"):
            integration()
    with pytest.raises(ValueError, match="with_time=True"):
        integrate_packed_duration(packed, 1000)
    with pytest.raises(ValueError, match="T = 0"):
        integrate_packed(packed, 0)
    with pytest.raises(ValueError, match="duration_us = 0"):
        integrate_packed_duration(packed, 0)


@pytest.mark.parametrize(
    ("antialias", "interpolation"),
    [(False, "bilinear"), (True, "bilinear"), (False, "bicubic"), (True, "bicubic"), (False, "nearest")],
)
def test_resize_is_torchvisions(batches, antialias, interpolation):
    mode = InterpolationMode(interpolation)
    for recordings in batches:
        frames = integrate_packed(PackedEvents.pack(recordings[:4]), 3)
        for size in (48, 17, 200):
            ours = resize_frames(frames, size, antialias, interpolation)
            assert ours.shape == (3, len(recordings[:4]), 2, size, size)
            for t in range(3):
                for n in range(frames.shape[1]):
                    # frame by frame, as the authors' transform did
                    assert torch.equal(ours[t, n], resize(frames[t, n], [size, size], mode, antialias=antialias))


def test_resize_leaves_what_fits():
    frames = torch.rand(2, 3, 2, 48, 48)
    assert resize_frames(frames, 48) is frames
    with pytest.raises(ValueError, match="interpolation = 'lanczos'"):
        resize_frames(frames, 32, interpolation="lanczos")


def test_a_batch_of_too_many_frames_is_refused_before_memory_is_asked_for(monkeypatch):
    recording = Recording(make_events([0, 60_000], [0, 1], [0, 1], [0, 1]), (320, 240))
    packed = PackedEvents.pack([recording] * 3, with_time=True)
    # on a CPU half of its memory is the bound, if that is less
    monkeypatch.setattr(batched.os, "sysconf", {"SC_PHYS_PAGES": 2000, "SC_PAGE_SIZE": 4096}.get)
    assert integrate_packed_duration(packed, 20_000, 2)[0].shape == (2, 3, 2, 240, 320)
    monkeypatch.setattr(batched, "_count", lambda *_: pytest.fail("memory was asked for"))
    with pytest.raises(ValueError, match=r"5,529,600 bytes .* at most 4,096,000 are taken, half of this machine's"):
        integrate_packed_duration(packed, 20_000, 3)
    monkeypatch.setattr(batched.os, "sysconf", lambda _: 2**20)
    says = (
        r"duration_us = 1 makes 60,000 frames of the longest of 3 .* 110,592,000,000 bytes .* a max_steps, or smaller"
    )
    with pytest.raises(ValueError, match=says):
        integrate_packed_duration(packed, 1)
    with pytest.raises(ValueError, match=r"at most 1,073,741,824 are taken; .* a smaller max_steps than 50,000, or"):
        integrate_packed_duration(packed, 1, 50_000)
