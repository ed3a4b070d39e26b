"""The router's product as CUDA takes it, on any device: against float64, and the parts of a gradient in 16 bits."""

import pytest
import torch
from tolerances import assert_close, tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def product_and_gradients(tokens, weight, grad):
    leaves = tokens.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = torch.ops.edl._router_product(*leaves)
    return logits.detach(), *torch.autograd.grad(logits, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens, hidden_size, num_experts", [(0, 4, 3), (1, 1, 1), (7, 33, 5), (300, 64, 16)])
def test_against_float64(dtype, num_tokens, hidden_size, num_experts, device):
    tokens, weight = (torch.randn(n, hidden_size, device=device).to(dtype) for n in (num_tokens, num_experts))
    grad = torch.randn(num_tokens, num_experts, device=device)
    logits, grad_tokens, grad_weight = product_and_gradients(tokens, weight, grad)
    wide_tokens, wide_weight, wide_grad = tokens.double(), weight.double(), grad.double()
    assert logits.dtype == torch.float32 and grad_tokens.dtype == grad_weight.dtype == dtype
    assert_close(logits, wide_tokens @ wide_weight.T, tolerance(torch.float32, hidden_size))
    assert_close(grad_tokens, wide_grad @ wide_weight, tolerance(dtype, num_experts))
    assert_close(grad_weight, wide_grad.T @ wide_tokens, tolerance(dtype, num_tokens))


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_tokens_and_weights_of_two_types(types, device):
    tokens, weight = (torch.randn(n, 8, device=device).to(dtype) for n, dtype in zip((6, 3), types))
    grad = torch.randn(6, 3, device=device)
    logits, grad_tokens, grad_weight = product_and_gradients(tokens, weight, grad)
    assert_close(logits, tokens.double() @ weight.double().T, tolerance(torch.float32, 8))
    assert (grad_tokens.dtype, grad_weight.dtype) == types
    assert_close(grad_weight, grad.double().T @ tokens.double(), tolerance(types[1], 6))


def test_a_gradient_in_two_parts_leaves_out_its_65536th_at_most(device):
    """Sums in which the high parts cancel, over 60 powers of two."""
    num_tokens, num_experts = 64, 10
    sizes = torch.logspace(-30, 30, num_tokens, base=2, device=device).unsqueeze(1)
    grad = sizes * (1 + torch.rand(num_tokens, num_experts, device=device) * 2**-9)
    weight = torch.ones(num_experts, 16, dtype=torch.bfloat16, device=device)
    weight[::2] = -1
    tokens = torch.eye(num_tokens, 16, dtype=torch.bfloat16, device=device)
    _, grad_tokens, _ = product_and_gradients(tokens, weight, grad)
    exact = grad.double() @ weight.double()
    allowed = 2**-16 * (grad.double().abs() @ weight.double().abs()) + 2**-8 * exact.abs()
    assert (exact != 0).all()
    assert ((grad_tokens.double() - exact).abs() <= allowed).all()
    one_part = grad.bfloat16().double() @ weight.double()
    assert ((one_part - exact).abs() > allowed).any()


def test_only_the_gradients_that_are_needed(device):
    grad = torch.ones(4, 2, device=device)
    for dtype in DTYPES:
        tokens, weight = torch.ones(4, 8, dtype=dtype, device=device), torch.ones(2, 8, dtype=dtype, device=device)
        for needed in ([True, False], [False, True], [False, False]):
            gradients = torch.ops.edl._router_product_backward(grad, tokens, weight, needed)
            assert [x.numel() > 0 for x in gradients] == needed


def test_torchs_own_checks(device):
    for dtype in DTYPES:
        arguments = [torch.randn(n, 8, device=device).to(dtype).requires_grad_() for n in (6, 3)]
        torch.library.opcheck(torch.ops.edl._router_product, arguments)


def test_second_derivatives_raise():
    tokens, weight = torch.ones(4, 8, requires_grad=True), torch.ones(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.ops.edl._router_product(tokens, weight).sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="edl::_router_product_backward"):
        gradient.sum().backward()


def test_what_is_no_matrix_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"^edl::router: tokens and weight must be matrices \(got 3 and 2 dimensions\)"
    ):
        torch.ops.edl._router_product(torch.ones(2, 3, 4, device="meta"), torch.ones(2, 4, device="meta"))
