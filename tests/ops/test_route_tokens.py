"""The choice of experts and its weights: order, ties, bias, values that are not finite, and what a gradient reaches."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from edl import ops, reference

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def chosen(device, logits, top_k, scores="softmax", bias=None, dtype=torch.float32):
    bias = None if bias is None else bias.to(device)
    return ops.route_tokens(torch.tensor([logits], dtype=dtype, device=device), top_k, scores, bias)[1][0].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_expert(scores, dtype, device):
    assert chosen(device, [0, 1, 1, 0, 1], 4, scores, dtype=dtype) == [1, 2, 4, 0]
    assert chosen(device, [-0.0, 0.0, -0.0, 0.0], 3, scores, dtype=dtype) == [0, 1, 2]
    assert chosen(device, [3.0] * 70, 5, scores, torch.zeros(70), dtype=dtype) == [0, 1, 2, 3, 4]
    bias = torch.zeros(40)
    bias[[7, 33]] = 1.0
    assert chosen(device, [3.0] * 40, 3, scores, bias, dtype=dtype) == [7, 33, 0]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_logits_keep_apart_what_the_rounding_of_scores_would_make_equal(scores, device):
    low = [-300.0, 0.0, -250.0, -200.0] if scores == "softmax" else [60.0, 90.0, 70.0, 80.0]
    assert chosen(device, low, 4, scores) == [1, 3, 2, 0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_logits_reach_the_weights_and_never_leave_the_range(dtype, scores, normalize, device):
    rows = torch.tensor(
        [
            [NAN] * 5,
            [1, 2, NAN, 0, 3],
            [INF, 0, INF, -INF, 1],
            [-INF] * 5,
            [6e4, -6e4, 5e4, 6e4, 0],
            [-INF, 2, -INF, -INF, -INF],
        ],
        device=device,
    )
    for bias in (None, torch.zeros(5, device=device), torch.tensor([0.0, 0.0, -5.0, 0.0, 0.0], device=device)):
        logits = rows.to(dtype).requires_grad_()
        weights, experts = ops.route_tokens(logits, 3, scores, bias, normalize)
        assert ((experts >= 0) & (experts < 5)).all()
        assert all(len(set(row)) == 3 for row in experts.tolist())
        assert weights[0].isnan().all()
        if scores == "softmax":
            assert weights[1:3].isnan().all()
            assert weights[5].tolist() == [1, 0, 0]
        elif bias is None:
            assert weights[1, 0].isnan()
        assert weights[4].isfinite().all()
        weights[4:].sum().backward()
        assert logits.grad[4].isfinite().all()


def test_a_bias_moves_the_choice_and_no_weight():
    logits = torch.randn(300, 12)
    bias = torch.randn(12)
    for scores in ("softmax", "sigmoid"):
        for normalize in (True, False):
            weights, experts = ops.route_tokens(logits, 3, scores, bias, normalize, 2.5)
            assert (experts != ops.route_tokens(logits, 3, scores)[1]).any()
            score = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
            expected = score.gather(1, experts)
            if normalize:
                expected = expected / expected.sum(-1, keepdim=True)
            torch.testing.assert_close(weights, 2.5 * expected)


def test_a_bias_that_prefers_underflowed_scores_divides_nothing_by_zero(device):
    logits = torch.tensor([[0.0, -150.0, -151.0, -300.0]], device=device, requires_grad=True)
    weights, experts = ops.route_tokens(logits, 2, "softmax", torch.tensor([0.0, 5.0, 4.0, 0.0], device=device))
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.0, -1.0]]).softmax(-1))
    (gradient,) = torch.autograd.grad(weights[0, 0], logits)
    slope = 1 / (2 + 2 * math.cosh(1))
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[0.0, slope, -slope, 0.0]]))


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_a_bias_of_any_type(bias_dtype):
    logits, bias = torch.randn(20, 6, dtype=torch.float64), (torch.arange(6) / 8).to(bias_dtype)
    expected = reference.route_tokens(logits, 2, "sigmoid", bias.double())
    torch.testing.assert_close(ops.route_tokens(logits, 2, "sigmoid", bias), expected)


def test_only_chosen_logits_get_a_gradient_unless_a_softmax_is_left_unnormalised():
    for scores, normalize in (("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)):
        everywhere = scores == "softmax" and not normalize
        logits = torch.randn(50, 9, requires_grad=True)
        weights, experts = ops.route_tokens(logits, 2, scores, None, normalize)
        (gradient,) = torch.autograd.grad((weights * torch.randn(50, 2)).sum(), logits)
        touched = gradient != 0
        assert touched.gather(1, experts).all()
        assert touched.all() if everywhere else touched.sum() == experts.numel()


def test_one_expert_normalised_is_sure_and_gets_no_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    weights, _ = ops.route_tokens(logits, 1, "softmax")
    assert (weights == 1).all()
    assert (torch.autograd.grad(weights.sum(), logits)[0] == 0).all()


def test_a_row_does_not_depend_on_its_neighbours(device):
    for dtype in DTYPES:
        logits = torch.randn(67, 33).to(device, dtype)
        bias = torch.zeros(33, device=device)
        together = ops.route_tokens(logits, 4, "softmax", bias, False)
        alone = [ops.route_tokens(row[None], 4, "softmax", bias, False) for row in logits]
        for i, parts in enumerate(zip(*alone)):
            assert torch.cat(parts).equal(together[i])


@hypothesis.given(
    st.integers(1, 70), st.integers(1, 40), st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.data()
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_permuting_experts_permutes_the_choice(num_experts, num_tokens, scores, with_bias, data):
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64) * 3
    bias = torch.randn(num_experts, generator=generator, dtype=torch.float64) if with_bias else None
    order = torch.randperm(num_experts, generator=generator)
    weights, experts = ops.route_tokens(logits, top_k, scores, bias)
    moved_weights, moved_experts = ops.route_tokens(
        logits[:, order], top_k, scores, None if bias is None else bias[order]
    )
    assert order[moved_experts].equal(experts)
    torch.testing.assert_close(moved_weights, weights, rtol=1e-12, atol=0)


def test_gradients_of_the_choice_itself_are_refused():
    _, experts = ops.route_tokens(torch.randn(3, 4, requires_grad=True), 2, "softmax")
    assert not experts.requires_grad


def test_the_private_backward_refuses_experts_out_of_range():
    with pytest.raises(IndexError, match="edl::_route_tokens_backward: experts must be at least 0 and below 4"):
        torch.ops.edl._route_tokens_backward(
            torch.ones(2, 1), torch.randn(2, 4), torch.tensor([[0], [4]]), "softmax", True, 1.0
        )
