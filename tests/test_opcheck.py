"""torch's own checks of an operator: schema, autograd registration, fake tensors, AOTAutograd with dynamic shapes."""

import pytest
import torch
from samples import SAMPLES, operator
from support import as_tuple, with_gradients

CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor"]
COMPARISON = "test_aot_dispatch_dynamic"  # takes NaN for unequal to itself


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample, device):
    arguments = with_gradients(sample, sample.arguments(device))
    outputs = as_tuple(operator(sample.op)(*arguments))
    comparable = not any(y.isnan().any() for y in outputs)
    torch.library.opcheck(operator(sample.op), arguments, test_utils=[*CHECKS, COMPARISON] if comparable else CHECKS)


def test_every_operator_is_compared_under_compilation():
    compared = {s.op for s in SAMPLES if not any(y.isnan().any() for y in as_tuple(operator(s.op)(*s.arguments())))}
    assert compared == {s.op for s in SAMPLES}
