"""What the figure of `psn view` says in words, and how it lays its frames out."""

import re
from dataclasses import replace

import numpy as np
import pytest
from event_data import events_document
from test_view import known

from psn_train.cli import main
from psn_train.data.events import Recording, make_events
from psn_train.data.events.writers import write_bin
from psn_train.data.frames import voxel_grid
from psn_train.recipe import check_recipe
from psn_train.view.figure import _columns, draw
from psn_train.view.frames import Cut, cut_of_recipe, make_frames
from psn_train.view.source import Seen


def random_recording(count: int, last_us: int, sensor=(34, 34)) -> Recording:
    """Events over the whole of `last_us`, the first at an odd time."""
    draws = np.random.default_rng(count)
    t = 123 + np.sort(np.append(draws.integers(0, last_us, count - 2), [0, last_us]))
    x, y = (draws.integers(0, size, count) for size in sensor)
    return Recording(make_events(t, x, y, draws.integers(0, 2, count)), sensor)


def figure_of(recording: Recording, cut: Cut, rows=None, recipe=None):
    figure = draw(Seen(recording, "somewhere", "some", "bin"), make_frames(recording, cut), rows, recipe)
    figure.draw_without_rendering()
    return figure


def texts_of(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def captions_of(figure) -> list[str]:
    return [text for text in texts_of(figure) if re.match(r"\d+: .*\n", text)]


# ---- captions


def test_a_bin_of_a_voxel_grid_has_a_peak_and_a_weight():
    recording = random_recording(400, 300_000)
    frames = make_frames(recording, Cut(T=6, by="voxel"))
    grid = voxel_grid(recording, 6)
    assert [frames.time(number) for number in range(6)] == [f"peak at {50 * number}.0 ms" for number in range(6)]
    assert [frames.amount(number) for number in range(6)] == [f"weight {weight:,.1f}" for weight in grid.sum((1, 2, 3))]
    # an event at the time a caption names gives all of its weight to that bin
    one = make_events([0, 150_000, 300_000], [0, 7, 0], [0, 9, 0], [1, 1, 1])
    assert make_frames(Recording(one, (34, 34)), Cut(T=6, by="voxel")).counts[:, 1, 9, 7].tolist() == [0, 0, 0, 1, 0, 0]


def test_a_signed_voxel_grid_says_so_and_keeps_its_signs(dot_shards, tmp_path):
    document = events_document(dot_shards, tmp_path / "run")
    document["model"]["in_chans"], document["events"]["frames"] = 1, "voxel"
    cut = replace(cut_of_recipe(check_recipe(document)), T=4)
    assert cut.signed
    recording = random_recording(300, 200_000)
    frames, grid = make_frames(recording, cut), voxel_grid(recording, 4, signed=True)
    np.testing.assert_array_equal(frames.counts[:, 1] - frames.counts[:, 0], grid[:, 0])
    assert frames.counts.min() == 0 and not (frames.counts[:, 0] * frames.counts[:, 1]).any()
    assert frames.amount(1) == f"weight {grid[1].sum():+,.1f}"
    texts = texts_of(figure_of(recording, cut))
    assert "4 bins of a signed voxel grid, ON less OFF, linear in time" in texts
    assert {"positive: more ON", "negative: more OFF", "zero"} <= set(texts) and "both" not in texts


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (Cut(T=1), "1 frame of all events"),
        (Cut(T=2, rounding="tonic"), "2 frames of equally many events, tonic's rounding"),
        (Cut(T=1, by="voxel"), "1 bin of a voxel grid, linear in time"),
        (Cut(by="duration", duration_us=40_000), "1 frame of 40 ms"),
        (Cut(by="duration", duration_us=20_000), "2 frames of 20 ms"),
    ],
)
def test_one_and_many(cut, words):
    frames = make_frames(known(), cut)
    assert frames.cut.words(len(frames)) == words
    assert make_frames(known(), Cut(T=16)).amount(0) == "1 event"


@pytest.mark.parametrize(
    ("last_us", "T", "digits", "unit"),
    [
        (1_450_000, 16, 1, "ms"),
        (307_600, 1, 1, "ms"),
        (300_000, 2000, 2, "ms"),
        (900, 100, 3, "ms"),
        (60e6, 10, 2, "s"),
    ],
)
def test_one_number_of_decimals_in_a_figure(last_us, T, digits, unit):
    captions = captions_of(figure_of(random_recording(3000, int(last_us)), Cut(T=T, by="time")))
    found = [re.match(r"\d+: ([\d.]+) to ([\d.]+) (ms|s)\n", caption).groups() for caption in captions]
    assert len(found) == min(T, 40)
    assert {name for *_, name in found} == {unit}
    assert {len(time.partition(".")[2]) for begin, end, _ in found for time in (begin, end)} == {digits}


def test_fewer_events_than_frames_are_remarked_on(tmp_path, monkeypatch, capsys):
    recording = known()
    says = "all but the last are empty, for there are fewer events than frames (16 events)"
    title = f"5,000 frames of equally many events, 40 of them shown, evenly taken: {says}"
    assert title in texts_of(figure_of(recording, Cut(T=5000)))
    assert make_frames(recording, Cut(T=17, rounding="tonic")).remark().startswith("all are empty")
    # as many events as frames, or frames of equal time, are another thing
    assert make_frames(recording, Cut(T=16)).remark() == make_frames(recording, Cut(T=17, by="time")).remark() == ""
    monkeypatch.chdir(tmp_path)
    write_bin("known.bin", recording)
    assert main(["view", "known.bin", "--T", "17", "--out", "a.gif"]) == 0
    assert f"17 frames of equally many events: {says}" in capsys.readouterr().out


def test_the_rows_name_recipe_and_network(dot_shards, tmp_path):
    recipe = check_recipe({**events_document(dot_shards, tmp_path / "run"), "name": "my"})
    rows = [("evaluation", np.ones((12, 2, 16, 16)))]
    says = (
        f"what {recipe.model.name}, the network of the recipe my, sees: 12 steps (10 of them shown) of 16 x 16 pixels"
    )
    assert any(text.startswith(says) for text in texts_of(figure_of(known(), Cut(T=3), rows, recipe)))


# ---- layout


@pytest.mark.parametrize(("width", "expected"), [(34, {1: 1, 4: 4, 8: 8, 10: 5, 16: 8}), (128, {4: 4, 10: 5, 16: 4})])
def test_rows_are_full(width, expected):
    short = ["1: 0.0 to 1.0 ms\n1 event"]
    assert {count: _columns(count, width, short) for count in expected} == expected
    for count in range(1, 41):
        columns = _columns(count, width, short)
        # never a row with less than half
        assert columns <= count and -count % columns <= columns / 2


@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("sensor", [(34, 34), (240, 180), (90, 160)])
def test_few_frames_are_large(T, sensor):
    figure = figure_of(random_recording(200, 100_000, sensor), Cut(T=T))
    boxes = [axis.get_window_extent() for axis in figure.axes if axis.images]
    assert len(boxes) == T
    longer = max(max(box.width, box.height) for box in boxes) / figure.dpi
    assert longer > 6 or sum(box.width for box in boxes) > 0.8 * figure.bbox.width


@pytest.mark.parametrize(
    ("last_us", "cut"),
    [
        (9_999_999, Cut(by="duration", duration_us=200)),
        (9_999_999, Cut(T=10_500, by="voxel")),
        (400_000_000, Cut(by="duration", duration_us=7000)),
        (300_000, Cut(T=10)),
    ],
)
@pytest.mark.parametrize("sensor", [(34, 34), (130, 10)])
def test_captions_do_not_overlap(last_us, cut, sensor):
    figure = figure_of(random_recording(3000, last_us, sensor), cut)
    boxes = [axis.title.get_window_extent() for axis in figure.axes if axis.images]
    assert len(boxes) == (10 if cut == Cut(T=10) else 40)
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
