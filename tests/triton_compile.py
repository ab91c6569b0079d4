"""Triton's compiler, down to machine code, on every kernel, without a GPU: run by test_triton.py in its own process.

python tests/triton_compile.py 80 90: a line for each kernel and compute capability: name, registers a thread, bytes of
the stack, on which lies what did not fit into registers.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from psn_train.neurons.kernels import triton_bits, triton_launch, triton_norm
from psn_train.neurons.kernels.triton_launch import Channels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT, HALF = torch.float32, torch.bfloat16


class NoGPU:
    """Stands in for the driver of a GPU that is not there: a target to compile for."""

    def __init__(self, capability: int):
        self.capability = capability
        self.utils = self

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        # of the smallest GPU of these capabilities
        return {"max_shared_mem": 101376}


def compile_only(kernel, programs, device, *arguments, warps, **constants):
    binary = kernel.warmup(*arguments, grid=programs, num_warps=warps, **constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    print(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", registers, stack, flush=True)


def empty(*shape, dtype=FLOAT):
    return torch.empty(shape, dtype=dtype, device="meta")


def psn(T, J, dtype, taps=0, band=0, M=1 << 20):
    weight, bias = (empty(taps), empty()) if taps else (empty(T, J), empty(T))
    triton_launch.forward(empty(J, M, dtype=dtype), weight, bias, band)
    triton_launch.backward(empty(T, M, dtype=dtype), empty(J, M, dtype=dtype), weight, bias, band, "atan", 2.0)


def norm(T, J, dtype, inner, taps=0):
    weight, bias = (empty(taps), empty()) if taps else (empty(T, J), empty(T))
    y, grad = empty(J, 1 << 20, dtype=dtype), empty(T, 1 << 20, dtype=dtype)
    channels = Channels(empty(64), empty(64), inner)
    triton_launch.forward(y, weight, bias, 0, channels, grad)
    triton_launch.forward(y, weight, bias, 0, channels, with_bits=True)
    arguments = (grad, y, weight, bias, 0, "sigmoid", 2.0, channels)
    triton_launch.backward(*arguments, want=("weight", "sums"))
    triton_launch.backward(*arguments, (empty(64),) * 3, want=("x",))


def main(capabilities):
    for module in (triton_launch, triton_norm, triton_bits):
        module.launch = compile_only
    for capability in capabilities:
        triton.runtime.driver.set_active(NoGPU(capability))
        psn(4, 4, FLOAT)
        psn(4, 4, HALF, M=(1 << 31) + 3)
        psn(8, 8, HALF)
        psn(16, 16, FLOAT)
        psn(128, 128, torch.float16)
        psn(32, 32, FLOAT, taps=17)
        psn(32, 32, HALF, band=8)
        psn(32, 1, HALF)
        norm(4, 4, HALF, inner=1)
        norm(8, 8, FLOAT, inner=49)
        norm(20, 20, HALF, inner=1)
        norm(20, 20, HALF, inner=1, taps=3)
        triton_norm.statistics(empty(4, 64, 64, 49, dtype=HALF))
        triton_bits.unpack_bits(triton_bits.pack_bits(empty(4, 1 << 20, dtype=HALF)), 1 << 20, HALF)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
