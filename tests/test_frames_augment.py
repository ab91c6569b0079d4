"""Augmentation of event frames: each operation against torchvision's on single samples, and what is drawn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recordings import real_recordings
from torchvision.transforms import functional as tv

from psn_train.data.frames.augment import NDA_OPERATIONS, EventDraws, augment_frames, draw_events
from psn_train.data.frames.batched import PackedEvents, integrate_packed, resize_frames
from psn_train.recipe import check_recipe
from psn_train.recipe.events import Events

T, COUNT = 4, 24


@pytest.fixture(scope="module", params=[(48, 48), (33, 20), (7, 34)], ids=str)
def frames(request) -> torch.Tensor:
    """float32 [4, 24, 2, H, W]: counts of real recordings, or of made ones where there are none."""
    height, width = request.param
    try:
        recordings = [recording for recording in real_recordings() if recording.sensor == (128, 128)]
        packed = PackedEvents.pack([recordings[n % len(recordings)] for n in range(COUNT)])
        made = resize_frames(integrate_packed(packed, T), 48)
    except pytest.skip.Exception:
        made = torch.from_numpy(np.random.default_rng(0).poisson(0.7, (T, COUNT, 2, 48, 48)).astype(np.float32))
    return made[..., :height, :width].contiguous()


@pytest.fixture
def recipe(small):
    def make(augment=None, seed=1, **events):
        whole = check_recipe(small())
        changes = {"crop": "none", "hflip": 0.0, **(augment or {})}
        parts = {"augment": whole.augment.model_copy(update=changes), "events": Events(**events), "seed": seed}
        return whole.model_copy(update=parts)

    return make


def plain(count: int, rounds: int = 1, **changes) -> EventDraws:
    """Draws that change nothing, but for `changes`."""
    nothing = {
        **{name: np.zeros(count, np.int64) for name in ("top", "left")},
        **{name: np.zeros(count, bool) for name in ("hflip", "vflip")},
        "roll": np.zeros((count, rounds, 2), np.int64),
        "angle": np.zeros((count, rounds)),
        "side": np.zeros((count, rounds), np.int64),
        "centre": np.zeros((count, rounds, 2)),
    }
    return EventDraws(**{**nothing, **changes})


def one(draws: EventDraws, n: int, number: int = 0) -> dict:
    """What sample n gets in a round."""
    return {name: getattr(draws, name)[n, number] for name in ("roll", "angle", "side", "centre")}


def torchvision_round(frames: torch.Tensor, roll, angle, side, centre) -> torch.Tensor:
    """One sample [T, C, H, W] through torch's roll and torchvision's rotate and erase."""
    height, width = frames.shape[-2:]
    frames = torch.roll(frames, (int(roll[0]), int(roll[1])), (2, 3))
    frames = tv.rotate(frames, float(angle))
    if side:
        middle = int(centre[0] * height), int(centre[1] * width)
        (top, bottom), (left, right) = (
            (max(0, m - side // 2), min(length, m - side // 2 + side))
            for m, length in zip(middle, (height, width), strict=True)
        )
        frames = tv.erase(frames, top, left, bottom - top, right - left, torch.zeros(()))
    return frames


def test_crop_and_flips_are_exact(frames):
    rng = np.random.default_rng(0)
    pad, (height, width) = 5, frames.shape[-2:]
    top, left = rng.integers(-pad, pad + 1, (2, COUNT))
    hflip, vflip = rng.random((2, COUNT)) < 0.5
    found = augment_frames(frames, plain(COUNT, top=top, left=left, hflip=hflip, vflip=vflip))
    for n in range(COUNT):
        padded = F.pad(frames[:, n], (pad, pad, pad, pad))
        expected = tv.crop(padded, int(top[n]) + pad, int(left[n]) + pad, height, width)
        expected = tv.hflip(expected) if hflip[n] else expected
        expected = tv.vflip(expected) if vflip[n] else expected
        assert torch.equal(found[:, n], expected)
    assert len({*zip(top, left, hflip, vflip, strict=True)}) > 20


def test_roll_is_exact(frames):
    roll = np.random.default_rng(1).integers(-40, 41, (COUNT, 1, 2))
    found = augment_frames(frames, plain(COUNT, roll=roll))
    for n in range(COUNT):
        assert torch.equal(found[:, n], torch.roll(frames[:, n], tuple(roll[n, 0].tolist()), (2, 3)))


def test_cutout_is_exact(frames):
    rng = np.random.default_rng(2)
    draws = plain(COUNT, side=rng.integers(0, 20, (COUNT, 1)), centre=rng.random((COUNT, 1, 2)))
    found = augment_frames(frames, draws)
    for n in range(COUNT):
        assert torch.equal(found[:, n], torchvision_round(frames[:, n], **one(draws, n)))
    # a square of that many pixels, odd or even, where it fits
    ones = augment_frames(
        torch.ones(1, 9, 1, 30, 30), plain(9, side=np.arange(9)[:, None], centre=np.full((9, 1, 2), 0.5))
    )
    assert (30 * 30 - ones.sum((0, 2, 3, 4))).tolist() == [side**2 for side in range(9)]


def off_ties(height: int, width: int, angle: float) -> torch.Tensor:
    """bool [H, W]: where the place that a rotation reads from is clearly nearer to one pixel than to the next."""
    y = torch.arange(height, dtype=torch.float64).view(-1, 1) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    places = sine * x + cosine * y + (height - 1) / 2, cosine * x - sine * y + (width - 1) / 2
    apart = [((place % 1) - 0.5).abs() for place in places]
    return (apart[0] > 1e-4) & (apart[1] > 1e-4)


def test_rotation_is_torchvisions_nearest(frames):
    angles = np.concatenate(
        [np.random.default_rng(3).uniform(-180, 180, COUNT - 8), [0, 45, 90, 180, -90, 30, 1e-9, -15]]
    )
    found = augment_frames(frames, plain(COUNT, angle=angles[:, None]))
    clear = 0
    for n, angle in enumerate(angles.tolist()):
        expected, where = tv.rotate(frames[:, n], angle), off_ties(*frames.shape[-2:], angle)
        # half-way between two pixels the last bit of float32 decides
        assert torch.equal(found[:, n][..., where], expected[..., where]), angle
        clear += where.float().mean().item() / COUNT
    assert clear > 0.9
    assert torch.equal(found[:, COUNT - 8], frames[:, COUNT - 8])


def test_rounds_follow_one_another(frames):
    """All operations, three rounds, against one after the other: what a round blanks stays blank in the next."""
    rng = np.random.default_rng(4)
    draws = plain(
        COUNT,
        3,
        top=rng.integers(-3, 4, COUNT),
        left=rng.integers(-3, 4, COUNT),
        hflip=rng.random(COUNT) < 0.5,
        roll=rng.integers(-6, 7, (COUNT, 3, 2)),
        # right angles have no ties, and a third of the rounds has none at all
        angle=rng.choice([0.0, 180.0, 180.0], (COUNT, 3)),
        side=rng.integers(0, 9, (COUNT, 3)),
        centre=rng.random((COUNT, 3, 2)),
    )
    found = augment_frames(frames, draws)
    height, width = frames.shape[-2:]
    for n in range(COUNT):
        expected = tv.crop(F.pad(frames[:, n], (3, 3, 3, 3)), draws.top[n] + 3, draws.left[n] + 3, height, width)
        expected = tv.hflip(expected) if draws.hflip[n] else expected
        for number in range(3):
            expected = torchvision_round(expected, **one(draws, n, number))
        assert torch.equal(found[:, n], expected)


def test_all_steps_and_channels_get_the_same(frames, recipe):
    strong = recipe({"crop": "pad", "pad": 4, "hflip": 0.5, "vflip": 0.5}, roll=5, rotate=20, cutout=6, nda_ops=2)
    draws = draw_events(strong, np.zeros(COUNT, int), np.arange(COUNT))
    repeated = frames[:1, :, :1].expand(T, -1, 2, -1, -1)
    found = augment_frames(repeated, draws)
    assert torch.equal(found, found[:1, :, :1].expand_as(found))
    assert not torch.equal(found, repeated)
    for t in range(T):
        assert torch.equal(augment_frames(frames[t : t + 1], draws)[0], augment_frames(frames, draws)[t])


def test_zero_strength_is_identity(frames, recipe):
    before = frames.clone()
    draws = draw_events(recipe({"crop": "pad", "pad": 0}), np.zeros(COUNT, int), np.arange(COUNT))
    assert augment_frames(frames, draws) is frames
    # likewise for the others in a batch where one sample gets something
    found = augment_frames(frames, plain(COUNT, angle=np.where(np.arange(COUNT) == 5, 33.0, 0.0)[:, None]))
    others = np.arange(COUNT) != 5
    assert torch.equal(found[:, others], frames[:, others]) and not torch.equal(found[:, 5], frames[:, 5])
    assert torch.equal(frames, before)


def test_a_sample_does_not_depend_on_its_batch(frames, recipe):
    wanted = recipe({"crop": "pad", "pad": 3, "hflip": 0.5}, roll=4, rotate=30, cutout=8, nda_ops=3)
    ids, epochs = np.arange(COUNT) + 70, np.arange(COUNT) % 3
    whole = augment_frames(frames, draw_events(wanted, epochs, ids))
    mixed = np.random.default_rng(1).permutation(COUNT)
    again = augment_frames(frames[:, mixed], draw_events(wanted, epochs[mixed], ids[mixed]))
    assert torch.equal(again, whole[:, mixed])
    for size in (1, 7):
        parts = [slice(begin, begin + size) for begin in range(0, COUNT, size)]
        pieces = [augment_frames(frames[:, part], draw_events(wanted, epochs[part], ids[part])) for part in parts]
        assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert not torch.equal(whole, augment_frames(frames, draw_events(wanted, epochs + 1, ids)))
    other = wanted.model_copy(update={"seed": 99})
    assert not torch.equal(whole, augment_frames(frames, draw_events(other, epochs, ids)))


def uniform_to(values: np.ndarray, low: float, high: float) -> bool:
    """Whether values look uniform on [low, high]: 20 bins, four standard deviations of a chi-square."""
    counts, _ = np.histogram(values, 20, (low, high))
    expected = len(values) / 20
    return counts.sum() == len(values) and abs(((counts - expected) ** 2 / expected).sum() - 19) < 4 * np.sqrt(38)


def test_the_recipes_own_are_drawn_from_its_ranges(recipe):
    ids = np.arange(50_000)
    augment = {"crop": "pad", "pad": 2, "hflip": 0.5, "vflip": 0.25}
    draws = draw_events(recipe(augment, roll=3, rotate=20.0, cutout=9), ids * 0 + 4, ids)
    for values, most in ((draws.top, 2), (draws.left, 2), (draws.roll[:, 0, 0], 3), (draws.roll[:, 0, 1], 3)):
        numbers, counts = np.unique(values, return_counts=True)
        assert numbers.tolist() == list(range(-most, most + 1))
        assert abs(counts / len(ids) - 1 / len(numbers)).max() < 0.008
    assert abs(draws.hflip.mean() - 0.5) < 0.01 and abs(draws.vflip.mean() - 0.25) < 0.01
    assert uniform_to(draws.angle[:, 0], -20, 20)
    assert (draws.side == 9).all()
    assert uniform_to(draws.centre[:, 0, 0], 0, 1) and uniform_to(draws.centre[:, 0, 1], 0, 1)
    columns = [draws.top, draws.left, draws.hflip, draws.vflip, *draws.roll[:, 0].T, draws.angle[:, 0]]
    columns += [*draws.centre[:, 0].T]
    # no number decides two things
    correlation = np.corrcoef(np.stack(columns).astype(float)) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.02
    # `crop: none` has no shift, whatever `pad` says
    assert not draw_events(recipe({"crop": "none", "pad": 4}), ids, ids).top.any()


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_nda_draws_as_its_code_does(recipe, strength):
    ids = np.arange(30_000)
    draws = draw_events(recipe(nda_ops=2, nda_strength=strength), ids * 0, ids)
    assert draws.angle.shape == (len(ids), 3)
    # nothing of the recipe's own
    assert not draws.roll[:, 0].any() and not draws.angle[:, 0].any() and not draws.side[:, 0].any()
    rotates, cuts = draws.angle[:, 1:] != 0, draws.side[:, 1:] != 0
    rolls = draws.roll[:, 1:].any(axis=2)
    # one of three in each round; a roll by (0, 0) looks like none
    assert not (rotates & cuts).any() and not (rolls & (rotates | cuts)).any()
    operation = np.where(cuts, 2, np.where(rotates, 1, 0))
    pairs = np.bincount(operation[:, 0] * 3 + operation[:, 1], minlength=9) / len(ids)
    # with replacement: all nine orders as often as each other
    assert len(NDA_OPERATIONS) == 3 and np.abs(pairs - 1 / 9).max() < 0.01
    most = 2 * strength + 1
    for direction in (0, 1):
        numbers, counts = np.unique(draws.roll[:, 1:, direction][operation == 0], return_counts=True)
        assert numbers.tolist() == list(range(-most, most + 1))
        assert np.abs(counts / counts.sum() - 1 / len(numbers)).max() < 0.01
    assert uniform_to(draws.angle[:, 1:][rotates], -15 * strength, 15 * strength)
    assert set(draws.side[:, 1:][cuts]) == {8 * strength}
    assert uniform_to(draws.centre[:, 1:][cuts][:, 0], 0, 1)


def test_more_operations_leave_the_others_as_they_were(recipe):
    ids = np.arange(100)
    augment = {"crop": "pad", "pad": 4, "hflip": 0.5}
    few = draw_events(recipe(augment, rotate=9, nda_ops=1), ids * 0, ids)
    many = draw_events(recipe(augment, rotate=9, nda_ops=5), ids * 0, ids)
    assert np.array_equal(few.top, many.top) and np.array_equal(few.hflip, many.hflip)
    assert np.array_equal(few.angle, many.angle[:, :2]) and np.array_equal(few.roll, many.roll[:, :2])


def test_no_shape_hangs_on_a_value(frames, recipe):
    strong = recipe({"crop": "pad", "pad": 4, "hflip": 0.5}, roll=5, rotate=20, cutout=6, nda_ops=4)
    draws = draw_events(strong, np.zeros(COUNT, int), np.arange(COUNT))
    # on the meta device there are no values: whatever waited for one would raise
    found = augment_frames(frames.to("meta"), draws)
    assert found.shape == frames.shape and found.dtype == frames.dtype
    with pytest.raises(ValueError, match="draws of 24 samples for frames of 23"):
        augment_frames(frames[:, :-1], draws)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_never_waits_and_agrees_with_the_cpu(frames, recipe):
    strong = recipe({"crop": "pad", "pad": 4, "hflip": 0.5}, roll=5, rotate=20, cutout=6, nda_ops=4)
    draws, there = draw_events(strong, np.zeros(COUNT, int), np.arange(COUNT)), frames.cuda()
    augment_frames(there, draws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment_frames(there, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # half-way between two pixels the last bit decides
    assert (found.cpu() != augment_frames(frames, draws)).float().mean() < 5e-3
