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


# ---- allowed experts, and experts that are given ----


def plain(logits, scores, allowed=None):
    """Scores in float64 by torch's own softmax and sigmoid; those of forbidden experts are exactly 0."""
    wide = logits.double() if allowed is None else logits.double().masked_fill(~allowed, -INF)
    return wide.softmax(-1) if scores == "softmax" else wide.sigmoid()


def some_allowed(num_tokens, num_experts, top_k):
    """Down to `top_k` for each token."""
    wanted = torch.rand(num_tokens, num_experts)
    return (wanted < 0.3) | (wanted <= wanted.kthvalue(top_k, keepdim=True).values)


def poisoned(logits, allowed):
    """What must reach nothing, in the place of every logit that is not allowed."""
    poison = torch.tensor([NAN, INF, -INF, 6e4]).repeat(logits.numel())[: logits.numel()].view_as(logits)
    return torch.where(allowed, logits, poison.to(logits.dtype))


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # of the weights
ROUNDING = {**TOLERANCES, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of gradients, in the type of the logits


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (40, 7), (64, 8)])
def test_a_forbidden_expert_has_no_part_in_choice_weights_or_gradients(
    num_experts, top_k, scores, normalize, dtype, with_bias, device
):
    allowed = some_allowed(60, num_experts, top_k)
    logits = torch.randn(60, num_experts).to(dtype)
    bias = None
    if with_bias:  # in favour of some that many tokens may not take
        bias = 3 * torch.randn(num_experts, dtype=dtype if dtype == torch.float64 else torch.float32)
    leaf = poisoned(logits, allowed).to(device).requires_grad_()
    weights, experts = ops.route_tokens(
        leaf, top_k, scores, None if bias is None else bias.to(device), normalize, 1.5, allowed=allowed.to(device)
    )
    own = experts.cpu()
    assert allowed.gather(1, own).all()
    exact = logits.double().requires_grad_()
    score = plain(exact, scores, allowed)
    order = logits.double() if bias is None else score.detach() + bias.double()
    best = order.masked_fill(~allowed, -INF).topk(top_k).values
    torch.testing.assert_close(order.gather(1, own), best, rtol=1e-5, atol=1e-6)
    expected = score.gather(1, own)
    expected = 1.5 * (expected / expected.sum(-1, keepdim=True) if normalize else expected)
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    upstream = torch.randn(60, top_k).to(weights.dtype)
    (gradient,) = torch.autograd.grad(weights, leaf, upstream.to(device))
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double())
    assert (gradient.cpu()[~allowed] == 0).all()
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    # A loss that is NaN reaches no forbidden logit either.
    (gradient,) = torch.autograd.grad(
        ops.route_tokens(leaf, top_k, scores, None, normalize, allowed=allowed.to(device))[0].sum() * NAN, leaf
    )
    assert (gradient.cpu()[~allowed] == 0).all() and gradient.isnan().any()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_all_allowed_is_none_forbidden_to_the_bit(scores, normalize, device):
    rows = torch.randn(9, 37)
    rows[2, 5:] = -INF
    rows[3], rows[4, 7], rows[5, 7], rows[6] = -INF, NAN, INF, rows[6].round()
    for bias in (None, torch.randn(37, device=device)):
        for dtype in DTYPES:
            found = []
            for allowed in (None, torch.ones(9, 37, dtype=torch.bool, device=device)):
                logits = rows.to(device, dtype).requires_grad_()
                weights, experts = ops.route_tokens(logits, 4, scores, bias, normalize, 2.0, allowed)
                found.append([weights, experts, *torch.autograd.grad(weights.sum(), logits)])
            for one, other in zip(*found):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_ties_among_the_allowed_go_to_the_lowest_and_masked_ones_come_before_forbidden_ones(device):
    allowed = torch.tensor([[False, True, True, False, True, True]], device=device)
    for scores in ("softmax", "sigmoid"):
        for bias in (None, torch.tensor([9.0, 0, 0, 9, 0, 0], device=device)):

            def route(logits):
                logits = torch.tensor([logits], device=device, requires_grad=True)
                weights, experts = ops.route_tokens(logits, 3, scores, bias, allowed=allowed)
                (gradient,) = torch.autograd.grad(weights.sum(), logits)
                return weights[0].tolist(), experts[0].tolist(), gradient[0].cpu()

            assert route([1.0] * 6)[1] == [1, 2, 4]
            weights, experts, gradient = route([1, -INF, 0, 1, -INF, -INF])
            assert weights == [1, 0, 0] and experts == [2, 1, 4] and gradient.isfinite().all()
            weights, experts, gradient = route([1, -INF, -INF, NAN, -INF, -INF])  # none is open among the allowed
            assert all(math.isnan(weight) for weight in weights) and experts == [1, 2, 4]
            assert gradient[[1, 2, 4]].isnan().all() and (gradient[[0, 3]] == 0).all()
            assert all(math.isnan(weight) for weight in route([0, 1, NAN, 0, 1, 1])[0])  # NaN that is allowed


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_given_experts_have_the_weights_of_the_formulas(scores, normalize, dtype, restricted, ids, device):
    allowed = some_allowed(60, 40, 7) if restricted else None
    logits = torch.randn(60, 40).to(dtype)
    given = torch.rand(60, 40).masked_fill(torch.zeros(60, 40, dtype=torch.bool) if allowed is None else ~allowed, -1)
    given = given.topk(7).indices
    is_none = torch.rand(60, 7) < 0.3
    is_none[4] = True
    recorded = given.masked_fill(is_none, -1).to(device, ids)
    leaf = (logits if allowed is None else poisoned(logits, allowed)).to(device).requires_grad_()
    mask = None if allowed is None else allowed.to(device)
    bias = torch.full((40,), NAN, device=device)  # has no say
    weights, experts = ops.route_tokens(leaf, 7, scores, bias, normalize, 1.5, mask, recorded)
    assert experts.dtype == torch.int64 and experts.cpu().equal(given.masked_fill(is_none, 40))
    assert experts.data_ptr() != recorded.data_ptr()
    exact = logits.double().requires_grad_()
    expected = plain(exact, scores, allowed).gather(1, given).masked_fill(is_none, 0)
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True).masked_fill(is_none.all(-1, keepdim=True), 1)
    expected = 1.5 * expected
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert (weights.cpu()[is_none] == 0).all() and (weights.cpu()[~is_none] > 0).all()
    upstream = torch.randn(60, 7).to(weights.dtype)
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double())
    upstream[4] = NAN  # of a token without a choice
    (gradient,) = torch.autograd.grad(weights, leaf, upstream.to(device))
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert (gradient[4] == 0).all() and (allowed is None or (gradient.cpu()[~allowed] == 0).all())


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_choice_that_is_given_again_has_its_weights_and_gradients_to_the_bit(scores, normalize, restricted, device):
    for dtype in DTYPES:
        logits = torch.randn(50, 33).to(device, dtype)
        logits[3], logits[5, 2:] = -INF, -INF  # no open expert, and fewer than are chosen
        logits.requires_grad_()
        bias = torch.randn(33, device=device, dtype=dtype if dtype == torch.float64 else torch.float32)
        allowed = some_allowed(50, 33, 4).to(device) if restricted else None
        weights, experts = ops.route_tokens(logits, 4, scores, bias, normalize, 2.5, allowed)
        again, same = ops.route_tokens(logits, 4, scores, None, normalize, 2.5, allowed, experts)
        assert same.equal(experts)
        torch.testing.assert_close(again, weights, rtol=0, atol=0, equal_nan=True)
        gradients = [torch.autograd.grad(each.sum(), logits)[0] for each in (weights, again)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_given_experts_of_logits_that_are_not_finite(scores, normalize, device):
    rows = [[-INF] * 4, [1, 2, NAN, 0], [1, 2, INF, 0], [-INF, -INF, 1, 0], [-INF, 2, 1, 0]]
    given = torch.tensor([[0, 1, -1]] * 5, device=device)
    logits = torch.tensor(rows, device=device, requires_grad=True)
    weights, _ = ops.route_tokens(logits, 3, scores, None, normalize, experts=given)
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    expected = plain(torch.tensor(rows), scores)[:, :2]
    if normalize:
        expected = expected / (expected.sum(-1, keepdim=True) + (1e-20 if scores == "sigmoid" else 0))
    expected[0] = NAN  # no open expert, whatever the scores
    torch.testing.assert_close(weights[:, :2].cpu().double(), expected, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert (weights[:, 2] == 0).all()
    assert gradient[:, :2].isnan().all(-1).cpu().equal(expected.isnan().all(-1))
    assert (gradient[4, 0] == 0) and gradient[4].isfinite().all()


def test_what_a_backward_pass_reads_must_stay_as_it_is():
    for name in ("allowed", "experts"):
        logits = torch.randn(6, 5, requires_grad=True)
        limit = torch.ones(6, 5, dtype=torch.bool) if name == "allowed" else torch.tensor([[0, 1]] * 6)
        weights, _ = ops.route_tokens(logits, 2, "softmax", **{name: limit})
        limit.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            weights.sum().backward()


@pytest.mark.parametrize("wrong", [5, -2, 2**40, 1])
def test_given_experts_that_change_behind_autograds_back_are_index_errors(wrong):
    logits, given = torch.randn(6, 5, requires_grad=True), torch.tensor([[0, 1]] * 6)
    weights, _ = ops.route_tokens(logits, 2, "softmax", experts=given)
    given.numpy()[3, 0] = wrong
    with pytest.raises(IndexError, match="^edl::_route_tokens_backward: experts "):
        weights.sum().backward()


@pytest.mark.parametrize("name", ["allowed", "experts"])
def test_limits_that_are_no_tensors_are_one_sentence(name):
    with pytest.raises(ValueError) as error:
        ops.route_tokens(torch.randn(1, 1), 1, "softmax", **{name: [[1]]})
    assert str(error.value) == f"edl::route_tokens: {name} must be a tensor (got list)"


def test_sentinels_of_given_experts_pass_the_experts_and_add_nothing():
    logits, tokens = torch.randn(6, 5), torch.randn(6, 8)
    gate_up, down = torch.randn(5, 12, 8), torch.randn(5, 8, 6)
    given = torch.tensor([[0, 1], [2, -1], [-1, 3], [-1, -1], [4, 0], [-1, 1]])
    weights, experts = ops.route_tokens(logits, 2, "sigmoid", experts=given)
    row_order, offsets = ops.sort_by_expert(experts, 5)
    assert offsets[-1] == (given >= 0).sum()
    output = ops.expert_mlp(tokens, weights, row_order, offsets, gate_up, down)
    assert (output[3] == 0).all()
    alone = ops.route_tokens(logits[1:2], 1, "sigmoid", experts=given[1:2, :1])
    expected = ops.expert_mlp(tokens[1:2], alone[0], *ops.sort_by_expert(alone[1], 5), gate_up, down)
    torch.testing.assert_close(output[1:2], expected)


class Limited(torch.nn.Module):
    """A router of one's own, scripted, compiled and exported."""

    def forward(
        self, logits: torch.Tensor, allowed: torch.Tensor, experts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.route_tokens(logits, 2, "softmax", None, False, 1.0, allowed, experts)


@pytest.mark.parametrize("with_experts", [False, True])
@pytest.mark.parametrize("way", ["script", "compile", "export"])
def test_scripted_compiled_and_exported(way, with_experts):
    def arguments(num_tokens):
        allowed = some_allowed(num_tokens, 9, 2)
        given = torch.rand(num_tokens, 9).masked_fill(~allowed, -1).topk(2).indices
        given[1, 0] = -1
        return (torch.randn(num_tokens, 9), allowed, *([given] if with_experts else []))

    length = torch.export.Dim("length", min=2, max=64)
    if way == "script":
        function = torch.jit.script(Limited())
    elif way == "compile":
        function = torch.compile(Limited(), fullgraph=True, dynamic=True, backend="aot_eager")
    else:
        shapes = ({0: length},) * (2 + with_experts)
        function = torch.export.export(Limited(), arguments(7), dynamic_shapes=shapes).module()
    for num_tokens in (7, 12):
        logits, *limits = arguments(num_tokens)
        logits.requires_grad_()
        (weights, experts), (expected, same) = function(logits, *limits), Limited()(logits, *limits)
        assert experts.equal(same)
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad(each.square().sum(), logits)[0] for each in (weights, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    limits[0].fill_(False)
    with pytest.raises((IndexError, RuntimeError), match="edl::route_tokens: (allowed must leave|experts must be al)"):
        function(logits.detach(), *limits)
