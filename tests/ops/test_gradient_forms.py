"""Backward operators refuse a gradient of another type, shape or number of dimensions with one sentence."""

import re

import pytest
import torch

from edl import ops

T, K, E, H, SIZE_INSIDE, S = 6, 2, 3, 5, 4, 2
EXPERTS = torch.arange(T * K).view(T, K) % E
ROW_ORDER, OFFSETS = ops.sort_by_expert(EXPERTS, E)
TOKENS, ROWS, WEIGHTS = torch.randn(T, H), torch.randn(T * K, H), torch.rand(T, K)
GATE_UP, DOWN = torch.randn(E, 2 * SIZE_INSIDE, H), torch.randn(E, H, SIZE_INSIDE)
LOGITS, IDS = torch.randn(T, E), torch.arange(T) % S
ALL = [True] * 4


def expert_mlp(grad=None, of_outputs=None, of_activations=None, pre_activation=None, rows=None):
    return torch.ops.edl._expert_mlp_backward(
        torch.ones(T, H) if grad is None else grad,
        of_outputs,
        of_activations,
        TOKENS,
        WEIGHTS,
        ROW_ORDER,
        OFFSETS,
        GATE_UP,
        DOWN,
        torch.randn(T * K, 2 * SIZE_INSIDE) if pre_activation is None else pre_activation,
        ROWS if rows is None else rows,
        ALL,
    )


def test_rows_are_kept_with_the_pre_activation():
    with pytest.raises(
        ValueError, match="edl::expert_mlp: rows must be given with pre_activation \\(got rows alone\\)"
    ):
        torch.ops.edl._expert_mlp_backward(
            *(torch.ones(T, H), None, None, TOKENS, WEIGHTS, ROW_ORDER, OFFSETS, GATE_UP, DOWN, None, ROWS, ALL)
        )


# name: the operator of a gradient, what its sentence calls it, its sizes
GRADIENTS = {
    "aggregate_routing": (
        lambda grad: torch.ops.edl._aggregate_routing_backward(grad, LOGITS, IDS, "softmax"),
        "edl::aggregate_routing: the gradient of sums",
        [S, E],
    ),
    "combine_tokens": (
        lambda grad: torch.ops.edl._combine_tokens_backward(grad, ROWS, WEIGHTS, ROW_ORDER, K, ALL[:2]),
        "edl::combine_tokens: the gradient of the output",
        [T, H],
    ),
    "token_gram": (
        lambda grad: torch.ops.edl._token_gram_backward(grad, ROWS, WEIGHTS, ROW_ORDER, K),
        "edl::token_gram: the gradient of the result",
        [T, K, K],
    ),
    "expert_mlp": (expert_mlp, "edl::expert_mlp: the gradient of the output", [T, H]),
    "expert_mlp_gram_of_outputs": (
        lambda grad: expert_mlp(of_outputs=grad),
        "edl::expert_mlp: the gradient of a Gram matrix",
        [T, K, K],
    ),
    "expert_mlp_gram_of_activations": (
        lambda grad: expert_mlp(of_activations=grad),
        "edl::expert_mlp: the gradient of a Gram matrix",
        [T, K, K],
    ),
    "expert_mlp_pre_activation": (
        lambda kept: expert_mlp(pre_activation=kept),
        "edl::expert_mlp: pre_activation",
        [T * K, 2 * SIZE_INSIDE],
    ),
    "expert_mlp_rows": (
        lambda rows: expert_mlp(of_outputs=torch.ones(T, K, K), rows=rows),
        "edl::expert_mlp: rows",
        [T * K, H],
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_another_form_is_refused(name):
    call, what, sizes = GRADIENTS[name]
    call(torch.randn(sizes))
    with pytest.raises(
        ValueError, match=re.escape(f"{what} must be Float of the shape {sizes} (got Double of {sizes})")
    ):
        call(torch.randn(sizes).double())
    wider = [*sizes[:-1], sizes[-1] + 1]
    with pytest.raises(
        ValueError, match=re.escape(f"{what} must be Float of the shape {sizes} (got Float of {wider})")
    ):
        call(torch.randn(wider))
    for other in ([], sizes[:1], [*sizes, 1]):
        with pytest.raises(ValueError, match=re.escape(f"{what} must ")):
            call(torch.randn(other))
