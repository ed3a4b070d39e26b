"""Copying tokens to experts: the adjoint of combining, to any order, sentinels included."""

import pytest
import torch

from edl import ops


def random_order(num_tokens, num_experts, top_k, sentinels=False):
    experts = torch.randint(0, num_experts + (1 if sentinels else 0), (num_tokens, top_k))
    return ops.sort_by_expert(experts, num_experts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 64, 129])
def test_rows_are_exact_copies(width, dtype):
    row_order, _ = random_order(31, 5, 3, sentinels=True)
    tokens = torch.randn(31, width).to(dtype)
    tokens[3] = float("nan")
    rows = ops.dispatch_tokens(tokens, row_order, 3)
    torch.testing.assert_close(rows, tokens[row_order.long() // 3], rtol=0, atol=0, equal_nan=True)


def test_dispatch_and_combine_are_adjoint():
    row_order, _ = random_order(40, 6, 3)
    tokens, rows = torch.randn(40, 17, dtype=torch.float64), torch.randn(120, 17, dtype=torch.float64)
    left = (ops.dispatch_tokens(tokens, row_order, 3) * rows).sum()
    right = (tokens * ops.combine_tokens(rows, None, row_order, 3)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        ops.combine_tokens(ops.dispatch_tokens(tokens, row_order, 3), None, row_order, 3), 3 * tokens
    )


def test_differentiable_to_any_order():
    row_order, _ = random_order(5, 4, 2)
    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.dispatch_tokens(x, row_order, 2).pow(3), tokens)


def test_a_16_bit_gradient_is_summed_in_float32():
    top_k = 64
    tokens = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    rows = ops.dispatch_tokens(tokens, torch.arange(top_k, dtype=torch.int32), top_k)
    rows.backward(torch.full_like(rows, 1.0).index_fill(0, torch.tensor([0]), 256.0))
    assert (tokens.grad == 320).all()  # in bfloat16 256 + 1 stays 256
