"""How the commands of each page are run in tests: what is put where, and what is done otherwise than the page says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import docs_data as data
import pytest
from docs_commands import Way
from hub_standin import hub_standin

# on two CPU cores, in seconds
QUIET = "data.workers=0 log.trackers=[]"
SMALL = f"data.image_size=32 model.args.width=8 model.args.stem=3x3 {QUIET}"
PHOTOS = f"{SMALL} data.global_batch_size=16 schedule.epochs=2 augment.crop=none"
LEAK = f"data.image_size=32 data.global_batch_size=16 schedule.epochs=2 augment.crop=none {QUIET}"
# 160 images of 4 classes in the place of 1,281,167 of 1,000
IMAGENET = (
    f"{SMALL} data.train_samples=null data.test_samples=null model.num_classes=null model.init_from=null "
    "data.global_batch_size=64 data.max_batch_per_device=null data.eval_batch_per_device=null data.streams=4 "
    "augment.eval_resize=36 precision.dtype=fp32 schedule.epochs=2 log.every_steps=1 checkpoint.every_steps=null"
)
DVS = (
    f"model.T=2 model.args.width=4 schedule.epochs=null schedule.steps=4 schedule.by=step log.every_steps=1 {QUIET} "
    "data.eval_batch_per_device=100 data.max_batch_per_device=null"
)
CIFAR = (
    f"model.args.width=8 {QUIET} data.train_samples=null data.test_samples=null schedule.epochs=2 data.hold_out=4 "
    "data.global_batch_size=8"
)
# with the README's photos.yaml
README_PHOTOS = f"{PHOTOS} model.init_from=null precision.dtype=fp32"
FEWER_WORKERS = (r"data\.workers=12", "data.workers=1")


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[dict[str, str]]:
    """A stand-in for the hub, and a token that may write."""
    with hub_standin() as running:
        yield {
            "HF_ENDPOINT": running.url,
            "HF_TOKEN": "hf_of_me",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "hf"),
        }


@contextlib.contextmanager
def nothing_is_fetched(folder: Path) -> Iterator[dict[str, str]]:
    """torchvision:NAME and timm:NAME are networks of these names with new weights."""
    import timm

    from psn_train.publish import convert

    def read(name: str) -> dict:
        return timm.create_model(name.partition(":")[2].partition(".")[0]).state_dict()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "read_source", read)
        yield {}


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[dict[str, str]]:
    """s3://bucket, of a server in this process."""
    server = pytest.importorskip("moto.server", reason="no moto")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    _, port = running.get_host_and_port()
    env = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    env["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        import boto3
        import s3fs

        boto3.client("s3").create_bucket(Bucket="bucket")
        yield env
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@contextlib.contextmanager
def hub_and_no_other(folder: Path) -> Iterator[dict[str, str]]:
    with hub(folder) as env, nothing_is_fetched(folder):
        yield env


# processes that decode are started anew by each command
FEWER_PROCESSES = (r"^(psn publish .*--to me/\S+)", r"\1 --workers 0")
WAYS: dict[str, Way] = {
    "index": Way(prepare=data.photos, adds={"photos.yaml": PHOTOS}),
    "imagenet": Way(
        prepare=data.imagenet_archives,
        adds={"imagenet/sew_resnet34_psn.tet_t4_in1k": IMAGENET},
        changes=[FEWER_WORKERS, (r"sbatch --nodes 4", "sbatch --nodes 2")],
    ),
    "cifar10dvs": Way(prepare=data.cifar10_dvs, adds={"cifar10dvs/vgg_snn_sliding_psn.t10_cifar10dvs": DVS}),
    "own_neuron": Way(prepare=data.photo_shards, adds={"leak.yaml": f"{LEAK} model.args.width=8"}),
    "own_data": Way(prepare=data.own_data, adds={"mine.yaml": PHOTOS}),
    "resume": Way(
        prepare=data.photo_shards,
        adds={"photos.yaml": PHOTOS.replace("epochs=2", "epochs=15")},
        changes=[
            (r"sleep 60", "until [ -s runs/photos/metrics.jsonl ]; do sleep 0.2; done"),
            (r"sleep 90", "until [ -s runs/killed/checkpoints/LAST ]; do sleep 0.2; done"),
        ],
    ),
    "convert": Way(prepare=data.old_files, around=nothing_is_fetched),
    "publish": Way(prepare=data.digits_run, around=hub, processes=r"--to me/", changes=[FEWER_PROCESSES]),
    "events": Way(
        prepare=data.event_sets,
        adds={"cifar10dvs/vgg_snn_sliding_psn.t10_cifar10dvs": DVS},
        elsewhere={"psn demo events": "tests/test_demo.py: piece by piece, in seconds"},
    ),
    "many_machines": Way(
        prepare=data.for_many_machines,
        around=bucket,
        adds={
            "imagenet/sew_resnet18_psn.tet_t4_in1k": IMAGENET,
            "imagenet/sew_resnet34_psn.tet_t4_in1k": IMAGENET,
            "photos.yaml": README_PHOTOS,
        },
        changes=[FEWER_WORKERS, (r"sbatch --nodes 4", "sbatch --nodes 2")],
        elsewhere={
            "kubectl apply": "tests/test_kubernetes.py: against the schemas of the cluster",
            "accelerate launch --config_file launch/accelerate/multi_node.yaml --rdzv_backend c10d": "tests/"
            "test_elastic.py: this very command, on hosts whose names resolve",
        },
    ),
}
WAYS["../README"] = Way(
    prepare=data.for_the_readme,
    around=hub_and_no_other,
    processes=r"--to me/",
    adds={
        "photos.yaml": f"{README_PHOTOS} schedule.epochs=6 checkpoint.keep_last=5",
        "imagenet/sew_resnet18_psn.tet_t4_in1k": IMAGENET,
        "imagenet/sew_resnet34_psn.tet_t4_in1k": IMAGENET,
        "cifar10dvs/vgg_snn_sliding_psn.t10_cifar10dvs": DVS,
    },
    changes=[
        FEWER_WORKERS,
        FEWER_PROCESSES,
        (r"/data/in1k/imagenet1k-train-\{0000\.\.1023\}", "in1k/imagenet1k-train-{0000..0003}"),
        (r"--val-labels ILSVRC", "--val-labels downloads/ILSVRC"),
        (r"^psn bench neurons$", "psn bench neurons --T 2 --N 256 --seconds 0.01 --repeats 1"),
        (
            r"--T 4 32 --N 2\^8 2\^20 --dtype bf16 --device cuda:0",
            "--T 4 --N 2^8 --dtype bf16 --seconds 0.01 --repeats 1",
        ),
        # one run would be refused the changed recipe of the other
        (r"photos\.yaml precision\.dtype=fp32", "photos.yaml run_dir=runs/cpu"),
    ],
    elsewhere={
        "make demo": "tests/test_demo.py: piece by piece, in seconds",
        "make test": ".ci/run: it runs this",
        "psn demo events": "tests/test_demo.py: piece by piece, in seconds",
    },
)
WAYS["../recipes/README"] = Way(prepare=data.cifar_shards, adds={"sew_resnet18_psn.t4_cifar10": CIFAR})
# pages whose commands of one process take seconds: run by `make test`, too
QUICK = {"index", "own_neuron", "own_data", "convert", "../recipes/README"}
