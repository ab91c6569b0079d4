"""Freed memory is kept by the processes that decode."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from psn_train.data.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
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
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kept_memory_is_not_asked_for_again():
    assert page_faults("give back") > 10 * page_faults("keep")
