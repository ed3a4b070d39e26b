"""Tensors whose memory was taken or changed behind autograd's back: a sentence, and no foreign memory."""

import pytest
import torch
from samples import SAMPLES, operator
from support import as_tuple, first_samples, with_gradients

import edl


def free(tensor: torch.Tensor) -> None:
    """What FSDP does with parameters that are not in use."""
    tensor.untyped_storage().resize_(0)


def readable(arguments: tuple) -> list[int]:
    return [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.numel() > 0]


FORWARD = [(sample, position) for sample in first_samples(2) for position in readable(sample.arguments())]


@pytest.mark.parametrize("sample, position", FORWARD, ids=str)
def test_memory_that_was_freed_is_a_sentence(sample, position):
    arguments = sample.arguments()
    free(arguments[position])
    with pytest.raises(
        ValueError, match=rf"^edl::{sample.op}: a tensor must have the memory of its shape.*\(got 0 of "
    ):
        operator(sample.op)(*arguments)


def test_memory_that_shrank_is_a_sentence():
    logits = torch.randn(6, 4)
    logits.untyped_storage().resize_(92)
    with pytest.raises(ValueError) as error:
        edl.ops.route_tokens(logits, 2, "softmax")
    assert str(error.value) == (
        "edl::route_tokens: a tensor must have the memory of its shape, which FSDP frees outside its module's passes "
        "(got 92 of 96 bytes for [6, 4])"
    )
    edl.ops.route_tokens(logits[:5], 2, "softmax")


@pytest.mark.parametrize("sample", [s for s in first_samples() if s.differentiable], ids=str)
def test_memory_that_was_freed_before_the_backward_pass_is_a_sentence(sample):
    leaves = with_gradients(sample, sample.arguments())
    outputs = [y for y in as_tuple(operator(sample.op)(*leaves)) if y.requires_grad]
    freed = [leaves[position] for position in readable(leaves) if leaves[position].dtype.is_floating_point]
    for leaf in freed:
        free(leaf.detach())
    try:
        torch.autograd.grad(outputs, [leaves[i] for i in sample.differentiable], [torch.ones_like(y) for y in outputs])
    except ValueError as error:
        assert str(error).startswith("edl::") and "a tensor must have the memory of its shape" in str(error)
    else:  # its gradient reads none of them
        assert sample.op in ("dispatch_tokens", "expert_divergence")


def test_the_layer_and_the_loss_without_memory():
    tokens, labels = torch.randn(6, 8), torch.tensor([0, 1])
    for name in ("gate_up_proj", "down_proj"):
        layer = edl.MoELayer(8, 4, 4, 2)
        (parameter,) = [p for n, p in layer.named_parameters() if n.endswith(name)]
        free(parameter.detach())
        with pytest.raises(ValueError, match="^edl::expert_mlp: a tensor must have the memory of its shape"):
            layer(tokens)
    for loss in (edl.ExpertDivergenceLoss(2), edl.ExpertDivergenceLoss(2, memory=edl.DomainMemory())):
        logits = torch.randn(2, 3, 4, requires_grad=True)
        value = loss(logits, labels)
        free(logits.detach())
        with pytest.raises(
            ValueError, match="^edl::expert_divergence_loss: a tensor must have the memory of its shape"
        ):
            value.backward()
        with pytest.raises(
            ValueError, match="^edl::expert_divergence_loss: a tensor must have the memory of its shape"
        ):
            loss(logits, labels)


LOGITS, LABELS = torch.randn(2, 3, 4), torch.tensor([0, 1])
READ_BY_TORCH = {
    "router_z_loss: router_logits": (LOGITS, edl.router_z_loss),
    "router_z_loss: padding_mask": (
        torch.zeros(2, 3, dtype=torch.bool),
        lambda mask: edl.router_z_loss(LOGITS, padding_mask=mask),
    ),
    "load_balancing_loss: experts": (
        torch.zeros(6, 2, dtype=torch.int64),
        lambda experts: edl.load_balancing_loss(edl.Routing(LOGITS, LOGITS, experts, experts)),
    ),
    "load_balancing_loss: attention_mask": (
        torch.ones(2, 3),
        lambda mask: edl.load_balancing_loss(LOGITS, mask, top_k=2),
    ),
    "update_expert_bias: tokens_per_expert": (
        torch.ones(4),
        lambda loads: edl.update_expert_bias(edl.MoELayer(8, 4, 4, 2, expert_bias=True), loads),
    ),
    "expert_divergence_loss: domain_ids": (
        torch.zeros(2, 3, dtype=torch.int64),
        lambda labels: edl.expert_divergence_loss(LOGITS, labels, 2),
    ),
    "expert_divergence_loss: attention_mask": (
        torch.ones(2, 3),
        lambda mask: edl.expert_divergence_loss(LOGITS, LABELS, 2, attention_mask=mask),
    ),
    "expert_divergence_loss: cu_seqlens": (
        torch.tensor([0, 3, 6]),
        lambda boundaries: edl.expert_divergence_loss(LOGITS.flatten(0, 1), LABELS, 2, cu_seqlens=boundaries),
    ),
}


@pytest.mark.parametrize("argument", READ_BY_TORCH)
def test_what_operators_of_torch_would_read_without_memory(argument):
    tensor, call = READ_BY_TORCH[argument]
    call(tensor := tensor.clone())
    free(tensor)
    with pytest.raises(ValueError) as error:
        call(tensor)
    assert str(error.value) == f"edl::{argument} must have memory (got a tensor whose storage was freed)"


# ---- ids that NumPy changed ----


@pytest.mark.parametrize("wrong", [10**12, 2**31 + 1, 5, 2, -2, -7, -(10**12)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("routing_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [6, 60_000])
def test_segment_ids_that_change_before_the_backward_pass_are_index_errors(wrong, dtype, routing_dtype, num_tokens):
    if abs(wrong) > 2**31 and dtype == torch.int32:
        wrong = 2**31 - 1 if wrong > 0 else -(2**31)
    ids = (torch.arange(num_tokens) % 2).to(dtype)
    routing = torch.randn(num_tokens, 4, dtype=routing_dtype, requires_grad=True)
    sums, _ = edl.ops.aggregate_routing(routing, ids, 2, "softmax")
    ids.numpy()[num_tokens - 2] = wrong
    with pytest.raises(IndexError) as error:
        sums.sum().backward()
    assert str(error.value) == (
        "edl::aggregate_routing: segment_ids must stay as they are until the backward pass (got one that is now below "
        "-1 or not below 2, the number of segments)"
    )
    assert routing.grad is None


def test_segment_ids_of_the_loss_that_change_are_index_errors():
    mask = torch.ones(2, 3, dtype=torch.int64)
    logits, labels = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([0, 1])
    loss = edl.ExpertDivergenceLoss(2)(logits, labels, attention_mask=mask)
    expected = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    labels.numpy()[:] = 10**12  # which the loss does not read again
    mask.numpy()[:] = 10**12
    assert torch.autograd.grad(loss, logits)[0].equal(expected)


ALL_WITH_INDICES = [
    (sample, position)
    for sample in SAMPLES
    if sample.differentiable
    for position in readable(sample.arguments())
    if sample.arguments()[position].dtype in (torch.int32, torch.int64)
]


@pytest.mark.parametrize("wrong", [2**31 - 1, -(2**31)])
@pytest.mark.parametrize("sample, position", ALL_WITH_INDICES, ids=str)
def test_indices_that_change_before_the_backward_pass_are_refused_by_every_operator(sample, position, wrong):
    leaves = with_gradients(sample, sample.arguments())
    outputs = [y for y in as_tuple(operator(sample.op)(*leaves)) if y.requires_grad]
    leaves[position].numpy()[-1] = wrong
    with pytest.raises((IndexError, ValueError), match="^edl::"):
        torch.autograd.grad(outputs, [leaves[i] for i in sample.differentiable], [torch.ones_like(y) for y in outputs])


def test_experts_that_change_before_the_backward_pass_are_index_errors():
    logits = torch.randn(6, 4, requires_grad=True)
    weights, experts = edl.ops.route_tokens(logits, 2, "softmax")
    experts.numpy()[3, 1] = 10**12
    with pytest.raises(IndexError, match="^edl::_route_tokens_backward: experts must be at least 0 and below 4"):
        weights.sum().backward()
