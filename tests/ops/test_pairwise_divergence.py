"""The matrix of divergences against plain torch in float64, and against the textbook formula."""

import math

import pytest
import torch
from oracle import LOG_2, textbook_divergence
from tolerances import assert_close, tolerance

from edl import ops, reference


def make_moments(*leading, num_domains, num_experts, absent=()):
    segments = (torch.randn(*leading, num_domains, 4, num_experts, dtype=torch.float64) * 2).softmax(dim=-1)
    counts = torch.randint(1, 5, (*leading, num_domains)).double()
    for domain in absent:
        counts[..., domain] = 0
    used = (torch.arange(4) < counts.unsqueeze(-1)).unsqueeze(-1)
    return (segments * used).sum(dim=-2), counts, (segments.square() * used).sum(dim=-2)


@pytest.mark.parametrize("bias_correction", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("num_domains, num_experts", [(0, 4), (1, 4), (2, 1), (5, 9), (20, 64)])
def test_every_size(num_domains, num_experts, leading, bias_correction, device):
    moments = make_moments(*leading, num_domains=num_domains, num_experts=num_experts)
    moments = moments if bias_correction else moments[:2]
    actual = ops.pairwise_divergence(*(x.to(device) for x in moments))
    assert actual.shape == (*leading, num_domains, num_domains) and actual.dtype == torch.float64
    if actual.numel() > 0:
        expected = reference.pairwise_divergence(*moments)
        assert_close(actual, expected, tolerance(torch.float64, num_experts), scale=1e-2)
    torch.testing.assert_close(actual, actual.mT, rtol=0, atol=0, equal_nan=True)


def test_textbook(device):
    sums, counts, _ = make_moments(num_domains=6, num_experts=11)
    actual = ops.pairwise_divergence(sums.to(device), counts.to(device))
    means = sums / counts.unsqueeze(-1)
    expected = torch.stack([torch.stack([textbook_divergence(p, q) for q in means]) for p in means])
    assert_close(actual, expected, 1e-13)
    assert not actual.diagonal().any()
    assert (actual >= 0).all() and (actual <= LOG_2 * (1 + 1e-15)).all()


@pytest.mark.parametrize("bias_correction", [False, True], ids=["plain", "corrected"])
def test_domains_without_an_estimate_are_nan(bias_correction, device):
    sums, counts, squares = make_moments(num_domains=4, num_experts=6)
    counts[:] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    there = (counts >= (2 if bias_correction else 1)).float()
    actual = ops.pairwise_divergence(
        sums.to(device), counts.to(device), squares.to(device) if bias_correction else None
    )
    assert actual.isfinite().cpu().equal(torch.outer(there, there).bool())


def test_a_nan_shows_in_its_row_and_column_alone(device):
    sums, counts, _ = (x.to(device) for x in make_moments(num_domains=4, num_experts=6))
    sums[2, 5] = math.nan
    wrong = ops.pairwise_divergence(sums, counts).isnan()
    off_diagonal = [(j, k) for j in range(4) for k in range(4) if j != k]
    assert all(wrong[j, k].item() == (2 in (j, k)) for j, k in off_diagonal)


def test_correction_is_not_clamped(device):
    """Domains of one distribution: what is left after the correction is around zero, on both sides of it."""
    segments = torch.randn(40, 6, 12, dtype=torch.float64).mul(0.3).softmax(dim=-1)
    counts = torch.full((40,), 6.0, dtype=torch.float64)
    moments = [x.to(device) for x in (segments.sum(1), counts, segments.square().sum(1))]
    pairs = torch.ones(40, 40, device=device).triu(1).bool()
    corrected = ops.pairwise_divergence(*moments)[pairs]
    plain = ops.pairwise_divergence(*moments[:2])[pairs]
    assert (corrected < 0).any() and (corrected > 0).any()
    assert corrected.mean().abs() < 0.1 * plain.mean()


def test_layouts(device):
    moments = make_moments(3, num_domains=4, num_experts=9)
    expected = ops.pairwise_divergence(*(x.to(device) for x in moments))
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1).to(device) for x in moments]
    assert ops.pairwise_divergence(*strided).equal(expected)


SUMS = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
COUNTS = torch.full((3,), 2.0, dtype=torch.float64)

SENTENCES = {
    "sums must have the shape [..., D, E] (got 1 dimensions)": (SUMS[0], COUNTS),
    "sums and counts must be float64 (got Float and Double)": (SUMS.float(), COUNTS),
    "counts must have the shape [..., D] of sums (got 2 dimensions for 2)": (SUMS, COUNTS[None]),
    "counts must have one entry per domain of sums (got [2] for [3, 5])": (SUMS, COUNTS[:2]),
    "all tensors must be on one device (got cpu and meta)": (SUMS, COUNTS.to("meta")),
    "squares must have the shape of sums (got [2, 5] for [3, 5])": (SUMS, COUNTS, SUMS[:2]),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence):
    with pytest.raises(ValueError) as error:
        ops.pairwise_divergence(*SENTENCES[sentence])
    assert str(error.value) == f"edl::pairwise_divergence: {sentence}"


def test_it_has_no_gradient():
    result = ops.pairwise_divergence(SUMS.clone().requires_grad_(), COUNTS)
    with pytest.raises(RuntimeError, match="derivative for edl::pairwise_divergence is not implemented"):
        result.sum().backward()
