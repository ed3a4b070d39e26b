"""How alike a token's rows are: the same in any order of the rows, whatever is not counted."""

import pytest
import torch

from edl import ops


def test_the_order_of_rows_does_not_matter(device):
    row_order, _ = ops.sort_by_expert(torch.randint(0, 5, (30, 4)), 5)
    rows, weights = torch.randn(120, 700), torch.rand(30, 4) + 0.1
    by_slot = torch.empty_like(rows)
    by_slot[row_order.long()] = rows
    in_order = torch.arange(120, dtype=torch.int32, device=device)
    sorted_gram = ops.token_gram(rows.to(device), weights.to(device), row_order.to(device), 4)
    assert sorted_gram.equal(ops.token_gram(by_slot.to(device), None, in_order, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 5, 100, 513])
def test_a_row_of_weight_0_is_not_read(width, dtype, device):
    rows = torch.randn(12, width).to(device, dtype)
    weights = torch.ones(4, 3, device=device, dtype=dtype)
    weights[1, 2] = weights[3, 0] = 0
    row_order = torch.arange(12, dtype=torch.int32, device=device)
    without = rows.clone()
    without[5] = without[9] = 0
    expected = ops.token_gram(without, None, row_order, 3)
    rows[5] = rows[9] = torch.nan
    rows.requires_grad_()
    gram = ops.token_gram(rows, weights, row_order, 3)
    assert gram.equal(expected)
    gram.sum().backward()
    assert rows.grad.isfinite().all()
    assert (rows.grad[[5, 9]] == 0).all()


def test_a_nan_reaches_its_own_token_alone(device):
    rows = torch.randn(8, 9, device=device)
    rows[5] = torch.nan
    gram = ops.token_gram(rows, None, torch.arange(8, dtype=torch.int32, device=device), 2)
    assert gram.isnan().any(dim=(1, 2)).tolist() == [False, False, True, False]
    assert gram[2, 0, 0].isfinite()


def test_16_bit_rows_are_summed_in_float32(device):
    rows = torch.full((2, 512), 1.0, dtype=torch.bfloat16, device=device)
    rows[:, 0] = 64
    gram = ops.token_gram(rows, None, torch.arange(2, dtype=torch.int32, device=device), 2)
    assert (gram == 4096 + 511).all()


def test_it_takes_a_transposed_gradient_as_its_mirror_image():
    rows = torch.randn(6, 4, dtype=torch.float64)
    row_order = torch.arange(6, dtype=torch.int32)
    cotangent = torch.randn(2, 3, 3, dtype=torch.float64)
    grads = []
    for each in (cotangent, cotangent.mT):
        leaf = rows.clone().requires_grad_()
        (ops.token_gram(leaf, None, row_order, 3) * each).sum().backward()
        grads.append(leaf.grad)
    assert grads[0].allclose(grads[1], rtol=1e-14)
