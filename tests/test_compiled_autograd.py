"""Compiled autograd traces the backward pass of every operator, and gives the gradients of the eager one."""

import pytest
import torch
from samples import operator
from support import as_tuple, first_samples, with_gradients

import edl


@pytest.fixture(autouse=True)
def compiled_autograd():
    with torch._dynamo.config.patch(compiled_autograd=True):
        yield


def gradients(function, leaves: list, compiled: bool) -> list:
    """Of the sum of what `function()` returns; compiled: after a graph break inside a compiled step."""

    def step():
        loss = function()
        torch._dynamo.graph_break()
        loss.backward()

    for leaf in leaves:
        leaf.grad = None
    (torch.compile(step, backend="eager") if compiled else step)()
    return [leaf.grad for leaf in leaves]


def assert_same_gradients(function, leaves: list) -> None:
    expected = gradients(function, leaves, compiled=False)
    assert all(gradient is not None for gradient in expected)
    torch.testing.assert_close(gradients(function, leaves, compiled=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("sample", [s for s in first_samples(2) if s.differentiable], ids=str)
def test_every_operator(sample):
    arguments = with_gradients(sample, sample.arguments())

    def function():
        return sum(y.square().sum() for y in as_tuple(operator(sample.op)(*arguments)) if y.requires_grad)

    assert_same_gradients(function, [arguments[i] for i in sample.differentiable])


LABELS = torch.tensor([0, 1, 2, 1])
LOSSES = {
    "divergence": lambda logits: edl.ExpertDivergenceLoss(3)([logits, logits.square()], LABELS),
    "divergence with a memory": lambda logits: edl.ExpertDivergenceLoss(3, memory=edl.DomainMemory())(logits, LABELS),
    "balance": lambda logits: edl.load_balancing_loss(logits, top_k=2),
    "z": edl.router_z_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    logits = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    assert_same_gradients(lambda: LOSSES[name](logits), [logits])


def test_the_layer():
    torch.manual_seed(2)
    layer, tokens = edl.MoELayer(8, 4, 4, 2), torch.randn(6, 8)

    def function():
        output = layer(tokens)
        return (output if isinstance(output, torch.Tensor) else output[0]).square().sum()

    assert_same_gradients(function, list(layer.parameters()))


@pytest.mark.parametrize("squares", [False, True])
def test_what_has_no_gradient_requires_none(squares):
    sums, counts, labels = torch.rand(3, 4).requires_grad_(True), torch.ones(3), torch.tensor([0, 1, 1])
    moments = edl.ops.domain_moments(sums, counts, labels, 2, squares)
    assert [x.requires_grad for x in moments] == [True, squares, False]
    logits = torch.randn(6, 4, requires_grad=True)
    assert [
        x.requires_grad for x in edl.ops.aggregate_routing(logits, torch.zeros(6, dtype=torch.int64), 1, "softmax")
    ] == [
        True,
        False,
    ]
    assert [x.requires_grad for x in edl.ops.route_tokens(logits, 2, "softmax")] == [True, False]
