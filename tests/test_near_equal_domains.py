"""Domains that are nearly equal, where the loss is steepest and the textbook formula has no digit left."""

import math

import mpmath
import pytest
import torch
from oracle import paper_loss, textbook_divergence

import edl
from edl import ops

mpmath.mp.dps = 60
TARGETS = [1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-13]


def exact_divergence(p, q):
    """Jensen-Shannon divergence of two lists of mpmath numbers, with sixty digits."""

    def terms(a, m):
        return a * mpmath.log(a / m) if a > 0 else mpmath.mpf(0)

    return mpmath.fsum(terms(a, (a + b) / 2) + terms(b, (a + b) / 2) for a, b in zip(p, q, strict=True)) / 2


def exact_mean(sums, count):
    """Σx / n of doubles, without rounding them."""
    return [mpmath.mpf(x) / mpmath.mpf(count) for x in sums.tolist()]


def pair_of_means(target, num_experts):
    """Two distributions [2, E] about `target` apart: one of a router's, tilted a little both ways."""
    logits = torch.randn(num_experts, dtype=torch.float64)
    tilt = torch.randn(num_experts, dtype=torch.float64)
    weights = logits.softmax(dim=0)
    variance = (weights * (tilt - (weights * tilt).sum()).square()).sum().item()
    step = math.sqrt(2 * target / variance) * tilt
    return torch.stack([logits + step, logits - step]).softmax(dim=-1)


def rounding(dtype, target):
    """What rounded probabilities leave of a divergence D, relative: about one digit of (p - q) / (p + q), which is
    sqrt(D)."""
    return 16 * torch.finfo(dtype).eps / math.sqrt(target)


@pytest.mark.parametrize("num_experts", [3, 8, 64, 100])
@pytest.mark.parametrize("target", TARGETS)
def test_divergence_of_given_sums_and_counts(target, num_experts, device):
    """Far better than 1e-5, against the exact divergence of the same sums and counts."""
    counts = torch.tensor([7.0, 12.0], dtype=torch.float64)
    sums = pair_of_means(target, num_experts) * counts.unsqueeze(-1)
    exact = exact_divergence(exact_mean(sums[0], 7.0), exact_mean(sums[1], 12.0))
    assert 0.3 * target < exact < 3 * target
    moments = [x.to(device) for x in (sums, counts)]
    allowed = rounding(torch.float64, target)
    assert allowed < 1e-5
    assert abs(ops.pairwise_divergence(*moments)[0, 1].item() / exact - 1) < allowed
    assert abs(ops.expert_divergence(*moments, 0.0).item() + mpmath.log(exact)) < allowed + 1e-14


@pytest.mark.parametrize("target", [1e-3, 1e-6, 1e-9])
def test_gradient_of_given_sums_and_counts(target, device):
    """dL/dp = -log(p/m) / (2 D), against sixty digits."""
    sums = pair_of_means(target, 16)
    p, q = exact_mean(sums[0], 1.0), exact_mean(sums[1], 1.0)
    exact = [-mpmath.log(2 * a / (a + b)) / 2 / exact_divergence(p, q) for a, b in zip(p, q, strict=True)]
    leaf = sums.to(device).requires_grad_()
    ops.expert_divergence(leaf, torch.ones(2, dtype=torch.float64, device=device), 0.0).backward()
    largest = max(abs(x) for x in exact)
    for actual, wanted in zip(leaf.grad[0].tolist(), exact, strict=True):
        assert abs(actual - wanted) < 1e-5 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_textbook_formula_would_fail(dtype):
    """The claim above can fail: p log(p/m) + q log(q/m) misses it, in float32 altogether."""
    for target in (1e-5, 1e-7, 1e-9):
        misses = []
        for _ in range(10):
            means = pair_of_means(target, 64).to(dtype)
            exact = exact_divergence(exact_mean(means[0], 1.0), exact_mean(means[1], 1.0))
            misses.append(float(abs(textbook_divergence(means[0], means[1]).item() / exact - 1)))
        misses.sort()
        assert misses[5] > rounding(dtype, target)
        if dtype == torch.float32 and target < 1e-8:
            assert misses[5] > 1.0


def nearly_equal_logits(target, num_tokens=512, num_experts=32):
    """Logits [2 T, E] of two domains of one sequence each, about `target` apart: the same tokens, and one shift."""
    tokens = torch.randn(num_tokens, num_experts, dtype=torch.float64)
    shift = torch.randn(num_experts, dtype=torch.float64) * math.sqrt(8 * target)
    return torch.cat([tokens, tokens + shift])


@pytest.mark.parametrize("target", [1e-3, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_end_to_end_within_the_rounding_of_the_input(target, dtype, device):
    """Routing in float32 is rounded by 2^-24, which moves a divergence D by a fraction of about 2^-24 / sqrt(D)."""
    logits = nearly_equal_logits(target)
    sequences = [(row // 512, row // 512) for row in range(1024)]
    exact = math.exp(-paper_loss(logits.softmax(dim=-1), sequences, eps=0.0).item())
    loss = edl.ExpertDivergenceLoss(2, eps=0.0)(logits.to(dtype).to(device), torch.tensor([0, 1], device=device))
    allowed = rounding(dtype, target) + 1e-15 / target  # the textbook formula's own rounding
    assert math.exp(-loss.double().item()) == pytest.approx(exact, rel=allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_never_nan_and_never_negative(dtype, device):
    """From noise of the size of the rounding down to none at all, with and without eps."""
    for scale in (1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 0.0):
        base = torch.randn(1, 6, 24, dtype=torch.float64)
        logits = (base + scale * torch.randn(4, 6, 24, dtype=torch.float64)).to(dtype).to(device).requires_grad_()
        labels = torch.tensor([0, 1, 2, 2], device=device)
        for options in ({}, {"pair_reduction": "log_of_mean"}, {"bias_correction": True}):
            for eps in (1e-6, 1e-30):
                loss = edl.ExpertDivergenceLoss(3, eps=eps, **options)(logits, labels)
                (grad,) = torch.autograd.grad(loss, logits)
                assert loss.isfinite() and loss.item() <= -math.log(eps) * (1 + 1e-6)
                assert grad.isfinite().all() or dtype == torch.float16  # 1 / sqrt(D) can pass its largest number
        routing = logits.detach().flatten(0, 1)
        sums, counts = ops.aggregate_routing(routing, torch.arange(4, device=device).repeat_interleave(6), 4)
        moments, _, counts = ops.domain_moments(sums, counts, labels, 3)
        matrix = ops.pairwise_divergence(moments, counts)
        assert (matrix >= 0).all()


def test_equal_domains_get_no_push(device):
    """At divergence 0 the gradient is exactly zero, whatever eps."""
    routing = torch.randn(1, 8, 16).expand(4, 8, 16).to(device).requires_grad_()
    for eps in (1e-6, 1e-30, 0.0):
        loss = edl.ExpertDivergenceLoss(2, eps=eps)(routing, torch.tensor([0, 0, 1, 1], device=device))
        (grad,) = torch.autograd.grad(loss, routing)
        assert not grad.any()
        assert loss.item() == pytest.approx(-math.log(eps) if eps > 0 else math.inf, rel=1e-6)
