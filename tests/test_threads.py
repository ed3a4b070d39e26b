"""Bitwise equal results: for one thread and two, from run to run, and right under every instruction set of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edl import _build
from samples import SAMPLES, operator
from support import gradients

# expert_mlp rests on at::mm, whose sums depend on the number of threads.
REPRODUCIBLE = [sample for sample in SAMPLES if sample.op != "expert_mlp"]


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


@pytest.mark.parametrize("sample", REPRODUCIBLE, ids=str)
def test_bitwise_equal_for_any_number_of_threads_and_across_runs(sample):
    first = results(sample, num_threads=1)
    for num_threads in (1, 2, 3):
        for expected, actual in zip(first, results(sample, num_threads), strict=True):
            assert torch.equal(bits(actual), bits(expected)), f"{num_threads} threads"


@pytest.mark.parametrize("capability", _build.instruction_sets)
def test_every_instruction_set_gives_right_values_and_gradients(capability):
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda", tests / "test_reference.py"],
        capture_output=True,
        text=True,
        cwd=tests.parent,
        env={**os.environ, "EDL_CPU_CAPABILITY": capability},
    )
    if "must name an instruction set that this processor" in result.stdout:
        pytest.skip(f"this processor has no {capability}")
    assert result.returncode == 0, result.stdout
