"""Numbers computed by hand from the formulas in double precision: what no change of the code may move."""

import pytest
import torch

import edl
from edl import ops

# Three domains of one sequence and one token each, eps = 1e-8.
DISTRIBUTIONS = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]]
DIVERGENCES = {(0, 1): 0.25310161544280674, (0, 2): 0.08429375012029298, (1, 2): 0.08429375012029298}
MEAN_OF_LOGS = 2.1069530208645078
LOG_OF_MEAN = 1.9620992
GRADIENT = [
    [-1.0337824041, 0.8016906343, 2.2833699002],
    [2.2833699002, 0.8016906343, -1.0337824041],
    [0.2083201167, -1.1376171144, 0.2083201167],
]

# Segments of two domains, eps = 1e-6.
SEGMENTS = [[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7], [0.3, 0.1, 0.6]]
LABELS = [0, 0, 0, 1, 1]
DIVERGENCE, BIAS, LOSS = 0.10865944275186902, 0.009718331777155306, 2.21952746321338
PLAIN_GRADIENT = [[-0.5470787941, -0.4412554455, 1.1561579407]] * 3 + [[1.2875333786, 0.9328719308, -0.9775480000]] * 2
CORRECTED_GRADIENT = [
    [-0.4207564741, -0.4253090216, 0.9727410549],
    [-0.5213214779, -0.5817434719, 1.1383775317],
    [-0.6218864816, -0.2688745713, 1.0555592933],
    [0.8514051706, 1.0605214681, -0.7815940292],
    [1.4547951931, 0.5912181173, -1.0300487444],
]

DTYPES = pytest.mark.parametrize(
    "dtype, allowed", [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


def module_loss(rows, labels, dtype, **options):
    """Loss and gradient of one-token sequences given as probabilities [B, 1, E]."""
    probabilities = torch.tensor(rows, dtype=dtype).unsqueeze(1).requires_grad_()
    loss = edl.ExpertDivergenceLoss(max(labels) + 1, input="probs", **options)(probabilities, torch.tensor(labels))
    loss.backward()
    return loss.item(), probabilities.grad.squeeze(1)


def moments_of(rows, labels, dtype):
    sums = torch.tensor(rows, dtype=dtype).requires_grad_()
    counts = torch.ones(len(rows), dtype=dtype)
    return sums, ops.domain_moments(sums, counts, torch.tensor(labels), max(labels) + 1, True)


def assert_near(actual, expected, allowed):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=allowed, atol=allowed)


@DTYPES
def test_loss_and_gradient(dtype, allowed):
    loss, grad = module_loss(DISTRIBUTIONS, [0, 1, 2], dtype, eps=1e-8)
    assert loss == pytest.approx(MEAN_OF_LOGS, abs=allowed)
    assert_near(grad, GRADIENT, allowed)


@DTYPES
def test_log_of_mean(dtype, allowed):
    loss, grad = module_loss(DISTRIBUTIONS, [0, 1, 2], dtype, eps=1e-8, pair_reduction="log_of_mean")
    assert loss == pytest.approx(LOG_OF_MEAN, abs=1e-7)  # given to seven digits
    mean = sum(DIVERGENCES.values()) / 3
    assert loss == pytest.approx(-torch.tensor(mean + 1e-8, dtype=torch.float64).log().item(), abs=allowed)
    # dD/dp = log(p / m) / 2, over three pairs and their mean.
    p = torch.tensor(DISTRIBUTIONS, dtype=torch.float64)
    slopes = torch.stack([sum((p[j] * 2 / (p[j] + p[k])).log() / 2 for k in range(3) if k != j) for j in range(3)])
    assert_near(grad, (-slopes / 3 / (mean + 1e-8)).tolist(), allowed)


@DTYPES
def test_pairwise_divergence(dtype, allowed):
    _, moments = moments_of(DISTRIBUTIONS, [0, 1, 2], dtype)
    sums, _, counts = (x.detach() for x in moments)
    matrix = ops.pairwise_divergence(sums, counts)
    for (j, k), expected in DIVERGENCES.items():
        assert matrix[j, k].item() == pytest.approx(expected, abs=allowed)
        assert matrix[k, j].item() == matrix[j, k].item()


@DTYPES
def test_gradient_without_correction(dtype, allowed):
    loss, grad = module_loss(SEGMENTS, LABELS, dtype)
    assert loss == pytest.approx(LOSS, abs=allowed)
    assert_near(grad, PLAIN_GRADIENT, allowed)


@DTYPES
def test_gradient_with_correction_row_by_row(dtype, allowed):
    loss, grad = module_loss(SEGMENTS, LABELS, dtype, bias_correction=True)
    assert loss == pytest.approx(LOSS, abs=allowed)
    assert_near(grad, CORRECTED_GRADIENT, allowed)


@DTYPES
def test_divergence_and_bias(dtype, allowed):
    _, moments = moments_of(SEGMENTS, LABELS, dtype)
    sums, squares, counts = (x.detach() for x in moments)
    assert ops.pairwise_divergence(sums, counts)[0, 1].item() == pytest.approx(DIVERGENCE, abs=allowed)
    assert ops.pairwise_divergence(sums, counts, squares)[0, 1].item() == pytest.approx(DIVERGENCE - BIAS, abs=allowed)
