"""The Triton backend: parity in Triton's interpreter, and on a GPU where there is one; compilation without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psn_train.neurons import kernels
from psn_train.neurons.kernels import backends

pytest.importorskip("triton")
HERE = Path(__file__).parent
# what ptxas may leave on the stack of a thread, in bytes: a few numbers at most
SPILLED = 64


def in_child(*command: str, timeout: int = 1200, **environment: str) -> str:
    """The output of Python with these arguments: Triton reads TRITON_INTERPRET when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    path = os.pathsep.join(filter(None, [str(HERE.parent), kept.get("PYTHONPATH")]))
    kept |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], env=kept, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def parity(**environment: str) -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", "--show-capture=no")
    output = in_child("-m", "pytest", *options, str(HERE / "triton_parity.py"), **environment)
    assert int(re.search(r"(\d+) passed", output)[1]) > 150, output


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_parity_in_the_interpreter():
    parity(TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parity_on_a_gpu():
    parity()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.long
def test_kernels_compile_for_gpus_and_fit_into_registers(tmp_path):
    output = in_child(str(HERE / "triton_compile.py"), "80", TRITON_CACHE_DIR=str(tmp_path))
    kernels_seen = [line.split() for line in output.splitlines()]
    assert len(kernels_seen) == 36
    assert {name.partition(".")[0] for name, _, _ in kernels_seen} == {
        *("triton_small", "triton_band", "triton_dense", "triton_norm", "triton_bits")
    }
    assert [line for line in kernels_seen if int(line[2]) > SPILLED] == []


def test_triton_on_the_cpu_is_refused_without_its_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    kernels.use_backend("triton")
    try:
        with pytest.raises(ValueError, match=r"got 'triton' and a CPU.*TRITON_INTERPRET=1"):
            kernels.choose(torch.device("cpu"))
    finally:
        kernels.use_backend("auto")
    assert kernels.choose(torch.device("cpu")) == "reference"
