"""Gradients against differences, and the second derivative: right, or refused."""

import pytest
import torch
from samples import SAMPLES, operator
from support import as_tuple, first_samples, with_gradients

DIFFERENTIABLE = [sample for sample in SAMPLES if sample.differentiable]
SMALL = 200


def double_precision(sample):
    leaves = [sample.arguments()[position] for position in sample.differentiable]
    return all(x.dtype == torch.float64 and x.numel() <= SMALL for x in leaves)


def differentiable_outputs(sample, leaves):
    return tuple(y for y in as_tuple(operator(sample.op)(*leaves)) if y.requires_grad)


@pytest.mark.parametrize(
    "sample", [s for s in DIFFERENTIABLE if s.gradient_is_derivative and double_precision(s)], ids=str
)
def test_gradcheck(sample, device):
    leaves = with_gradients(sample, sample.arguments(device))
    assert torch.autograd.gradcheck(lambda *x: differentiable_outputs(sample, x), leaves)


@pytest.mark.parametrize("sample", [s for s in first_samples() if s.differentiable], ids=str)
def test_second_derivative_is_right_or_refused(sample):
    leaves = with_gradients(sample, sample.arguments())
    outputs = differentiable_outputs(sample, leaves)
    inputs = [leaves[position] for position in sample.differentiable]
    grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs, create_graph=True)
    try:
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
    except RuntimeError as error:
        name = sample.op.removesuffix("_with_gram")  # both have one backward operator
        assert f"derivative for edl::_{name}" in str(error) and "is not implemented" in str(error)
    else:
        assert torch.autograd.gradgradcheck(lambda *x: differentiable_outputs(sample, x), leaves)


@pytest.mark.parametrize("sample", [s for s in first_samples() if s.differentiable], ids=str)
def test_no_graph_where_no_gradient_is_asked_for(sample):
    leaves = with_gradients(sample, sample.arguments())
    with torch.no_grad():
        assert not any(y.requires_grad for y in as_tuple(operator(sample.op)(*leaves)))
    with torch.inference_mode():
        operator(sample.op)(*sample.arguments())
