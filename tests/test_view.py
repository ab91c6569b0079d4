"""`psn view`: pictures of recordings whose events are known to the pixel, and what a user's mistakes end in."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import SHARED
from event_data import events_document
from PIL import Image

from psn_train.cli import main
from psn_train.data.events import Recording, make_events
from psn_train.data.events.writers import write_aedat2_dvs128, write_bin
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.recipe import check_recipe
from psn_train.view.animation import MOST_FRAMES
from psn_train.view.colours import GROUND, OFF, ON, both, paint, scale_of
from psn_train.view.frames import Cut, cut_of_recipe, evenly, make_frames
from psn_train.view.source import open_recording, short


def known() -> Recording:
    """ON at (3, 2), OFF at (10, 5), both at (20, 30), one after the other, four times."""
    rows = []
    for begin in range(0, 40_000, 10_000):
        rows += [(begin, 3, 2, 1), (begin + 1000, 10, 5, 0), (begin + 2000, 20, 30, 1), (begin + 3000, 20, 30, 0)]
    return Recording(make_events(*np.array(rows).T), sensor=(34, 34))


@pytest.fixture
def known_file(tmp_path):
    path = tmp_path / "known.bin"
    write_bin(path, known())
    return path


@pytest.fixture
def view(capsys, tmp_path, monkeypatch):
    """view(FILE, ...) -> (exit status, stdout, stderr), in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["view", *map(str, words)])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def mistake(view, tmp_path):
    """mistake(..., says="...") checks what a mistake ends in: status 2, one message, no picture."""

    def run(*words, says: str) -> str:
        status, out, err = view(*words)
        assert (status, out) == (2, "")
        assert len(re.findall(r"^psn: ", err, re.MULTILINE)) == 1 and "Traceback" not in err
        assert says in err
        assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.gif"))
        return err

    return run


def pixels(path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def count_of(picture: np.ndarray, colour) -> int:
    """Pixels of a colour, which anti-aliasing leaves in the middle of an area."""
    return int((np.abs(picture.astype(int) - colour).max(axis=2) <= 2).sum())


# ---- colours


def test_colours_of_single_pixels():
    frame = np.zeros((2, 4, 5))
    frame[1, 0, 1], frame[0, 2, 3], frame[:, 3, 4] = 7, 7, 7
    painted = paint(frame, scale=7)
    assert painted.shape == (4, 5, 3) and painted.dtype == np.uint8
    light = np.array(GROUND) / 255
    np.testing.assert_allclose(painted[0, 1], light * ON, atol=1)
    np.testing.assert_allclose(painted[2, 3], light * OFF, atol=1)
    np.testing.assert_allclose(painted[3, 4], light * ON * OFF / 255, atol=1)
    assert (painted.reshape(-1, 3) == GROUND).all(axis=1).sum() == 4 * 5 - 3


def test_more_events_are_stronger_and_one_is_seen():
    row = np.zeros((2, 1, 6))
    row[1, 0] = [0, 1, 2, 5, 10, 50]
    blueness = (255 - paint(row, scale=10)[0, :, 0]).astype(int)
    assert (np.diff(blueness)[:4] > 5).all() and blueness[4] == blueness[5]
    assert blueness[1] - blueness[0] > 60


def test_scale_is_not_that_of_one_hot_pixel():
    frames = np.zeros((1, 2, 20, 20))
    frames[0, 1, :10] = 3
    frames[0, 0, 0, 0] = 5000
    assert scale_of(frames) == 3
    assert scale_of(np.zeros((1, 2, 3, 3))) == 1


# ---- frames and their borders


def test_borders_of_each_way_to_cut():
    recording = known()
    assert recording.duration_us == 33_000
    by_number = make_frames(recording, Cut(T=4))
    assert by_number.borders.tolist() == [0, 10_000, 20_000, 30_000, 33_000]
    assert by_number.counts.sum(axis=(1, 2, 3)).tolist() == [4, 4, 4, 4]
    by_time = make_frames(recording, Cut(T=2, by="time"))
    assert by_time.borders.tolist() == [0, 16_500, 33_000]
    by_duration = make_frames(recording, Cut(by="duration", duration_us=15_000))
    assert by_duration.borders.tolist() == [0, 15_000, 30_000, 33_000]
    assert make_frames(recording, Cut(by="duration", duration_us=15_000, max_steps=2)).borders.tolist() == [
        0,
        15_000,
        30_000,
    ]
    voxels = make_frames(recording, Cut(T=3, by="voxel"))
    assert voxels.borders.tolist() == [0, 11_000, 22_000, 33_000]
    # 16 events in 5 frames of 3: tonic leaves the last one out
    tonic = make_frames(recording, Cut(T=5, rounding="tonic"))
    assert tonic.borders[-1] == 33_000 and tonic.counts.sum() == 15


@pytest.mark.parametrize("by", ["number", "time"])
@pytest.mark.parametrize("rounding", ["spikingjelly", "tonic"])
@pytest.mark.parametrize("T", [1, 3, 7, 40])
def test_events_of_a_frame_lie_within_its_borders(by, rounding, T):
    draw = np.random.default_rng(T)
    t = 5_000_000 + np.cumsum(draw.integers(1, 900, 300))
    recording = Recording(
        make_events(t, draw.integers(0, 34, 300), draw.integers(0, 34, 300), draw.integers(0, 2, 300)), (34, 34)
    )
    frames = make_frames(recording, Cut(T=T, by=by, rounding=rounding))
    since = t - t[0]
    for number, (begin, end) in enumerate(zip(frames.borders, frames.borders[1:], strict=False)):
        is_end = number == T - 1 and frames.counts.sum() == len(t)
        inside = (since >= begin) & ((since <= end) if is_end else (since < end))
        assert frames.counts[number].sum() == inside.sum()


def test_no_recording_is_too_short():
    for count in range(4):
        events = known().events[:count]
        for cut in (Cut(), Cut(by="time"), Cut(by="voxel"), Cut(by="duration", duration_us=1000)):
            frames = make_frames(Recording(events, (34, 34)), cut)
            assert len(frames.borders) == len(frames) + 1 and (np.diff(frames.borders) >= 0).all()


def test_evenly():
    assert evenly(3, 10).tolist() == [0, 1, 2]
    assert evenly(101, 5).tolist() == [0, 25, 50, 75, 100]


def test_short_numbers():
    assert [short(n) for n in (0, 12, 999, 1234, 5_678_900, 2.5e9)] == ["0", "12", "999", "1.23k", "5.68M", "2.5G"]


# ---- files


def test_both_files_by_default(view, known_file, tmp_path):
    status, out, _ = view(known_file, "--T", 4)
    assert status == 0
    assert out.splitlines() == [
        str(known_file),
        "bin, 34 x 34 pixels, 16 events (50% ON), 33.0 ms, 485 events/s, repairs: none",
        "runs/view/known.png",
        "runs/view/known.gif",
    ]
    picture = pixels(tmp_path / "runs/view/known.png")
    assert picture.shape[1] == 1680 and picture.shape[0] > 500
    light = np.array(GROUND) / 255
    # legend and rates are of the pure colours; those on the ground are of the pixels with events
    for colour in (ON, OFF):
        assert count_of(picture, np.array(colour)) > 5000
        assert count_of(picture, light * np.array(colour)) > 10
    assert count_of(picture, np.array(both()) * 255) > 10


@pytest.mark.parametrize(("name", "wrote"), [("a.png", ["a.png"]), ("b.GIF", ["b.gif"]), ("c", ["c.gif", "c.png"])])
def test_out_says_what_is_written(view, known_file, tmp_path, name, wrote):
    assert view(known_file, "--out", f"new/{name}")[0] == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == wrote


def test_the_gif_has_each_frame_with_its_events(view, known_file, tmp_path):
    # frames of one event each: ON, OFF, ON, OFF
    assert view(known_file, "--T", 16, "--out", "one.gif")[0] == 0
    with Image.open(tmp_path / "one.gif") as gif:
        assert gif.n_frames == 16 and gif.info["loop"] == 0
        assert gif.info["duration"] * 16 == pytest.approx(2000, rel=0.1)
        scale = 384 // 34
        assert gif.size[0] == 34 * scale and gif.size[1] > 34 * scale
        places = [((3, 2), ON), ((10, 5), OFF), ((20, 30), ON), ((20, 30), OFF)]
        for number in range(16):
            gif.seek(number)
            frame = np.asarray(gif.convert("RGB"))[: 34 * scale]
            (x, y), colour = places[number % 4]
            middle = frame[y * scale + scale // 2, x * scale + scale // 2]
            np.testing.assert_allclose(middle, np.array(GROUND) / 255 * colour, atol=6)
            # one pixel of the sensor and nothing else
            assert (np.abs(frame.astype(int) - GROUND).max(axis=2) > 12).sum() == scale**2


def test_like_frames_stay_apart_and_long_recordings_are_thinned(view, tmp_path):
    long = Recording(make_events([0, 5_000_000], [1, 1], [1, 1], [0, 1]), (128, 128))
    write_aedat2_dvs128(tmp_path / "long.aedat", long)
    assert view("long.aedat", "--duration-us", 10_000, "--out", "long")[0] == 0
    with Image.open(tmp_path / "long.gif") as gif:
        assert gif.n_frames == MOST_FRAMES < 500
    assert pixels(tmp_path / "long.png").shape[0] < 2000


def test_the_header_names_repairs(view, tmp_path):
    write_bin(tmp_path / "cut.bin", known())
    with open(tmp_path / "cut.bin", "ab") as file:
        file.write(b"abc")
    _, out, _ = view("cut.bin", "--out", "cut.gif")
    assert "16 events" in out and "repairs: cut_bytes 3" in out


def test_an_empty_recording_is_drawn_as_empty(view, tmp_path):
    write_aedat2_dvs128(tmp_path / "empty.aedat", Recording(known().events[:0], (128, 128)))
    status, out, _ = view("empty.aedat")
    assert status == 0 and "128 x 128 pixels, no events" in out
    with Image.open(tmp_path / "runs/view/empty.gif") as gif:
        assert gif.n_frames == 10
    picture = pixels(tmp_path / "runs/view/empty.png")
    assert count_of(picture, np.array(GROUND)) > 10 * 128 * 128


def test_a_gif_needs_no_matplotlib_and_a_figure_says_so(view, mistake, known_file, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    mistake(known_file, says="psn view draws with matplotlib: pip install 'psn-train[demo]'")
    assert view(known_file, "--out", "only.gif")[0] == 0


# ---- shards


def test_a_sample_of_shards_by_number_and_by_key(view, dot_shards):
    test = str(dot_shards / "test")
    reader = SampleReader(load_index(test))
    key = reader.read(7)["__key__"]
    by_number, by_key = open_recording(test, sample="7"), open_recording(test, sample=key)
    assert by_number.recording.events.tobytes() == by_key.recording.events.tobytes()
    assert by_number.sample_id == by_key.sample_id == 7 and by_key.name == key.replace("/", "_")
    assert by_number.recording.sensor == (20, 16)
    status, out, _ = view(test, "--sample", key, "--out", "dot")
    label = load_index(test).classes[int(reader.read(7)["cls"])]
    assert status == 0 and out.startswith(f"{test}, sample 7 of 24, {key}, class {label}\nshards, 20 x 16 pixels")
    assert open_recording(test).sample_id == 0


def test_mistakes_about_shards(mistake, dot_shards, digit_shards, known_file):
    test = dot_shards / "test"
    mistake(test, "--sample", "24", says="--sample: got '24'; ")
    assert "has samples 0 to 23" in mistake(test, "--sample", "nobody", says="got 'nobody'")
    mistake(test, "--sensor", "20x16", says="--sensor is of a file")
    mistake(digit_shards / "val", says="shards of images; psn view draws recordings")
    mistake(known_file, "--sample", "3", says="--sample is of a folder of shards")
    said = mistake(
        known_file.parent, says="is a folder of recordings, and one is drawn at a time; name a file, such as"
    )
    assert str(known_file) in said
    mistake(dot_shards, says="is a folder of folders of shards (test, train); name one")
    (known_file.parent / "bare").mkdir()
    for nothing, says in (
        ("bare", "without shards"),
        ("no.aedat", "no such file or folder"),
        ("no/index.json", "no such"),
    ):
        said = mistake(known_file.parent / nothing, says=says)
        assert "a recording's file, or a folder or URL of shards with an index.json" in said and "Errno" not in said


# ---- what a network sees


@pytest.fixture
def recipe_file(dot_shards, tmp_path):
    """recipe_file(**changes) -> a recipe on the dots, 16 x 16 pixels, as a file."""
    import yaml
    from conftest import merged

    def write(**changes):
        path = tmp_path / "events.yaml"
        path.write_text(yaml.safe_dump(merged(events_document(dot_shards, tmp_path / "run"), changes)))
        return path

    return write


def test_network_rows_are_the_trainers_inputs(dot_shards, tmp_path):
    from conftest import merged

    from psn_train.data.stream import Batch, EvalStream, open_samples
    from psn_train.training.inputs import EvalInputs, EventInputs
    from psn_train.view.network import EPOCHS, network_rows

    changes = {"augment": {"hflip": 0.5}, "events": {"event_drop": True}}
    recipe = check_recipe(merged(events_document(dot_shards, tmp_path / "run"), changes))
    reader = SampleReader(load_index(dot_shards / "train"))
    rows = network_rows(open_recording(str(dot_shards / "train"), sample="5"), recipe)
    assert [name for name, _ in rows] == ["evaluation", *(f"epoch {epoch}" for epoch in range(EPOCHS))]
    batch = EvalStream(recipe, reader, 1, 0, 1, ids=np.array([5]))[0]
    frames, _ = EvalInputs(recipe, "cpu")(batch)
    np.testing.assert_array_equal(rows[0][1], frames[:, 0].numpy())
    assert rows[0][1].shape == (3, 2, 16, 16)
    samples = open_samples(recipe, reader, training=True)
    for epoch, (_, row) in enumerate(rows[1:]):
        packed = samples.stack([samples.read(5, epoch)[0]])
        batch = Batch(packed, torch.zeros(1), np.array([5]), np.array([epoch]))
        frames, _ = EventInputs(recipe, torch.device("cpu"))(batch, training=True)
        np.testing.assert_array_equal(row, frames[:, 0].numpy())
    assert len({row.tobytes() for _, row in rows}) >= 4


def test_rows_of_the_recipe_are_drawn(view, recipe_file, tmp_path, dot_shards):
    path = recipe_file()
    words = (dot_shards / "train", "--sample", 4)
    assert view(*words, "--T", 3, "--out", "plain.png")[0] == 0
    assert view(*words, "--recipe", path, "--out", "rows.png")[0] == 0
    assert view(*words, "--recipe", path, "model.T=6", "--out", "six")[0] == 0
    plain, rows = (pixels(tmp_path / f"{name}.png") for name in ("plain", "rows"))
    # five rows of three frames more
    assert rows.shape[0] > plain.shape[0] + 5 * 200
    assert count_of(rows, np.array(GROUND)) > count_of(plain, np.array(GROUND)) + 5 * 3 * 150**2
    with Image.open(tmp_path / "six.gif") as gif:
        assert gif.n_frames == 6


def test_a_voxel_recipe_of_one_channel(view, recipe_file, dot_shards):
    path = recipe_file(model={"in_chans": 1}, events={"frames": "voxel"})
    assert cut_of_recipe(check_recipe(__import__("yaml").safe_load(path.read_text()))).by == "voxel"
    assert view(dot_shards / "test", "--recipe", path, "--out", "voxels")[0] == 0


def test_mistakes_about_frames_and_recipes(mistake, view, recipe_file, known_file, tmp_path):
    path = recipe_file()
    mistake(known_file, "--recipe", path, "--T", 4, says="--T: with --recipe the frames are the recipe's")
    mistake(known_file, "model.T=4", says="model.T=4: key=value is of a recipe; give one with --recipe")
    mistake(known_file, "--by", "duration", says="--by duration needs the length of a frame: --duration-us")
    mistake(known_file, "--by", "time", "--duration-us", 9, says="--duration-us is of --by duration")
    mistake(known_file, "--duration-us", 9, "--T", 3, says="--duration-us is of --by duration")
    mistake(known_file, "--recipe", "mnist/sew_resnet10_psn.demo", says="is of images: it has no section `events`")
    mistake(known_file, "--recipe", "mnist/none", says="mnist/none")
    mistake(known_file, "--out", tmp_path, says="is a folder; wanted NAME.png, NAME.gif")
    for suffix in (".jpg", ".v2"):
        mistake(known_file, "--out", f"new/x{suffix}", says=f"--out: new/x{suffix} ends in {suffix}; wanted NAME.png")
    mistake(tmp_path / "none.bin", "--sample", 1, says="there is no such file or folder; wanted a recording's file")
    (tmp_path / "text.txt").write_text("nothing of the sort")
    mistake(tmp_path / "text.txt", says="give one of")
    for words in (("--sensor", "34"), ("--T", "0"), ("--by", "name")):
        with pytest.raises(SystemExit) as end:
            view(known_file, *words)
        assert end.value.code == 2


# ---- real recordings


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("nmnist/Test/0/*.bin", (34, 34)),
        ("dvs_gesture/0[1-9]*.npz", (128, 128)),
        ("aedat2_dvs128/*.aedat", (128, 128)),
        ("aedat2_davis240/*.aedat", (240, 180)),
    ],
)
def test_real_recordings(view, tmp_path, pattern, size):
    paths = sorted((SHARED / "events").glob(pattern))
    if not paths:
        pytest.skip(f"no {pattern} in {SHARED / 'events'}; set PSN_SHARED_DATA")
    status, out, _ = view(paths[0], "--by", "time", "--T", 5, "--out", "real")
    assert status == 0 and f"{size[0]} x {size[1]} pixels" in out
    with Image.open(tmp_path / "real.gif") as gif:
        assert gif.n_frames == 5
    assert count_of(pixels(tmp_path / "real.png"), np.array(ON)) > 5000
