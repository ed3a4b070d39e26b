"""A loss carried by another tensor: what it gets does not depend on what the carrier gets."""

import pytest
import torch

import edl


def test_the_loss_gets_the_scale_and_the_carrier_its_own_gradient():
    carrier = torch.randn(4, 2, requires_grad=True)
    parameter = torch.tensor(3.0, requires_grad=True)
    output = edl.inject(carrier, parameter.square(), torch.tensor(5.0))
    assert output.equal(carrier) and output.data_ptr() != carrier.data_ptr()
    grad = torch.randn(4, 2)
    output.backward(grad)
    assert carrier.grad.equal(grad)
    assert parameter.grad == 5 * 2 * 3


@pytest.mark.parametrize("factor", [0.0, 1.0, -7.0])
def test_what_comes_after_does_not_scale_the_loss(factor):
    parameter = torch.tensor(2.0, requires_grad=True)
    (factor * edl.inject(torch.ones(3), 4 * parameter)).sum().backward()
    assert parameter.grad == 4


def test_a_loss_that_is_not_finite_leaves_the_carrier_alone():
    loss = torch.tensor(float("nan"), requires_grad=True)
    carrier = torch.ones(3, requires_grad=True)
    edl.inject(carrier, loss).sum().backward()
    assert (carrier.grad == 1).all() and loss.grad == 1


def test_injecting_is_adding_to_the_final_loss():
    layer = edl.MoELayer(8, 8, 4, 2)
    tokens = torch.randn(16, 8)

    def routed(with_loss):
        logits = layer.router.logits_of(tokens)
        weights, experts = edl.ops.route_tokens(logits, 2, "softmax")
        balance = edl.load_balancing_loss(logits, top_k=2)
        if with_loss:
            weights = edl.inject(weights, 0.3 * balance)
        order = edl.ops.sort_by_expert(experts, 4)
        return edl.ops.expert_mlp(tokens, weights, *order, layer.gate_up_proj, layer.down_proj).square().sum(), balance

    output, balance = routed(False)
    expected = torch.autograd.grad(output + 0.3 * balance, layer.parameters())
    torch.testing.assert_close(torch.autograd.grad(routed(True)[0], layer.parameters()), expected)


def test_several_losses_on_one_carrier():
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    edl.inject(edl.inject(torch.ones(2), a), b, torch.tensor(2.0)).sum().backward()
    assert (a.grad, b.grad) == (1, 2)


def test_the_gradient_of_the_loss_is_no_view_of_the_scale():
    scale = torch.tensor(2.0)
    loss = torch.tensor(1.0, requires_grad=True)
    edl.inject(torch.ones(2), loss, scale).sum().backward()
    loss.grad.add_(1)
    assert scale == 2


def test_a_carrier_without_gradient_and_a_loss_without_gradient():
    assert not edl.inject(torch.ones(2), torch.tensor(1.0)).requires_grad
    assert edl.inject(torch.ones(2), torch.tensor(1.0, requires_grad=True)).requires_grad
