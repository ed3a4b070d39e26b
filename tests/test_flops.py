"""torch's counter of floating-point operations knows the operators of edl that multiply matrices."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import edl

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 10, 64, 32, 4, 2
ROUTER = 2 * TOKENS * HIDDEN * EXPERTS  # 5120
PRODUCT = 2 * TOKENS * TOP_K * HIDDEN * INTERMEDIATE  # of all rows with one matrix; three make 245 760


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def make_layer(**options):
    return edl.MoELayer(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, **options), torch.randn(TOKENS, HIDDEN)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_counts_router_and_experts_once(grad):
    layer, tokens = make_layer()
    with torch.set_grad_enabled(grad):
        assert counted(lambda: layer(tokens)) == ROUTER + 3 * PRODUCT == 5120 + 245760


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_shared_expert_and_devices_without_values(place):
    layer, tokens = make_layer(num_shared_experts=1, device=place)
    shared = 3 * 2 * TOKENS * HIDDEN * INTERMEDIATE
    assert counted(lambda: layer(tokens.to(place))) == ROUTER + 3 * PRODUCT + shared


@pytest.mark.parametrize("frozen", [[], ["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_backward_counts_the_products_that_it_needs(frozen, of_tokens):
    layer, tokens = make_layer()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    output = layer(tokens.requires_grad_(of_tokens))[0].sum()
    # The gradient of the activation, which the router's weights need always; of tokens; of the matrices.
    products = 1 + 2 * of_tokens + 2 * ("gate_up_proj" not in frozen) + ("down_proj" not in frozen)
    assert counted(output.backward) == products * PRODUCT + (1 + of_tokens) * ROUTER


def test_a_whole_step_counts_three_times_its_forward():
    layer, tokens = make_layer()
    tokens.requires_grad_()

    def step():
        layer(tokens)[0].sum().backward()

    assert counted(step) == 3 * (ROUTER + 3 * PRODUCT)


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_recomputed_counts_where_it_is(grad):
    layer, tokens = make_layer(recompute_activations=True)
    with torch.set_grad_enabled(grad):
        assert counted(lambda: layer(tokens)) == ROUTER + 3 * PRODUCT
    output = layer(tokens)[0].sum()
    assert counted(output.backward) == (2 + 1 + 2 + 1) * PRODUCT + ROUTER
    layer, tokens = make_layer(recompute_activations=True, output_gram=True)
    gram = 2 * TOKENS * TOP_K * TOP_K * HIDDEN
    assert counted(lambda: layer(tokens)) == ROUTER + 3 * PRODUCT + gram
    assert counted(layer(tokens)[1].output_gram.sum().backward) == (3 + 1 + 2 + 1) * PRODUCT + gram + ROUTER


@pytest.mark.parametrize("grad", [False, True])
def test_gram_matrices_count_as_the_products_that_they_are(grad):
    layer, tokens = make_layer(output_gram=True, activation_gram=True)
    grams = 2 * TOKENS * TOP_K * TOP_K * (HIDDEN + INTERMEDIATE)
    with torch.set_grad_enabled(grad):
        assert counted(lambda: layer(tokens)) == ROUTER + 3 * PRODUCT + grams
    if grad:
        _, observed = layer(tokens)
        loss = observed.output_gram.sum() + observed.activation_gram.sum()
        assert counted(loss.backward) == (1 + 2 + 1) * PRODUCT + grams + ROUTER
