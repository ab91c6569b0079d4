"""The Triton kernels on a GPU: parity with plain PyTorch on a grid of shapes, then bytes a second against a copy's.

python benchmarks/kernels_gpu_check.py [--neurons 1048576]. Bytes are those that must move: forward x and spikes,
backward x, gradient and gradient of x. No rate is printed of a kernel whose results differ.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from triton.testing import do_bench

from psn_train.neurons.kernels import plain, triton_launch, triton_psn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def coarse(*shape: int, step: float, most: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers so coarse that sums of their products are exact in float32, so that spikes must be equal."""
    numbers = torch.randn(*shape, device="cuda") * (most / 2)
    return numbers.clamp(-most, most).div(step).round().mul(step).to(dtype)


def case(T: int, J: int, M: int, taps: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(grad, x, weight, bias): a sliding PSN's where there are taps."""
    weight = coarse(taps, step=1 / 64, most=1) if taps else coarse(T, J, step=1 / 64, most=1)
    bias = coarse(1 if taps else T, step=1 / 64, most=1)
    x = coarse(J, M, step=1 / 16, most=4, dtype=dtype)
    return coarse(T, M, step=1 / 8, most=2, dtype=dtype), x, weight, bias.squeeze() if taps else bias


def agree(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    same = torch.equal(triton_psn.forward(x, weight, bias, 0).float(), plain.forward(x.float(), weight, bias, 0))
    found = triton_psn.backward(grad, x, weight, bias, 0, "atan", 2.0)
    exact = (tensor.double() for tensor in (grad, x, weight, bias))
    for mine, truth in zip(found, plain.backward(*exact, 0, "atan", 2.0), strict=True):
        rounding = 1e-5 + (torch.finfo(mine.dtype).eps if mine.dtype.itemsize == 2 else 0.0)
        # terms of a sum are about 1
        scale = max(float(truth.abs().max()), 1.0 if mine.shape == x.shape else grad.numel() ** 0.5)
        same &= float((mine.double() - truth).abs().max()) <= rounding * scale
    return same


class Case(NamedTuple):
    T: int
    J: int
    taps: int
    dtype: str

    def __str__(self) -> str:
        return f"T={self.T:<3} J={self.J:<3} k={self.taps} {self.dtype}"

    def tensors(self, M: int) -> tuple[torch.Tensor, ...]:
        return case(self.T, self.J, M, self.taps, DTYPES[self.dtype])


STEPS = (*((T, T, 0) for T in (1, 2, 4, 5, 8, 10, 16, 31, 32, 64, 128)), (4, 1, 0), (32, 1, 0), (32, 32, 8))
CASES = [Case(*steps, dtype) for steps in STEPS for dtype in DTYPES]


def prepared(of: Case, M: int) -> bool:
    """Whether the kernels agree with plain PyTorch; and those of M columns are compiled, for any process."""
    torch.manual_seed(0)
    found = all(agree(*of.tensors(odd)) for odd in (1, 7, 1001, 65537))
    grad, x, weight, bias = of.tensors(M)
    triton_psn.forward(x, weight, bias, 0)
    triton_psn.backward(grad, x, weight, bias, 0, "atan", 2.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neurons", type=int, default=1 << 20, help="M (default %(default)s)")
    M = parser.parse_args().neurons
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, programs {triton_launch.PROGRAMS}")
    big = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    copy = 2 * big.numel() / do_bench(lambda: big.clone()) / 1e6
    print(f"copy: {copy:.0f} GB/s", flush=True)
    # hundreds of kernels are compiled, a second each: by as many processes as there are cores
    workers = min(16, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        agreed = list(pool.map(partial(prepared, M=M), CASES))
    for of, same in zip(CASES, agreed, strict=True):
        if not same:
            print(f"{of}: differs from plain PyTorch")
            continue
        grad, x, weight, bias = of.tensors(M)
        forward = do_bench(lambda x=x, w=weight, b=bias: triton_psn.forward(x, w, b, 0))
        backward = do_bench(lambda a=(grad, x, weight, bias): triton_psn.backward(*a, 0, "atan", 2.0))
        rates = [(of.T + of.J) * M * x.itemsize / forward / 1e6, (of.T + 2 * of.J) * M * x.itemsize / backward / 1e6]
        print(of, *(f"{rate:7.0f} GB/s ({rate / copy:4.0%} of a copy)" for rate in rates), sep="  ", flush=True)
    raise SystemExit(not all(agreed))


if __name__ == "__main__":
    main()
