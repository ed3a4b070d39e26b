"""ExpertDivergenceLoss: every form of input gives the paper's loss, and every wrong one a sentence."""

import copy
import io
import itertools
import math
import pickle

import numpy
import pytest
import torch
from oracle import normalised_sigmoid, paper_loss, softmax
from tolerances import assert_close, tolerance

import edl
from edl import ExpertDivergenceLoss, expert_divergence_loss

NAN = math.nan
B, S_LEN, E, D = 8, 12, 20, 3
LABELS = torch.tensor([0, 1, 2, 0, 2, 1, -1, 0])
TOKENS = [(b, label) for b, label in enumerate(LABELS.tolist()) for _ in range(S_LEN)]
RANDOM = torch.Generator().manual_seed(5)
LOGITS = torch.randn(B, S_LEN, E, generator=RANDOM) * 2
CU_SEQLENS = torch.arange(B + 1) * S_LEN


def loss_and_gradient(logits, *labels_and_masks, options=None, **masks):
    leaf = logits.detach().requires_grad_()
    loss = ExpertDivergenceLoss(D, **(options or {}))(leaf, *labels_and_masks, **masks)
    loss.backward()
    return loss.detach(), leaf.grad


def expected(logits=LOGITS, scores=softmax, tokens=TOKENS, **options):
    leaf = logits.double().detach().requires_grad_()
    loss = paper_loss(scores(leaf).flatten(0, -2), tokens, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_same(actual, wanted, dtype=torch.float32):
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual[0].item() == pytest.approx(wanted[0].item(), rel=2e-6 if dtype != torch.float64 else 1e-12)
    assert_close(actual[1].reshape(wanted[1].shape), wanted[1], tolerance(dtype, S_LEN * E))


# ---- the paper's loss ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pair_reduction", ["mean_of_logs", "log_of_mean"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_the_loss_of_the_paper(eps, scores, pair_reduction, dtype):
    logits = LOGITS.to(dtype)
    options = {"scores": scores, "pair_reduction": pair_reduction, "eps": eps}
    definition = softmax if scores == "softmax" else normalised_sigmoid
    wanted = expected(logits, definition, eps=eps, pair_reduction=pair_reduction)
    assert_same(loss_and_gradient(logits, LABELS, options=options), wanted, dtype)


@pytest.mark.parametrize("scores", [softmax, normalised_sigmoid])
@pytest.mark.parametrize("options", [{}, {"pair_reduction": "log_of_mean"}, {"bias_correction": True}], ids=str)
def test_probabilities_give_what_logits_give(options, scores):
    logits = LOGITS.double()
    from_logits = loss_and_gradient(
        logits, LABELS, options={**options, "scores": {softmax: "softmax"}.get(scores, "sigmoid")}
    )
    leaf = logits.requires_grad_()
    loss = ExpertDivergenceLoss(D, input="probs", **options)(scores(leaf), LABELS)
    assert_same((loss.detach(), torch.autograd.grad(loss, leaf)[0]), from_logits, torch.float64)


# ---- forms of labels ----

PER_TOKEN = LABELS.unsqueeze(1).expand(B, S_LEN)
ONE_HOT = torch.nn.functional.one_hot(LABELS + 1, D + 1)[:, 1:]

LABEL_FORMS = {
    "[B], 3-D": (LOGITS, LABELS, {}),
    "[B] int32": (LOGITS, LABELS.int(), {}),
    "[B], 2-D": (LOGITS.flatten(0, 1), LABELS, {}),
    "[B, S_len], 3-D": (LOGITS, PER_TOKEN, {}),
    "[B, S_len] int32": (LOGITS, PER_TOKEN.int(), {}),
    "[B, S_len], 2-D": (LOGITS.flatten(0, 1), PER_TOKEN, {}),
    "soft, 3-D": (LOGITS, ONE_HOT.float(), {}),
    "soft bfloat16": (LOGITS, ONE_HOT.bfloat16(), {}),
    "soft float64, 2-D": (LOGITS.flatten(0, 1), ONE_HOT.double(), {}),
    "document labels, 2-D": (LOGITS.flatten(0, 1), LABELS, {"cu_seqlens": CU_SEQLENS}),
    "document labels, [1, T]": (LOGITS.view(1, B * S_LEN, E), LABELS, {"cu_seqlens": CU_SEQLENS.int()}),
    "documents, labels [T]": (LOGITS.flatten(0, 1), PER_TOKEN.flatten(), {"cu_seqlens": CU_SEQLENS}),
    "documents, labels [1, T]": (LOGITS.view(1, -1, E), PER_TOKEN.reshape(1, -1), {"cu_seqlens": CU_SEQLENS}),
    "documents, soft": (LOGITS.flatten(0, 1), ONE_HOT.float(), {"cu_seqlens": CU_SEQLENS}),
}
HARD_FORMS = {name: form for name, form in LABEL_FORMS.items() if not form[1].is_floating_point()}


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_all_forms_of_labels_agree(form):
    logits, labels, packing = LABEL_FORMS[form]
    assert_same(loss_and_gradient(logits, labels, **packing), expected())


@pytest.mark.parametrize("form", HARD_FORMS)
def test_all_forms_of_labels_agree_with_bias_correction(form):
    logits, labels, packing = HARD_FORMS[form]
    options = {"bias_correction": True}
    wanted = loss_and_gradient(LOGITS.double(), LABELS, options=options)
    assert_same(loss_and_gradient(logits, labels, options=options, **packing), wanted)


@pytest.mark.parametrize("form", [*HARD_FORMS, "[T]"])
def test_tokens_weigh_what_sequences_weigh_where_lengths_are_equal(form):
    forms = {**HARD_FORMS, "[T]": (LOGITS.flatten(0, 1), PER_TOKEN.flatten(), {})}
    logits, labels, packing = forms[form]
    assert_same(loss_and_gradient(logits, labels, options={"sequence_reduction": "token"}, **packing), expected())


def test_labels_that_change_inside_a_sequence():
    """A (sequence, domain) pair is averaged as one."""
    labels = torch.randint(-1, D, (B, S_LEN))
    tokens = [(b, label) for b, row in enumerate(labels.tolist()) for label in row]
    wanted = expected(tokens=tokens)
    assert_same(loss_and_gradient(LOGITS, labels), wanted)
    assert_same(loss_and_gradient(LOGITS.flatten(0, 1), labels.flatten(), cu_seqlens=CU_SEQLENS), wanted)
    each = [(row, label) for row, (_, label) in enumerate(tokens)]
    by_token = expected(tokens=each)
    options = {"sequence_reduction": "token"}
    for form in (labels, labels.flatten()):
        logits = LOGITS if form.dim() == 2 else LOGITS.flatten(0, 1)
        assert_same(loss_and_gradient(logits, form, options=options), by_token)
        assert_same(loss_and_gradient(LOGITS.flatten(0, 1), form, options=options, cu_seqlens=CU_SEQLENS), by_token)


def test_soft_labels():
    weights = torch.rand(B, D) * (torch.rand(B, D) < 0.7)
    probabilities = softmax(LOGITS).mean(dim=1)
    means = (weights.double().T @ probabilities) / weights.double().sum(dim=0).unsqueeze(1)
    by_hand = torch.zeros(D, 1, E, dtype=torch.float64) + means.unsqueeze(1)
    wanted = paper_loss(by_hand.flatten(0, 1), [(d, d) for d in range(D)])
    loss, grad = loss_and_gradient(LOGITS, weights)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    assert grad[(weights > 0).any(dim=1)].any() and not grad[(weights == 0).all(dim=1)].any()


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_tokens_behind_the_last_document_are_not_counted(reduction):
    options = {"sequence_reduction": reduction}
    packed = LOGITS.flatten(0, 1).clone()
    packed[5 * S_LEN :] = NAN
    for labels in (LABELS[:5], PER_TOKEN.flatten()):
        loss, grad = loss_and_gradient(packed, labels, options=options, cu_seqlens=CU_SEQLENS[:6])
        wanted, _ = loss_and_gradient(LOGITS[:5], LABELS[:5], options=options)
        assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
        assert not grad[5 * S_LEN :].any()


# ---- masks ----

KEPT = torch.rand(B, S_LEN, generator=RANDOM) < 0.6
MASK_TYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("flat_mask", [False, True], ids=["[B, S_len]", "[T]"])
@pytest.mark.parametrize("flat_logits", [False, True], ids=["3-D", "2-D"])
@pytest.mark.parametrize("dtype", MASK_TYPES, ids=str)
def test_masks_of_every_type(dtype, flat_logits, flat_mask):
    tokens = [token if kept else None for token, kept in zip(TOKENS, KEPT.flatten().tolist(), strict=True)]
    hostile = LOGITS.clone()
    hostile[~KEPT] = NAN
    logits = hostile.flatten(0, 1) if flat_logits else hostile
    mask = KEPT.flatten() if flat_mask else KEPT
    wanted = expected(torch.where(KEPT.unsqueeze(-1), LOGITS, 0.0), tokens=tokens)
    attended = loss_and_gradient(logits, LABELS, attention_mask=mask.to(dtype))
    assert_same(attended, wanted)
    padded = loss_and_gradient(logits, LABELS, padding_mask=(~mask).to(dtype))
    assert padded[0].equal(attended[0]) and padded[1].equal(attended[1])


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("form", HARD_FORMS)
def test_masks_with_every_form_of_labels(form, reduction):
    logits, labels, packing = HARD_FORMS[form]
    options = {"sequence_reduction": reduction}
    wanted, _ = loss_and_gradient(LOGITS, LABELS, options=options, attention_mask=KEPT)
    mask = KEPT.flatten() if logits.dim() == 2 or logits.shape[0] == 1 else KEPT
    loss, grad = loss_and_gradient(logits, labels, options=options, attention_mask=mask, **packing)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    assert not grad.view(B, S_LEN, E)[~KEPT].any()


def test_a_mask_with_a_form_of_labels_hides_wrong_labels_behind_padding():
    """Collators fill labels of padding with anything, -100 most often."""
    labels = torch.where(KEPT, PER_TOKEN, -100)
    wanted = loss_and_gradient(LOGITS, PER_TOKEN, attention_mask=KEPT)
    actual = loss_and_gradient(LOGITS, labels, attention_mask=KEPT)
    assert actual[0].equal(wanted[0]) and actual[1].equal(wanted[1])


# ---- layers ----


@pytest.mark.parametrize("options", [{}, {"sequence_reduction": "token"}, {"bias_correction": True}], ids=str)
@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("dims", [2, 3])
def test_layers(dims, container, options):
    layers = [torch.randn(B, S_LEN, E) * scale for scale in (0.5, 1.0, 3.0, 2.0)]
    alone = [loss_and_gradient(layer, LABELS, options=options) for layer in layers]
    values = torch.stack([loss for loss, _ in alone])
    for reduction, total, factor in (("mean", values.mean(), 0.25), ("sum", values.sum(), 1.0), ("none", values, None)):
        leaves = [(layer.flatten(0, 1) if dims == 2 else layer).detach().requires_grad_() for layer in layers]
        loss = ExpertDivergenceLoss(D, layer_reduction=reduction, **options)(container(leaves), LABELS)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=0)
        weights = torch.tensor([1.0, -2.0, 0.5, 3.0]) if factor is None else torch.tensor(1.0)
        loss.backward(weights)
        for index, (leaf, (_, grad)) in enumerate(zip(leaves, alone, strict=True)):
            scale = weights[index].item() if factor is None else factor
            assert_close(leaf.grad.view_as(grad), grad.double() * scale, tolerance(torch.float32, E))


def test_one_tensor_is_one_layer():
    loss = ExpertDivergenceLoss(D, layer_reduction="none")(LOGITS, LABELS)
    assert loss.shape == (1,)
    assert loss[0].equal(ExpertDivergenceLoss(D)([LOGITS], LABELS))
    assert ExpertDivergenceLoss(D)(LOGITS, LABELS).shape == ()


def test_layouts_of_the_router_logits():
    wanted = loss_and_gradient(LOGITS, LABELS)
    sequence_first = LOGITS.transpose(0, 1).contiguous().transpose(0, 1)
    experts_first = LOGITS.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sliced = torch.cat([LOGITS, LOGITS * NAN], dim=2)[..., :E]
    for logits in (sequence_first, experts_first, sliced):
        loss, grad = loss_and_gradient(logits, LABELS)
        assert loss.equal(wanted[0]) and grad.equal(wanted[1])


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(autocast, dtype):
    wanted = loss_and_gradient(LOGITS.to(dtype), LABELS)
    with torch.autocast("cpu", dtype=autocast):
        loss, grad = loss_and_gradient(LOGITS.to(dtype), LABELS)
        layers = ExpertDivergenceLoss(D)([LOGITS.to(dtype)] * 2, LABELS)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and grad.dtype == dtype
    assert loss.equal(wanted[0]) and grad.equal(wanted[1]) and layers.dtype == loss.dtype


def test_non_finite_routing_reaches_the_loss():
    """Gradient scalers look for it."""
    for value in (NAN, math.inf):
        logits = LOGITS.clone()
        logits[3, 5, 7] = value
        for options in (
            {},
            {"sequence_reduction": "token"},
            {"bias_correction": True},
            {"pair_reduction": "log_of_mean"},
        ):
            loss, grad = loss_and_gradient(logits, LABELS, options=options)
            assert loss.isnan() and grad.isnan().any()


@pytest.mark.parametrize(
    "options", [{}, {"bias_correction": True}, {"sequence_reduction": "token"}, {"scores": "sigmoid"}], ids=str
)
def test_the_same_bits_for_any_number_of_threads(options):
    """Large enough that every level is cut into tasks."""
    logits, labels = torch.randn(200, 150, 64), torch.randint(-1, 49, (200,))
    results = []
    for threads in (1, 2, 3, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaf = logits.clone().requires_grad_()
        loss = ExpertDivergenceLoss(49, **options)(leaf, labels)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert loss.equal(results[0][0]) and grad.equal(results[0][1])


# ---- bias correction ----


def push_apart(segments, labels, **options):
    """How fast the loss falls as all segments [B, E] move away from their common mean."""
    leaf = segments.unsqueeze(1).detach().requires_grad_()
    ExpertDivergenceLoss(2, input="probs", **options)(leaf, labels).backward()
    return -(leaf.grad.squeeze(1) * (segments - segments.mean(dim=0))).sum().item()


def test_correction_takes_the_reward_from_random_labels():
    """The plain loss pays any labels for variety between sequences, log D growing by 2 per e-fold of distance, and the
    corrected one only labels that explain it."""
    segments = (torch.randn(12, 64, dtype=torch.float64) * 0.2).softmax(dim=-1)
    splits = [torch.tensor(split) for split in itertools.product([0, 1], repeat=12) if sum(split) == 6][::23]
    plain = [push_apart(segments, split, eps=1e-12) for split in splits]
    corrected = [push_apart(segments, split, eps=1e-12, bias_correction=True) for split in splits]
    assert min(plain) > 1.8
    assert abs(sum(corrected) / len(splits)) < 0.15
    assert min(corrected) < 0 < max(corrected)
    true = torch.tensor([0] * 6 + [1] * 6)
    apart = (segments.log() + torch.randn(64, dtype=torch.float64) * true.unsqueeze(1)).softmax(dim=-1)
    assert push_apart(apart, true, eps=1e-12, bias_correction=True) > 1.5


def test_correction_leaves_the_value():
    plain, plain_grad = loss_and_gradient(LOGITS, LABELS)
    corrected, corrected_grad = loss_and_gradient(LOGITS, LABELS, options={"bias_correction": True})
    # Every domain has two sequences or more.
    assert corrected.equal(plain) and not corrected_grad.allclose(plain_grad)


def test_correction_leaves_out_domains_of_one_sequence():
    labels = torch.tensor([0, 1, 2, 0, 2, -1, -1, 0])
    loss, grad = loss_and_gradient(LOGITS, labels, options={"bias_correction": True})
    wanted, _ = loss_and_gradient(LOGITS, torch.where(labels == 1, -1, labels))
    assert loss.equal(wanted) and not grad[1].any()
    loss, grad = loss_and_gradient(LOGITS[:4], labels[:4], options={"bias_correction": True})
    assert loss.item() == 0.0 and not grad.any()


# ---- the module ----


def test_the_function_is_the_module():
    masks = {"attention_mask": KEPT}
    wanted = ExpertDivergenceLoss(D, eps=1e-4, scores="sigmoid", pair_reduction="log_of_mean")(LOGITS, LABELS, **masks)
    actual = expert_divergence_loss(
        LOGITS, LABELS, D, eps=1e-4, scores="sigmoid", pair_reduction="log_of_mean", **masks
    )
    assert actual.equal(wanted)
    assert edl.expert_divergence_loss is expert_divergence_loss


def test_repr():
    assert repr(ExpertDivergenceLoss(3)) == (
        "ExpertDivergenceLoss(num_domains=3, eps=1e-06, input='logits', scores='softmax', "
        "sequence_reduction='sequence', pair_reduction='mean_of_logs', layer_reduction='mean', bias_correction=False)"
    )
    text = repr(ExpertDivergenceLoss(49, eps=0, input="probs", sequence_reduction="token", layer_reduction="sum"))
    assert "num_domains=49, eps=0, input='probs'" in text and "sequence_reduction='token'" in text and "'sum'" in text


def test_it_has_no_state_and_survives_copying():
    module = ExpertDivergenceLoss(D, eps=1e-3, scores="sigmoid", bias_correction=True)
    wanted = module(LOGITS, LABELS)
    assert not module.state_dict() and not list(module.parameters())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    for other in (*copies, module.eval(), module.bfloat16(), module.train()):
        assert repr(other) == repr(module) and other(LOGITS, LABELS).equal(wanted)


def test_arguments_are_left_as_they_were():
    arguments = [LOGITS.clone(), LABELS.clone(), KEPT.clone(), None, CU_SEQLENS.clone()]
    for labels, cu_seqlens in ((arguments[1], None), (arguments[1], arguments[4]), (PER_TOKEN.clone(), None)):
        logits = arguments[0] if cu_seqlens is None else arguments[0].flatten(0, 1)
        ExpertDivergenceLoss(D)(logits, labels, arguments[2], None, cu_seqlens)
    for before, after in zip([LOGITS, LABELS, KEPT, None, CU_SEQLENS], arguments, strict=True):
        assert after is None or after.equal(before)


# ---- what it refuses ----

OPTION_ERRORS = {
    "num_domains must be at least 2, or there is no pair to push apart (got 0)": {"num_domains": 0},
    "num_domains must be at least 2, or there is no pair to push apart (got 1)": {"num_domains": 1},
    "num_domains must be an integer (got 3.0)": {"num_domains": 3.0},
    "num_domains must be an integer (got '3')": {"num_domains": "3"},
    "num_domains must be an integer (got None)": {"num_domains": None},
    "num_domains must be an integer (got [3])": {"num_domains": [3]},
    "eps must be a number (got '1e-6')": {"eps": "1e-6"},
    "eps must be a number (got None)": {"eps": None},
    "bias_correction must be True or False (got 'yes')": {"bias_correction": "yes"},
    "scores must be a string (got 5)": {"scores": 5},
    "eps must be finite and not negative (got -1e-06)": {"eps": -1e-6},
    "eps must be finite and not negative (got nan)": {"eps": NAN},
    "eps must be finite and not negative (got inf)": {"eps": math.inf},
    "input must be one of ['logits', 'probs'] (got 'probabilities')": {"input": "probabilities"},
    "scores must be one of ['softmax', 'sigmoid'] (got 'none')": {"scores": "none"},
    "sequence_reduction must be one of ['sequence', 'token'] (got 'mean')": {"sequence_reduction": "mean"},
    "pair_reduction must be one of ['mean_of_logs', 'log_of_mean'] (got 'mean')": {"pair_reduction": "mean"},
    "layer_reduction must be one of ['mean', 'sum', 'none'] (got 'max')": {"layer_reduction": "max"},
    "bias_correction needs sequence_reduction='sequence' and pair_reduction='mean_of_logs' "
    "(got 'token' and 'mean_of_logs')": {
        "bias_correction": True,
        "sequence_reduction": "token",
    },
    "bias_correction needs sequence_reduction='sequence' and pair_reduction='mean_of_logs' "
    "(got 'sequence' and 'log_of_mean')": {
        "bias_correction": True,
        "pair_reduction": "log_of_mean",
    },
}


@pytest.mark.parametrize("three", [numpy.int64(3), torch.tensor(3)], ids=["numpy", "torch"])
def test_integers_of_other_libraries_are_numbers_of_domains(three):
    labels = LABELS.clamp(max=2)
    for loss in (ExpertDivergenceLoss(three)(LOGITS, labels), expert_divergence_loss(LOGITS, labels, three)):
        assert loss == ExpertDivergenceLoss(3)(LOGITS, labels)


@pytest.mark.parametrize("sentence", OPTION_ERRORS)
def test_sentences_of_options(sentence):
    options = {"num_domains": D, **OPTION_ERRORS[sentence]}
    for build in (lambda: ExpertDivergenceLoss(**options), lambda: expert_divergence_loss(LOGITS, LABELS, **options)):
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value) == f"edl::expert_divergence_loss: {sentence}"


FLAT = LOGITS.flatten(0, 1)
TOKEN = {"sequence_reduction": "token"}

INPUT_ERRORS = [
    ("router_logits must hold at least one layer (got an empty list)", ([], LABELS), {}, {}),
    (
        "router_logits must have the shape [T, E] or [B, S_len, E] (got [20])",
        *((LOGITS[0, 0], LABELS), {}, {}),
    ),
    (
        "router_logits must have the shape [T, E] or [B, S_len, E] (got [1, 8, 12, 20])",
        *((LOGITS[None], LABELS), {}, {}),
    ),
    (
        ("router_logits must hold tensors, and nothing for a layer without a router (got a list with NoneType)"),
        *(([LOGITS, None], LABELS), {}, {}),
    ),
    (
        "router_logits must be a tensor, or a list of tensors (got NoneType)",
        *((None, LABELS), {}, {}),
    ),
    (
        "router_logits must be a tensor, or a list of tensors (got generator)",
        *(((layer for layer in [LOGITS]), LABELS), {}, {}),
    ),
    (
        ("router_logits must hold tensors, and nothing for a layer without a router (got a list with str)"),
        *((["logits"], LABELS), {}, {}),
    ),
    (
        "router_logits must be dense (got a nested tensor)",
        *((torch.nested.nested_tensor([LOGITS[0], LOGITS[1]], layout=torch.jagged), LABELS), {}, {}),
    ),
    (
        "router_logits must be dense (got a nested tensor)",
        *((torch.nested.nested_tensor([LOGITS[0], LOGITS[1]]), LABELS), {}, {}),
    ),
    (
        "domain_ids must be dense (got layout torch.sparse_coo)",
        *((LOGITS, LABELS.to_sparse()), {}, {}),
    ),
    (
        "attention_mask must be a tensor (got list)",
        (LOGITS, LABELS),
        {"attention_mask": [1]},
        {},
    ),
    ("padding_mask must be a tensor (got list)", (LOGITS, LABELS), {"padding_mask": [0]}, {}),
    ("cu_seqlens must be a tensor (got tuple)", (LOGITS, LABELS), {"cu_seqlens": (0, 8)}, {}),
    (
        "attention_mask must be dense (got layout torch.sparse_coo)",
        *((LOGITS, LABELS), {"attention_mask": torch.ones(8, 12).to_sparse()}, {}),
    ),
    ("domain_ids must be a tensor (got NoneType)", (LOGITS, None), {}, {}),
    ("domain_ids must be a tensor (got list)", (LOGITS, [0] * 8), {}, {}),
    (
        (
            "all layers must have one shape, dtype and device "
            "(got [8, 12, 20] torch.float32 on cpu and [8, 12, 19] torch.float32 on cpu)"
        ),
        *(([LOGITS, LOGITS[..., :19]], LABELS), {}, {}),
    ),
    (
        (
            "all layers must have one shape, dtype and device "
            "(got [8, 12, 20] torch.float32 on cpu and [8, 12, 20] torch.bfloat16 on cpu)"
        ),
        *(([LOGITS, LOGITS.bfloat16()], LABELS), {}, {}),
    ),
    (
        (
            "all layers must have one shape, dtype and device "
            "(got [8, 12, 20] torch.float32 on cpu and [8, 12, 20] torch.float32 on meta)"
        ),
        *(([LOGITS, LOGITS.to("meta")], LABELS), {}, {}),
    ),
    (
        "domain_ids must be on the device of router_logits (got meta and cpu)",
        *((LOGITS, LABELS.to("meta")), {}, {}),
    ),
    (
        "bias_correction needs one label per segment (got soft labels)",
        *((LOGITS, ONE_HOT.float()), {}, {"bias_correction": True}),
    ),
    (
        "routing must be float32, float64, bfloat16 or float16 (got Int)",
        (LOGITS.int(), LABELS),
        {},
        {},
    ),
    # labels
    (
        "domain_ids must be int32, int64 or floating weights (got torch.int16)",
        (LOGITS, LABELS.short()),
        {},
        {},
    ),
    (
        "domain_ids must be int32, int64 or floating weights (got torch.bool)",
        (LOGITS, LABELS.bool()),
        {},
        {},
    ),
    (
        "domain_ids must have the shape [B], [B, S_len] or [T] (got [])",
        (LOGITS, LABELS[0]),
        {},
        {},
    ),
    (
        "domain_ids must have the shape [B], [B, S_len] or [T] (got [1, 8, 12])",
        (LOGITS, PER_TOKEN[None]),
        {},
        {},
    ),
    (
        "floating domain_ids are weights and must have the shape [B, 3] (got [8])",
        (LOGITS, LABELS.float()),
        {},
        {},
    ),
    (
        "floating domain_ids are weights and must have the shape [B, 3] (got [8, 2])",
        (LOGITS, torch.ones(8, 2)),
        {},
        {},
    ),
    ("domain_ids must have one row per sequence, 8 (got [7])", (LOGITS, LABELS[:7]), {}, {}),
    (
        "domain_ids must have one row per sequence, 8 (got [12, 8])",
        (LOGITS, PER_TOKEN.T),
        {},
        {},
    ),
    (
        "domain_ids must have one row per sequence, 8 (got [12, 8])",
        (LOGITS, PER_TOKEN.T),
        {},
        TOKEN,
    ),
    (
        "domain_ids [B, S_len] must have one label per token, 96 (got [8, 11])",
        (LOGITS, PER_TOKEN[:, 1:]),
        {},
        {},
    ),
    (
        "the 96 tokens must be a whole number of sequences of one length (got 7 labels)",
        (FLAT, LABELS[:7]),
        {},
        {},
    ),
    (
        "the 96 tokens must be a whole number of sequences of one length (got 0 labels)",
        (FLAT, LABELS[:0]),
        {},
        {},
    ),
    (
        "the 96 tokens must be a whole number of sequences of one length (got 7 labels)",
        (FLAT, LABELS[:7]),
        {},
        TOKEN,
    ),
    (
        (
            "one label per token needs sequence_reduction='token', cu_seqlens, or the shape [B, S_len] "
            "(got 96 labels for 96 tokens)"
        ),
        *((FLAT, PER_TOKEN.flatten()), {}, {}),
    ),
    (
        "soft labels need sequence_reduction='sequence' (got sequence_reduction='token')",
        (LOGITS, ONE_HOT.float()),
        {},
        TOKEN,
    ),
    # masks
    (
        "give attention_mask (1 = keep) or padding_mask (True = padding), not both (got both)",
        *((LOGITS, LABELS), {"attention_mask": KEPT, "padding_mask": ~KEPT}, {}),
    ),
    *(
        (
            f"{name} must have the shape [B, S_len] or [T] of the 96 tokens (got {shape})",
            *((logits, labels), {name: torch.ones(shape)}, options),
        )
        for name in ("attention_mask", "padding_mask")
        for shape in ([12, 8], [8, 11], [95], [8], [1, 8, 12], [8, 1, 1, 12])
        for logits, labels, options in ((LOGITS, LABELS, {}), (FLAT, LABELS, {}), (FLAT, PER_TOKEN, TOKEN))
    ),
    (
        "attention_mask must be on the device of domain_ids (got meta and cpu)",
        *((LOGITS, LABELS), {"attention_mask": KEPT.to("meta")}, {}),
    ),
    (
        "padding_mask must be on the device of domain_ids (got meta and cpu)",
        *((LOGITS, LABELS), {"padding_mask": KEPT.to("meta")}, {}),
    ),
    # packing
    (
        "cu_seqlens must be int32 or int64 of the shape [N + 1] (got torch.float32 [9])",
        *((FLAT, LABELS), {"cu_seqlens": CU_SEQLENS.float()}, {}),
    ),
    (
        "cu_seqlens must be int32 or int64 of the shape [N + 1] (got torch.uint8 [9])",
        *((FLAT, LABELS), {"cu_seqlens": CU_SEQLENS.to(torch.uint8)}, {}),
    ),
    (
        "cu_seqlens must be int32 or int64 of the shape [N + 1] (got torch.int64 [1, 9])",
        *((FLAT, LABELS), {"cu_seqlens": CU_SEQLENS[None]}, {}),
    ),
    (
        "cu_seqlens must be int32 or int64 of the shape [N + 1] (got torch.int64 [0])",
        *((FLAT, LABELS), {"cu_seqlens": CU_SEQLENS[:0]}, {}),
    ),
    (
        "cu_seqlens must be on the device of domain_ids (got meta and cpu)",
        *((FLAT, LABELS), {"cu_seqlens": CU_SEQLENS.to("meta")}, {}),
    ),
    *(
        (
            (
                "with cu_seqlens domain_ids must have one label per document or per token, 8 or 96 (got "
                f"{list(labels.shape)})"
            ),
            *((FLAT, labels), {"cu_seqlens": CU_SEQLENS}, {}),
        )
        for labels in (LABELS[:7], PER_TOKEN.flatten()[1:], torch.ones(96, D))
    ),
]


@pytest.mark.parametrize(
    "sentence, arguments, masks, options", INPUT_ERRORS, ids=[case[0][:60] for case in INPUT_ERRORS]
)
def test_sentences_of_inputs(sentence, arguments, masks, options):
    with pytest.raises(ValueError) as error:
        ExpertDivergenceLoss(D, **options)(*arguments, **masks)
    assert str(error.value) == f"edl::expert_divergence_loss: {sentence}"


ID_SENTENCE = (
    "edl::expert_divergence_loss: segment_ids must be at least -1 and below {S}, the number of segments (got {S} at "
    "row {row}; edl.segments gives this id to a token whose label or mask value is not allowed, and to all where "
    "cu_seqlens does not rise from 0)"
)


def changed(tensor, at, value):
    copied = tensor.clone()
    copied[at] = value
    return copied


@pytest.mark.parametrize("wrong", [D, D + 1, -2, -100, 2**31 - 1, 2**32, 2**32 + 1, -(2**32)])
def test_wrong_labels_are_index_errors(wrong):
    with pytest.raises(IndexError) as error:
        ExpertDivergenceLoss(D)(LOGITS, changed(LABELS, 2, wrong))
    assert str(error.value) == (
        f"edl::expert_divergence_loss: labels must be at least -1 and below num_domains = 3 (got {wrong} for segment 2)"
    )
    per_token = changed(PER_TOKEN, (4, 5), wrong)
    cases = [
        (LOGITS, per_token, {}, {}, B * D, 53),
        (FLAT, per_token.flatten(), {}, {"cu_seqlens": CU_SEQLENS}, B * D, 53),
        (LOGITS, changed(LABELS, 2, wrong), TOKEN, {}, D, 24),
        (LOGITS, per_token, TOKEN, {}, D, 53),
        (FLAT, per_token.flatten(), TOKEN, {}, D, 53),
        (FLAT, per_token.flatten(), TOKEN, {"cu_seqlens": CU_SEQLENS}, D, 53),
        (FLAT, changed(LABELS, 2, wrong), TOKEN, {"cu_seqlens": CU_SEQLENS}, D, 24),
    ]
    for logits, labels, options, packing, num_segments, row in cases:
        with pytest.raises(IndexError) as error:
            ExpertDivergenceLoss(D, **options)(logits, labels, **packing)
        assert str(error.value) == ID_SENTENCE.format(S=num_segments, row=row)


@pytest.mark.parametrize("name", ["attention_mask", "padding_mask"])
@pytest.mark.parametrize("wrong", [2, -1, 0.5, NAN, -1e9])
@pytest.mark.parametrize("options", [{}, TOKEN], ids=str)
def test_wrong_mask_values_are_index_errors(options, wrong, name):
    dtype = torch.int64 if isinstance(wrong, int) else torch.float32
    mask = changed(KEPT.to(dtype), (3, 4), wrong)
    with pytest.raises(IndexError) as error:
        ExpertDivergenceLoss(D, **options)(LOGITS, LABELS, **{name: mask})
    assert str(error.value) == ID_SENTENCE.format(S=D if options else B, row=40)


@pytest.mark.parametrize("options", [{}, TOKEN], ids=str)
@pytest.mark.parametrize("at, value", [(0, 1), (0, -1), (3, 2), (8, 97), (1, 200), (5, -3)])
def test_wrong_boundaries_are_index_errors(at, value, options):
    cu_seqlens = changed(CU_SEQLENS, at, value)
    for labels, num_segments in ((LABELS, B), (PER_TOKEN.flatten(), B * D)):
        with pytest.raises(IndexError) as error:
            ExpertDivergenceLoss(D, **options)(FLAT, labels, cu_seqlens=cu_seqlens)
        assert str(error.value) == ID_SENTENCE.format(S=D if options else num_segments, row=0)


def test_probabilities_and_logits_are_not_taken_for_each_other():
    probabilities = LOGITS.softmax(dim=-1)
    with pytest.raises(ValueError) as error:
        ExpertDivergenceLoss(D)(probabilities, LABELS)
    assert str(error.value) == (
        "edl::expert_divergence_loss: with scores = 'softmax' or 'sigmoid' routing must be logits (got 84 rows that "
        "all sum to 1 with entries of at least 0; for probabilities pass scores = 'none', or to ExpertDivergenceLoss "
        "input = 'probs')"
    )
    with pytest.raises(ValueError) as error:
        ExpertDivergenceLoss(D, input="probs")(LOGITS, LABELS)
    assert str(error.value) == (
        "edl::expert_divergence_loss: with scores = 'none' every row of routing must be a distribution, entries of at "
        "least 0 that sum to 1 (got something else at row 0; for logits pass scores = 'softmax' or 'sigmoid', or to "
        "ExpertDivergenceLoss input = 'logits')"
    )


def test_dtensors_are_refused(as_dtensor):
    module = ExpertDivergenceLoss(D)
    rule = "takes plain tensors, call to_local() on the shards first (got a DTensor)"
    calls = {
        "expert_divergence_loss": [
            lambda: module(as_dtensor(LOGITS), LABELS),
            lambda: module([LOGITS, as_dtensor(LOGITS)], LABELS),
            lambda: module(LOGITS, as_dtensor(LABELS)),
            lambda: module(LOGITS, LABELS, attention_mask=as_dtensor(KEPT)),
            lambda: module(LOGITS, LABELS, padding_mask=as_dtensor(KEPT)),
            lambda: module(FLAT, LABELS, cu_seqlens=as_dtensor(CU_SEQLENS)),
        ],
        "sequence_segment_ids": [lambda: edl.ops.sequence_segment_ids(as_dtensor(LABELS), len(LABELS))],
        "aggregate_routing": [lambda: edl.ops.aggregate_routing(as_dtensor(FLAT), PER_TOKEN.flatten(), D)],
        "domain_moments": [lambda: edl.ops.domain_moments(as_dtensor(torch.rand(B, E)), torch.ones(B), LABELS, D)],
        "expert_divergence": [
            lambda: edl.ops.expert_divergence(as_dtensor(torch.rand(D, E).double()), torch.ones(D).double())
        ],
        "pairwise_divergence": [
            lambda: edl.ops.pairwise_divergence(torch.rand(D, E).double(), as_dtensor(torch.ones(D).double())),
            lambda: edl.ops.pairwise_divergence(
                torch.rand(D, E).double(), torch.ones(D).double(), as_dtensor(torch.rand(D, E).double())
            ),
        ],
    }
    for op, cases in calls.items():
        for call in cases:
            with pytest.raises(ValueError) as error:
                call()
            assert str(error.value) == f"edl::{op}: {rule}"
    assert module(as_dtensor(LOGITS).to_local(), LABELS).equal(module(LOGITS, LABELS))


@pytest.mark.parametrize("changed", ["logits", "labels"])
def test_what_is_changed_in_place_between_begin_and_finish_is_refused(changed):
    logits, labels = LOGITS.clone(), LABELS.clone()
    finish = ExpertDivergenceLoss(D).begin(logits, labels)
    finish()
    {"logits": logits, "labels": labels}[changed].add_(0)
    with pytest.raises(RuntimeError, match="must stay as they are until a loss that was begun is finished"):
        finish()


def test_vmap_gives_the_loss_of_every_sample():
    divergence = ExpertDivergenceLoss(D)
    logits = torch.stack([LOGITS, LOGITS.flip(0)]).requires_grad_(True)
    together = torch.vmap(lambda layer: divergence(layer, LABELS))(logits)
    alone = torch.stack([divergence(layer, LABELS) for layer in logits])
    assert together.equal(alone)
    grads = [torch.autograd.grad(losses.sum(), logits)[0] for losses in (together, alone)]
    torch.testing.assert_close(*grads)


# ---- what logs say ----


@pytest.mark.parametrize("bias_correction", [False, True])
def test_pairs_and_nats(bias_correction):
    """Against the definition, in float64: the mean over pairs of the entropy of the mean less the mean entropy."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, -1])  # the bias correction leaves out domain 3, of one sequence
    loss = ExpertDivergenceLoss(5, bias_correction=bias_correction)
    loss.keep_moments()
    layers = [LOGITS, LOGITS.square()]
    value = loss(layers, labels)
    assert value == ExpertDivergenceLoss(5, bias_correction=bias_correction)(layers, labels)
    divergences = []
    for layer in layers:
        sequences = layer.double().softmax(-1).mean(1)
        domains = [sequences[labels == d].mean(0) for d in range(3 if bias_correction else 4)]
        for j, p in enumerate(domains):
            for q in domains[:j]:
                m = (p + q) / 2
                divergences.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
    pairs, nats = loss.pairs_and_nats()
    assert pairs == len(divergences) / 2
    torch.testing.assert_close(nats, torch.stack(divergences).mean(), rtol=1e-5, atol=1e-7)


def test_pairs_and_nats_without_a_pair():
    loss = ExpertDivergenceLoss(D)
    with pytest.raises(ValueError, match="^edl::expert_divergence_loss: pairs_and_nats\\(\\) tells of a loss after"):
        loss.pairs_and_nats()
    loss.keep_moments()
    for label in (0, -1):
        assert loss(LOGITS, torch.full((8,), label)) == 0
        pairs, nats = loss.pairs_and_nats()
        assert pairs == 0 and nats.isnan()
