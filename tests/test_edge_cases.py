"""The edge cases that every implementation of the loss has to decide, one by one, through the module."""

import math

import pytest
import torch
from oracle import paper_loss, softmax
from support import divergence_arguments
from tolerances import assert_close, tolerance

import edl
from edl import ops

B, S_LEN, E, D = 6, 10, 16, 3


@pytest.fixture
def logits(device):
    return torch.randn(B, S_LEN, E, device=device) * 2


def loss_and_gradient(logits, labels, num_domains=D, *, options=None, **masks):
    leaf = logits.detach().requires_grad_()
    loss = edl.ExpertDivergenceLoss(num_domains, **(options or {}))(leaf, labels.to(logits.device), **masks)
    assert loss.requires_grad
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
    return loss.item(), grad


def sequences(labels, kept=None):
    """Tokens as (sequence, domain), row by row."""
    return [
        (b, label) if label >= 0 and (kept is None or kept[b][s]) else None
        for b, label in enumerate(labels)
        for s in range(S_LEN)
    ]


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"pair_reduction": "log_of_mean"},
        {"sequence_reduction": "token"},
        {"bias_correction": True},
        {"scores": "sigmoid"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)


@OPTIONS
def test_1_one_domain_gives_zero_with_a_graph(options, logits):
    for labels, num_domains in (([1] * B, D), ([0] * B, 2), ([-1, -1, 2, -1, -1, 2], D), ([-1] * B, D)):
        loss, grad = loss_and_gradient(logits, torch.tensor(labels), num_domains, options=options)
        assert loss == 0.0 and not grad.any()


@OPTIONS
def test_2_absent_domains_do_not_count_as_pairs(options, logits):
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    few, few_grad = loss_and_gradient(logits, labels, 2, options=options)
    many, many_grad = loss_and_gradient(logits, labels * 500 + 3, 1000, options=options)
    assert few == pytest.approx(many, rel=1e-6) and few != 0.0
    assert_close(many_grad, few_grad.double(), tolerance(torch.float32, B * S_LEN))


def test_3_padding_is_left_out_and_a_padded_sequence_drops_out(logits):
    kept = torch.ones(B, S_LEN, dtype=torch.bool)
    kept[0, 4:], kept[2, 1:], kept[3, :6], kept[5, :] = False, False, False, False
    labels = [0, 1, 2, 0, 1, 2]
    hostile = logits.clone()
    hostile[~kept] = math.nan
    loss, grad = loss_and_gradient(hostile, torch.tensor(labels), attention_mask=kept.to(logits.device))
    expected = paper_loss(softmax(logits).flatten(0, 1).cpu(), sequences(labels, kept))
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert not grad[~kept].any() and grad[kept].any(dim=-1).all()
    without, _ = loss_and_gradient(logits, torch.tensor([*labels[:5], -1]), attention_mask=kept.to(logits.device))
    assert loss == without


@OPTIONS
def test_3_everything_padded(options, logits):
    mask = torch.zeros(B, S_LEN, device=logits.device)
    hostile = torch.full_like(logits, math.nan)
    loss, grad = loss_and_gradient(hostile, torch.tensor([0, 1, 2] * 2), options=options, attention_mask=mask)
    assert loss == 0.0 and not grad.any()


def test_4_packed_documents(device):
    """Documents of length 1, 0, 9, 4 and 3 behind each other, and two tokens of padding."""
    boundaries = [0, 1, 1, 10, 14, 17]
    labels = [2, 1, 0, 2, 0]
    packed = torch.randn(19, E, device=device)
    tokens = [(n, label) for n, label in enumerate(labels) for _ in range(boundaries[n + 1] - boundaries[n])]
    hostile = packed.clone()
    hostile[17:] = math.nan
    expected = paper_loss(softmax(packed).cpu(), [*tokens, None, None]).item()
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor(boundaries, dtype=dtype, device=device)
        loss, grad = loss_and_gradient(hostile, torch.tensor(labels), cu_seqlens=cu_seqlens)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert not grad[17:].any() and grad[:17].any(dim=-1).all()
        again, _ = loss_and_gradient(hostile[None], torch.tensor(labels), cu_seqlens=cu_seqlens)
        assert again == loss


def test_4_documents_of_several_domains(device):
    labels = torch.tensor([0, 0, 1, 2, 2, 2, -1, 0, 1, 1])
    packed = torch.randn(10, E, device=device)
    rows = [0] * 4 + [1] * 6
    expected = paper_loss(softmax(packed).cpu(), list(zip(rows, labels.tolist(), strict=True))).item()
    loss, grad = loss_and_gradient(packed, labels, cu_seqlens=torch.tensor([0, 4, 10], device=device))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert not grad[6].any()


@pytest.mark.parametrize("sequence_reduction", ["sequence", "token"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
def test_5_unlabelled_sequences_and_tokens_do_not_leak(bad, sequence_reduction, logits):
    options = {"sequence_reduction": sequence_reduction}
    labels = torch.tensor([0, -1, 1, 2, -1, 0])
    per_token = labels.unsqueeze(1).expand(B, S_LEN)
    hostile = logits.clone()
    hostile[labels < 0] = bad
    expected = paper_loss(softmax(logits).flatten(0, 1).cpu(), sequences(labels.tolist())).item()
    forms = [(hostile, labels, {}), (hostile, per_token, {}), (hostile.flatten(0, 1), labels, {})]
    cu_seqlens = torch.arange(B + 1, device=logits.device) * S_LEN
    forms += [(hostile.flatten(0, 1), form, {"cu_seqlens": cu_seqlens}) for form in (labels, per_token.flatten())]
    if sequence_reduction == "sequence":
        soft = torch.nn.functional.one_hot(labels + 1, D + 1)[:, 1:].float()
        forms += [(hostile, soft, {}), (hostile.flatten(0, 1), soft, {"cu_seqlens": cu_seqlens})]
    for routing, form, packing in forms:
        loss, grad = loss_and_gradient(routing, form, options=options, **packing)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert grad.isfinite().all() and not grad.view(B, S_LEN, E)[labels < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_6_probabilities_that_underflow(dtype, device):
    """Domains that use different experts, with logits so far apart that the others' probabilities are 0."""
    logits = torch.zeros(B, S_LEN, E, dtype=dtype, device=device)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for b, label in enumerate(labels.tolist()):
        logits[b, :, label * 5 : label * 5 + 2] = 2000.0
    loss, grad = loss_and_gradient(logits, labels)
    assert loss == pytest.approx(-math.log(math.log(2) + 1e-6), rel=1e-6)
    assert grad.isfinite().all()


def test_6_probabilities_of_zero(device):
    probabilities = torch.zeros(4, 3, E, device=device)
    probabilities[:2, :, 0] = 1.0
    probabilities[2:, :, 0], probabilities[2:, :, 1] = 0.5, 0.5
    loss, grad = loss_and_gradient(probabilities, torch.tensor([0, 0, 1, 1]), 2, options={"input": "probs"})
    tokens = [(b, b // 2) for b in range(4) for _ in range(3)]
    assert loss == pytest.approx(paper_loss(probabilities.double().flatten(0, 1).cpu(), tokens).item(), rel=1e-6)
    assert grad.isfinite().all()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_7_sixteen_bit_logits_of_large_magnitude(dtype, scores, device):
    logits = (torch.randn(B, S_LEN, E, device=device) * 3e3).to(dtype)
    labels = torch.tensor([0, 1, 2] * 2)
    loss, grad = loss_and_gradient(logits, labels, options={"scores": scores})
    expected, expected_grad = loss_and_gradient(logits.double(), labels, options={"scores": scores})
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grad.dtype == dtype and grad.isfinite().all()
    assert_close(grad, expected_grad, tolerance(dtype, E), scale=1e-4)


def test_8_parts_of_a_batch_add_up_at_the_second_seam(logits):
    """Moments of micro-batches or ranks are summed before the loss, which is not the mean of their losses."""
    labels = torch.tensor([0, 1, 2, 2, 0, 1], device=logits.device)

    def moments(part):
        ids = torch.arange(len(labels[part]), device=logits.device).repeat_interleave(S_LEN)
        sums, counts = ops.aggregate_routing(logits[part].flatten(0, 1), ids, len(labels[part]))
        return ops.domain_moments(sums, counts, labels[part], D, True)

    def loss(moments, **options):
        return ops.expert_divergence(*divergence_arguments(*moments, **options))

    whole = loss(moments(slice(0, 6)), corrected=True)
    first, second = moments(slice(0, 2)), moments(slice(2, 6))
    added = loss([a + b for a, b in zip(first, second, strict=True)], corrected=True)
    assert_close(added, whole, tolerance(torch.float64, E))
    assert abs(loss(first).item() / 2 + loss(second).item() / 2 - whole.item()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_9_halves_of_sequences_add_up_at_the_first_seam(dtype, logits):
    """Tokens of one sequence on two ranks: their segment sums and counts are added."""
    routing = logits.to(dtype)
    ids = torch.arange(B, dtype=torch.int32, device=logits.device).repeat_interleave(S_LEN)
    early = (torch.arange(B * S_LEN, device=logits.device) % S_LEN) < 4
    whole = ops.aggregate_routing(routing.flatten(0, 1), ids, B)
    parts = [ops.aggregate_routing(routing.flatten(0, 1)[part], ids[part], B) for part in (early, ~early)]
    assert parts[0][1].tolist() == [4] * B and parts[1][1].tolist() == [6] * B
    for a, b, total in zip(*parts, whole, strict=True):
        assert_close(a + b, total, tolerance(dtype, S_LEN))
    labels = torch.tensor([0, 1, 2] * 2, device=logits.device)
    sums, counts = (a + b for a, b in zip(*parts, strict=True))
    moments, _, segments = ops.domain_moments(sums, counts, labels, D)
    loss = ops.expert_divergence(moments, segments)
    assert loss.item() == pytest.approx(edl.ExpertDivergenceLoss(D)(routing, labels).item(), rel=1e-6)


def test_10_sequences_of_different_length_weigh_the_same_or_by_their_tokens(logits):
    lengths = [1, 9, 10, 2, 7, 3]
    labels = [0, 0, 1, 1, 2, 2]
    kept = torch.arange(S_LEN) < torch.tensor(lengths).unsqueeze(1)
    probabilities = softmax(logits).flatten(0, 1).cpu()
    by_sequence = sequences(labels, kept)
    by_token = [None if token is None else ((row, token[0]), token[1]) for row, token in enumerate(by_sequence)]
    losses = {}
    for reduction, tokens in (("sequence", by_sequence), ("token", by_token)):
        losses[reduction], _ = loss_and_gradient(
            *(logits, torch.tensor(labels)),
            options={"sequence_reduction": reduction},
            attention_mask=kept.to(logits.device),
        )
        assert losses[reduction] == pytest.approx(paper_loss(probabilities, tokens).item(), rel=1e-6)
    assert abs(losses["sequence"] - losses["token"]) > 1e-3
    equal = [loss_and_gradient(logits, torch.tensor(labels), options={"sequence_reduction": r})[0] for r in losses]
    assert equal[0] == pytest.approx(equal[1], rel=1e-6)


# ---- sizes ----


@OPTIONS
@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (4, 0)], ids=str)
def test_empty_batch(shape, options, device):
    labels = torch.arange(shape[0]) % D
    for dtype in (torch.int32, torch.int64):
        loss, grad = loss_and_gradient(torch.randn(*shape, E, device=device), labels.to(dtype), options=options)
        assert loss == 0.0 and grad.shape == (*shape, E)
        flat, _ = loss_and_gradient(torch.randn(0, E, device=device), labels.to(dtype), options=options)
        assert flat == 0.0


def test_empty_packed_batch(device):
    for boundaries in ([0], [0, 0, 0]):
        labels = torch.zeros(len(boundaries) - 1, dtype=torch.int64)
        loss, grad = loss_and_gradient(
            torch.randn(0, E, device=device), labels, cu_seqlens=torch.tensor(boundaries, device=device)
        )
        assert loss == 0.0 and grad.shape == (0, E)


def test_a_thousand_domains(device):
    logits = torch.randn(1200, 2, 8, device=device)
    labels = torch.arange(1200) % 1000
    labels[5] = -1
    loss, grad = loss_and_gradient(logits, labels, 1000)
    means = torch.zeros(1000, 8, dtype=torch.float64).index_add(
        0, labels.clamp(min=0), softmax(logits).mean(dim=1).cpu()
    )
    means[0] -= softmax(logits)[5].mean(dim=0).cpu()
    p = means / means.sum(dim=1, keepdim=True)
    p = p[p.isfinite().all(dim=1)]
    pairs = torch.combinations(torch.arange(len(p)))
    a, b = p[pairs[:, 0]], p[pairs[:, 1]]
    m = (a + b) / 2
    divergences = (a * (a / m).log() + b * (b / m).log()).sum(dim=1) / 2
    assert loss == pytest.approx(-(divergences + 1e-6).log().mean().item(), rel=1e-6)
    assert grad.isfinite().all() and not grad[5].any()


@OPTIONS
def test_one_expert_has_nothing_to_separate(options, device):
    loss, grad = loss_and_gradient(
        torch.randn(B, S_LEN, 1, device=device), torch.tensor([0, 1, 2] * 2), options=options
    )
    assert loss == pytest.approx(-math.log(1e-6), rel=1e-5)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_2048_experts(dtype, device):
    logits = torch.randn(B, S_LEN, 2048, device=device, dtype=torch.float64).to(dtype)
    labels = [0, 1, 2] * 2
    loss, grad = loss_and_gradient(logits, torch.tensor(labels))
    leaf = logits.double().cpu().requires_grad_()
    expected = paper_loss(softmax(leaf).flatten(0, 1), sequences(labels))
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close(grad, expected_grad, tolerance(dtype, 2048))


def test_one_token(device):
    loss, grad = loss_and_gradient(torch.randn(1, E, device=device), torch.tensor([0]))
    assert loss == 0.0 and not grad.any()
