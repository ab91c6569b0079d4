"""JPEG files decoded no further than a crop needs: parity with timm on real photographs, and what is left to Pillow."""

import io

import numpy as np
import pytest
import torch
from conftest import SHARED, small_document
from PIL import Image

from psn_train.data.image_files import prepare_image
from psn_train.data.images import BadSample, eval_transform, seeded, train_transform
from psn_train.data.index import load_index
from psn_train.data.jpeg import decode_part, read_header, scale_of
from psn_train.data.reader import SampleReader
from psn_train.data.shards import write_shards
from psn_train.data.sources import open_source
from psn_train.data.stream import Batch, EvalStream, TrainStream
from psn_train.data.turbo import Unflipped, open_turbo
from psn_train.recipe import check_recipe, make_plan
from psn_train.training.inputs import ImageInputs

ORIGINALS = sorted((SHARED / "imagenet_originals").glob("*.JPEG"))


def recipe_of(size: int = 224, in_chans: int = 3, **augment):
    augment = {"hflip": 0.5, **augment}
    if in_chans == 1:
        augment.update(mean=[0.5], std=[0.2])
    return check_recipe(
        {
            "name": "photographs",
            "model": {"name": "sew_resnet18_psn", "in_chans": in_chans},
            "data": {"train": "shards", "global_batch_size": 4, "image_size": size},
            "optim": {"lr": 0.1},
            "schedule": {"steps": 1},
            "augment": augment,
        }
    )


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    if not ORIGINALS:
        pytest.skip(f"no photographs at {SHARED}; set PSN_SHARED_DATA")
    # every third, with the largest, the smallest and the progressive ones
    chosen = [path.read_bytes() for path in ORIGINALS]
    headers = [read_header(data) for data in chosen]
    sides = np.argsort([header.height * header.width for header in headers])
    special = {*sides[:3].tolist(), *sides[-12:].tolist()}
    special |= {i for i, header in enumerate(headers) if i % 3 == 0 or header.progressive}
    return [data for i, data in enumerate(chosen) if i in special]


def turned(image) -> np.ndarray:
    """What the device makes of it, uint8 [C, H, W]."""
    if not isinstance(image, Unflipped):
        return image
    pixels = image.pixels[:, :, ::-1] if image.hflip else image.pixels
    return pixels[:, ::-1] if image.vflip else pixels


def of_pillow(recipe, data: bytes, entropy=None) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB" if recipe.model.in_chans == 3 else "L")
    if entropy is None:
        return eval_transform(recipe)(image)
    with seeded(*entropy):
        return train_transform(recipe)(image)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def encoded(image: Image.Image, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **how)
    return out.getvalue()


@pytest.fixture(scope="module")
def picture(photographs) -> Image.Image:
    return Image.open(io.BytesIO(photographs[1])).convert("RGB")


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"interpolation": "bicubic", "vflip": 0.5},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"color_jitter": 0.3},
        {"auto_augment": "trivial"},
    ],
    ids=str,
)
def test_training_crops_are_those_of_timm(photographs, augment):
    recipe = recipe_of(**augment)
    turbo = open_turbo(recipe, training=True)
    plain, scaled = [], []
    for number, data in enumerate(photographs):
        for epoch in range(2):
            entropy = (3, epoch, number)
            found = turned(turbo(data, entropy))
            header = read_header(data)
            large = scale_of(header.height, header.width, (224, 224)) > 1
            (scaled if large else plain).append(difference(found, of_pillow(recipe, data, entropy)))
    assert len(plain) > 50 and len(scaled) > 5
    # an operation of a policy may multiply what it is given; a wrong box or flip gives tens
    assert max(plain) < (0.1 if not {*augment} & {"auto_augment", "color_jitter"} else 0.5)
    assert max(scaled) < 5 and np.mean(plain + scaled) < 0.3


def test_evaluation_is_that_of_timm(photographs):
    for augment in ({}, {"interpolation": "bicubic"}, {"eval_resize": 288}):
        recipe = recipe_of(**augment)
        turbo = open_turbo(recipe, training=False)
        found = [difference(turbo(data), of_pillow(recipe, data)) for data in photographs]
        assert max(found) < 1 and np.median(found) < 0.05


def test_predictions_are_those_of_timms_pixels(photographs):
    """Of a random network of many features, whose answers are as sensitive as any."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=100).eval()
    recipe = recipe_of(size=128)
    turbo, inputs = open_turbo(recipe, training=False), ImageInputs(recipe, torch.device("cpu"))
    answers = []
    for images in ([turbo(d) for d in photographs], [of_pillow(recipe, d) for d in photographs]):
        batch = Batch(torch.from_numpy(np.stack(images)), torch.zeros(len(images)), np.zeros(1), np.zeros(1))
        with torch.no_grad():
            features = model.forward_head(model.forward_features(inputs(batch, training=False)[0]), pre_logits=True)
        # by the nearest other photograph, since a network without training gives all the same class
        distance = torch.cdist(features, features).fill_diagonal_(torch.inf)
        answers.append(distance.argmin(1))
    assert (answers[0] == answers[1]).float().mean() >= 0.95


@pytest.mark.parametrize("how", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {}])
@pytest.mark.parametrize("restarts", [None, 1, 3, 4, 5, 26, 32, 63, 64])
@pytest.mark.parametrize("grey", [False, True])
def test_parts_are_those_of_the_whole_bit_by_bit(picture, how, restarts, grey):
    if how.get("progressive") and restarts:
        pytest.skip("the intervals of a progressive file are not of its parts")
    image = picture.resize((500, 333)).convert("L" if grey else "RGB")
    data = encoded(image, **how, **({"restart_marker_blocks": restarts} if restarts else {}))
    whole = np.asarray(Image.open(io.BytesIO(data)).convert(image.mode)).reshape(333, 500, -1)
    header = read_header(data)
    assert (header.height, header.width, header.channels) == (333, 500, 1 if grey else 3)
    random = np.random.default_rng(0)
    for _ in range(12):
        (y, bottom), (x, right) = (np.sort(random.choice(side + 1, 2, replace=False)) for side in (333, 500))
        part = decode_part(data, header, (int(y), int(bottom)), (int(x), int(right)))
        found = part.pixels[y - part.top : bottom - part.top, x - part.left : right - part.left]
        assert np.array_equal(found, whole[y:bottom, x:right])


def test_re_encoded_images_are_decoded_in_part(photographs):
    large = max(photographs, key=len)
    data = prepare_image(large, max_side=400).data
    header = read_header(data)
    assert header.interval and -(-header.width // header.block[1]) % header.interval == 0
    part = decode_part(data, header, (120, 150), (100, 140))
    assert part.pixels.shape[0] <= 64 and part.top > 0
    # any reader reads it
    assert max(Image.open(io.BytesIO(data)).convert("RGB").size) == 400


def test_what_is_left_to_pillow(picture):
    small = picture.resize((80, 60))
    assert read_header(encoded(small)) and read_header(encoded(small, progressive=True))
    exif = Image.Exif()
    exif[274] = 6
    rotated = encoded(small, exif=exif)
    recipe = recipe_of(size=32)
    assert difference(open_turbo(recipe, False)(rotated), of_pillow(recipe, rotated)) < 0.1
    png = io.BytesIO()
    small.save(png, "PNG")
    plain = encoded(small)
    damaged = [plain[:-2], plain + b"\0", plain[:300], b"", b"\xff\xd8\xff\xd9"]
    for data in (png.getvalue(), encoded(small.convert("CMYK")), *damaged):
        assert read_header(data) is None
    # grey of a coloured file is Pillow's, which weighs red, green and blue
    assert open_turbo(recipe_of(in_chans=1), False)(plain) is None
    grey = encoded(small.convert("L"))
    one = recipe_of(size=32, in_chans=1)
    assert difference(open_turbo(one, False)(grey), of_pillow(one, grey)) < 0.1
    assert difference(turned(open_turbo(recipe, True)(grey, (1, 2, 3))), of_pillow(recipe, grey, (1, 2, 3))) < 0.1
    for other in ({"crop": "pad"}, {"interpolation": "nearest"}):
        assert open_turbo(recipe_of(**other), True) is None


@pytest.mark.parametrize("restarts", [0, 4])
def test_damage_inside_is_repaired_as_pillow_does(picture, restarts):
    data = bytearray(encoded(picture.resize((320, 240)), restart_marker_blocks=restarts))
    random = np.random.default_rng(1)
    recipe, decoded = recipe_of(size=200, scale=[1.0, 1.0], ratio=[1.3, 1.34]), 0
    for _ in range(40):
        broken = bytearray(data)
        for place in random.integers(700, len(data) - 2, 3):
            broken[place] = random.integers(256)
        broken = bytes(broken)
        found = open_turbo(recipe, True)(broken, (1, 1, 1))
        try:
            wanted = of_pillow(recipe, broken, (1, 1, 1))
        except Exception:
            continue
        if found is not None:
            decoded += 1
            assert difference(turned(found), wanted) < 0.1
    assert decoded > 20


@pytest.fixture
def shards(photographs, tmp_path):
    folder = tmp_path / "tree" / "n01"
    folder.mkdir(parents=True)
    for number, data in enumerate(photographs[:8]):
        (folder / f"{number}.JPEG").write_bytes(data)
    source = next(iter(open_source(tmp_path / "tree").values()))
    write_shards(source, tmp_path / "shards", split="train", num_shards=1, workers=1, progress=False)
    return tmp_path / "shards"


def test_streams_give_what_pillow_gives(shards):
    recipe = recipe_of(size=96)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": str(shards), "hold_out": 0})})
    pillow = recipe.model_copy(update={"data": recipe.data.model_copy(update={"decoder": "pillow"})})
    batches = []
    for each in (recipe, pillow):
        reader = SampleReader(load_index(shards))
        plan = make_plan(each, world_size=1, train_samples=8)
        inputs = ImageInputs(each, torch.device("cpu"))
        train, test = TrainStream(each, plan, reader, 0)[0], EvalStream(each, reader, 8, 0, 1)[0]
        assert train.inputs.is_contiguous(memory_format=torch.channels_last) and train.inputs.dtype == torch.uint8
        batches.append((inputs(train, True)[0], inputs(test, False)[0]))
    for ours, theirs in zip(*batches, strict=True):
        # in units of a channel's deviation, about 58
        assert (ours - theirs).abs().mean() < 0.02


def test_a_truncated_photograph_is_named(shards, photographs):
    recipe = recipe_of(size=96)
    reader = SampleReader(load_index(shards))
    samples = EvalStream(recipe, reader, 8, 0, 1).samples
    cut = {"jpg": photographs[1][: len(photographs[1]) // 2], "cls": b"0", "__key__": "cut"}
    reader.read = lambda sample_id: cut
    with pytest.raises(BadSample, match=r"undecodable jpg: .*truncated"):
        samples.read(0, 0)


def test_the_decoder_is_in_the_hash_where_it_decides(digit_shards, tmp_path):
    from psn_train.recipe import decisive, recipe_hash, saved_recipe

    photos = recipe_of()
    document = photos.resolved()
    assert photos.decoder == "turbo" and decisive(document)["data.decoder"] == "turbo"
    del document["data"]["decoder"]
    before = saved_recipe(document)
    assert before.decoder == "pillow" and "data.decoder" not in decisive(document)
    assert recipe_hash(before) != recipe_hash(photos) == recipe_hash(saved_recipe(photos.resolved()))
    assert decisive(before.resolved()) == decisive(document)
    digits = check_recipe(small_document(digit_shards, tmp_path))
    assert digits.decoder == "pillow" and "data.decoder" not in decisive(digits.resolved())


def test_a_run_goes_on_with_its_decoder(tmp_path):
    from psn_train.training.run_folder import RunError, check_same_recipe

    recipe = recipe_of()
    document = recipe.resolved()
    del document["data"]["decoder"]
    with pytest.raises(RunError, match=r"data\.decoder: 'pillow' then, 'turbo' now(.|\n)*data\.decoder=pillow"):
        check_same_recipe(recipe, {"recipe": document, "order": 2})
    pillow = recipe.model_copy(update={"data": recipe.data.model_copy(update={"decoder": "pillow"})})
    check_same_recipe(pillow, {"recipe": document, "order": 2})
