"""Bitwise equal results: for one thread and two, from run to run, and right under every instruction set of this
machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import SAMPLES, operator
from support import gradients

from edl import _build, _extension


def results(sample, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        outputs, grads = gradients(sample, operator(sample.op), sample.arguments())
    finally:
        torch.set_num_threads(before)
    return [*outputs, *grads]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def test_the_library_runs_on_several_threads():
    """Compiled without OpenMP, at::parallel_for quietly runs on one, and the tests below hold for nothing."""
    library = _extension.LIBRARY.read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_bitwise_equal_for_any_number_of_threads_and_across_runs(sample):
    first = results(sample, num_threads=1)
    for num_threads in (1, 2, 3):
        for expected, actual in zip(first, results(sample, num_threads), strict=True):
            assert torch.equal(bits(actual), bits(expected)), f"{num_threads} threads"


# Every operator's samples, and the numbers on which instruction sets are most likely to differ.
ON_EVERY_INSTRUCTION_SET = [
    "test_reference.py",
    "ops/test_aggregate_routing.py::test_every_number_of_experts",
    "ops/test_aggregate_routing.py::test_logits_of_large_magnitude",
    "ops/test_aggregate_routing.py::test_a_counted_nan_reaches_its_segment_and_no_other",
    "ops/test_aggregate_routing.py::test_every_16_bit_number_is_read_right",
    "ops/test_aggregate_routing.py::test_gradients_are_rounded_to_16_bits_like_torch_does",
    "ops/test_expert_mlp.py::test_any_number_of_rows_is_right_and_bitwise_equal_for_any_number_of_threads",
    "ops/test_routing_sums.py",
    "ops/test_expert_divergence.py::test_from_nearly_equal_to_nearly_disjoint",
    "test_near_equal_domains.py::test_divergence_of_given_sums_and_counts",
]
IN_USE = torch.ops.edl._cpu_instruction_set()  # this process tests it


@pytest.mark.parametrize("capability", [name for name in _build.instruction_sets if name != IN_USE])
def test_every_other_instruction_set_gives_right_values_and_gradients(capability):
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not cuda"]
        + [str(tests / claim) for claim in ON_EVERY_INSTRUCTION_SET],
        capture_output=True,
        text=True,
        cwd=tests.parent,
        env={**os.environ, "EDL_CPU_CAPABILITY": capability},
    )
    if "must name an instruction set that this processor" in result.stdout:
        pytest.skip(f"this processor has no {capability}")
    assert result.returncode == 0, result.stdout
