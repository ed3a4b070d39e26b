"""domain → pairs: the loss and its gradient against plain torch in float64, on hostile distributions, and on bad
arguments."""

import math

import pytest
import torch
from support import divergence_arguments
from tolerances import assert_close, tolerance

from edl import ops, reference

NAN = math.nan
INF = math.inf
FORMS = [("mean_of_logs", False), ("log_of_mean", False), ("mean_of_logs", True)]
FORM_NAMES = ["mean_of_logs", "log_of_mean", "corrected"]


def make_moments(*leading, num_domains, num_experts, scale=2.0, most_segments=5, absent=()):
    """Sums, squares and counts of 1 to `most_segments` segments per domain."""
    segments = (torch.randn(*leading, num_domains, most_segments, num_experts, dtype=torch.float64) * scale).softmax(
        dim=-1
    )
    counts = torch.randint(1, most_segments + 1, (*leading, num_domains)).double()
    for domain in absent:
        counts[..., domain] = 0
    used = (torch.arange(most_segments) < counts.unsqueeze(-1)).unsqueeze(-1)
    return (segments * used).sum(dim=-2), (segments.square() * used).sum(dim=-2), counts


def differentiate(function, sums, squares, counts, eps, reduction, bias_correction, weights):
    leaves = sums.detach().requires_grad_(), squares.detach().requires_grad_()
    loss = function(*divergence_arguments(*leaves, counts, eps, reduction, bias_correction))
    grads = torch.autograd.grad((loss * weights).sum(), leaves[: 2 if bias_correction else 1], allow_unused=True)
    return loss.detach(), [torch.zeros_like(sums) if g is None else g for g in grads]


def check(
    sums, squares, counts, eps=1e-6, reduction="mean_of_logs", bias_correction=False, device="cpu", closeness=1.0
):
    """Kernel against definition, with and without a gradient; returns loss and gradients of the kernel.

    `closeness`: how close the domains are, (p - q) / (p + q): logarithms of their ratios lose that many digits.
    """
    sums, squares, counts = (x.to(device) for x in (sums, squares, counts))
    weights = torch.randn(sums.shape[:-2], dtype=torch.float64, device=device)
    arguments = sums, squares, counts, eps, reduction, bias_correction
    loss, grads = differentiate(ops.expert_divergence, *arguments, weights)
    expected, expected_grads = differentiate(reference.expert_divergence, *arguments, weights)
    allowed = tolerance(torch.float64, sums.shape[-1] * max(1, sums.shape[-2]) ** 2)
    assert_close(loss, expected, allowed, scale=1.0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert_close(grad, wanted, allowed / closeness)
    assert ops.expert_divergence(*divergence_arguments(*arguments)).equal(
        loss
    )  # the way without a gradient gives the same bits
    return loss, grads


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_every_size(form, device):
    for num_domains in (1, 2, 3, 9):
        for num_experts in (1, 2, 7, 8, 9, 16, 65, 128):
            check(*make_moments(num_domains=num_domains, num_experts=num_experts), 1e-6, *form, device)


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("num_domains, num_experts", [(2, 2048), (49, 128), (60, 12)])
def test_sizes_with_several_chunks(num_domains, num_experts, form, device):
    check(*make_moments(num_domains=num_domains, num_experts=num_experts), 1e-6, *form, device)


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("leading", [(0,), (1,), (4,), (2, 3)], ids=str)
def test_layers(leading, form, device):
    moments = make_moments(*leading, num_domains=5, num_experts=12)
    loss, _ = check(*moments, 1e-6, *form, device)
    assert loss.shape == leading
    if leading == (4,):
        layers = [[x[layer].to(device) for x in moments] for layer in range(4)]
        alone = [ops.expert_divergence(*divergence_arguments(*layer, 1e-6, *form)) for layer in layers]
        assert loss.equal(torch.stack(alone))


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_layouts(form, device):
    sums, squares, counts = make_moments(3, num_domains=4, num_experts=9)
    turned = sums.transpose(0, 2).contiguous().transpose(0, 2), squares.mT.contiguous().mT, counts.t().contiguous().t()
    wide = sums.repeat_interleave(2, dim=-1)[..., ::2], squares.repeat_interleave(2, dim=1)[:, ::2], counts
    same = sums[:1].expand(3, 4, 9), squares[:1].expand(3, 4, 9), counts[:1].expand(3, 4)
    for moments in (turned, wide, same):
        check(*moments, 1e-6, *form, device)


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("absent", [(0,), (4,), (1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_absent_domains_drop_out_whatever_they_hold(absent, form, device):
    sums, squares, counts = make_moments(num_domains=5, num_experts=10, absent=absent)
    sums[list(absent)], squares[list(absent)] = NAN, NAN
    present = [d for d in range(5) if d not in absent]
    loss, grads = check_without(sums, squares, counts, present, form, device)
    assert loss.isfinite() and all(g.isfinite().all() and not g[list(absent)].any() for g in grads)
    if len(present) < 2:
        assert loss.item() == 0.0 and not any(g.any() for g in grads)


def check_without(sums, squares, counts, present, form, device):
    """The loss of all domains is that of the present ones alone."""
    arguments = [x.to(device) for x in (sums, squares, counts)]
    weight = torch.ones((), dtype=torch.float64, device=device)
    loss, grads = differentiate(ops.expert_divergence, *arguments, 1e-6, *form, weight)
    expected, _expected_grads = check(*(x[present] for x in (sums, squares, counts)), 1e-6, *form, device)
    assert_close(loss, expected, tolerance(torch.float64, 64))
    reduced, _ = differentiate(ops.expert_divergence, *(x[present] for x in arguments), 1e-6, *form, weight)
    assert loss.equal(reduced)
    return loss, grads


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_every_eps(form, eps, device):
    check(*make_moments(num_domains=4, num_experts=10), eps, *form, device)


@pytest.mark.parametrize("form", FORMS[:2], ids=FORM_NAMES[:2])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 10.0, 100.0, 700.0])
def test_from_nearly_equal_to_nearly_disjoint(scale, form, device):
    """Softmax of logits of this size: at 1e-6 divergences of 1e-13, at 700 probabilities from 1 to 0."""
    moments = make_moments(num_domains=4, num_experts=20, scale=scale)
    loss, _ = check(*moments, 1e-9, *form, device, closeness=min(1.0, scale))
    assert 0.3 < loss.item() < 21


@pytest.mark.parametrize("form", FORMS[:2], ids=FORM_NAMES[:2])
def test_disjoint_domains_are_log_2_apart(form, device):
    sums = torch.eye(4, dtype=torch.float64, device=device) * 3
    counts = torch.full((4,), 3.0, dtype=torch.float64, device=device)
    loss = ops.expert_divergence(sums, counts, 0.0, form[0])
    assert loss.item() == pytest.approx(-math.log(math.log(2)), rel=1e-14)


def test_the_slope_at_a_probability_of_zero_is_that_of_the_smallest_float32(device):
    """There the derivative is minus infinity; a finite one keeps a softmax behind it from computing 0 * inf."""
    sums = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64, device=device, requires_grad=True)
    counts = torch.ones(2, dtype=torch.float64, device=device)
    loss = ops.expert_divergence(sums, counts, 0.0, "mean_of_logs")
    (grad,) = torch.autograd.grad(loss, sums)
    divergence = 0.5 * (math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2))
    slope = torch.tensor([[math.log(1 / 0.75), math.log(2.0**-126), 0.0], [math.log(0.5 / 0.75), math.log(2), 0.0]])
    assert_close(grad, -0.5 * slope.double() / divergence, 1e-7)
    assert_close(
        grad[:, 0], -0.5 * torch.tensor([math.log(4 / 3), math.log(2 / 3)], dtype=torch.float64) / divergence, 1e-14
    )


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_equal_domains(eps, form, device):
    """A saddle: the loss is -log(eps), the gradient zero, also where eps is 0 and the loss infinite."""
    row = torch.tensor([0.125, 0.25, 0.5, 0.125, 0.0], dtype=torch.float64, device=device)
    counts = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64, device=device)
    sums, squares = row * counts.unsqueeze(-1), row.square() * counts.unsqueeze(-1)  # segments without any variance
    one = torch.ones((), dtype=torch.float64, device=device)
    loss, grads = differentiate(ops.expert_divergence, sums, squares, counts, eps, *form, one)
    assert loss.item() == pytest.approx(-math.log(eps) if eps > 0 else INF, rel=1e-14)
    to_segments = grads[0] + 2 * row * grads[1] if form[1] else grads[0]
    assert not to_segments.any()


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_a_counted_nan_reaches_the_loss(form, device):
    for tensor in range(3 if form[1] else 1):
        moments = [x.to(device) for x in make_moments(2, num_domains=4, num_experts=20, most_segments=5)]
        moments[2].fill_(3.0)
        moments[tensor][(1, 2, 17) if tensor < 2 else (1, 2)] = NAN
        weights = torch.ones(2, dtype=torch.float64, device=device)
        loss, grads = differentiate(ops.expert_divergence, *moments, 1e-6, *form, weights)
        if tensor == 1:  # squares enter the gradient alone
            assert loss.isfinite().all() and grads[0][1].isnan().any() and grads[1][1].isnan().any()
        else:
            assert loss.isnan().tolist() == [False, True] and grads[0][1].isnan().any()
        assert grads[0][0].isfinite().all()


def test_a_count_of_nan_reaches_the_loss(device):
    """What CUDA makes of a label out of range."""
    sums, _, counts = (x.to(device) for x in make_moments(num_domains=3, num_experts=8))
    counts[1] = NAN
    assert ops.expert_divergence(sums, counts).isnan()


def test_infinite_sums_reach_the_loss(device):
    sums, _, counts = (x.to(device) for x in make_moments(num_domains=3, num_experts=8))
    sums[1, 3] = INF
    assert not ops.expert_divergence(sums, counts).isfinite()


# ---- bias correction ----


def test_correction_leaves_the_value_and_drops_single_segments(device):
    sums, squares, counts = make_moments(num_domains=5, num_experts=10)
    counts[:] = torch.tensor([1.0, 2.0, 0.0, 4.0, 3.0])
    segments = (torch.randn(5, 4, 10, dtype=torch.float64) * 2).softmax(dim=-1)
    used = (torch.arange(4) < counts.unsqueeze(-1)).unsqueeze(-1)
    sums, squares = (segments * used).sum(dim=1), (segments.square() * used).sum(dim=1)
    squares[[0, 2]] = NAN
    loss, grads = check_without(sums, squares, counts, [1, 3, 4], ("mean_of_logs", True), device)
    plain, _ = check(*(x[[1, 3, 4]] for x in (sums, squares, counts)), device=device)
    assert loss.equal(plain)
    assert not grads[0][[0, 2]].any() and not grads[1][[0, 2]].any()


def test_correction_with_fewer_than_two_such_domains_is_zero(device):
    sums, squares, counts = (x.to(device) for x in make_moments(num_domains=3, num_experts=10))
    counts[:] = torch.tensor([1.0, 1.0, 4.0])
    one = torch.ones((), dtype=torch.float64, device=device)
    loss, grads = differentiate(ops.expert_divergence, sums, squares, counts, 1e-6, "mean_of_logs", True, one)
    assert loss.item() == 0.0 and not grads[0].any() and not grads[1].any()


def test_correction_with_experts_that_nobody_uses(device):
    segments = (torch.randn(3, 4, 10, dtype=torch.float64) * 2).softmax(dim=-1)
    segments[..., 3] = 0.0
    segments[0, :, 5] = 0.0
    counts = torch.full((3,), 4.0, dtype=torch.float64)
    _, grads = check(segments.sum(1), segments.square().sum(1), counts, 1e-6, "mean_of_logs", True, device)
    assert not grads[0][:, 3].any() and not grads[1][:, 3].any()


def test_correction_where_noise_is_all_there_is(device):
    """b > D: the denominator is 2 b + eps, and the gradient pulls the segments of a domain together."""
    segments = (torch.randn(2, 2, 6, dtype=torch.float64)).softmax(dim=-1)
    segments[1] = segments[0].flip(0)  # the same two segments in both domains
    counts = torch.full((2,), 2.0, dtype=torch.float64)
    moments = segments.sum(1), segments.square().sum(1), counts
    means, spreads = moments[0] / 2, reference.segment_spreads(*moments)
    assert reference.divergence_bias(means[0], spreads[0], means[1], spreads[1]) > 1e-3
    check(*moments, 1e-6, "mean_of_logs", True, device)
    leaf = moments[1].to(device).requires_grad_()
    ops.expert_divergence(moments[0].to(device), counts.to(device), squares=leaf).backward()
    assert (leaf.grad > 0).all()  # less variance lowers the corrected loss


# ---- what it refuses ----

SUMS = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
COUNTS = torch.full((3,), 2.0, dtype=torch.float64)

SENTENCES = {
    "sums must have the shape [..., D, E] (got 1 dimensions)": (SUMS[0], COUNTS),
    "sums and counts must be float64 (got Float and Double)": (SUMS.float(), COUNTS),
    "sums and counts must be float64 (got Double and Long)": (SUMS, COUNTS.long()),
    "counts must have the shape [..., D] of sums (got 2 dimensions for 2)": (SUMS, COUNTS[None]),
    "counts must have one entry per domain of sums (got [2] for [3, 5])": (SUMS, COUNTS[:2]),
    "counts must have one entry per domain of sums (got [4, 3] for [2, 3, 5])": (
        *(SUMS.expand(2, 3, 5), COUNTS.expand(4, 3)),
    ),
    "all tensors must be on one device (got cpu and meta)": (SUMS, COUNTS.to("meta")),
    "eps must be finite and not negative (got -1e-09)": (SUMS, COUNTS, -1e-9),
    "eps must be finite and not negative (got nan)": (SUMS, COUNTS, NAN),
    "eps must be finite and not negative (got inf)": (SUMS, COUNTS, INF),
    "reduction must be 'mean_of_logs' or 'log_of_mean' (got 'mean')": (SUMS, COUNTS, 1e-6, "mean"),
    "squares correct the bias of reduction = 'mean_of_logs' only (got 'log_of_mean')": (
        *(SUMS, COUNTS, 1e-6, "log_of_mean", SUMS),
    ),
    "counts have no gradient (got counts with requires_grad = True)": (SUMS, COUNTS.clone().requires_grad_()),
}
WRONG_SQUARES = {
    "squares must have the shape of sums (got [0] for [3, 5])": SUMS[:0, 0],  # domain_moments without squares
    "squares must have the shape of sums (got [2, 5] for [3, 5])": SUMS[:2],
    "squares must be float64 (got Float)": SUMS.float(),
    "all tensors must be on one device (got cpu and meta)": SUMS.to("meta"),
    "squares must be a tensor (got bool)": True,
    "squares must be dense (got layout torch.sparse_coo)": SUMS.to_sparse(),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence):
    with pytest.raises(ValueError) as error:
        ops.expert_divergence(*SENTENCES[sentence])
    assert str(error.value) == f"edl::expert_divergence: {sentence}"


@pytest.mark.parametrize("op", [ops.expert_divergence, ops.pairwise_divergence], ids=lambda op: op.__name__)
@pytest.mark.parametrize("sentence", WRONG_SQUARES)
def test_wrong_squares(sentence, op):
    with pytest.raises(ValueError) as error:
        op(SUMS, COUNTS, squares=WRONG_SQUARES[sentence])
    assert str(error.value) == f"edl::{op.__name__}: {sentence}"


# ---- differentiation ----


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_the_second_derivative_raises(form):
    leaf = SUMS.clone().requires_grad_()
    loss = ops.expert_divergence(*divergence_arguments(leaf, SUMS.square() * 2, COUNTS, 1e-6, *form))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for edl::_expert_divergence_backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_only_what_needs_a_gradient_gets_one(needs):
    sums, squares = (x.clone().requires_grad_(need) for x, need in zip((SUMS, SUMS.square() * 2), needs, strict=True))
    ops.expert_divergence(sums, COUNTS, squares=squares).backward()
    assert (sums.grad is not None, squares.grad is not None) == needs


def test_operators_without_squares():
    for op in (torch.ops.edl.expert_divergence, torch.ops.edl.pairwise_divergence):
        assert op(SUMS, COUNTS).equal(op(SUMS, COUNTS, squares=None))
        assert not op(SUMS, COUNTS).isnan().any()
    with pytest.raises(RuntimeError, match="expert_divergence"):  # the former order finds no meaning
        torch.ops.edl.expert_divergence(SUMS, SUMS, COUNTS, 1e-6, "mean_of_logs", False)


def test_forward_mode_is_refused_and_not_taken_for_zero():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp is not implemented"):
        ops.expert_divergence(torch.autograd.forward_ad.make_dual(SUMS, SUMS), COUNTS)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.jvp(lambda x: ops.expert_divergence(x, COUNTS), (SUMS,), (SUMS,))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ops.expert_divergence(x, COUNTS))(SUMS)


def test_without_gradients():
    expected = ops.expert_divergence(SUMS, COUNTS)
    leaf = SUMS.clone().requires_grad_()
    with torch.no_grad():
        assert not ops.expert_divergence(leaf, COUNTS).requires_grad
    with torch.inference_mode():
        assert ops.expert_divergence(leaf, COUNTS).equal(expected)
