"""Training on images that live on the device: a run that is stopped and goes on, and the figures of a run without."""

import pytest
import torch
from conftest import assert_same_run, metrics, weights

# several micro-batches an update and updates that span two epochs, all of the batched augmentation, mixing and erasing
RESIDENT = {
    "data": {"resident": True, "max_batch_per_device": 12, "workers": 0},
    "augment": {"hflip": 0.5, "auto_augment": "trivial", "mixup": 0.2, "random_erasing": 0.3},
    "schedule": {"epochs": 2},
}


@pytest.mark.slow
def test_a_run_that_stops_in_mid_epoch_goes_on_bit_for_bit(small, train_in_child):
    whole = small("whole", **RESIDENT)
    status, log = train_in_child(whole)
    assert status == 0, log
    parts = small("parts", **RESIDENT)
    for stop in (8, None):
        parts["schedule"]["stop_after_steps"] = stop
        status, log = train_in_child(parts)
        assert status == 0, log
    assert "goes on after step 8" in log
    ours, theirs = weights(parts["run_dir"]), weights(whole["run_dir"])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [line for line in metrics(parts["run_dir"]) if line["step"] > 8] == [
        line for line in metrics(whole["run_dir"]) if line["step"] > 8
    ]


@pytest.mark.slow
def test_without_augmentation_it_trains_the_very_weights_of_the_stream(small, train_in_child):
    plain = {"augment": {"crop": "none"}, "schedule": {"epochs": 1}}
    for name, resident in (("stream", False), ("resident", True)):
        status, log = train_in_child(small(name, **plain, data={"resident": resident}))
        assert status == 0, log
    assert_same_run(small("resident")["run_dir"], small("stream")["run_dir"])
