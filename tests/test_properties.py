"""What must hold for every batch: order does not matter, copies do not matter, and sums can be cut anywhere."""

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import divergence_arguments
from tolerances import assert_close, tolerance

import edl
from edl import ops

EXAMPLES = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)

OPTIONS = st.sampled_from(
    [
        {},
        {"pair_reduction": "log_of_mean"},
        {"bias_correction": True},
        {"sequence_reduction": "token"},
        {"scores": "sigmoid"},
    ]
)


@st.composite
def batches(draw):
    """Logits [B, S_len, E] of realistic size, labels [B] of which some are -1, and a mask [B, S_len]."""
    num_sequences, length = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    num_experts, num_domains = draw(st.sampled_from([1, 2, 5, 8, 16, 33, 64])), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(num_sequences, length, num_experts, generator=generator) * draw(
        st.sampled_from([0.1, 1.0, 5.0])
    )
    labels = torch.randint(-1, num_domains, (num_sequences,), generator=generator)
    mask = torch.rand(num_sequences, length, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    return logits, labels, mask, num_domains, generator


def differentiate(logits, labels, mask, num_domains, options):
    leaf = logits.detach().requires_grad_()
    loss = edl.ExpertDivergenceLoss(num_domains, eps=1e-4, **options)(leaf, labels, attention_mask=mask)
    loss.backward()
    return loss.item(), leaf.grad


def assert_equal_up_to_rounding(actual, wanted):
    """A gradient is a difference of terms of about its own size, divided by a divergence of at least eps."""
    assert actual[0] == pytest.approx(wanted[0], rel=1e-4, abs=1e-5)
    assert_close(actual[1], wanted[1].double(), 1e-3, scale=1e-4)


@EXAMPLES
@given(batches(), OPTIONS)
def test_the_order_of_the_tokens_of_a_sequence_does_not_matter(batch, options):
    logits, labels, mask, num_domains, generator = batch
    order = torch.randperm(logits.shape[1], generator=generator)
    loss, grad = differentiate(logits[:, order], labels, mask[:, order], num_domains, options)
    assert_equal_up_to_rounding((loss, grad[:, order.argsort()]), differentiate(*batch[:4], options))


@EXAMPLES
@given(batches(), OPTIONS)
def test_the_order_of_the_sequences_does_not_matter(batch, options):
    logits, labels, mask, num_domains, generator = batch
    order = torch.randperm(len(labels), generator=generator)
    loss, grad = differentiate(logits[order], labels[order], mask[order], num_domains, options)
    assert_equal_up_to_rounding((loss, grad[order.argsort()]), differentiate(*batch[:4], options))


@EXAMPLES
@given(batches(), OPTIONS)
def test_the_order_of_the_experts_does_not_matter(batch, options):
    logits, labels, mask, num_domains, generator = batch
    order = torch.randperm(logits.shape[2], generator=generator)
    loss, grad = differentiate(logits[..., order], labels, mask, num_domains, options)
    assert_equal_up_to_rounding((loss, grad[..., order.argsort()]), differentiate(*batch[:4], options))


@EXAMPLES
@given(batches(), OPTIONS)
def test_the_names_of_the_domains_do_not_matter(batch, options):
    logits, labels, mask, num_domains, generator = batch
    names = torch.randperm(num_domains + 3, generator=generator)
    renamed = torch.where(labels < 0, -1, names[labels.clamp(min=0)])
    actual = differentiate(logits, renamed, mask, num_domains + 3, options)
    assert_equal_up_to_rounding(actual, differentiate(*batch[:4], options))


@EXAMPLES
@given(batches(), OPTIONS.filter(lambda options: "bias_correction" not in options))
def test_a_batch_twice_over_has_the_same_loss_and_half_the_gradient(batch, options):
    logits, labels, mask, num_domains, _ = batch
    loss, grad = differentiate(logits.repeat(2, 1, 1), labels.repeat(2), mask.repeat(2, 1), num_domains, options)
    both = grad[: len(labels)] + grad[len(labels) :]
    assert_equal_up_to_rounding((loss, both), differentiate(*batch[:4], options))


@EXAMPLES
@given(batches(), OPTIONS)
def test_a_shift_of_a_tokens_logits_does_not_matter_to_softmax(batch, options):
    logits, labels, mask, num_domains, generator = batch
    shift = torch.randn(*logits.shape[:2], 1, generator=generator) * 10
    options = {**options, "scores": "softmax"}
    actual = differentiate((logits.double() + shift).float(), labels, mask, num_domains, options)
    wanted = differentiate(logits, labels, mask, num_domains, options)
    assert_equal_up_to_rounding(actual, wanted)
    # So the gradient of a token's logits adds up to nothing.
    assert_close(
        wanted[1].double().sum(dim=-1),
        torch.zeros(logits.shape[:2]),
        tolerance(torch.float32, logits.shape[2]),
        scale=10.0,
    )


@EXAMPLES
@given(batches(), st.integers(0, 12), st.booleans())
def test_segments_cut_anywhere_add_up(batch, cut, bias_correction):
    """Both seams: tokens of a segment on two ranks, and segments of a domain on two ranks."""
    logits, labels, mask, num_domains, _ = batch
    ids = torch.where(mask, torch.arange(len(labels)).unsqueeze(1), -1)
    whole = ops.aggregate_routing(logits.double().flatten(0, 1), ids.flatten(), len(labels))
    parts = [
        ops.aggregate_routing(logits[:, part].double().flatten(0, 1), ids[:, part].flatten(), len(labels))
        for part in (slice(0, cut), slice(cut, None))
    ]
    for first, second, total in zip(*parts, whole, strict=True):
        assert_close(first + second, total, tolerance(torch.float64, logits.shape[1]))
    moments = ops.domain_moments(*whole, labels, num_domains, True)
    halves = [
        ops.domain_moments(whole[0][part], whole[1][part], labels[part], num_domains, True)
        for part in (slice(0, cut), slice(cut, None))
    ]
    for first, second, total in zip(*halves, moments, strict=True):
        assert_close(first + second, total, tolerance(torch.float64, len(labels)))
    added = [first + second for first, second in zip(*halves, strict=True)]
    actual, expected = (
        ops.expert_divergence(*divergence_arguments(*each, 1e-4, corrected=bias_correction))
        for each in (added, moments)
    )
    assert actual.item() == pytest.approx(expected.item(), rel=1e-9)


@EXAMPLES
@given(batches(), OPTIONS)
def test_the_loss_lies_between_its_bounds(batch, options):
    loss, grad = differentiate(*batch[:4], options)
    lowest = -torch.tensor(2.0).log().add(1e-4).log().item()
    assert loss == 0.0 or lowest * (1 - 1e-6) <= loss <= -torch.tensor(1e-4).log().item() * (1 + 1e-6)
    assert grad.isfinite().all()
    counted = batch[2] & (batch[1] >= 0).unsqueeze(1)
    assert not grad[~counted].any()


@EXAMPLES
@given(batches())
def test_divergences_are_a_matrix_of_squared_distances(batch):
    """The root of the Jensen-Shannon divergence is a metric."""
    logits, labels, mask, num_domains, _ = batch
    ids = torch.where(mask, torch.arange(len(labels)).unsqueeze(1), -1).flatten()
    segments = ops.aggregate_routing(logits.flatten(0, 1), ids, len(labels))
    moments, _, counts = ops.domain_moments(*segments, labels, num_domains)
    distances = ops.pairwise_divergence(moments, counts).sqrt()
    there = counts > 0
    distances = distances[there][:, there]
    assert distances.equal(distances.T) and not distances.diagonal().any()
    detours = (distances.unsqueeze(2) + distances.unsqueeze(0)).amin(dim=1) if len(distances) > 0 else distances
    assert (distances <= detours + 1e-9).all()
