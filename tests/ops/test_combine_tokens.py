"""Bringing rows back: weights, zeros that hide what a sentinel's row holds, and gradients."""

import pytest
import torch

from edl import ops

NAN = float("nan")


def random_order(num_tokens, num_experts, top_k):
    return ops.sort_by_expert(torch.randint(0, num_experts + 1, (num_tokens, top_k)), num_experts)


@pytest.mark.parametrize("width", [1, 5, 16, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_row_of_weight_0_is_not_read(dtype, width, device):
    row_order, offsets = (x.to(device) for x in random_order(30, 5, 3))
    rows = torch.randn(90, width).to(device, dtype)
    sentinels = row_order[offsets[-1] :].long()
    assert len(sentinels) > 0
    weights = torch.rand(30, 3).to(device, dtype) + 0.5
    weights.view(-1)[sentinels] = 0
    expected = ops.combine_tokens(rows, weights, row_order, 3)
    rows[offsets[-1] :] = NAN
    rows.requires_grad_()
    output = ops.combine_tokens(rows, weights, row_order, 3)
    assert output.isfinite().all() and output.equal(expected)
    output.sum().backward()
    assert (rows.grad[offsets[-1] :] == 0).all() and (rows.grad[: offsets[-1]] != 0).all()


def test_the_gradient_of_a_zero_weight_is_that_of_its_row():
    row_order = torch.tensor([1, 0], dtype=torch.int32)
    rows = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    weights = torch.tensor([[0.0, 2.0]], requires_grad=True)
    ops.combine_tokens(rows, weights, row_order, 2).backward(torch.tensor([[1.0, 10.0]]))
    assert weights.grad.tolist() == [[65.0, 43.0]]


def test_a_nan_reaches_its_own_token_alone():
    row_order, _ = random_order(20, 4, 2)
    rows = torch.randn(40, 9)
    rows[11] = NAN
    output = ops.combine_tokens(rows, torch.rand(20, 2) + 0.1, row_order, 2)
    assert output.isnan().all(dim=1).nonzero().flatten().tolist() == [row_order[11].item() // 2]
    assert output.isnan().any(dim=1).sum() == 1


def test_16_bit_rows_are_summed_in_float32(device):
    top_k = 64
    rows = torch.full((top_k, 33), 1.0, dtype=torch.bfloat16, device=device)
    rows[0] = 256
    output = ops.combine_tokens(rows, None, torch.arange(top_k, dtype=torch.int32, device=device), top_k)
    assert (output == 256 + 64).all()  # 319, rounded once; in bfloat16 256 + 1 stays 256


def test_the_order_of_rows_does_not_matter():
    row_order, _ = random_order(50, 6, 3)
    rows, weights = torch.randn(150, 40), torch.randn(50, 3)
    shuffle = torch.randperm(150)
    moved = ops.combine_tokens(rows[shuffle], weights, row_order[shuffle], 3)
    assert moved.equal(ops.combine_tokens(rows, weights, row_order, 3))


def test_without_weights_differentiable_to_any_order_with_weights_once():
    row_order, _ = random_order(4, 3, 2)
    rows = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.combine_tokens(x, None, row_order, 2).pow(3), rows)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    output = ops.combine_tokens(rows, weights, row_order, 2).square().sum()
    (gradient,) = torch.autograd.grad(output, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for edl::_combine_tokens_backward is not implemented"):
        torch.autograd.grad(gradient.sum(), rows)


def test_only_gradients_that_are_needed_are_computed():
    row_order, _ = random_order(6, 3, 2)
    rows, weights, grad = torch.randn(12, 5), torch.rand(6, 2), torch.randn(6, 5)
    for needed in ((True, False), (False, True), (True, True)):
        grads = torch.ops.edl._combine_tokens_backward(grad, rows, weights, row_order, 2, needed)
        assert [g.numel() > 0 for g in grads] == list(needed)
