"""The cases of tests/cuda_emulation: every CUDA kernel, run on the CPU. They need the headers of CUDA and no device."""

import re
import subprocess

import pytest
from commands import ROOT, run

SOURCES = ROOT / "tests" / "cuda_emulation"
NAMES = [
    name
    for path in sorted(SOURCES.glob("test_*.cpp"))
    for name in re.findall(r'CATCH_TEST_CASE\(\s*"([^"]+)"\)', path.read_text())
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("program", ["edl_cuda_sanitized", "edl_cuda_races"])
def test_case(emulated_kernels, program, name):
    pattern = re.sub(r"([\\,*~\[\]])", r"\\\1", name)
    assert re.search(r"All tests passed \(\d+ assertions? in 1 test case\)", run(emulated_kernels / program, pattern))


def test_every_kernel_has_cases():
    kernels = {path.stem for path in (ROOT / "csrc" / "cuda" / "kernels").glob("*.cu")}
    assert {path.stem.removeprefix("test_") for path in SOURCES.glob("test_*.cpp")} == kernels | {"emulation"}


def test_one_program_checks_every_access(emulated_kernels):
    assert "All tests passed" in run(emulated_kernels / "edl_cuda_races", "every access is checked")


@pytest.mark.parametrize("memory", ["an output", "shared memory"])
def test_the_address_sanitizer_sees_a_kernel_leave_its_memory(emulated_kernels, memory):
    command = [emulated_kernels / "edl_cuda_sanitized", f"past the end of {memory}"]
    assert "heap-buffer-overflow" in subprocess.run(command, capture_output=True, text=True).stderr
