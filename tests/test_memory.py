"""Freed memory is kept by the processes that decode."""

import subprocess
import sys

import pytest

from psn_train.data import memory

PROGRAM = """
import resource, runpy, sys
import numpy as np
if sys.argv[1] == "keep" and not runpy.run_path(sys.argv[2])["keep_freed_memory"]():
    sys.exit(3)

def decode():
    # as a recording of 200,000 events: several arrays of 1.6 MB at once
    return sum(array[0] for array in [np.ones(200_000) for _ in range(10)])

decode()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    decode()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    # by its path: the package would import torch
    done = subprocess.run([sys.executable, "-c", PROGRAM, how, memory.__file__], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kept_memory_is_not_asked_for_again():
    assert page_faults("give back") > 10 * page_faults("keep")
