"""The simulated DVS: what a pixel sends is known to the event where its light is; moved digits are like N-MNIST's."""

import numpy as np
import pytest
from conftest import SHARED

from psn_train.data.events import EventError
from psn_train.data.events.simulate import (
    SACCADE_US,
    move_image,
    saccade_path,
    simulate_dvs,
    simulate_saccades,
)

EPS = 1e-3


def lit(levels) -> np.ndarray:
    """Images [F, H, W] whose log intensity is `levels`."""
    return np.exp(np.asarray(levels, np.float64)) - EPS


def columns(recording) -> list[tuple[int, int, int, int]]:
    return [tuple(int(event[name]) for name in ("t", "x", "y", "p")) for event in recording.events]


# ---- one pixel


def test_a_pixel_that_brightens_sends_a_known_number_at_known_times():
    """From 0 to 1 in 1 ms and a threshold of 0.25: ON at 250, 500, 750 and 1,000 us."""
    found = simulate_dvs(lit([[[0.0]], [[1.0]]]), [0, 1000], threshold_on=0.25)
    assert columns(found) == [(250, 0, 0, 1), (500, 0, 0, 1), (750, 0, 0, 1), (1000, 0, 0, 1)]
    assert found.sensor == (1, 1) and found.repairs == {}


def test_a_pixel_that_darkens_sends_off_by_its_own_threshold():
    found = simulate_dvs(lit([[[0.0]], [[-0.9]]]), [100, 1000], threshold_on=0.1, threshold_off=0.4)
    assert columns(found) == [(500, 0, 0, 0), (900, 0, 0, 0)]


def test_the_reference_is_the_level_last_crossed():
    """Up by 0.5 (ON at 0.4), to 0.9 (ON at 0.8), down to 0.3 (OFF at 0.4, not before), over samples that are uneven."""
    found = simulate_dvs(
        lit([[[0.0]], [[0.5]], [[0.9]], [[0.3]]]), [0, 500, 1300, 1900], threshold_on=0.4, threshold_off=0.4
    )
    assert columns(found) == [(400, 0, 0, 1), (1100, 0, 0, 1), (1800, 0, 0, 0)]


def test_small_steps_add_up():
    """0.03 a sample: no sample reaches 0.1 by itself, and ten samples cross it three times."""
    found = simulate_dvs(lit(0.03 * np.arange(11)[:, None, None]), 100 * np.arange(11), threshold_on=0.1)
    assert [event[0] for event in columns(found)] == [333, 667, 1000]


def test_no_change_gives_no_event():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    found = simulate_dvs(np.stack([picture] * 4), [0, 10, 20, 30])
    assert len(found) == 0 and found.sensor == (7, 5)
    assert len(simulate_dvs(picture[None], [0])) == 0
    # a change below the threshold is none either
    assert len(simulate_dvs(lit([[[0.0]], [[0.19]], [[-0.19]]]), [0, 10, 20])) == 0


def test_on_is_brighter():
    pictures = np.zeros((2, 2, 3), np.uint8)
    pictures[0, 1, 2], pictures[1, 0, 1] = 200, 200
    found = simulate_dvs(pictures, [0, 1000]).events
    assert set(zip(found["x"].tolist(), found["y"].tolist(), found["p"].tolist(), strict=True)) == {
        (1, 0, 1),
        (2, 1, 0),
    }


def test_against_pixel_by_pixel():
    """The same events as a loop over pixels, samples and levels, written from the definition."""
    levels = np.cumsum(np.random.default_rng(5).normal(0, 0.4, (20, 4, 6)), axis=0)
    times = np.cumsum(np.random.default_rng(6).integers(50, 900, 20))
    expected = []
    for y in range(4):
        for x in range(6):
            reference = levels[0, y, x]
            for step in range(1, 20):
                before, after = levels[step - 1, y, x], levels[step, y, x]
                while after - reference >= 0.15 or reference - after >= 0.2:
                    p = int(after > reference)
                    reference += 0.15 if p else -0.2
                    share = (reference - before) / (after - before)
                    expected.append((round(times[step - 1] + share * (times[step] - times[step - 1])), x, y, p))
    expected.sort(key=lambda event: (event[0], event[2], event[1]))
    found = columns(simulate_dvs(lit(levels), times, threshold_on=0.15, threshold_off=0.2))
    assert found == expected and len(found) > 500


# ---- refractory time, noise, thresholds


def test_refractory_time_loses_levels_but_moves_the_reference():
    rising, times = lit([[[0.0]], [[1.0]], [[0.9]]]), [0, 1000, 2000]
    assert [e[0] for e in columns(simulate_dvs(rising, times, threshold_on=0.1))] == list(range(100, 1001, 100))
    found = simulate_dvs(rising, times, threshold_on=0.1, threshold_off=0.1, refractory_us=250)
    # 100, then the first at or after 350, 650 and 950; the OFF of the last 0.1 shows where the reference stands
    assert columns(found) == [(100, 0, 0, 1), (400, 0, 0, 1), (700, 0, 0, 1), (1000, 0, 0, 1), (2000, 0, 0, 0)]
    # exactly the refractory time later is late enough
    assert [e[0] for e in columns(simulate_dvs(rising[:2], times[:2], threshold_on=0.1, refractory_us=300))] == [
        100,
        400,
        700,
        1000,
    ]


@pytest.mark.parametrize("refractory_us", [2, 700, 20_000])
def test_refractory_time_holds_for_every_pixel_and_is_not_longer(refractory_us):
    levels = np.cumsum(np.random.default_rng(1).normal(0, 0.5, (60, 9, 11)), axis=0)
    sight = {"images": lit(levels - levels.min()), "times_us": 1000 * np.arange(60), "noise_hz": 200.0}
    everything = simulate_dvs(**sight, rng=3).events
    found = simulate_dvs(**sight, rng=3, refractory_us=refractory_us).events
    sent = {tuple(event) for event in found.tolist()}
    for y in range(9):
        for x in range(11):
            own = everything[(everything["x"] == x) & (everything["y"] == y)]
            last = -(10**9)
            for event in own:
                late = event["t"] - last >= refractory_us
                last = event["t"] if late else last
                assert (tuple(event.tolist()) in sent) == bool(late)
    assert 0 < len(found) < len(everything)


def test_noise_has_its_rate_and_both_polarities():
    still = np.zeros((2, 50, 40), np.uint8)
    found = simulate_dvs(still, [0, 1_000_000], noise_hz=5.0, rng=0)
    # Poisson with mean 10,000
    assert abs(len(found) - 10_000) < 500
    assert abs(found.events["p"].mean() - 0.5) < 0.02
    assert (np.diff(found.events["t"]) >= 0).all() and found.events["t"].max() > 900_000


def test_thresholds_differ_between_pixels():
    pictures = lit(np.stack([np.zeros((30, 30)), np.full((30, 30), 2.0)]))
    even, spread = (simulate_dvs(pictures, [0, 1000], threshold_sigma=sigma, rng=1).events for sigma in (0.0, 0.03))
    assert len(even) == 9000
    counts = np.bincount(spread["y"] * 30 + spread["x"], minlength=900)
    assert counts.min() < 9 and counts.max() > 11 and abs(counts.mean() - 10) < 0.5


def test_one_seed_one_recording():
    digit = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    first, same, other = (simulate_saccades(digit, rng=seed) for seed in (4, 4, 5))
    assert first.events.tobytes() == same.events.tobytes()
    assert first.events.tobytes() != other.events.tobytes()
    with_generator = simulate_saccades(digit, rng=np.random.default_rng(4))
    assert with_generator.events.tobytes() == first.events.tobytes()


def test_a_function_of_time_is_seen_as_its_images():
    times = np.arange(0, 5000, 100)
    images = np.stack([lit(np.full((2, 2), t / 1000)) for t in times])
    by_function = simulate_dvs(lambda t: lit(np.full((2, 2), t / 1000)), times)
    assert by_function.events.tobytes() == simulate_dvs(images, times).events.tobytes()
    assert len(by_function) == 4 * 24


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": np.zeros((3, 2, 2))}, r"images \[3, 2, 2\] for 2 times; wanted \[2, H, W\]"),
        ({"images": np.full((2, 2, 2), -1.0)}, "image 0 has negative or non-finite intensities"),
        ({"images": np.full((2, 2, 2), np.nan)}, "image 0 has negative or non-finite intensities"),
        ({"images": lambda t: np.zeros((2, 2 + (t > 0)))}, r"image 1 has shape \[2, 3\], wanted \[H, W\], the same"),
        ({"times_us": [5, 5]}, "finite and rising"),
        ({"times_us": []}, "F >= 1"),
        ({"threshold_on": 0.0}, "threshold_on is 0.0, wanted a number above 0"),
        ({"threshold_off": -1}, "threshold_off is -1"),
        ({"log_eps": 0}, "log_eps is 0"),
        ({"refractory_us": -1}, "refractory_us is -1, wanted a number of at least 0"),
        ({"noise_hz": -1.0}, "noise_hz is -1.0"),
    ],
)
def test_mistakes(changes, says):
    sight = {"images": np.zeros((2, 2, 2)), "times_us": [0, 1], **changes}
    with pytest.raises(EventError, match=says):
        simulate_dvs(**sight)


# ---- moving pictures


def test_a_shift_by_whole_pixels_moves_and_a_half_mixes():
    picture = np.arange(1.0, 7.0).reshape(2, 3)
    moved = move_image(picture, np.array([[0, 0], [1, 0], [0, -1], [0.5, 0], [0.25, 0.5], [9, 9]], float), (5, 4))
    assert moved.shape == (6, 4, 5)
    still = np.zeros((4, 5))
    still[1:3, 1:4] = picture
    right, up = np.roll(still, 1, axis=1), np.roll(still, -1, axis=0)
    np.testing.assert_array_equal(moved[0], still)
    np.testing.assert_array_equal(moved[1], right)
    np.testing.assert_array_equal(moved[2], up)
    np.testing.assert_allclose(moved[3], (still + right) / 2)
    quarter = 0.75 * still + 0.25 * right
    np.testing.assert_allclose(moved[4], (quarter + np.roll(quarter, 1, axis=0)) / 2)
    assert not moved[5].any()


def test_what_leaves_the_sensor_is_cut_and_comes_back():
    picture = np.ones((6, 6))
    moved = move_image(picture, np.array([[0.0, 0.0], [3.0, 0.0], [-3.5, 0.0]]), (4, 4))
    assert moved[0].sum() == 16
    np.testing.assert_array_equal(moved[1][0], [0, 0, 1, 1])
    np.testing.assert_allclose(moved[2][0], [1, 0.5, 0, 0])


def test_the_path_is_a_triangle_of_three_saccades():
    times = np.arange(0, 3 * SACCADE_US + 1, 1000)
    path = saccade_path(times)
    np.testing.assert_allclose(path[[0, 100, 200, 300]], [[-3.5, -3.5], [0, 3.5], [3.5, -3.5], [-3.5, -3.5]], atol=1e-9)
    steps = np.diff(path, axis=0)
    # right and down, right and up, left
    for part, (right, down) in zip(np.split(steps, 3), ((1, 1), (1, -1), (-1, 0)), strict=True):
        assert (np.sign(np.round(part, 12)) == [right, down]).all()
    speed = np.hypot(*steps.T)
    assert speed[[0, 99, 100, 199, 200, 299]].max() < 0.1 * speed.max()
    np.testing.assert_array_equal(saccade_path([-5.0, 4e5]), path[[0, 300]])


def fields(recording) -> tuple[np.ndarray, ...]:
    events = recording.events
    return tuple(events[name].astype(np.int64) for name in ("t", "x", "y", "p"))


@pytest.fixture(scope="module")
def real() -> list[tuple[np.ndarray, ...]]:
    """(t, x, y, p) of 220 of N-MNIST's recordings."""
    files = sorted((SHARED / "events" / "nmnist").glob("T*/*/*.bin"))[::5]
    if not files:
        pytest.skip(f"no recordings of N-MNIST at {SHARED / 'events' / 'nmnist'}; set PSN_SHARED_DATA")
    words = [np.fromfile(path, np.uint8).reshape(-1, 5).astype(np.int64) for path in files]
    return [((w[:, 2] & 127) << 16 | w[:, 3] << 8 | w[:, 4], w[:, 0], w[:, 1], w[:, 2] >> 7) for w in words]


def leads(recordings) -> np.ndarray:
    """How far ON lies right of and below OFF in each saccade, in pixels: [3, 2]."""
    found = []
    for begin in range(0, 300_000, 100_000):
        parts = []
        for t, x, y, p in recordings:
            # the middle of a saccade, where its speed is known best
            inside = (t > begin + 25_000) & (t < begin + 75_000)
            on, off = inside & (p == 1), inside & (p == 0)
            parts.append([place[on].mean() - place[off].mean() for place in (x, y)])
        found.append(np.mean(parts, axis=0))
    return np.stack(found)


def test_a_moved_digit_is_seen_on_the_sensor_and_on_leads(digits):
    bright, dark = (
        [simulate_saccades(image, dark=dark, noise_hz=0.0, rng=0) for image in digits[0][::10]]
        for dark in (False, True)
    )
    assert all(one.sensor == (34, 34) and 270_000 <= one.duration_us <= 300_000 for one in bright + dark)
    # bright strokes that go right and down, right and up, left
    found = leads([fields(one) for one in bright])
    assert (np.sign(found[:2]) == [[1, 1], [1, -1]]).all() and found[2, 0] < -1 and abs(found[2, 1]) < 1
    assert (np.sign(leads([fields(one) for one in dark]))[:2] == [[-1, -1], [-1, 1]]).all()


def test_on_and_off_lie_as_in_nmnist(digits, real):
    ours = leads([fields(simulate_saccades(image, rng=0)) for image in digits[0][::5]])
    theirs = leads(real)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9
    assert np.abs(ours - theirs).max() < 2.5


def test_simulated_digits_are_like_nmnist(digits, real):
    def figures(recordings):
        counts, on, pauses, active, beside = [], [], [], [], []
        for t, x, y, p in recordings:
            pixel = y * 34 + x
            order = np.lexsort((t, pixel))
            pauses.append(np.diff(t[order])[np.diff(pixel[order]) == 0])
            counts.append(len(t))
            on.append(p.mean())
            active.append(len(np.unique(pixel)))
            beside.append(((x < 3) | (x > 30)).sum())
        pauses = np.concatenate(pauses)
        return [*(np.mean(each) for each in (counts, on, active, beside)), *np.percentile(pauses, [5, 50])]

    ours = figures([fields(simulate_saccades(image, rng=seed)) for seed, image in enumerate(digits[0])])
    names = ("events", "ON share", "pixels with events", "events beside the digit", "short pauses", "median pause")
    for name, mine, wanted, tolerance in zip(names, ours, figures(real), (0.1, 0.05, 0.1, 0.3, 0.1, 0.1), strict=True):
        assert abs(mine / wanted - 1) < tolerance, f"{name}: {mine:.4g}, and {wanted:.4g} in N-MNIST"
