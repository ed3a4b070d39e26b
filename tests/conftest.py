"""What all tests share: poisoned memory, devices, seeds, and the check for a CUDA device."""

import os

import pytest
import torch

from edl import _build

# Children that torch.compile and AOTInductor start should not compete with the tests for two cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and _build.cuda_version:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and an edl built with CUDA")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every device that edl has kernels for."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    """The same random inputs on every run and in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills fresh memory with NaN (integers: the largest value), so that a result that reads or skips any of it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
