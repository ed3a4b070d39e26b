"""Experts that are masked by a logit of -inf, tokens without any open expert, and choices of weight 0."""

from typing import Optional

import pytest
import torch

import edl
from edl import ops

INF = float("inf")
SCORES = ["softmax", "sigmoid"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("scores", SCORES)
def test_a_bias_does_not_choose_a_masked_expert(scores, device):
    logits = torch.tensor([[0, 0.1, -INF, -INF]], device=device)
    bias = torch.tensor([0, 0, 0.9, 0.8], device=device)
    weights, experts = ops.route_tokens(logits, 2, scores, bias)
    assert experts.tolist() == [[1, 0]]
    chosen = logits[:, [1, 0]].softmax(-1) if scores == "softmax" else logits[:, [1, 0]].sigmoid()
    torch.testing.assert_close(weights, chosen / chosen.sum())
    # A bias of -inf closes no expert: it comes last among the open ones.
    bias = torch.tensor([0, -INF, 0, 0], device=device)
    assert ops.route_tokens(logits, 2, scores, bias)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 3), (40, 7)])
def test_masks_and_biases_together(num_experts, top_k, scores, normalize, dtype, device):
    masked = torch.rand(60, num_experts) < 0.6
    masked[torch.arange(60), torch.randint(num_experts, (60,))] = False  # one at least is open
    logits = torch.randn(60, num_experts).to(dtype).masked_fill(masked, -INF)
    wide = dtype if dtype == torch.float64 else torch.float32
    for bias in (None, 3 * torch.randn(num_experts, dtype=wide)):
        on_device = logits.to(device).requires_grad_()
        weights, experts = ops.route_tokens(
            on_device, top_k, scores, None if bias is None else bias.to(device), normalize
        )
        for t in range(60):
            score = logits[t].double().softmax(-1) if scores == "softmax" else logits[t].double().sigmoid()
            order = score + bias.double() if bias is not None else logits[t].double()
            is_open = (~masked[t]).nonzero().flatten().tolist()
            # Open experts by what orders them; then the masked ones, lowest first.
            expected = sorted(is_open, key=lambda e: -order[e].item())[:top_k]
            closed = masked[t].nonzero().flatten().tolist()[: top_k - len(expected)]
            own = experts[t].tolist()
            assert own[len(expected) :] == closed
            torch.testing.assert_close(order[own[: len(expected)]], order[expected], rtol=1e-5, atol=1e-6)
            chosen = score[own]
            chosen = chosen / chosen.sum() if normalize else chosen
            torch.testing.assert_close(weights[t].double().cpu(), chosen, rtol=1e-5, atol=1e-6)
            assert (weights[t, len(expected) :] == 0).all()
        (gradient,) = torch.autograd.grad(weights.square().sum(), on_device)
        assert gradient.isfinite().all() and (gradient.cpu()[masked] == 0).all()


@pytest.mark.parametrize("scores", SCORES)
def test_a_layer_with_masked_experts_and_updates_never_chooses_them(scores):
    layer = edl.MoELayer(16, 8, 6, 2, scores=scores, expert_bias=True)
    is_open = torch.tensor([True, False, True, True, False, True])
    mask = torch.zeros(6).masked_fill(~is_open, -INF)
    layer.router.register_forward_hook(lambda router, inputs, choice: router.choice_of(choice.logits + mask, inputs[2]))
    tokens = torch.randn(64, 16) + 1
    for told in (None, is_open):
        for _ in range(50):
            edl.update_expert_bias(layer, layer(tokens)[1], rate=0.05, open_experts=told)
        counts = layer(tokens)[1].tokens_per_expert
        assert (counts[~is_open] == 0).all() and counts.sum() == 128
    before = layer.expert_bias.clone()
    edl.update_expert_bias(layer, torch.tensor([0, 0, 9, 5, 0, 5]), rate=0.5, open_experts=is_open)
    # The first is open and had no luck: it rises, and the masked ones stay.
    torch.testing.assert_close(layer.expert_bias - before, 0.5 * torch.tensor([1.0, 0, -1, -1, 0, -1]))


class Allows(edl.routers.TopK):
    """Tokens of group g take the experts g and g + 1, 3, 4 or 5, whatever the logits and the bias say."""

    def forward(
        self,
        tokens: torch.Tensor,
        context: Optional[edl.RoutingContext] = None,  # noqa: UP045
        expert_bias: Optional[torch.Tensor] = None,  # noqa: UP045
    ) -> edl.Choice:
        logits = self.logits_of(tokens)
        choices: Optional[torch.Tensor] = None  # noqa: UP045
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if context is not None:
            groups, choices = context.groups, context.choices
            if groups is not None:
                number = torch.arange(6, device=logits.device)
                allowed = (number >= 3) | (number == groups[:, None]) | (number == groups[:, None] + 1)
        weights, experts = ops.route_tokens(
            logits,
            self.top_k,
            self.scores,
            expert_bias,
            self.normalize_top_k,
            self.routed_scaling_factor,
            allowed,
            choices,
        )
        return edl.Choice(logits, weights, experts)


@pytest.mark.parametrize("scores", SCORES)
def test_a_layer_whose_router_allows_some_experts(scores):
    layer = edl.MoELayer(16, 8, 6, expert_bias=True, router=Allows(16, 6, 2, scores=scores))
    tokens, groups = torch.randn(64, 16), (torch.arange(64) % 2).int()
    context = edl.RoutingContext(groups=groups)
    with torch.no_grad():
        layer.expert_bias[:] = torch.tensor([5.0, 0, 5, 0, 0, 0])
    output, routing = layer(tokens, context=context)
    assert (routing.experts[groups == 0] != 2).all() and (routing.experts[groups == 1] != 0).all()
    assert (routing.experts[groups == 0] == 0).any() and (routing.experts[groups == 1] == 2).any()
    assert routing.logits.isfinite().all()  # before the rule: what objectives read
    recorded = context._replace(choices=routing.experts)
    for run in (layer, torch.jit.script(layer)):
        again, same = run(tokens, context=recorded)
        assert same.experts.equal(routing.experts) and same.weights.equal(routing.weights)
        torch.testing.assert_close(again, output, rtol=0, atol=0)
        with pytest.raises((IndexError, RuntimeError), match="edl::route_tokens: experts must be allowed"):
            run(tokens, context=recorded._replace(groups=1 - groups))
    # An expert that nobody may take spoils nothing, nor does its logit.
    with torch.no_grad():
        layer.gate_up_proj[2] = layer.router.weight[2] = float("nan")
    output, routing = layer(tokens, context=edl.RoutingContext(groups=torch.zeros(64, dtype=torch.int32)))
    assert routing.logits[:, 2].isnan().all() and output.isfinite().all()
    output.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# ---- a token without any open expert has no distribution: NaN, unless it does not count ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("num_experts", [4, 37])
def test_weights_of_a_wholly_masked_token_are_nan(num_experts, scores, with_bias, normalize, dtype, device):
    logits = torch.randn(3, num_experts, device=device).to(dtype)
    logits[1] = -INF
    logits.requires_grad_()
    wide = dtype if dtype == torch.float64 else torch.float32
    bias = torch.randn(num_experts, device=device, dtype=wide) if with_bias else None
    weights, experts = ops.route_tokens(logits, 2, scores, bias, normalize)
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()
    assert experts[1].tolist() == [0, 1]
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    assert gradient[1, :2].isnan().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("num_experts", [4, 8, 37, 64])
def test_segments_that_count_a_wholly_masked_token_are_nan(num_experts, scores, dtype, device):
    logits = torch.randn(10, num_experts, device=device).to(dtype)
    logits[3] = -INF
    logits[7] = -300  # far down, but open: its sigmoids are 0 in float32
    logits.requires_grad_()
    ids = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], device=device)
    sums, counts = ops.aggregate_routing(logits, ids, 2, scores)
    assert counts.tolist() == [5, 5]
    assert sums[0].isnan().all() and sums[1].isfinite().all()
    (gradient,) = torch.autograd.grad(sums.square().sum(), logits)
    assert gradient[3].isnan().all() and gradient[5:].isfinite().all()
    sums, counts = ops.aggregate_routing(logits, torch.where(torch.arange(10, device=device) == 3, -1, ids), 2, scores)
    assert counts.tolist() == [4, 5] and sums.isfinite().all()
    (gradient,) = torch.autograd.grad(sums.square().sum(), logits)
    assert gradient.isfinite().all() and (gradient[3] == 0).all()


LOSSES = {
    "balance-softmax": lambda z, **mask: edl.load_balancing_loss(z, top_k=2, **mask),
    "balance-sigmoid": lambda z, **mask: edl.load_balancing_loss(z, top_k=2, scores="sigmoid", **mask),
    "z": edl.router_z_loss,
    "divergence-softmax": lambda z, **mask: edl.expert_divergence_loss(z, torch.tensor([0, 1]), 2, **mask),
    "divergence-sigmoid": lambda z, **mask: edl.expert_divergence_loss(
        z, torch.tensor([0, 1]), 2, scores="sigmoid", **mask
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_count_a_wholly_masked_token_are_nan(name):
    logits = torch.randn(2, 6, 5)
    logits[:, :, 2] = -INF  # an expert that is masked everywhere leaves them finite
    logits.requires_grad_()
    loss = LOSSES[name](logits)
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
    masked = logits.detach().clone()
    masked[0, 3] = -INF
    masked.requires_grad_()
    loss = LOSSES[name](masked)
    assert loss.isnan() and torch.autograd.grad(loss, masked)[0][0, 3].isnan().any()
    keep = torch.ones(2, 6)
    keep[0, 3] = 0
    loss = LOSSES[name](masked, attention_mask=keep)
    expected = LOSSES[name](logits, attention_mask=keep)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, masked)[0], torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][0, 3] == 0).all()


# ---- a choice of weight 0 takes no part, whatever it holds; the gradient of its weight reads it ----


@pytest.mark.parametrize("width", [3, 16, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_leaves_rows_of_weight_0_out_and_keeps_their_weights_gradient(dtype, width, device):
    rows = torch.randn(12, width, device=device).to(dtype)
    weights = torch.rand(6, 2, device=device).to(dtype)
    weights[2, 1] = weights[4] = 0
    order = torch.randperm(12, device=device).int()
    slots = torch.argsort(order)  # the row of each slot
    bad = rows.clone()
    bad[slots[5]] = float("nan")
    grads = {}
    for name, values in (("finite", rows), ("nan", bad)):
        values.requires_grad_()
        leaf = weights.clone().requires_grad_()
        output = ops.combine_tokens(values, leaf, order, 2)
        assert output.isfinite().all()
        grads[name] = torch.autograd.grad(output.float().square().sum() + output.float().sum(), [values, leaf])
    assert (grads["nan"][0][slots[[5, 8, 9]]] == 0).all() and grads["nan"][0].isfinite().all()
    torch.testing.assert_close(grads["nan"][0], grads["finite"][0])
    # Of a zero weight: <gradient of the output, row>.
    expected = rows.detach()[slots[8]].double().sum()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(grads["finite"][1][4, 0].double(), expected, rtol=tolerance, atol=10 * tolerance)
    assert grads["nan"][1][2, 1].isnan() and grads["nan"][1].isnan().sum() == 1


@pytest.mark.parametrize("bad", ["token", "expert"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_experts_leave_choices_of_weight_0_out_and_keep_their_weights_gradient(dtype, bad, device):
    tokens = torch.randn(9, 16).to(dtype)
    gate_up, down = torch.randn(4, 24, 16).to(dtype) / 4, torch.randn(4, 16, 12).to(dtype) / 4
    experts = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 2], [1, 0], [3, 1], [2, 0], [3, 2]])
    weights = torch.rand(9, 2).to(dtype) + 0.1
    weights[experts == 3] = 0
    weights[4] = 0
    row_order, offsets = ops.sort_by_expert(experts, 4)

    def run(*leaves):
        leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
        x, w, first, second = leaves
        output = ops.expert_mlp(x, w, row_order.to(device), offsets.to(device), first, second)
        return output, torch.autograd.grad(output.float().square().sum() + output.float().sum(), leaves)

    expected, grads = run(tokens, weights, gate_up, down)
    poisoned = [tokens.clone(), weights, gate_up.clone(), down.clone()]
    if bad == "token":
        poisoned[0][4] = float("nan")
    else:
        poisoned[2][3] = poisoned[3][3] = float("nan")
    output, bad_grads = run(*poisoned)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for position in (0, 2, 3):
        torch.testing.assert_close(bad_grads[position], grads[position], rtol=0, atol=0)
    assert (grads[0][4] == 0).all() and (grads[2][3] == 0).all() and (grads[3][3] == 0).all()
    reads = (torch.arange(9)[:, None] == 4).expand(9, 2) if bad == "token" else experts == 3
    assert bad_grads[1].isnan().cpu().equal(reads) and grads[1].isfinite().all()
    assert (grads[1].cpu()[reads] != 0).all()  # the gradient of a zero weight


def test_a_masked_expert_that_holds_nan_spoils_nothing():
    layer = edl.MoELayer(16, 8, 3, 2)
    mask = torch.tensor([0, -INF, -INF])
    layer.router.register_forward_hook(lambda router, inputs, choice: router.choice_of(choice.logits + mask))
    with torch.no_grad():
        layer.gate_up_proj[1] = float("nan")
    output, routing = layer(torch.randn(5, 16))
    assert routing.weights.tolist() == [[1, 0]] * 5
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
