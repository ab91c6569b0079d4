"""The recipe: strict, complete in its complaints, and read without torch."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psn_train.recipe import (
    PlanError,
    RecipeError,
    check_recipe,
    load_recipe,
    make_plan,
    packaged_recipes,
    parse_yaml,
    recipe_hash,
    recipe_path,
    recipe_schema,
)
from psn_train.recipe.show import learning_rates, show_recipe

ROOT = Path(__file__).parents[1]
MINIMAL = """
model: {name: sew_resnet18_psn}
data: {train: shards/train, global_batch_size: 512}
optim: {lr: 1e-1}
schedule: {epochs: 320}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E4", 5e4),
        ("1.", 1.0),
        (".5", 0.5),
        ("010", 10),
        ("1_000", 1000),
        ("-3", -3),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        (".inf", math.inf),
        ("3x3", "3x3"),
        ("1e", "1e"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    parsed = parse_yaml(text)
    assert parsed == value and type(parsed) is type(value)


def test_minimal_recipe_and_name_from_the_file(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL, "sew_resnet18_psn.mine.yaml"))
    assert recipe.name == "sew_resnet18_psn.mine"
    assert recipe.optim.lr == 0.1
    assert str(recipe.run_path) == "runs/sew_resnet18_psn.mine"


def test_every_problem_is_reported_at_once_with_place_and_nearest_key(tmp_path):
    path = write(
        tmp_path,
        """
model: {nam: sew_resnet18_psn, T: four}
data: {train: a, global_batch_size: 512, lr: 3}
optim: {lr: 1e-3, momentun: 0.9}
schedule: {epochs: 3, steps: 4, name: no, learning_rate: 1}
augment: {mean: [0.5]}
""",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["checkpoint.keep_last=0"])
    message = str(caught.value)
    for expected in (
        f"{path}:2: model.nam: unknown key; did you mean model.name?",
        "model.name: missing",
        f"{path}:2: model.T: got 'four'",
        f"{path}:3: data.lr: unknown key; did you mean optim.lr?",
        f"{path}:4: optim.momentun: unknown key; did you mean optim.momentum?",
        f"{path}:5: schedule.name: got 'no'",
        f"{path}:5: schedule.learning_rate: unknown key; did you mean optim.lr?",
        "command line: checkpoint.keep_last: got 0",
        # combinations are looked at in the same pass
        f"{path}:5: schedule.epochs: give the length as",
        f"{path}:6: augment.mean: 1 values for in_chans = 3",
    ):
        assert expected in message, message
    assert message.startswith("10 problems")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.k=3", "has no order"),
        ("model.name=sew_resnet18_masked_psn", "needs its order"),
        ("schedule.warmup_steps=5", "moves by epoch"),
        ("schedule.warmup_epochs=320", "not less than epochs"),
        ("schedule.min_lr=1", "more than optim.lr"),
        ("model.in_chans=1", "3 values for in_chans = 1"),
        ("augment.scale=[1.0, 0.08]", "smaller value first"),
        ("data.resident=true", "augment.crop: got random_resized; images on the device"),
        ("augment.random_erasing_area=[0.5, 0.02]", "augment.random_erasing_area: got [0.5, 0.02]; wanted the smaller"),
        ("augment.random_erasing_ratio=[3.3, 0.3]", "augment.random_erasing_ratio: got [3.3, 0.3]; wanted the smaller"),
        ("augment.random_erasing_area=[0.02, 1.5]", "less than or equal to 1"),
        ("augment.random_erasing_ratio=[0.0, 3.3]", "greater than 0"),
        ("augment.random_erasing_ratio=[0.3]", "at least 2 items"),
        ("augment.eval_resize=200", "less than data.image_size"),
        ("checkpoint.select_by=ema_top1", "needs an EMA"),
        ("data.select_on=test", "test needs test shards"),
        ("data.hold_out=-1", "greater than or equal to 0"),
        ("checkpoint.every_epochs=null", "never saves"),
        ("optim.lr=fast", "should be a valid number"),
        ("optim.lr=-1", "greater than 0"),
        ("data.global_batch_size=1.5", "valid integer"),
        ("model.args={stem: [3]}", "model.args.stem"),
        ("ema.decay=1.0", "less than 1"),
        ("nonsense", "wanted key=value"),
        ("seed.x=1", "seed"),
        ("modle.T=4", "did you mean model"),
    ],
)
def test_one_problem_one_message(tmp_path, override, complaint):
    with pytest.raises(RecipeError, match=complaint.replace("[", r"\[")):
        load_recipe(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["data.hold_out=0", "checkpoint.select_by=top1"],
            "checkpoint.select_by: top1 is of samples that are not trained",
        ),
        (["data.select_on=test"], "data.select_on: test needs test shards; set data.test"),
        (["data.select_on=test", "data.test=t", "data.val=v"], "data.val: v would never be looked at"),
        (["data.select_on=test", "data.test=t", "data.hold_out=5"], "data.hold_out: got 5, but data.select_on: test"),
        (["data.val=v", "data.hold_out=5"], "data.hold_out: got 5, but the best epoch is chosen on data.val"),
        (["data.val=v/", "data.test=v"], "data.test: v is data.val, too"),
        (["data.test=shards/train"], "data.test: shards/train is data.train, too; what is trained on tests nothing"),
        (["data.val=shards/train/"], "data.val: shards/train/ is data.train, too; what is trained on selects nothing"),
    ],
)
def test_splits_that_contradict_each_other(tmp_path, overrides, complaint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL), overrides)
    assert str(caught.value).startswith("1 problem") and complaint in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "samples", "selected_on", "held_out"),
    [
        ([], 1281167, "held out", 10_000),
        ([], 50_000, "held out", 5_000),
        ([], 9, "held out", 1),
        (["data.hold_out=300"], 1000, "held out", 300),
        (["data.hold_out=0"], 1000, None, 0),
        (["data.val=v"], 1000, "val", 0),
        (["data.val=v", "data.hold_out=0", "data.test=t"], 1000, "val", 0),
        (["data.test=t", "data.select_on=test"], 1000, "test", 0),
        (["data.test=t", "data.select_on=test", "data.hold_out=0"], 1000, "test", 0),
    ],
)
def test_what_is_held_out_and_selected_on(tmp_path, capsys, overrides, samples, selected_on, held_out):
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    plan = make_plan(recipe, world_size=1, train_samples=samples)
    assert (recipe.data.selected_on, plan.held_out, plan.train_samples) == (selected_on, held_out, samples - held_out)
    show_recipe(recipe, [1], samples, "the test")
    printed = capsys.readouterr().out
    assert f"split: {samples - held_out:,} trained on, {held_out:,} held out" in printed
    shown = {
        "val": "the validation shards v",
        "held out": "the held-out samples",
        "test": "the test shards t, which makes",
    }
    assert f"best epoch selected on {shown.get(selected_on, 'nothing')}" in printed
    assert ("test shards t: once, at the end" in printed) == (recipe.data.test is not None and selected_on != "test")


def test_masked_psn_cannot_look_further_back_than_T(tmp_path):
    overrides = ["model.name=sew_resnet18_masked_psn", "model.k=5"]
    with pytest.raises(RecipeError, match="got 5, which is more than T = 4"):
        load_recipe(write(tmp_path, MINIMAL), overrides)


def test_base_is_inherited_section_by_section(tmp_path):
    write(tmp_path, MINIMAL, "parent.yaml")
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub", "base: ../parent.yaml\noptim: {momentum: 0.5}\n", "child.yaml")
    recipe = load_recipe(child, ["optim.lr=0.05"])
    assert (recipe.name, recipe.optim.lr, recipe.optim.momentum) == ("child", 0.05, 0.5)
    assert recipe.model.name == "sew_resnet18_psn"


def test_a_mistake_in_the_parent_is_placed_in_the_parent(tmp_path):
    parent = write(tmp_path, MINIMAL + "ema: {decai: 0.9}\n", "parent.yaml")
    child = write(tmp_path, "base: parent.yaml\n", "child.yaml")
    with pytest.raises(RecipeError, match=f"{parent}:6: ema.decai: unknown key; did you mean ema.decay"):
        load_recipe(child)


def test_circles_missing_files_and_broken_yaml(tmp_path):
    a = write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(a)
    with pytest.raises(RecipeError, match=r"Is it .*a\.yaml"):
        load_recipe(tmp_path / "aa.yaml")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(write(tmp_path, "model: {"))
    with pytest.raises(RecipeError, match="stands in line 1 already"):
        load_recipe(write(tmp_path, "seed: 1\nseed: 2\n"))
    with pytest.raises(RecipeError, match="wanted a mapping"):
        load_recipe(write(tmp_path, "- 1\n"))


def test_mistakes_are_reported_before_torch_is_imported(tmp_path):
    path = write(tmp_path, MINIMAL.replace("lr:", "learning_rate:"))
    script = (
        "import sys; sys.argv = ['psn']; sys.orig_argv = ['psn'];"
        "from psn_train.cli import main;"
        f"status = main(['train', {str(path)!r}]);"
        "print(status, 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert "did you mean optim.lr?" in done.stderr
    # and so by the way that the README shows for several processes
    module = [sys.executable, "-X", "importtime", "-m", "psn_train.train", str(path)]
    done = subprocess.run(module, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean optim.lr?" in done.stderr
    assert " torch\n" not in done.stderr


def test_hash_ignores_what_does_not_change_the_weights(tmp_path):
    path = write(tmp_path, MINIMAL)
    reference = recipe_hash(load_recipe(path))
    neutral = ["data.workers=9", "log.every_steps=1", "run_dir=/elsewhere", "data.train=/other/place"]
    assert recipe_hash(load_recipe(path, neutral)) == reference
    # where validation shards are does not matter; whether there are any decides what is trained on
    with_val = recipe_hash(load_recipe(path, ["data.val=here"]))
    assert with_val == recipe_hash(load_recipe(path, ["data.val=/there", "data.hold_out=0", "data.test=x"]))
    assert with_val != reference and reference == recipe_hash(load_recipe(path, ["data.test=x"]))
    for decisive in (
        "data.hold_out=9",
        "data.hold_out_seed=1",
        "data.test_samples=9",
        "seed=1",
        "optim.lr=0.2",
        "model.T=5",
        "data.shuffle=full",
        "augment.hflip=0.1",
    ):
        assert recipe_hash(load_recipe(path, [decisive])) != reference, decisive


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 600),
    world=st.integers(1, 12),
    bound=st.none() | st.integers(1, 80),
    samples=st.integers(1, 5000),
    epochs=st.integers(1, 5),
    hold_out=st.none() | st.integers(0, 50),
)
def test_plan_keeps_the_global_batch(batch, world, bound, samples, epochs, hold_out):
    recipe = check_recipe(
        {
            "name": "x",
            "model": {"name": "sew_resnet18_psn"},
            "data": {"train": "t", "global_batch_size": batch, "max_batch_per_device": bound, "hold_out": hold_out},
            "optim": {"lr": 0.1},
            "schedule": {"epochs": epochs},
        }
    )
    held_out = max(1, samples // 10) if hold_out is None else hold_out
    if held_out >= samples:
        with pytest.raises(PlanError, match=f"{held_out} held-out samples, but the training shards have {samples} in"):
            make_plan(recipe, world_size=world, train_samples=samples)
        return
    if batch < world:
        with pytest.raises(PlanError, match=f"do not give each of {world} devices one"):
            make_plan(recipe, world_size=world, train_samples=samples)
        return
    if batch % world and batch // world < -(-(batch // world + 1) // min(bound or batch, batch // world + 1)):
        with pytest.raises(PlanError, match="cannot both be cut into"):
            make_plan(recipe, world_size=world, train_samples=samples)
        return
    plan = make_plan(recipe, world_size=world, train_samples=samples)
    assert (plan.train_samples, plan.held_out) == (samples - held_out, held_out)
    samples = plan.train_samples
    assert plan.even == (batch % world == 0)
    if plan.even:
        assert plan.micro_batch_size * plan.grad_accum_steps * world == batch
    assert plan.micro_batch_size <= (bound or batch)
    # the micro-batches of all ranks tile the stream: each sample of a global batch once, in the stream's order
    accumulated = plan.grad_accum_steps
    for step in (0, 3):
        micros = [
            plan.micro_batch(rank, step * accumulated + number)
            for rank in range(world)
            for number in range(accumulated)
        ]
        assert [at for micro in micros for at in micro] == list(range(step * batch, (step + 1) * batch))
        sizes = [len(micro) for micro in micros]
        assert min(sizes) >= 1 and max(sizes) == plan.micro_batch_size
    assert (plan.total_steps - 1) * batch < epochs * samples <= plan.total_steps * batch
    ends = [plan.epoch_ended_by(step) for step in range(1, plan.total_steps + 1)]
    ended = [end for end in ends if end is not None]
    assert ended == sorted(set(ended)) and ended[-1] == epochs - 1
    if batch <= samples:
        assert ended == list(range(epochs))


def test_packaged_recipes_load_and_are_found_by_name():
    names = packaged_recipes()
    assert "imagenet/sew_resnet18_psn.tet_t4_in1k" in names
    for name in names:
        recipe = load_recipe(recipe_path(name))
        assert recipe.name == name.split("/")[-1] and recipe.note
    assert recipe_path("sew_resnet34_psn.tet_t4_in1k") == recipe_path("imagenet/sew_resnet34_psn.tet_t4_in1k")
    with pytest.raises(RecipeError, match=r"Did you mean sew_resnet34_psn\.tet_t4_in1k"):
        recipe_path("sew_resnet34_psn.tet_t4")


@pytest.mark.parametrize(("layers", "batch"), [(18, 512), (34, 256)])
def test_imagenet_recipes_state_the_papers_runs(layers, batch, capsys):
    recipe = load_recipe(recipe_path(f"sew_resnet{layers}_psn.tet_t4_in1k"))
    model, optim, schedule = recipe.model, recipe.optim, recipe.schedule
    assert (model.name, model.T, model.connect_function) == (f"sew_resnet{layers}_psn", 4, "ADD")
    assert (model.surrogate, model.alpha, model.sync_bn) == ("atan", 2.0, False)
    assert model.init_from == f"torchvision:resnet{layers}.IMAGENET1K_V1"
    assert (optim.name, optim.lr, optim.momentum, optim.nesterov) == ("sgd", 0.1, 0.9, False)
    assert (optim.weight_decay, optim.norm_weight_decay, optim.clip_grad_norm) == (0.0, None, None)
    assert (schedule.name, schedule.by, schedule.epochs, schedule.min_lr) == ("cosine", "epoch", 320, 0.0)
    assert schedule.warmup_epochs == schedule.warmup_steps == 0
    assert (recipe.loss.name, recipe.loss.label_smoothing, recipe.loss.mse_weight) == ("tet", 0.0, 0.0)
    assert (recipe.precision.dtype, recipe.precision.eval_dtype) == ("fp16", "fp32")
    assert recipe.augment.mixup == recipe.augment.cutmix == recipe.augment.color_jitter == 0
    assert recipe.augment.auto_augment is None and recipe.ema.decay is None
    plan = make_plan(recipe, world_size=8, train_samples=1281167)
    assert (plan.global_batch_size, plan.micro_batch_size, plan.grad_accum_steps) == (batch, batch // 8, 1)
    # the authors chose on the validation images, and trained on all others
    data = recipe.data
    assert (plan.held_out, data.val, data.test, data.test_samples) == (10_000, None, "data/imagenet/val", 50_000)
    theirs = load_recipe(recipe_path(f"sew_resnet{layers}_psn.tet_t4_in1k"), ["data.select_on=test"])
    assert make_plan(theirs, world_size=8, train_samples=1281167).train_samples == 1281167
    show_recipe(recipe, [8], 1281167, "the test")
    printed = capsys.readouterr().out
    assert f"{plan.total_steps:,}" in printed and str(batch // 8) in printed


def test_schema_is_current_and_accepts_the_recipes():
    schema = recipe_schema()
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == schema, "run `make schema`"
    assert schema["$defs"]["Optim"]["properties"]["lr"]["description"]
    assert schema["additionalProperties"] is False
    for name in packaged_recipes():
        document = parse_yaml(recipe_path(name).read_text())
        assert set(document) <= set(schema["properties"])


def test_shown_learning_rates_are_those_of_the_run(tmp_path):
    import torch

    from psn_train.training.optim import LearningRate

    for overrides in ([], ["schedule.by=step", "schedule.warmup_steps=7", "schedule.min_lr=0.01"]):
        recipe = load_recipe(write(tmp_path, MINIMAL), ["schedule.epochs=6", *overrides])
        plan = make_plan(recipe, world_size=1, train_samples=5120)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        optimizer.param_groups[0]["lr_scale"] = 1.0
        rate = LearningRate(optimizer, recipe, plan)
        for when, shown in learning_rates(recipe, plan):
            unit, number = when.split()
            step = int(number) * (10 if unit == "epoch" else 1)
            if step < plan.total_steps:
                assert rate.set(step) == pytest.approx(shown, abs=1e-12), when
