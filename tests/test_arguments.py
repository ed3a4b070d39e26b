"""Arguments that are of no use end in one sentence that names them, in every public function."""

import pytest
import torch
from torch import nn

import edl
from edl import ops, segments
from edl.integrations.transformers import DomainCollator

T, E, K, H, S = 6, 4, 2, 8, 2
LOGITS, TOKENS, LABELS = torch.randn(T, E), torch.randn(T, H), torch.tensor([0, 1])
ORDER = torch.arange(T * K, dtype=torch.int32)

INTEGERS = {
    "sequence_segment_ids": lambda number: ops.sequence_segment_ids(LABELS, number),
    "aggregate_routing": lambda number: ops.aggregate_routing(LOGITS, torch.zeros(T, dtype=torch.int64), number),
    "domain_moments": lambda number: ops.domain_moments(torch.rand(S, E), torch.ones(S), LABELS, number),
    "route_tokens": lambda number: ops.route_tokens(LOGITS, number, "softmax"),
    "sort_by_expert": lambda number: ops.sort_by_expert(torch.zeros(T, K, dtype=torch.int64), number),
    "dispatch_tokens": lambda number: ops.dispatch_tokens(TOKENS, ORDER, number),
    "combine_tokens": lambda number: ops.combine_tokens(torch.randn(T * K, H), None, ORDER, number),
    "load_balancing_loss": lambda number: edl.load_balancing_loss(LOGITS, top_k=number),
    "segments": lambda number: segments.make_segments(number, LABELS[:1], 2),
}
NO_INTEGERS = {
    "torch.float32": torch.tensor(2.0),  # as are tensors of other kinds than one integer
    "torch.bool": torch.tensor(True),
    "Tensor": torch.eye(2),
    "[2]": torch.tensor([2, 2]).numpy(),
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.tensor(2, device="meta"),
    "type": int,
    "2**64": 2**64,
}


@pytest.mark.parametrize("kind", NO_INTEGERS)
@pytest.mark.parametrize("op", INTEGERS)
def test_what_is_no_integer(op, kind):
    with pytest.raises(ValueError, match=rf"^edl::{op}: \w+ must be an integer( of 64 bits)? \(got .+\)$"):
        INTEGERS[op](NO_INTEGERS[kind])


@pytest.mark.parametrize("op", INTEGERS)
def test_integers_of_torch_and_numpy_are_integers(op):
    for number in (torch.tensor(2), torch.tensor(2, dtype=torch.int32), LABELS.numpy().dtype.type(2)):
        INTEGERS[op](number)


@pytest.mark.parametrize(
    "number", [torch.eye(2), torch.tensor(1j), 1j, "1", [1.0], torch.empty(0), 10**400, float], ids=repr
)
def test_what_is_no_number(number):
    layer = edl.MoELayer(H, 4, E, K, expert_bias=True)
    calls = {
        "route_tokens: scale": lambda: ops.route_tokens(LOGITS, K, "softmax", scale=number),
        "expert_divergence: eps": lambda: ops.expert_divergence(
            torch.ones(2, E, dtype=torch.float64), torch.ones(2, dtype=torch.float64), eps=number
        ),
        "update_expert_bias: rate": lambda: edl.update_expert_bias(layer, torch.ones(E), rate=number),
        "clip_grad_norm_: max_norm": lambda: edl.expert_parallel.clip_grad_norm_(layer, number),
    }
    for argument, call in calls.items():
        with pytest.raises(ValueError, match=rf"^edl::{argument} must be a number \(got .+\)$"):
            call()


def test_quantised_tensors():
    quantised = torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.qint8)
    for call in (
        lambda: ops.aggregate_routing(quantised, torch.zeros(T, dtype=torch.int64), 1),
        lambda: ops.route_tokens(quantised, K, "softmax"),
        lambda: edl.expert_divergence_loss(quantised, LABELS, 2),
        lambda: edl.router_z_loss(quantised),
        lambda: edl.load_balancing_loss(quantised, top_k=K),
    ):
        with pytest.raises(ValueError, match=r"^edl::\w+: \w+ must not be quantised \(got torch.qint8\)$"):
            call()


NO_TENSORS = [[0, 1], "01", 1.0, (0, 1), LABELS.numpy(), nn.Identity()]
TENSORS = {
    "make_segments": lambda given: segments.make_segments(T, given, 2),
    "make_segments-mask": lambda given: segments.make_segments(T, LABELS, 2, attention_mask=given),
    "make_segments-padding": lambda given: segments.make_segments(T, LABELS, 2, padding_mask=given),
    "make_segments-documents": lambda given: segments.make_segments(T, LABELS, 2, cu_seqlens=given),
    "mask_segments": lambda given: segments.mask_segments(given, 2),
    "mask_segments-mask": lambda given: segments.mask_segments(torch.zeros(T, dtype=torch.int64), 2, -1, given),
    "document_segments": lambda given: segments.document_segments(T, LABELS, 2, given),
    "sequence_segments": lambda given: segments.sequence_segments(T, given, 2),
    "domain_segments": lambda given: segments.domain_segments(T, given, 2),
}


@pytest.mark.parametrize("given", NO_TENSORS, ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("call", TENSORS)
def test_segments_of_what_is_no_tensor(call, given):
    with pytest.raises(ValueError, match=r"^edl::segments: \w+ must be a tensor \(got \w+\)$"):
        TENSORS[call](given)


SEGMENTS = {
    "domain_ids must be int32, int64 or floating weights (got torch.bool)": lambda: segments.sequence_segments(
        T, LABELS.bool(), 2
    ),
    "domain_ids must have the shape [B], [B, S_len] or [T] (got [])": lambda: segments.sequence_segments(
        T, LABELS[0], 2
    ),
    "segment_ids must be int32 or int64 of the shape [T] (got torch.float32 [6, 4])": lambda: segments.mask_segments(
        LOGITS, 2
    ),
    "num_tokens must not be negative (got -6)": lambda: segments.document_segments(
        -6, LABELS, 2, torch.tensor([0, 3, 6])
    ),
    "num_domains must be at least 1 (got 0)": lambda: segments.make_segments(T, LABELS, 0),
    "sequence_reduction must be 'sequence' or 'token' (got 'tokens')": lambda: segments.make_segments(
        T, LABELS, 2, "tokens"
    ),
}


@pytest.mark.parametrize("message", SEGMENTS)
def test_segments_of_what_makes_no_sense(message):
    with pytest.raises(ValueError) as error:
        SEGMENTS[message]()
    assert str(error.value) == f"edl::segments: {message}"


@pytest.mark.parametrize("given", [None, [LABELS], LABELS, (LABELS, 2, LABELS)], ids=lambda given: type(given).__name__)
def test_a_loss_of_what_are_no_segments(given):
    divergence = edl.ExpertDivergenceLoss(2)
    with pytest.raises(ValueError, match="^edl::expert_divergence_loss: segments must be edl.segments.Segments, or a"):
        divergence.from_segments(LOGITS, given)
    with pytest.raises(ValueError, match="^edl::expert_divergence_loss: labels must be a tensor"):
        divergence.from_segments(LOGITS, segments.Segments(torch.zeros(T, dtype=torch.int32), S, [0, 1]))


def test_functions_of_models():
    for function in (
        edl.expert_parallel.expert_parameters,
        edl.expert_parallel.exclude_from_ddp,
        edl.expert_parallel.average_expert_gradients,
        lambda model: edl.expert_parallel.clip_grad_norm_(model, 1.0),
    ):
        with pytest.raises(ValueError, match=r"^edl::expert_parallel: model must be an nn.Module \(got list\)$"):
            function([])
    with pytest.raises(ValueError, match=r"^edl::average_expert_gradients: replica_group must be a process group"):
        edl.expert_parallel.average_expert_gradients(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="^edl::fully_shard_layer: layer must be made with expert_group"):
        edl.expert_parallel.fully_shard_layer(None, None, None)
    with pytest.raises(ValueError, match=r"^edl::MoELayer.to_transformers: family must be one of"):
        edl.MoELayer(H, 4, E, K).to_transformers(["olmoe"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((E + 1, H), "the router must give 4 logits, one per expert (got 5)"),
        ((E - 1, H), "the router must give 4 logits, one per expert (got 3)"),
        ((E, H - 1), "router.weight must have the shape [E, 8] (got [4, 7])"),
        ((0,), "router.weight must have the shape [E, 8] (got [0])"),
    ],
    ids=str,
)
def test_a_router_that_does_not_fit_its_layer(shape, message):
    layer = edl.MoELayer(H, 4, E, K)
    layer.router.weight = nn.Parameter(torch.randn(shape))
    with pytest.raises(ValueError) as error:
        layer(TOKENS)
    assert str(error.value) == f"edl::MoELayer: {message}"


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"input_ids": [[1, 2]]}, "['input_ids']"),
        ({"inputs_embeds": torch.zeros(1, 2, 4)}, "['inputs_embeds']"),
        ([torch.zeros(1, 2)], "list"),
        (None, "NoneType"),
    ],
    ids=str,
)
@pytest.mark.parametrize("label", [0, [0, 1]], ids=str)
def test_batches_without_tokens_are_refused(batch, got, label):
    with pytest.raises(ValueError) as error:
        DomainCollator(lambda rows: batch)([{"input_ids": [1, 2], "domain_ids": label}])
    assert str(error.value) == f"edl::DomainCollator: collator must make a batch with a tensor input_ids (got {got})"


def test_labels_of_tokens_need_examples_with_tokens():
    collator = DomainCollator(lambda rows: {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="^edl::DomainCollator: examples with labels of tokens must have input_ids"):
        collator([{"text": "two words", "domain_ids": [0, 1]}])
