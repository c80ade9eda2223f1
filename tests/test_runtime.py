"""The machine's part of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys, torch
from idml.runtime import keep_freed_memory
keep_freed_memory(torch.device(sys.argv[1]))
size = 2**int(sys.argv[2])
for number in range(20):
    if number == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (10 * size * 4 / resource.getpagesize()))
"""


def faults_a_page(device: str, power: int, **variables: str) -> float:
    """Of tensors of 2^power float32, one after the other, each freed before the next."""
    command = [sys.executable, "-c", FAULTS, device, str(power)]
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"} | variables
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_memory_is_used_again_on_the_cpu() -> None:
    assert faults_a_page("cpu", 22) < 0.1  # 16 MiB
    assert faults_a_page("meta", 24) > 0.9
    assert faults_a_page("cpu", 24, MALLOC_TRIM_THRESHOLD_="131072") > 0.9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_the_scripts_ask_for_huge_pages_in_time() -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[never]" in modes.read_text():
        pytest.skip("the kernel gives no huge pages")
    for script in ("train_cls", "train_dml"):
        program = f"import {script}\n" + FAULTS
        command = [sys.executable, "-c", program, "cpu", "24"]
        without = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
        done = subprocess.run(command, env=without, check=True, capture_output=True, text=True)
        assert float(done.stdout) < 0.1
