"""The section `events` of a recipe: what goes with it, what does not and what to do then; what `psn recipe` shows."""

import pytest
import yaml
from conftest import merged

from psn_train.recipe import RecipeError, check_recipe, load_recipe, packaged_recipes, recipe_hash, recipe_path
from psn_train.recipe.event_rules import takes_any_number_of_steps
from psn_train.recipe.show import show_recipe, steps_line

EVENTS = {
    "name": "events",
    "model": {"name": "vgg_snn_psn", "T": 4, "in_chans": 2},
    "data": {"train": "t", "val": "v", "global_batch_size": 8, "image_size": 48},
    "augment": {"crop": "pad", "hflip": 0.0},
    "events": {"split": "tebn"},
    "optim": {"lr": 0.1},
    "schedule": {"epochs": 2},
}
DURATION = {"model": {"name": "vgg_snn_sliding_psn", "k": 2}, "events": {"frames": "duration", "duration_us": 10000}}


def problems(**changes) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(merged(EVENTS, changes))
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"events": {"frames": "time", "rounding": "tonic", "antialias": True, "event_drop": True}},
        {"events": {"roll": 5, "rotate": 10.0, "cutout": 8, "scale": 0.5}},
        {"events": {"nda_ops": 2, "nda_strength": 3, "roll": 1, "cutout": 4}},
        {"events": {"frames": "voxel"}},
        {"model": {"in_chans": 1}, "events": {"frames": "voxel"}},
        {"augment": {"crop": "none", "interpolation": "nearest", "mixup": 0.2, "cutmix": 1.0}},
        # as they are by default
        {"augment": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}},
        DURATION,
        merged(DURATION, {"events": {"max_steps": 20}, "model": {"k": 9}}),
    ],
)
def test_what_goes_together_is_accepted(changes):
    recipe = check_recipe(merged(EVENTS, changes))
    assert recipe.events is not None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"events": None}, "model.in_chans: got 2, which is of recordings alone"),
        ({"model": {"in_chans": 3}}, "model.in_chans: got 3; frames of events have 2 channels"),
        ({"model": {"in_chans": 1}}, "(1 is of events.frames: voxel alone); set it to 2"),
        ({"model": {"in_chans": 3}, "events": {"frames": "voxel"}}, "voxels may have 1, with signs; set it to 2 or 1"),
        ({"model": {"name": "sequential_net_psn"}}, "model.name: sequential_net_psn takes the columns of an image"),
        ({"augment": {"hflip": 2}}, "augment.hflip: got 2; "),
        ({"augment": {"crop": "random_resized"}}, "augment.crop: got random_resized; frames of events are cropped by"),
        ({"augment": {"color_jitter": 0.4}}, "augment.color_jitter: got 0.4; counts of events have no colour"),
        (
            {"augment": {"auto_augment": "trivial"}},
            "augment.auto_augment: got trivial; its policies are of photographs",
        ),
        ({"augment": {"random_erasing": 0.1}}, "events.cutout blanks a square"),
        ({"augment": {"eval_resize": 60}}, "augment.eval_resize: got 60; the evaluation resizes to data.image_size"),
        ({"augment": {"mean": [0.5, 0.5]}}, "augment.mean: got [0.5, 0.5]; counts of events are not normalised"),
        ({"augment": {"std": [0.5, 0.5]}}, "events.scale multiplies them"),
        ({"augment": {"interpolation": "bicubic"}}, "set bilinear or nearest"),
        ({"augment": {"interpolation": "nearest"}, "events": {"antialias": True}}, "events.antialias: nearest takes"),
        ({"data": {"resident": True}}, "data.resident: recordings are read from the shards"),
        ({"events": {"frames": "duration"}, "model": DURATION["model"]}, "events.duration_us: missing"),
        (
            {"events": {"duration_us": 1000}},
            "events.duration_us: got 1000, but it is of frames: duration and frames is",
        ),
        ({"events": {"max_steps": 7}}, "events.max_steps: got 7, but it is of frames: duration"),
        ({"events": {"frames": "voxel", "rounding": "tonic"}}, "frames: voxel leaves nothing to round"),
        ({"events": DURATION["events"]}, "vgg_snn_psn has weights for T = 4; take a network of sliding_psn, if, lif"),
        (merged(DURATION, {"augment": {"cutmix": 1.0}}), "augment.mixup: recordings of unequal length cannot be mixed"),
        ({"events": {"nda_strength": 3}}, "nothing is drawn by it; set events.nda_ops, too"),
        ({"events": {"split": "tebm"}}, "events.split: got 'tebm'"),
        ({"events": {"roll": -1}}, "events.roll: got -1"),
        ({"events": {"cutout": 48}}, "events.cutout: got 48 pixels, and the frames have 48; wanted fewer"),
        ({"augment": {"pad": 50}}, "augment.pad: got 50 pixels, and the frames have 48"),
        ({"model": {"name": "vgg_snn_sliding_psn", "k": 5}}, "model.k: got 5, which is more than T = 4"),
    ],
)
def test_what_does_not_is_refused_in_one_sentence_each(changes, complaint):
    text = problems(**changes)
    assert text.startswith("1 problem in the recipe:") and complaint in text, text


def test_a_horizontal_flip_is_stated(tmp_path):
    """It has no default that suits digits and gestures as well as photographs; a parent or an override may state it."""
    says = "augment.hflip: missing; recordings have no default, state it: 0.0 where left and right differ"
    for augment in ({"crop": "pad"}, {"crop": "none", "vflip": 0.5}):
        with pytest.raises(RecipeError) as caught:
            check_recipe({**EVENTS, "augment": augment})
        assert str(caught.value).startswith("1 problem in the recipe:") and says in str(caught.value)
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    parent.write_text(yaml.safe_dump({**EVENTS, "augment": {"crop": "pad"}}))
    child.write_text("base: parent.yaml\naugment:\n  hflip: 0.5\n")
    assert load_recipe(child).augment.hflip == 0.5
    assert load_recipe(parent, ["augment.hflip=0"]).augment.hflip == 0.0
    with pytest.raises(RecipeError, match="1 problem in the recipe"):
        load_recipe(parent)
    # a run's recipe.json states everything
    check_recipe(load_recipe(child).resolved())
    # images keep their default
    images = {"model": {"name": "sew_resnet18_psn"}, "augment": {"crop": "pad"}, "events": None}
    assert check_recipe({**EVENTS, **images}).augment.hflip == 0.5


def test_every_problem_is_told_at_once():
    text = problems(
        model={"in_chans": 3},
        augment={"crop": "random_resized", "color_jitter": 0.4, "mean": [0.5]},
        events={"max_steps": 3, "frames": "voxel", "rounding": "tonic"},
        data={"resident": True},
    )
    assert text.startswith("7 problems in the recipe:")


@pytest.mark.parametrize("neuron", ["sliding_psn", "if", "lif", "lif_no_reset", "plif", "klif"])
def test_networks_that_take_any_number_of_steps(neuron):
    name = f"sew_resnet10_{neuron}"
    k = 2 if neuron == "sliding_psn" else None
    recipe = check_recipe(merged(EVENTS, merged(DURATION, {"model": {"name": name, "k": k}})))
    assert takes_any_number_of_steps(recipe)
    # a learned number for each time-step
    assert "with pe has weights for T = 4" in problems(
        **merged(DURATION, {"model": {"name": name, "k": k, "args": {"pe": True}}})
    )


@pytest.mark.parametrize("neuron", ["psn", "masked_psn", "glif"])
def test_networks_that_are_bound_to_T(neuron):
    k = 2 if neuron == "masked_psn" else None
    text = problems(**merged(DURATION, {"model": {"name": f"vgg_snn_{neuron}", "k": k}}))
    assert f"events.frames: duration gives each recording as many frames as it has, and vgg_snn_{neuron} has" in text


def test_the_rule_agrees_with_the_networks():
    """The recipe goes by names; a network of any T is one that runs at two."""
    import timm
    import torch

    from psn_train.models import NETWORKS

    for name in NETWORKS:
        if not name.startswith("vgg_snn_"):
            continue
        k = 2 if "masked_psn" in name or "sliding_psn" in name else None
        recipe = check_recipe(merged(EVENTS, {"model": {"name": name, "k": k}}))
        model, found = timm.create_model(name, T=4, k=k, width=2, img_size=16).eval(), []
        for T in (4, 6):
            try:
                model(torch.zeros(T, 1, 2, 16, 16))
                found.append(T)
            except ValueError:
                pass
        assert (found == [4, 6]) == takes_any_number_of_steps(recipe), name


def test_places_of_the_file_stand_in_the_message(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {name: vgg_snn_psn, in_chans: 2}\ndata: {train: t, global_batch_size: 4}\naugment: {crop: none}\n"
        "events:\n  max_steps: 3\noptim: {lr: 0.1}\nschedule: {epochs: 1}\n"
    )
    with pytest.raises(RecipeError, match=rf"{path}:5: events\.max_steps: got 3"):
        load_recipe(path)


def test_what_decides_the_frames_decides_the_hash():
    plain = check_recipe(EVENTS)
    for changes in ({"frames": "time"}, {"split": "random"}, {"antialias": True}, {"scale": 2.0}, {"roll": 1}):
        assert recipe_hash(check_recipe(merged(EVENTS, {"events": changes}))) != recipe_hash(plain)


def test_a_recipe_of_images_has_the_hash_it_had():
    """Published results name the hashes of recipes that knew of no section `events`."""
    recipe = load_recipe(recipe_path("cifar10/sew_resnet18_psn.t4_cifar10"))
    assert recipe.resolved()["events"] is None and recipe_hash(recipe) == "be77570a17b8"
    # of before there was another decoder than Pillow's
    photographs = load_recipe(recipe_path("imagenet/sew_resnet18_psn.tet_t4_in1k"), ["data.decoder=pillow"])
    assert recipe_hash(photographs) == "82b07c69aa15"


def test_psn_recipe_shows_split_and_steps(capsys):
    show_recipe(check_recipe(EVENTS), [1], 9000, "the test", "split tebn (9,000 / 1,000)")
    text = capsys.readouterr().out
    assert "recordings: split tebn (9,000 / 1,000)\n" in text and "frames: number" in text
    recipe = check_recipe(merged(EVENTS, merged(DURATION, {"events": {"max_steps": 30}})))
    show_recipe(recipe, [1], 9000, "the test")
    text = capsys.readouterr().out
    assert "recordings: split tebn, says the recipe" in text
    assert steps_line(recipe) == "one for each 10,000 us, at most 30" and steps_line(recipe) in text
    # of images it says nothing
    show_recipe(load_recipe(recipe_path("cifar10/sew_resnet18_psn.t4_cifar10")), [1], 50000, "the test")
    assert "recordings:" not in capsys.readouterr().out


def test_packaged_recipes_of_recordings():
    names = [name for name in packaged_recipes() if name.split("/")[0] in ("cifar10dvs", "nmnist", "dvs128gesture")]
    assert len(names) >= 9
    for name in names:
        recipe = load_recipe(recipe_path(name))
        assert recipe.events is not None and recipe.model.in_chans == 2
        assert recipe.events.split == ("tebn" if name.startswith("cifar10dvs/") else "given")
