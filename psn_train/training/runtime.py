"""Processes, devices, precision and signals: what a run stands on, whichever launcher started it."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import signal
import warnings
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import psn_train
from psn_train.neurons import kernels
from psn_train.recipe import Plan, Recipe

# what `psn train` exits with after a SIGTERM or SIGUSR1, when everything is saved: EX_TEMPFAIL, "try again"
EXIT_STOPPED = 75

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def launched_processes() -> int:
    """How many processes the launcher started, known before any of them talks to another."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def build_accelerator(recipe: Recipe, world_size: int):
    """accelerate's Accelerator for this process; on machines without a GPU it joins the CPU processes over gloo.

    accelerate prepares the model only. The order of samples, the schedule and autocast are the project's own:
    a prepared scheduler would step once for every process (accelerate issue 2142), and a prepared iterable loader would
    read on rank 0 alone.
    """
    # torch 2.15 calls it forward_sync_buffers; accelerate passes the old name, which older versions need
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    with without_deepspeed():
        accelerator = _accelerator(recipe)
    if accelerator.num_processes != world_size:
        raise ValueError(
            f"the launcher started {world_size} processes, accelerate joins {accelerator.num_processes} of them: each "
            "would train by itself. On a CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu."
        )
    return accelerator


@contextlib.contextmanager
def without_deepspeed():
    """accelerate joins the processes, and `engine` hands the network to DeepSpeed itself: accelerate's way would want
    transformers, fill in clipping at 1.0, and leave a CPU out."""
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked


def _accelerator(recipe: Recipe):
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

    return Accelerator(
        # without it two processes on a CPU train side by side, unsynchronised
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=list(recipe.log.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(recipe.run_path), logging_dir=str(recipe.run_path / "tensorboard")
        ),
        kwargs_handlers=[
            # batch norm statistics stay each rank's own between evaluations, where they are averaged
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            # of the start; watch.py makes it shorter
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.watch.start_timeout_s)),
        ],
    )


def set_precision(recipe: Recipe, device: torch.device) -> None:
    """Process-wide switches of the recipe's `precision` section."""
    precision = recipe.precision
    kernels.use_backend(precision.kernels)
    # which says what it cannot run on
    kernels.choose(device)
    torch.backends.cudnn.allow_tf32 = precision.tf32
    # the T x T products are matrix products, and stay float32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = not precision.deterministic
    if precision.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    for key in ("dtype", "eval_dtype"):
        if getattr(precision, key) == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"precision.{key}: bf16, but {name} has none; use fp16 or fp32")


def versions() -> dict[str, str]:
    """Versions of what computes the weights."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"psn_train": psn_train.__version__, "python": platform.python_version()}
    packages = (
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "deepspeed",
        "webdataset",
        "numpy",
        "pillow",
        "simplejpeg",
    )
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def autocast(dtype: str, device: torch.device):
    """Autocast to `bf16` or `fp16`; nothing for `fp32`."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


def seed_everything(*entropy: int) -> None:
    """Start Python's, NumPy's and PyTorch's generators (all devices) from `entropy`."""
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def gather_rows(row: torch.Tensor) -> torch.Tensor:
    """[n] of each rank -> [ranks, n], on all of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return row[None]
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def all_reduce_sum(*tensors: torch.Tensor) -> None:
    """Add up tensors over all ranks, in place. One process: nothing to do."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def average_batch_norm(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances averaged over the ranks, by name; the model is left as it is."""
    averaged = {}
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for key in ("running_mean", "running_var"):
                value = getattr(module, key).detach().clone()
                if world_size > 1:
                    dist.all_reduce(value)
                    value /= world_size
                averaged[f"{name}.{key}"] = value
    return averaged


def out_of_memory(error: BaseException, recipe: Recipe, plan: Plan) -> str | None:
    """What to do about an error of an allocator, of a GPU's or of the CPU's; None for other errors."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    if not isinstance(error, kinds) and "DefaultCPUAllocator" not in str(error):
        return None
    events, fewer = recipe.events, "a smaller data.max_batch_per_device"
    if events is not None and events.frames == "duration":
        steps = f"steps of events.duration_us = {events.duration_us}"
        steps += f", at most events.max_steps = {events.max_steps}" if events.max_steps is not None else ""
        fewer += ", a longer events.duration_us, a smaller events.max_steps"
    else:
        steps = f"T = {recipe.model.T} steps"
    return (
        f"the memory does not suffice for a batch of {plan.micro_batch_size} samples on a device, {steps} and "
        f"data.image_size = {recipe.data.image_size}: set {fewer}, model.memory: lean or "
        "model.grad_checkpointing: true. The allocator says: "
        f"{(str(error) or type(error).__name__).splitlines()[0]}"
    )


class NonFiniteLoss(FloatingPointError):
    """The loss became infinite or NaN; the weights are those before the update."""


class FiniteGuard:
    """Stops every rank before an update whose loss is not finite.

    On a CPU the flag is looked at. On a GPU nobody waits for it: a device-side assertion stands between the loss and
    the update, and each step's flag is copied to pinned memory, from which `blame` reads, after the fact, which step
    it was.
    """

    _KEPT = 64

    def __init__(self, device: torch.device):
        self.device = device
        self.recent: list[tuple[int, list[str]]] = []
        self.flags = torch.ones(self._KEPT, pin_memory=True) if device.type == "cuda" else None

    def check(self, losses: torch.Tensor, step: int, samples: list[str]) -> None:
        """Call before the update, with the micro-batches' losses and the names of their samples.

        Raises:
            NonFiniteLoss: on a CPU; on a GPU a later call raises the device's own error: see `blame`.
        """
        here = torch.isfinite(losses).all().float()
        everywhere = here.clone()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        if self.flags is None:
            if not everywhere:
                raise NonFiniteLoss(self._message(step, samples, bool(here)))
            return
        self.recent = [*self.recent, (step, samples)][-self._KEPT :]
        self.flags[step % self._KEPT].copy_(here, non_blocking=True)
        torch._assert_async(everywhere > 0)

    def blame(self) -> str | None:
        """After a device-side assertion: which step had the loss that is not finite, and its samples."""
        if self.flags is None:
            return None
        for step, samples in self.recent:
            if self.flags[step % self._KEPT] == 0:
                return self._message(step, samples, here_finite=False)
        return None

    @staticmethod
    def _message(step: int, samples: list[str], here_finite: bool) -> str:
        text = f"the loss of step {step} is not finite; nothing was updated with it and the last checkpoint stands. "
        if here_finite:
            return text + "It happened on another rank, which names the samples."
        return (
            text + f"Samples of this rank in that step: {', '.join(samples)}. "
            "Lower optim.lr, set optim.clip_grad_norm, or use precision.dtype: bf16 in place of fp16."
        )


class StopSignal:
    """SIGTERM and SIGUSR1, agreed upon by all ranks without waiting for a device.

    Every rank calls `poll` once a step. The flags travel over gloo while the step computes, and the answer of the step
    before is read: all ranks hear of a signal in the same step, one later than the rank that caught it.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        self.group = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")
        self.previous = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _catch(self, number: int, _frame) -> None:
        self.caught = signal.Signals(number).name

    def poll(self) -> bool:
        """True when some rank has caught a signal."""
        if self.group is None:
            return self.caught is not None
        answer = self._answer()
        flag = torch.tensor(float(self.caught is not None))
        self.pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return answer

    def of_main(self, value: float) -> float:
        """The main process's value, on every rank."""
        if self.group is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0, group=self.group)
        return shared.item()

    def settle(self) -> None:
        """Wait for what is under way: a process that is forked while gloo's threads work may hang in the fork."""
        if self.pending is not None:
            self.pending[0].wait()

    def _answer(self) -> bool:
        if self.pending is None:
            return False
        work, flag = self.pending
        work.wait()
        self.pending = None
        return bool(flag)

    def close(self) -> None:
        """Take part in what is under way, and give the signals back."""
        self._answer()
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@dataclass
class RankState:
    """What differs between ranks: random generators and batch norm statistics."""

    tensors: dict[str, torch.Tensor]
    scalars: dict

    @classmethod
    def capture(cls, model: nn.Module, device: torch.device) -> RankState:
        name, keys, position, has_gauss, gauss = np.random.get_state()
        version, words, gauss_next = random.getstate()
        tensors = {
            "rng.torch": torch.get_rng_state(),
            "rng.numpy": torch.from_numpy(keys.astype(np.int64)),
            "rng.python": torch.tensor(words, dtype=torch.int64),
            **{f"buffer.{key}": value.detach().cpu().contiguous() for key, value in model.named_buffers()},
        }
        if device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
        scalars = {"numpy": [name, int(position), int(has_gauss), float(gauss)], "python": [version, gauss_next]}
        return cls({key: value.clone() for key, value in tensors.items()}, scalars)

    def restore(self, model: nn.Module, device: torch.device) -> None:
        name, position, has_gauss, gauss = self.scalars["numpy"]
        keys = self.tensors["rng.numpy"].numpy().astype(np.uint32)
        np.random.set_state((name, keys, position, has_gauss, gauss))
        version, gauss_next = self.scalars["python"]
        random.setstate((version, tuple(self.tensors["rng.python"].tolist()), gauss_next))
        torch.set_rng_state(self.tensors["rng.torch"])
        if device.type == "cuda" and "rng.cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["rng.cuda"], device)
        buffers = dict(model.named_buffers())
        for key, value in self.tensors.items():
            if key.startswith("buffer."):
                buffers[key.removeprefix("buffer.")].copy_(value)
