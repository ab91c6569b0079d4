"""DDP and ZeRO on a tiny network: the same updates, to the bit or nearly."""

from __future__ import annotations

import contextlib
import gc
import logging
import os

import torch
import torch.distributed as dist
from torch import nn

from psn_train.neurons import set_nan_check
from psn_train.training.zero import load_deepspeed

UPDATES = 3
STAGES = (1, 2, 3)
# of the largest weight: sums of more than two ranks are added in another order, and a GPU's convolutions in any
CLOSE = 1e-4


def largest_differences(device: torch.device) -> dict[str, float]:
    """{"ZeRO-1": largest difference of a weight from DDP's after some updates, relative to the largest weight, ...}.

    Float32, batch norm included, SGD with momentum, no clipping; each rank has a batch of its own.

    Raises:
        RuntimeError, ImportError, ...: whatever DeepSpeed has to say.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = load_deepspeed(logging.ERROR)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    expected = _train_ddp(device)
    largest = max(float(value.abs().max()) for value in expected)
    found = {}
    for stage in STAGES:
        weights = _train_zero(deepspeed, device, stage)
        difference = max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True))
        found[f"ZeRO-{stage}"] = difference / largest
    return found


def _network(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    import timm

    import psn_train.models  # noqa: F401 (registers the architectures)

    torch.manual_seed(0)
    model = timm.create_model("sew_resnet10_psn", T=2, num_classes=5, stem="3x3", width=8).to(device)
    set_nan_check(model, "never")
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _batches(device: torch.device):
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    for _ in range(UPDATES):
        yield torch.randn(4, 3, 16, 16, generator=generator).to(device), torch.arange(4, device=device)


def _loss(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(network(images, per_step=True).mean(0), labels)


def _train_ddp(device: torch.device) -> list[torch.Tensor]:
    model, optimizer = _network(device)
    network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for images, labels in _batches(device):
        _loss(network, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [parameter.detach().clone() for parameter in model.parameters()]


def _train_zero(deepspeed, device: torch.device, stage: int) -> list[torch.Tensor]:
    model, optimizer = _network(device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 1_000_000,
                "allgather_bucket_size": 1_000_000,
                "overlap_comm": False,
            },
            "steps_per_print": 10**9,
        },
    )
    for images, labels in _batches(device):
        engine.backward(_loss(engine, images, labels))
        engine.step()
    parameters = list(model.parameters())
    gathered = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else contextlib.nullcontext()
    with gathered:
        weights = [parameter.detach().clone() for parameter in parameters]
    # left to the end of the process, stage 3 aborts it now and then
    engine.destroy()
    del engine, model, optimizer, parameters
    gc.collect()
    return weights
