"""segment → domain: sums, squares and counts, and their gradient, against plain torch in float64."""

import math

import pytest
import torch
from tolerances import assert_close, tolerance

from edl import ops, reference

NAN = math.nan


def make_segments(*leading, num_segments, num_experts, dtype=torch.float64, shared=False):
    """Sums of 0 to 5 tokens per segment, and their number."""
    counts = torch.randint(0, 6, (num_segments,) if shared else (*leading, num_segments))
    means = (torch.randn(*leading, num_segments, num_experts, dtype=torch.float64) * 2.5).softmax(dim=-1)
    return (means * counts.unsqueeze(-1)).to(dtype), counts.to(dtype)


def make_labels(num_segments, num_domains, kind):
    if kind.is_floating_point:
        weights = torch.rand(num_segments, num_domains, dtype=torch.float64)
        return (weights * (torch.rand(num_segments, num_domains) < 0.6)).to(kind)
    return torch.randint(-1, num_domains, (num_segments,), dtype=kind)


def differentiate(function, segment_sums, segment_counts, labels, num_domains, squares, weights):
    leaf = segment_sums.detach().requires_grad_()
    outputs = function(leaf, segment_counts, labels, num_domains, squares)
    value = sum((y * w).sum() for y, w in zip(outputs, weights, strict=False) if y.numel() > 0)
    (grad,) = torch.autograd.grad(value, leaf, allow_unused=True) if isinstance(value, torch.Tensor) else (None,)
    return [y.detach() for y in outputs], grad


def check(segment_sums, segment_counts, labels, num_domains, squares=True, device="cpu"):
    """Kernel against definition; returns the kernel's results."""
    segment_sums, segment_counts, labels = (x.to(device) for x in (segment_sums, segment_counts, labels))
    shape = (*segment_sums.shape[:-2], num_domains, segment_sums.shape[-1])
    weights = [torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2 if squares else 1)]
    actual, grad = differentiate(
        ops.domain_moments, segment_sums, segment_counts, labels, num_domains, squares, weights
    )
    expected, expected_grad = differentiate(
        reference.domain_moments, segment_sums.double(), segment_counts.double(), labels, num_domains, squares, weights
    )
    for y, wanted in zip(actual, expected, strict=True):
        assert y.dtype == torch.float64
        assert_close(y, wanted, tolerance(torch.float64, segment_sums.shape[-2]))
    if expected_grad is not None:
        assert grad.dtype == segment_sums.dtype
        assert_close(grad, expected_grad, tolerance(grad.dtype, 2 * num_domains))
    return (*actual, grad)


@pytest.mark.parametrize("squares", [False, True], ids=["sums", "squares"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_size(dtype, kind, squares, device):
    for num_segments, num_experts, num_domains in [
        *[
            (0, 5, 3),
            (1, 1, 1),
            (9, 5, 1),
            (40, 63, 4),
            (40, 64, 4),
            (40, 65, 4),
            (7, 200, 30),
            (300, 16, 3),
            (5, 2048, 2),
        ]
    ]:
        segments = make_segments(num_segments=num_segments, num_experts=num_experts, dtype=dtype)
        check(*segments, make_labels(num_segments, num_domains, kind), num_domains, squares, device)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own counts", "shared counts"])
@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3), (0,)], ids=str)
def test_layers(leading, shared, kind, device):
    segments = make_segments(*leading, num_segments=11, num_experts=70, dtype=torch.float32, shared=shared)
    check(*segments, make_labels(11, 4, kind), 4, True, device)


def test_layers_are_independent():
    sums, counts = make_segments(3, num_segments=11, num_experts=6)
    labels = make_labels(11, 4, torch.int64)
    together = ops.domain_moments(sums, counts, labels, 4, True)
    for layer in range(3):
        for all_layers, alone in zip(
            together, ops.domain_moments(sums[layer], counts[layer], labels, 4, True), strict=True
        ):
            assert all_layers[layer].equal(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layouts(dtype, device):
    sums, counts = make_segments(3, num_segments=11, num_experts=6, dtype=dtype)
    labels = make_labels(11, 4, torch.int64)
    soft = make_labels(11, 4, torch.float64)
    layouts = [
        (sums.transpose(0, 2).contiguous().transpose(0, 2), counts.t().contiguous().t(), labels),
        (sums.repeat_interleave(2, dim=-1)[..., ::2], counts, torch.stack([labels, labels + 9], dim=1)[:, 0]),
        (sums[:1].expand(3, 11, 6), counts[:1].expand(3, 11), soft.t().contiguous().t()),
        (sums[..., :1].expand(3, 11, 6), counts, soft[:1].expand(11, 4)),
        (torch._neg_view(-sums), counts, labels),
    ]
    for arguments in layouts:
        check(*arguments, 4, True, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.float64], ids=["ids", "weights"])
@pytest.mark.parametrize("garbage", [NAN, math.inf, 1e30])
def test_segments_that_are_not_counted_do_not_leak(garbage, kind, dtype, device):
    sums, counts = make_segments(num_segments=12, num_experts=9, dtype=dtype)
    labels = make_labels(12, 3, kind)
    labels[::4] = -1 if kind == torch.int64 else 0.0
    counts[1::4] = 0
    unused = (counts == 0) | ((labels == 0).all(dim=1) if kind.is_floating_point else labels < 0)
    sums[unused] = garbage
    *moments, grad = check(sums, counts, labels, 3, True, device)
    assert all(y.isfinite().all() for y in moments)
    assert not grad[unused].any()


def test_a_domain_of_zero_weight_does_not_see_a_nan(device):
    sums = torch.tensor([[0.2, 0.8], [NAN, 0.4]], device=device)
    counts = torch.ones(2, device=device)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], device=device)
    total, squares, _ = ops.domain_moments(sums, counts, weights, 3, True)
    for y in (total, squares):
        assert y[0].isfinite().all() and y[2].isfinite().all()
        assert y[1].isnan().tolist() == [True, False]


def test_a_counted_nan_and_a_count_of_nan_show(device):
    sums = torch.rand(3, 2, device=device)
    sums[1, 0] = NAN
    counts = torch.tensor([1.0, 1.0, NAN], device=device)
    total, _, weights = ops.domain_moments(sums, counts, torch.tensor([0, 1, 2], device=device), 4)
    assert total.isnan().tolist() == [[False, False], [True, False], [True, True], [False, False]]
    assert weights.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_parts_add_up_to_the_whole(device):
    """The seam for ranks and micro-batches: moments of parts of the segments are simply added."""
    sums, counts = make_segments(2, num_segments=50, num_experts=12)
    labels = make_labels(50, 5, torch.int64)
    whole = check(sums, counts, labels, 5, True, device)[:3]
    first = check(sums[:, :17], counts[:, :17], labels[:17], 5, True, device)[:3]
    second = check(sums[:, 17:], counts[:, 17:], labels[17:], 5, True, device)[:3]
    for all_of_it, a, b in zip(whole, first, second, strict=True):
        assert_close(a + b, all_of_it, tolerance(torch.float64, 50))


def test_gradients_through_one_output_only(device):
    sums, counts = (x.to(device) for x in make_segments(num_segments=8, num_experts=5))
    labels = make_labels(8, 3, torch.int64).to(device)
    for index in (0, 1):
        grads = []
        for function in (ops.domain_moments, reference.domain_moments):
            leaf = sums.clone().requires_grad_()
            (grad,) = torch.autograd.grad(function(leaf, counts, labels, 3, True)[index].square().sum(), leaf)
            grads.append(grad)
        assert_close(grads[0], grads[1], tolerance(torch.float64, 8))


# ---- what it refuses ----

SUMS = torch.rand(4, 5, generator=torch.Generator().manual_seed(3))
COUNTS = torch.ones(4)
LABELS = torch.tensor([0, 1, -1, 2])
WEIGHTS = torch.full((4, 3), 0.5)

SENTENCES = {
    "segment_sums must have the shape [..., S, E] (got 1 dimensions)": (SUMS[0], COUNTS, LABELS, 3),
    "segment_sums must be float32 or float64 (got BFloat16)": (SUMS.bfloat16(), COUNTS, LABELS, 3),
    "segment_counts must have the dtype of segment_sums (got Double and Float)": (SUMS, COUNTS.double(), LABELS, 3),
    "segment_counts must have the shape [S] or [..., S] of segment_sums (got 2 dimensions for 2)": (
        *(SUMS, COUNTS[None], LABELS, 3),
    ),
    "segment_counts must have one entry per segment of segment_sums (got [3] for [4, 5])": (
        SUMS,
        COUNTS[:3],
        LABELS,
        3,
    ),
    "segment_counts must have one entry per segment of segment_sums (got [2, 4] for [3, 4, 5])": (
        *(SUMS.expand(3, 4, 5), COUNTS.expand(2, 4), LABELS, 3),
    ),
    "num_domains must be at least 1 (got 0)": (SUMS, COUNTS, LABELS, 0),
    "labels must be ids [S] of int32 or int64, or weights [S, D] of a floating type (got 1 dimensions of Float)": (
        *(SUMS, COUNTS, LABELS.float(), 3),
    ),
    "labels must be ids [S] of int32 or int64, or weights [S, D] of a floating type (got 2 dimensions of Long)": (
        *(SUMS, COUNTS, LABELS[:, None], 3),
    ),
    "labels must be ids [S] of int32 or int64, or weights [S, D] of a floating type (got 1 dimensions of Short)": (
        *(SUMS, COUNTS, LABELS.short(), 3),
    ),
    "labels must have one row per segment (got 3 for 4 segments)": (SUMS, COUNTS, LABELS[:3], 3),
    "labels as weights must have one column per domain (got 3 for num_domains = 4)": (SUMS, COUNTS, WEIGHTS, 4),
    "labels as weights must be finite and at least 0 (got -0.5 for segment 0 and domain 0)": (
        SUMS,
        COUNTS,
        -WEIGHTS,
        3,
    ),
    "labels as weights must be finite and at least 0 (got inf for segment 0 and domain 0)": (
        SUMS,
        COUNTS,
        WEIGHTS / 0,
        3,
    ),
    "labels as weights must be finite and at least 0 (got nan for segment 0 and domain 0)": (
        SUMS,
        COUNTS,
        WEIGHTS * NAN,
        3,
    ),
    "all tensors must be on one device (got cpu, cpu and meta)": (SUMS, COUNTS, LABELS.to("meta"), 3),
    "all tensors must be on one device (got cpu, meta and cpu)": (SUMS, COUNTS.to("meta"), LABELS, 3),
    "segment_counts have no gradient (got segment_counts with requires_grad = True)": (
        *(SUMS, COUNTS.clone().requires_grad_(), LABELS, 3),
    ),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence):
    with pytest.raises(ValueError) as error:
        ops.domain_moments(*SENTENCES[sentence])
    assert str(error.value) == f"edl::domain_moments: {sentence}"


def test_weights_that_want_a_gradient_are_refused():
    with pytest.raises(ValueError, match="^edl::domain_moments: labels have no gradient"):
        ops.domain_moments(SUMS, COUNTS, WEIGHTS.clone().requires_grad_(), 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [3, -2, 2**31 - 1, 2**32 + 1, -(2**40)])
def test_a_label_outside_its_range(wrong, dtype):
    if dtype == torch.int32 and abs(wrong) >= 2**31:
        return
    labels = LABELS.clone().to(dtype)
    labels[2] = wrong
    with pytest.raises(IndexError) as error:
        ops.domain_moments(SUMS, COUNTS * 0, labels, 3)
    assert str(error.value) == (
        f"edl::domain_moments: labels must be at least -1 and below num_domains = 3 (got {wrong} for segment 2)"
    )


def test_the_backward_op_reads_no_gradient_of_another_shape():
    right = torch.rand(3, 5, dtype=torch.float64)
    none = torch.empty(0, dtype=torch.float64)
    backward = torch.ops.edl._domain_moments_backward
    assert backward(right, none, SUMS, COUNTS, LABELS).shape == SUMS.shape
    for sums, squares in [
        (right[:, :4], none),
        (right[0], none),
        (right.float(), none),
        (right, right[:, :4]),
        (right, right[:2]),
    ]:
        for device in ("cpu", "meta"):
            arguments = [x.to(device) for x in (sums, squares, SUMS, COUNTS, LABELS)]
            with pytest.raises(ValueError, match="edl::domain_moments: the gradients of sums and squares must"):
                backward(*arguments)


# ---- differentiation ----


@pytest.mark.parametrize("squares", [False, True])
def test_the_second_derivative_raises(squares):
    leaf = SUMS.double().requires_grad_()
    sums, squared, counts = ops.domain_moments(leaf, COUNTS.double(), LABELS, 3, squares)
    assert not counts.requires_grad and squared.requires_grad == squares
    (grad,) = torch.autograd.grad(sums.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for edl::_domain_moments_backward is not implemented"):
        grad.sum().backward()


def test_forward_mode_and_function_transforms_are_refused():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp is not implemented"):
        ops.domain_moments(torch.autograd.forward_ad.make_dual(SUMS, SUMS), COUNTS, LABELS, 3)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ops.domain_moments(x, COUNTS, LABELS, 3)[0].sum())(SUMS)
