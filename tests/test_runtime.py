"""The machine's part of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from idml.runtime import keep_freed_memory
keep_freed_memory(torch.device(sys.argv[1]))
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(device: str, **variables: str) -> int:
    """Of ten tensors of 64 MiB, one after the other, each freed before the next."""
    command = [sys.executable, "-c", FAULTS, device]
    return int(subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_memory_is_used_again_on_the_cpu() -> None:
    pages = 10 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert page_faults("cpu") < pages / 2  # not every one finds the place of the one before it
    assert page_faults("meta") > 0.9 * pages
    assert page_faults("cpu", MALLOC_MMAP_MAX_="65536") > 0.9 * pages
