"""An error names the function that was called, whichever operator inside finds it."""

import pytest
import torch
from torch import nn

import edl
from edl.objectives import ExpertDivergence, LoadBalancing, Objectives, RouterZ

B, S_LEN, E, D = 4, 6, 5, 3
LOGITS = torch.randn(B, S_LEN, E, generator=torch.Generator().manual_seed(5)) * 2
LABELS = torch.tensor([0, 1, 2, 0])
PER_TOKEN = torch.arange(B * S_LEN).view(B, S_LEN) % D
SOFT = torch.full((B, D), 1 / D)
MASK = torch.ones(B, S_LEN)
DOCUMENTS = torch.tensor([0, 6, 12, 18, 24])


def changed(tensor, place, value):
    result = tensor.clone()
    result[place] = value
    return result


def case(sentence, logits=LOGITS, labels=LABELS, options=None, **masks):
    return sentence, logits, labels, options or {}, masks


PROBABILITIES = LOGITS.softmax(dim=-1)
BY_TOKEN = {"sequence_reduction": "token"}
CASES = {
    # what only the values tell, found in kernels
    "label": case(
        "labels must be at least -1 and below num_domains = 3 (got 9 for segment 2)", labels=changed(LABELS, 2, 9)
    ),
    "label of a token": case("segment_ids must be at least -1 and below 12, ", labels=changed(PER_TOKEN, (1, 2), D)),
    "label by token": case(
        "segment_ids must be at least -1 and below 3, ", labels=changed(LABELS, 2, 9), options=BY_TOKEN
    ),
    "mask value": case("segment_ids must be at least -1 and below 4, ", attention_mask=changed(MASK, (1, 1), 2.0)),
    "documents that fall": case(
        "segment_ids must be at least -1 and below 4, ",
        LOGITS.flatten(0, 1),
        cu_seqlens=torch.tensor([0, 12, 6, 18, 24]),
    ),
    "negative weight": case(
        "labels as weights must be finite and at least 0 (got -1 for segment 1 and domain 2)",
        labels=changed(SOFT, (1, 2), -1.0),
    ),
    "weights with a gradient": case(
        "labels have no gradient (got labels with requires_grad = True)", labels=SOFT.clone().requires_grad_()
    ),
    "probabilities for logits": case(
        "with scores = 'softmax' or 'sigmoid' routing must be logits (got 24 rows ", PROBABILITIES
    ),
    "logits for probabilities": case(
        "with scores = 'none' every row of routing must be a distribution, ", options={"input": "probs"}
    ),
    "integers": case("routing must be float32, float64, bfloat16 or float16 (got Long)", PER_TOKEN.unsqueeze(-1)),
    "no expert": case("routing must have at least one expert (got a tensor of 24 by 0)", LOGITS[..., :0]),
    # what shapes and types tell, found where segments are made
    "rows": case("domain_ids must have one row per sequence, 4 (got [3])", labels=LABELS[:3]),
    "type of labels": case("domain_ids must be int32, int64 or floating weights (got ", labels=LABELS > 0),
    "one label": case("domain_ids must have the shape [B], [B, S_len] or [T] (got [])", labels=LABELS[0]),
    "columns of weights": case(
        "floating domain_ids are weights and must have the shape [B, 3] (got [4, 2])", labels=SOFT[:, :2]
    ),
    "weights by token": case("soft labels need sequence_reduction='sequence' ", labels=SOFT, options=BY_TOKEN),
    "weights and correction": case(
        "bias_correction needs one label per segment (got soft labels)", labels=SOFT, options={"bias_correction": True}
    ),
    "labels of tokens": case(
        "domain_ids [B, S_len] must have one label per token, 24 (got [4, 5])", labels=PER_TOKEN[:, :5]
    ),
    "no whole sequences": case(
        "the 24 tokens must be a whole number of sequences of one length (got 5 labels)",
        LOGITS.flatten(0, 1),
        torch.zeros(5, dtype=torch.int64),
    ),
    "labels that could be either": case(
        "one label per token needs sequence_reduction='token', ", LOGITS.flatten(0, 1), PER_TOKEN.flatten()
    ),
    "both masks": case("give attention_mask (1 = keep) or ", attention_mask=MASK, padding_mask=MASK == 0),
    "shape of a mask": case("attention_mask must have the shape [B, S_len] or [T] ", attention_mask=MASK[:, :1]),
    "no mask": case("padding_mask must be a tensor (got list)", padding_mask=[1]),
    "type of documents": case(
        "cu_seqlens must be int32 or int64 of the shape [N + 1] ", LOGITS.flatten(0, 1), cu_seqlens=DOCUMENTS.float()
    ),
    "labels of documents": case(
        "with cu_seqlens domain_ids must have one label per document or per token, 4 or 24 (got [3])",
        LOGITS.flatten(0, 1),
        LABELS[:3],
        cu_seqlens=DOCUMENTS,
    ),
    "device of a mask": case("attention_mask must be on the device of domain_ids ", attention_mask=MASK.to("meta")),
}


def of_memory(options):
    return edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory(), **options)


def of_objectives(options):
    read = {"scores": "probs"}.get(options.get("input"), options.get("input", "logits"))
    objectives = Objectives({"divergence": (ExpertDivergence(D, **options), 1.0)})

    def call(logits, labels, **masks):
        rows = logits.flatten(0, 1) if logits.dim() == 3 else logits
        size = logits.shape[0] if logits.dim() == 3 else -1
        field = {"scores": rows} if read == "probs" else {"logits": rows}
        return objectives(edl.routing.Observation(**field, batch_size=size), domain_ids=labels, **masks)

    return call


ENTRIES = {
    "function": lambda options: lambda x, labels, **masks: edl.expert_divergence_loss(x, labels, D, **options, **masks),
    "module": lambda options: edl.ExpertDivergenceLoss(D, **options),
    "memory": of_memory,
    "scripted": lambda options: torch.jit.script(edl.ExpertDivergenceLoss(D, **options)),
    "objectives": of_objectives,
}


OF_TORCHSCRIPT = (RuntimeError, torch.jit.Error)
CALLS = [(entry, name) for entry in ENTRIES for name in CASES]
CALLS.remove(("scripted", "no mask"))  # TorchScript itself refuses the type


@pytest.mark.parametrize("entry, name", CALLS)
def test_the_divergence(entry, name):
    sentence, logits, labels, options, masks = CASES[name]
    with pytest.raises(OF_TORCHSCRIPT if entry == "scripted" else (ValueError, IndexError)) as error:
        ENTRIES[entry](options)(logits.clone().requires_grad_(logits.is_floating_point()), labels, **masks)
    named = ("ExpertDivergence", "Objectives") if entry == "objectives" else ("expert_divergence_loss",)
    assert any(f"edl::{op}: {sentence}" in str(error.value) for op in named)
    assert "aggregate_routing" not in str(error.value) and "edl::segments" not in str(error.value)


@pytest.mark.parametrize("entry", ["function", "module", "memory", "objectives"])
def test_the_divergence_in_its_backward_pass(entry):
    """What the forward pass saved was changed behind autograd's back, or its memory freed."""
    op = "ExpertDivergence" if entry == "objectives" else "expert_divergence_loss"
    logits = LOGITS.clone().requires_grad_()
    results = ENTRIES[entry]({})(logits, LABELS)
    logits.detach().untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"^edl::{op}: a tensor must have the memory of its shape"):
        (results if isinstance(results, torch.Tensor) else results[0]).backward()
    labels = LABELS.repeat_interleave(S_LEN).int()
    loss = torch.ops.edl.expert_divergence_loss(
        [LOGITS.flatten(0, 1).clone().requires_grad_()], labels, D, torch.arange(D), D, sequence_reduction="token"
    )
    labels.numpy()[3] = D
    with pytest.raises(IndexError, match="^edl::expert_divergence_loss: segment_ids must stay as they are until"):
        loss.backward()


def test_compiled_code_keeps_the_name():
    loss = torch.compile(edl.ExpertDivergenceLoss(D), backend="aot_eager", fullgraph=True)
    loss(LOGITS, LABELS)
    with pytest.raises(IndexError, match="edl::expert_divergence_loss: labels must be at least -1 and below"):
        loss(LOGITS, changed(LABELS, 2, 9))


EXPERTS = torch.arange(B * S_LEN * 2).view(-1, 2) % E
ROUTING = edl.Routing(LOGITS.flatten(0, 1), torch.ones(B * S_LEN, 2), EXPERTS, EXPERTS.new_empty(0))
WRONG_MASKS = {
    "segment_ids must be at least -1 and below 1, ": {"attention_mask": changed(MASK.flatten(), 3, 2.0)},
    "attention_mask must have the shape [B, S_len] or [T] ": {"attention_mask": MASK.flatten()[:5]},
    "give attention_mask (1 = keep) or padding_mask ": {
        "attention_mask": MASK.flatten(),
        "padding_mask": MASK.flatten() == 0,
    },
}


@pytest.mark.parametrize("masks", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_the_balancing_losses(masks):
    (sentence,) = (text for text, wrong in WRONG_MASKS.items() if wrong is masks)

    class Balance(nn.Module):
        def forward(self, routing: edl.Routing, attention_mask: torch.Tensor):
            return edl.load_balancing_loss([routing], attention_mask)

    calls = {
        ("load_balancing_loss",): lambda: edl.load_balancing_loss(ROUTING, **masks),
        ("router_z_loss",): lambda: edl.router_z_loss(ROUTING, **masks),
        ("LoadBalancing", "Objectives"): lambda: Objectives({"balance": (LoadBalancing(), 1.0)})(ROUTING, **masks),
        ("RouterZ", "Objectives"): lambda: Objectives({"z": (RouterZ(), 1.0)})(ROUTING, **masks),
    }
    for named, call in calls.items():
        with pytest.raises((ValueError, IndexError)) as error:
            call()
        assert any(str(error.value).startswith(f"edl::{op}: {sentence}") for op in named)
    if len(masks) == 1:
        with pytest.raises(OF_TORCHSCRIPT) as error:
            torch.jit.script(Balance())(ROUTING, masks["attention_mask"])
        assert f"edl::load_balancing_loss: {sentence}" in str(error.value)


def test_experts_out_of_range():
    class Balance(nn.Module):
        def forward(self, routing: edl.Routing):
            return edl.load_balancing_loss([routing])

    routing = ROUTING._replace(experts=changed(EXPERTS, (3, 1), E + 1))
    calls = {
        "load_balancing_loss": lambda: edl.load_balancing_loss(routing),
        "Objectives": lambda: Objectives({"balance": (LoadBalancing(), 1.0)})(routing),
    }
    for op, call in calls.items():
        with pytest.raises(IndexError, match=f"^edl::{op}: experts must be "):
            call()
    with pytest.raises(OF_TORCHSCRIPT, match="edl::load_balancing_loss: experts must be at least 0 and at most 5, "):
        torch.jit.script(Balance())(routing)


def test_the_default_name_is_the_operator_s_own():
    ids = torch.zeros(B * S_LEN, dtype=torch.int64)
    with pytest.raises(IndexError, match="^edl::aggregate_routing: segment_ids must be"):
        edl.ops.aggregate_routing(LOGITS.flatten(0, 1), ids + 1, 1)
    with pytest.raises(IndexError, match="^edl::domain_moments: labels must be"):
        edl.ops.domain_moments(torch.rand(B, E), torch.ones(B), LABELS + 1, D)
    with pytest.raises(ValueError, match="^edl::segments: domain_ids must have one row"):
        edl.segments.make_segments(24, LABELS, D, batch_size=5)
    with pytest.raises(IndexError, match="^edl::mine: segment_ids must be"):
        torch.ops.edl.aggregate_routing(LOGITS.flatten(0, 1), ids + 1, 1, "softmax", caller="edl::mine")
