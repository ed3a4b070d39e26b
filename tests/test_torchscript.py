"""Every operator scripted, saved, loaded, run and differentiated."""

import io

import pytest
import torch
from samples import operator
from support import first_samples, gradients

import edl.ops


@pytest.mark.parametrize("sample", first_samples(3), ids=str)
def test_script_save_load_and_differentiate(sample):
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(getattr(edl.ops, sample.op)), saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    outputs, grads = gradients(sample, loaded, sample.arguments())
    expected, expected_grads = gradients(sample, operator(sample.op), sample.arguments())
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)
