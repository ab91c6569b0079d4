"""The Triton kernels on a GPU: parity with plain PyTorch on a grid of shapes, then bytes a second against a copy's.

python benchmarks/kernels_gpu_check.py [--neurons 1048576]. Bytes are those that must move: forward x and spikes,
backward x, gradient and gradient of x. No rate is printed of a kernel whose results differ.
"""

import argparse

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neurons", type=int, default=1 << 20, help="M (default %(default)s)")
    M = parser.parse_args().neurons
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, programs {triton_launch.PROGRAMS}")
    big = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    copy = 2 * big.numel() / do_bench(lambda: big.clone()) / 1e6
    print(f"copy: {copy:.0f} GB/s")
    failed = 0
    for T, J, taps in [
        *((T, T, 0) for T in (1, 2, 4, 5, 8, 10, 16, 31, 32, 64, 128)),
        (4, 1, 0),
        (32, 1, 0),
        (32, 32, 8),
    ]:
        for name, dtype in DTYPES.items():
            label = f"T={T:<3} J={J:<3} k={taps} {name}"
            if not all(agree(*case(T, J, odd, taps, dtype)) for odd in (1, 7, 1001, 65537)):
                failed += 1
                print(f"{label}: differs from plain PyTorch")
                continue
            grad, x, weight, bias = case(T, J, M, taps, dtype)
            forward = do_bench(lambda x=x, w=weight, b=bias: triton_psn.forward(x, w, b, 0))
            backward = do_bench(lambda a=(grad, x, weight, bias): triton_psn.backward(*a, 0, "atan", 2.0))
            rates = [(T + J) * M * x.itemsize / forward / 1e6, (T + 2 * J) * M * x.itemsize / backward / 1e6]
            print(label, *(f"{rate:7.0f} GB/s ({rate / copy:4.0%} of a copy)" for rate in rates), sep="  ")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
