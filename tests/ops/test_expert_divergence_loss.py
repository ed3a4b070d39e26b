"""The loss as one step of autograd: equal to its three operators one after another, and as strict as they are."""

import pytest
import torch
from support import divergence_arguments
from tolerances import assert_close, tolerance

from edl import ops
from edl.reduction.share import share

LOSS = torch.ops.edl.expert_divergence_loss.default
SEGMENTS, DOMAINS, EXPERTS, TOKENS = 9, 3, 7, 60


def arguments(num_layers=2, dtype=torch.float64, soft=False, by_token=False, **options):
    """Arguments by position; tokens in any order, some not counted, one segment without a label."""
    segment_ids = torch.randint(-1, DOMAINS if by_token else SEGMENTS, (TOKENS,))
    labels = torch.arange(SEGMENTS) % DOMAINS
    labels[4] = -1
    given = {
        "layers": [(torch.randn(TOKENS, EXPERTS, dtype=torch.float64) * 2.5).to(dtype) for _ in range(num_layers)],
        "segment_ids": segment_ids,
        "num_segments": DOMAINS if by_token else SEGMENTS,
        "labels": torch.rand(SEGMENTS, DOMAINS) if soft else labels,
        "num_domains": DOMAINS,
        "eps": 1e-4,
        "scores": "softmax",
        "sequence_reduction": "token" if by_token else "sequence",
        "pair_reduction": "mean_of_logs",
        "layer_reduction": "mean",
        "bias_correction": False,
    }
    return list((given | options).values())


def moments_of(sums, counts, labels, num_domains, sequence_reduction, corrected):
    if sequence_reduction == "token":  # the segments are the domains
        return sums.double(), sums.new_empty(0).double(), counts.double().expand(len(sums), num_domains)
    return ops.domain_moments(sums, counts, labels, num_domains, corrected)


def one_after_another(
    layers, ids, num_segments, labels, num_domains, eps, scores, sequence_reduction, pairs, layer_reduction, corrected
):
    parts = [ops.aggregate_routing(layer, ids, num_segments, scores) for layer in layers]
    sums, counts = torch.stack([sums for sums, _ in parts]), parts[0][1]
    moments = moments_of(sums, counts, labels, num_domains, sequence_reduction, corrected)
    loss = ops.expert_divergence(*divergence_arguments(*moments, eps, pairs, corrected)).to(sums.dtype)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[layer_reduction]()


FORMS = {
    "one-layer": {"num_layers": 1},
    "one-layer-none": {"num_layers": 1, "layer_reduction": "none"},
    "mean": {},
    "sum": {"layer_reduction": "sum"},
    "none": {"num_layers": 3, "layer_reduction": "none"},
    "sigmoid": {"scores": "sigmoid"},
    "log-of-mean": {"pair_reduction": "log_of_mean"},
    "bias-correction": {"bias_correction": True},
    "soft": {"soft": True},
    "by-token": {"by_token": True},
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
}


def differentiate(function, given):
    layers = [layer.detach().requires_grad_(True) for layer in given[0]]
    loss = function(layers, *given[1:])
    weights = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view_as(loss)
    return loss.detach(), torch.autograd.grad(loss, layers, weights)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_its_operators_one_after_another(form):
    given = arguments(**form)
    loss, grads = differentiate(LOSS, given)
    expected, expected_grads = differentiate(one_after_another, given)
    assert loss.equal(expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.abs().max() > 0
        assert_close(grad, wanted, tolerance(given[0][0].dtype, 1))
    with torch.no_grad():
        assert LOSS(*given).equal(loss)


def of_moments(
    layers, ids, num_segments, labels, num_domains, eps, scores, sequence_reduction, pairs, layer_reduction, corrected
):
    """In the steps between which ranks and micro-batches add their parts; the gradient eight times as large."""
    sums, counts = torch.ops.edl._segment_sums(layers, ids, num_segments, scores, "edl::expert_divergence_loss")
    parts = moments_of(sums, counts, labels, num_domains, sequence_reduction, corrected)
    row = torch.cat([part.detach().flatten() for part in parts])
    shared = share(parts, row, 2.0, torch.tensor(4.0).double())
    loss = ops.expert_divergence(*divergence_arguments(*shared, eps, pairs, corrected)).to(sums.dtype)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[layer_reduction]()


@pytest.mark.parametrize("function", [LOSS, of_moments], ids=["loss", "of-moments"])
@pytest.mark.parametrize("strides", ["contiguous", "sequence-first", "wider"])
def test_routing_of_a_batch_is_its_rows(function, strides):
    given = arguments()
    rows = [layer.view(5, 12, EXPERTS) for layer in given[0]]
    if strides == "sequence-first":
        batch = [layer.transpose(0, 1).contiguous().transpose(0, 1) for layer in rows]
    elif strides == "wider":
        batch = [torch.full((5, 12, EXPERTS + 3), torch.nan).double()[..., 1:-2].copy_(layer) for layer in rows]
    else:
        batch = rows
    loss, grads = differentiate(function, given)
    actual, batch_grads = differentiate(function, [batch, *given[1:]])
    assert actual.equal(loss)
    assert all(grad.equal(rows.view(5, 12, EXPERTS)) for grad, rows in zip(batch_grads, grads, strict=True))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_loss_of_its_moments(form):
    given = arguments(**form)
    loss, grads = differentiate(LOSS, given)
    actual, larger = differentiate(of_moments, given)
    assert actual.equal(loss)
    for multiple, grad in zip(larger, grads, strict=True):
        assert_close(multiple / 8, grad, tolerance(given[0][0].dtype, 1))


@pytest.mark.parametrize("name", ["one-layer", "none", "sigmoid", "log-of-mean", "soft", "by-token"])
def test_gradient_is_the_derivative(name):
    given = arguments(**FORMS[name])
    layers = [layer.requires_grad_(True) for layer in given[0]]
    assert torch.autograd.gradcheck(lambda *layers: LOSS(list(layers), *given[1:]), layers)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_opcheck(form):
    given = arguments(**form)
    given[0] = [layer.requires_grad_(True) for layer in given[0]]
    torch.library.opcheck(LOSS, given)


def test_only_layers_with_a_gradient_get_one():
    given = arguments(num_layers=3)
    given[0][1].requires_grad_(True)
    LOSS(*given).backward()
    assert [layer.grad is not None for layer in given[0]] == [False, True, False]


def test_keeps_the_routing_the_ids_and_one_matrix_per_layer():
    given = arguments(num_layers=1, layer_reduction="mean")
    leaf = given[0][0].requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        LOSS(*given)
    others = [x for x in kept if x.data_ptr() not in (leaf.data_ptr(), given[1].data_ptr())]
    assert [x.shape for x in others] == [(SEGMENTS, EXPERTS)]


def test_second_derivatives_and_tangents_are_refused():
    given = arguments(num_layers=1)
    leaf = given[0][0].requires_grad_(True)
    (grad,) = torch.autograd.grad(LOSS(*given), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grad.sum(), leaf)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        given[0] = [torch.autograd.forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf))]
        LOSS(*given)


REFUSALS = [
    ({"layers": []}, "layers must hold at least one tensor (got an empty list)"),
    ({"sequence_reduction": "tokens"}, "sequence_reduction must be 'sequence' or 'token' (got 'tokens')"),
    ({"layer_reduction": "max"}, "layer_reduction must be 'mean', 'sum' or 'none' (got 'max')"),
    (
        {"by_token": True, "bias_correction": True},
        (
            "bias_correction needs sequence_reduction = 'sequence' and pair_reduction = 'mean_of_logs' "
            "(got 'token' and 'mean_of_logs')"
        ),
    ),
    ({"eps": -1.0}, "eps must be finite and not negative (got -1)"),
    ({"pair_reduction": "mean"}, "pair_reduction must be 'mean_of_logs' or 'log_of_mean' (got 'mean')"),
    ({"scores": "tanh"}, "scores must be 'softmax', 'sigmoid' or 'none' (got 'tanh')"),
    ({"num_segments": -1}, "num_segments must not be negative (got -1)"),
    (
        {"segment_ids": torch.zeros(5, dtype=torch.int64)},
        "segment_ids must have one entry per row of routing (got 5 ids for 60 rows)",
    ),
    ({"segment_ids": torch.zeros(TOKENS)}, "segment_ids must be int32 or int64 (got Float)"),
    ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels must have one row per segment (got 4 for 9 segments)"),
    (
        {"labels": torch.zeros(SEGMENTS, 2)},
        "labels as weights must have one column per domain (got 2 for num_domains = 3)",
    ),
    ({"labels": torch.zeros(SEGMENTS).to("meta").long()}, "all tensors must be on one device (got cpu, cpu and meta)"),
    (
        {"layers": [torch.randn(TOKENS, 4), torch.randn(TOKENS, 5)]},
        "all layers must have one shape, type and device (got [60, 4] Float on cpu and [60, 5] Float on cpu)",
    ),
    (
        {"layers": [torch.randn(TOKENS, 4), torch.randn(TOKENS, 4).double()]},
        "all layers must have one shape, type and device (got [60, 4] Float on cpu and [60, 4] Double on cpu)",
    ),
    (
        {"by_token": True, "num_segments": 5},
        "with sequence_reduction = 'token' the segments are the domains (got 5 segments and num_domains = 3)",
    ),
    ({"num_domains": 1}, "num_domains must be at least 2, or there is no pair to push apart (got 1)"),
    (
        {"soft": True, "bias_correction": True},
        "bias_correction needs one label per segment (got labels of 2 dimensions)",
    ),
    (
        {"layers": [torch.randn(TOKENS)]},
        "layers must have the shape [T, E] or [B, S_len, E] (got 1 dimensions)",
    ),
]


@pytest.mark.parametrize("options, sentence", REFUSALS, ids=[sentence[:30] for _, sentence in REFUSALS])
def test_refusals(options, sentence):
    with pytest.raises(ValueError) as error:
        LOSS(*arguments(**options))
    assert str(error.value) == f"edl::expert_divergence_loss: {sentence}"


def test_labels_have_no_gradient():
    given = arguments(soft=True)
    given[3].requires_grad_(True)
    with pytest.raises(ValueError, match="^edl::expert_divergence_loss: labels have no gradient"):
        LOSS(*given)
