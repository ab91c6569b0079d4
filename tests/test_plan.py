"""`psn plan`: its arithmetic, what it refuses, and that it agrees with runs that were made."""

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import merged, train_here

from psn_train.cli import main
from psn_train.data.index import ShardError, load_index, save_index
from psn_train.plan.communication import DDP_BUCKET, batch_norm_channels, communication, gradient_traffic
from psn_train.plan.hardware import GPUS, Cluster
from psn_train.plan.hours import from_run
from psn_train.plan.memory import ZERO_BUCKET, GpuMemory, gpu_memory, largest_micro_batch
from psn_train.plan.report import Question, make_report
from psn_train.recipe import check_recipe, load_recipe, recipe_path
from psn_train.training.build import build_model, check_order, open_splits
from psn_train.training.memory import UpdateMemory

AUTHORS = "sew_resnet18_psn.tet_t4_in1k"
UPDATE = UpdateMemory(
    micro_batch_size=4,
    parameters=800,
    buffers=10,
    gradients=800,
    optimizer_state=800,
    inputs=50,
    saved=1000,
    casts=0,
    activations_peak=1300,
    step_peak=400,
)


def packaged(*overrides: str):
    return load_recipe(recipe_path(AUTHORS), list(overrides))


def test_hours_agree_with_the_authors_log():
    """8 GPUs, 869 images/s in their log, evaluation included: 1,474 s an epoch, 320 epochs, 131 hours."""
    report = make_report(packaged(), Cluster(gpus_per_node=8), Question(images_per_second=108.6))
    assert report.problems == []
    assert report.plan.micro_batch_size == 64 and report.plan.grad_accum_steps == 1
    # 10,000 of their 1,281,167 images are held out here
    assert report.hours.seconds_per_epoch == pytest.approx(1474.3 * 1_271_167 / 1_281_167, rel=0.01)
    assert report.hours.total == pytest.approx(1474.3 * 320 / 3600, rel=0.02)
    # "the authors' 869 images/s needed two" cores of faster decoding
    assert 2 < report.reading.cores_per_node < 6
    on_test = make_report(packaged("data.select_on=test"), Cluster(gpus_per_node=8), Question(images_per_second=108.6))
    assert on_test.hours.seconds_per_epoch == pytest.approx(1474.3, rel=0.01)


def test_standing_memory_by_engine():
    def parts(engine: str) -> dict:
        return vars(gpu_memory(UPDATE, engine=engine, devices=4, ema=False))

    ddp, one, two, three = (parts(engine) for engine in ("ddp", "zero1", "zero2", "zero3"))
    assert (ddp["parameters"], ddp["gradients"], ddp["optimizer_state"], ddp["engine"]) == (800, 800, 800, 0)
    assert (one["parameters"], one["gradients"], one["optimizer_state"]) == (800, 800, 200)
    assert (two["parameters"], two["gradients"], two["optimizer_state"]) == (800, 200, 200)
    assert (three["parameters"], three["gradients"], three["optimizer_state"]) == (200, 200, 200)
    assert one["engine"] == two["engine"] == 200 + ZERO_BUCKET and three["engine"] == 200 + 800 + ZERO_BUCKET
    assert ddp["saved"] == three["saved"] == 1000 and ddp["temporary"] == 300
    averaged = gpu_memory(UPDATE, engine="ddp", devices=4, ema=True)
    assert averaged.ema == 810 and averaged.total == pytest.approx(sum(ddp.values()) - 4 + 810 * 1.05)
    assert gpu_memory(UPDATE, engine="ddp", devices=1, ema=False).allowance < ddp["allowance"]


def recorded(total, looked: list[int], size: int) -> GpuMemory:
    """The memory of a micro-batch, of which only the total is looked at; its size is noted."""
    looked.append(size)
    return GpuMemory(size, *[0.0] * 8, saved=total(size), temporary=0.0, allowance=0.0)


@pytest.mark.parametrize(
    "total",
    [
        lambda size: 10.0 * size + 5.0,
        lambda size: 100.0 + max(7.0 * size, 30.0 * size - 400.0),
        lambda size: float(size**3),
        lambda size: 100.0 * (size // 10) + 1e-3 * size,
        lambda size: 0.0 if size < 50 else 1e6,
    ],
)
@pytest.mark.parametrize("most", [1, 2, 64, 1000])
def test_largest_micro_batch_is_the_largest(total, most):
    for limit in (-1.0, 4.0, 14.9, 15.0, 75.0, 640.0, 1e4, 1e9):
        looked = []
        wanted = max((size for size in range(1, most + 1) if total(size) <= limit), default=0)
        assert largest_micro_batch(partial(recorded, total, looked), limit, most) == wanted
        assert len(looked) == len(set(looked)) <= 2 + 3 * most.bit_length()


def test_few_sizes_are_looked_at_where_memory_is_a_straight_line():
    looked = []
    memory_of = partial(recorded, lambda size: 40.0 * size + 1000.0, looked)
    assert largest_micro_batch(memory_of, 40.0 * 777 + 1010.0, 4096) == 777
    assert len(looked) <= 5


def test_traffic():
    assert gradient_traffic("ddp", 800, 800, 4, 3) == (1200, 0)
    assert gradient_traffic("zero1", 800, 800, 4, 3) == (1200, 600)
    assert gradient_traffic("zero2", 800, 800, 4, 3) == (3600, 600)
    assert gradient_traffic("zero3", 800, 800, 4, 3) == (1800, 3600)
    assert communication(Cluster(), UPDATE, accumulated=1) is None
    slow, fast = (communication(Cluster(2, 4, gpu="h100", node_gbps=gbps), UPDATE, accumulated=1) for gbps in (10, 100))
    assert slow.bytes == fast.bytes == 2 * 7 / 8 * 800
    assert slow.seconds > fast.seconds
    synced = communication(Cluster(1, 4), UPDATE, accumulated=2, sync_bn=[3, 5])
    # forward: 3 other ranks' 2 C + 1 numbers; backward: 2 C numbers all-reduced; twice
    assert synced.batch_norm_bytes == 2 * 4 * (3 * (7 + 11) + 2 * 3 / 4 * (6 + 10))
    assert synced.collectives == communication(Cluster(1, 4), UPDATE, accumulated=2).collectives + 8


def test_traffic_hides_behind_the_backward_pass():
    large = UpdateMemory(**{**vars(UPDATE), "gradients": 10 * DDP_BUCKET})

    def exposed(compute_seconds: float, engine: str = "ddp") -> float:
        cluster = Cluster(4, 8, engine, node_gbps=10)
        return communication(cluster, large, accumulated=2, compute_seconds=compute_seconds).exposed_seconds

    whole = communication(Cluster(4, 8, node_gbps=10), large, accumulated=2).seconds
    assert exposed(0.0) == pytest.approx(whole)
    # all but the last bucket
    assert 0 < exposed(1e3) < 0.15 * whole
    assert exposed(1e3) < exposed(whole / 10) < exposed(0.0)
    # DeepSpeed reduces and gathers when backward is over
    assert exposed(1e3, "zero1") > whole


def test_batch_norms_are_found():
    recipe = packaged()
    channels = batch_norm_channels(build_model(recipe, 10))
    assert len(channels) == 20 and sum(channels) == 4800


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does():
    stated = partial(packaged, "precision.kernels=reference")
    recipe, cluster = stated("data.max_batch_per_device=null"), Cluster(1, 2, memory_gib=7.0)
    report = make_report(recipe, cluster)
    (problem,) = report.problems
    assert "a micro-batch of 256 needs an estimated" in problem and "of the 7.0 GiB" in problem
    size, accumulated = report.largest_micro_batch, 256 // report.largest_micro_batch
    assert f"set it to {size}, the largest that fits, which gives {accumulated} micro-batches" in problem
    fitting = make_report(stated(f"data.max_batch_per_device={size}"), cluster)
    assert fitting.problems == [] and fitting.memory.total <= cluster.memory
    assert (fitting.plan.micro_batch_size, fitting.plan.grad_accum_steps) == (size, accumulated)
    larger = make_report(stated(f"data.max_batch_per_device={2 * size}"), cluster)
    assert larger.problems != []
    none = make_report(recipe, Cluster(1, 2, memory_gib=1.0))
    assert none.largest_micro_batch == 0 and "not even one sample fits" in none.problems[0]


@pytest.mark.parametrize(
    ("overrides", "cluster", "question", "found"),
    [
        (["data.global_batch_size=4"], Cluster(1, 8), {}, "data.global_batch_size = 4"),
        (["precision.dtype=bf16"], Cluster(1, 8, gpu="v100-32"), {}, "bf16, but a v100-32 has none"),
        (["ema.decay=0.99"], Cluster(1, 8, "zero3"), {}, "ema.decay: under ZeRO-3"),
        (["precision.compile=true"], Cluster(1, 8, "zero3"), {}, "precision.compile: the hooks"),
        ([], Cluster(engine="zero1"), {}, "one device has nobody to share with"),
        (["model.sync_bn=true"], Cluster(), {}, "model.sync_bn: there is one device"),
        ([], Cluster(1, 8, cores_per_node=16), {"images_per_second": 2000}, "74 cores of a node would decode"),
        ([], Cluster(1, 8), {"images_per_second": 100, "time_limit": 24}, "the job has 24"),
        (["model.name=sew_resnet19_psn"], Cluster(), {}, "model.name: 'sew_resnet19_psn'"),
        (["data.train_samples=null"], Cluster(), {}, "set data.train_samples"),
        (["data.hold_out=2000000"], Cluster(), {}, "data.hold_out"),
        (
            ["optim.name=lamb", "optim.weight_decay=0.01"],
            Cluster(1, 8, "zero1"),
            {},
            "optim.name: Lamb under DeepSpeed",
        ),
        (["optim.name=nonsense"], Cluster(), {}, "timm has no optimiser 'nonsense'"),
        (["optim.name=muon"], Cluster(), {}, "the memory of muon cannot be counted"),
    ],
)
def test_what_cannot_work_is_refused(overrides, cluster, question, found):
    report = make_report(packaged(*overrides), cluster, Question(**question))
    assert any(found in problem for problem in report.problems), report.problems


def test_a_bound_that_gives_no_pairs_is_not_proposed(small):
    """mixup mixes pairs: an odd micro-batch cannot be."""
    recipe = check_recipe(small(augment={"mixup": 0.2}, data={"global_batch_size": 18}, model={"in_chans": 1}))
    whole = make_report(recipe, Cluster())
    limit = (whole.memory.total - 1) / 2**30
    report = make_report(recipe, Cluster(memory_gib=limit))
    assert report.largest_micro_batch in range(2, 18, 2) and "the largest that fits" in report.problems[0]


def test_all_problems_are_told_at_once():
    report = make_report(
        packaged("precision.dtype=bf16", "ema.decay=0.9", "data.max_batch_per_device=null"),
        Cluster(1, 2, "zero3", gpu="t4", memory_gib=10.0, cores_per_node=1),
        Question(images_per_second=500, time_limit=1),
    )
    assert len(report.problems) == 5
    requeued = make_report(packaged(), Cluster(), Question(images_per_second=500, time_limit=1, requeues=True))
    assert requeued.problems == []


def test_decoding_limits_a_run():
    quick = Question(images_per_second=2000, images_per_core=50)
    report = make_report(packaged("data.workers=4"), Cluster(2, 4), quick)
    assert report.hours.limited_by == "decoding" and report.hours.images_per_second == 2 * 4 * 4 * 50
    assert "40 would keep up" in report.notes[0]
    assert report.reading.bytes_per_second == pytest.approx(1600 * 147.8e9 / 1_281_167)
    # an evaluation is decoded by the same cores: 320 times 10,000 samples, and the test's 50,000 twice
    assert report.hours.evaluation_hours == pytest.approx((320 * 10_000 + 2 * 50_000) / 1600 / 3600)
    enough = make_report(packaged("data.workers=40"), Cluster(2, 4), quick)
    assert enough.hours.limited_by == "devices"


def test_shards_that_are_there_tell_their_bytes(small, digit_shards, tmp_path):
    recipe = check_recipe(small())
    index = load_index(digit_shards / "train")
    report = make_report(recipe, Cluster(1, 2), Question(images_per_second=100, images_per_core=1000))
    assert report.samples == 150 and report.plan.train_samples == 150
    assert report.reading.bytes_per_epoch == index.num_bytes
    assert report.reading.bytes_per_second == pytest.approx(index.num_bytes / 150 * report.hours.images_per_second)
    assert report.reading.cores_per_node == pytest.approx(0.2)


def test_a_cache_that_training_refuses_is_refused(small, digit_shards, tmp_path, monkeypatch):
    """The same shards behind URLs: plan and trainer want the same room on each node."""
    index = load_index(digit_shards / "train")
    remote = tmp_path / "remote"
    remote.mkdir()
    shards = [type(s)(**{**vars(s), "name": f"http://127.0.0.1:9/{s.name}"}) for s in index.shards]
    save_index(type(index)(**{**vars(index), "shards": shards}), remote)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2"), monkeypatch.setenv("WORLD_SIZE", "4"), monkeypatch.setenv("RANK", "0")

    def refused(gigabytes: float, **data) -> tuple[bool, bool]:
        document = small(data={"train": str(remote), "val": None, "cache_gb": gigabytes, "streams": 2, **data})
        recipe = check_recipe(document)
        report = make_report(recipe, Cluster(2, 2))
        try:
            check_order(recipe, report.plan, open_splits(recipe))
        except ShardError as error:
            assert "data.cache_gb" in str(error)
            return any("data.cache_gb: got" in problem for problem in report.problems), True
        return any("data.cache_gb: got" in problem for problem in report.problems), False

    whole = index.num_bytes / 1e9
    for data in ({"hold_out": 0}, {"hold_out": 20}, {"hold_out": 0, "val": str(digit_shards / "val")}):
        found = [refused(whole * share, **data) for share in (0.1, 0.5, 0.8, 1.0, 1.2, 1.6, 2.0, 3.0)]
        assert all(plan == trainer for plan, trainer in found) and found[0][0] and not found[-1][0], found
    small_one = small(data={"train": str(remote), "val": None, "hold_out": 0, "cache_gb": whole * 0.99, "streams": 1})
    assert "every epoch fetches them anew" in make_report(check_recipe(small_one), Cluster()).notes[0]
    small_one["data"]["cache_gb"] = whole
    assert make_report(check_recipe(small_one), Cluster()).notes == []


def test_evaluations_are_counted_by_the_shards_that_are_there(small):
    """The recipe states no number of val's samples; its index does."""
    report = make_report(check_recipe(small(schedule={"epochs": 4})), Cluster(), Question(images_per_second=100))
    assert report.hours.evaluation_hours == pytest.approx(4 * 50 / 300 / 3600)


def test_resident_images_take_memory_and_no_cores(small):
    recipe = check_recipe(small(data={"resident": True}))
    report = make_report(recipe, Cluster(), Question(images_per_second=100))
    # the 50 of val, too
    assert report.memory.resident_images == 200 * 16 * 16
    assert report.reading.bytes_per_epoch == 0 and report.reading.cores_per_node is None


@pytest.mark.slow
def test_throughput_of_a_run(small):
    document = small("measured", schedule={"epochs": 2})
    assert train_here(document) == 0
    recipe = check_recipe(document)
    lines = [json.loads(line) for line in (Path(document["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["images_per_s"] for line in lines if line["kind"] == "train")
    found = from_run(document["run_dir"], recipe)
    assert rates[0] <= found.images_per_second <= rates[-1] and "1 x cpu" in found.source
    report = make_report(recipe, Cluster(1, 2), Question(run=document["run_dir"]))
    assert report.problems == [] and report.hours.total > 0
    other = check_recipe(merged(document, {"model": {"T": 4}}))
    with pytest.raises(ValueError, match=r"model\.T: 2 there, 4 here"):
        from_run(document["run_dir"], other)
    wider = check_recipe(merged(document, {"model": {"args": {"width": 16}}}))
    with pytest.raises(ValueError, match=r"model\.args\.width: 8 there, 16 here"):
        from_run(document["run_dir"], wider)
    with pytest.raises(ValueError, match="no log and checkpoint of a run"):
        from_run(document["run_dir"] + "x", recipe)


def test_command_measures_and_prints(small, tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps({key: value for key, value in small().items() if value is not None}))
    status = main(["plan", str(recipe), "optim.lr=0.2", "--gpus-per-node", "2", "--measure", "2", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert status == 0 and document["problems"] == []
    assert document["throughput"]["images_per_second"] > 0 and "2 updates of 12" in document["throughput"]["source"]
    assert document["reading"]["images_per_core"] > 0 and "measured here" in document["reading"]["decode_source"]
    assert document["learning_rates"][0][1] == 0.2
    assert document["memory"]["total"] == pytest.approx(
        sum(value for key, value in document["memory"].items() if key not in ("total", "micro_batch_size"))
    )
    assert main(["plan", AUTHORS, "--nodes", "4", "--gpus-per-node", "8", "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    for text in ("batch per device", "1,271,167", "kept by autograd", "an estimate", "hours", "the plan stands"):
        assert text in shown
    assert main(["plan", AUTHORS, "precision.dtype=bf16", "--gpu", "t4"]) == 1
    assert "cannot be: precision.dtype: bf16" in capsys.readouterr().out


def test_gpus_are_plausible():
    assert all(10 < gpu.memory_gib < 200 and 50 <= gpu.gbps <= 8000 for gpu in GPUS.values())
