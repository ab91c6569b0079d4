"""A run whose checkpoints are in a bucket, by S3's own API: killed in any request, resumed, evaluated, published."""

import signal

import pytest
import torch
from conftest import merged, metrics, run_in_child, small_document, train_here

from psn_train.cli import main
from psn_train.training.checkpoint import find_checkpoint, read_checkpoint
from psn_train.training.storage import StorageError, folders, place, sizes

server = pytest.importorskip("moto.server", reason="no moto")
pytest.importorskip("s3fs", reason="no s3fs")

pytestmark = pytest.mark.slow

KILL = """
import os, signal, psn_train.training.storage as m
write, requests = m.Url.write_bytes, []
def killing(self, data):
    requests.append(self)
    if len(requests) == {number}: os.kill(os.getpid(), signal.SIGKILL)
    write(self, data)
m.Url.write_bytes = killing
"""


@pytest.fixture
def bucket(monkeypatch):
    """s3://psn, of a server in this process."""
    running = server.ThreadedMotoServer(port=0)
    running.start()
    _, port = running.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for key, value in {**settings, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(key, value)
    import boto3
    import s3fs

    boto3.client("s3").create_bucket(Bucket="psn")
    yield "s3://psn"
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.mark.long
def test_killed_in_any_request_and_resumed_equals_the_run_on_a_disk(
    bucket, digit_shards, tmp_path, capsys, checked_here
):
    section = {"every_steps": 4, "keep_last": 1, "retry_seconds": 0.1}
    local = merged(small_document(digit_shards, tmp_path / "local"), {"checkpoint": section, "ema": {"decay": 0.9}})
    remote = merged(local, {"run_dir": str(tmp_path / "remote"), "checkpoint": {"dir": f"{bucket}/runs/one"}})
    assert train_here(local) == 0
    # the start's own trial, files of the first save, LAST, and so on
    for number in (3, 7, 12):
        status, log = run_in_child(remote, tmp_path, before=KILL.format(number=number))
        assert status == -signal.SIGKILL, log
    status, log = run_in_child(remote, tmp_path)
    assert status == 0 and "goes on after step" in log, log
    assert metrics(remote["run_dir"]) == metrics(local["run_dir"])
    ours, theirs = (read_checkpoint(find_checkpoint(run["run_dir"], "last")) for run in (remote, local))
    for one, other in ((ours.model, theirs.model), (ours.optimizer["tensors"], theirs.optimizer["tensors"])):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)
    folder, disk = place(f"{bucket}/runs/one"), tmp_path / "local" / "checkpoints"
    assert [path.name for path in folders(folder, "step_")] == [path.name for path in folders(disk, "step_")]
    assert sizes(folder).keys() == sizes(disk).keys()

    def psn(*words) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    shards = ("--shards", digit_shards / "val", "--json")
    assert psn("eval", f"{bucket}/runs/one", *shards) == psn("eval", local["run_dir"], *shards)
    words = ("publish", f"{bucket}/runs/one/", "--to-folder", tmp_path / "out", "--license", "mit")
    assert "published: the best checkpoint" in psn(*words)


def test_a_bucket_that_is_not_there_is_an_error_at_the_start(bucket, small, monkeypatch):
    monkeypatch.setattr("psn_train.training.storage.READ_WAITS", ())
    with pytest.raises(ValueError, match=r"s3://nobody/run: no checkpoint can be written there: .*set checkpoint\.dir"):
        train_here(small(checkpoint={"dir": "s3://nobody/run"}))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"s3://psn/run.*: "):
        find_checkpoint("s3://psn/run")
