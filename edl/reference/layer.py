"""The definitions of the layer: token → expert → token."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edl.reference.loss import one_or_nan, router_scores


def route_tokens(
    logits: Tensor,
    top_k: int,
    scores: str,
    bias: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    allowed: Tensor | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights and experts [T, K] that each token of logits [T, E] gets."""
    num_experts = logits.shape[1]
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    score = router_scores(logits, scores)
    if experts is None:
        # Scores rise with the logits, and logits keep apart what rounding would make equal.
        order = logits if bias is None else score + bias
        ranks = order.argsort(dim=-1, descending=True, stable=True)
        # Open experts first, whatever the bias, then the masked ones, at last those that are not allowed.
        number = torch.arange(num_experts, device=logits.device)
        places = torch.where(logits == -math.inf, number, -1)
        places = places if allowed is None else torch.where(allowed, places, number + num_experts)
        experts = ranks.gather(1, places.gather(1, ranks).argsort(dim=-1, stable=True))[:, :top_k]
    experts = experts.long()
    is_none = experts < 0
    weights = score.gather(1, experts.clamp(min=0)).masked_fill(is_none, 0.0)
    if normalize:
        sums = weights.sum(dim=-1, keepdim=True) + (1e-20 if scores == "sigmoid" else 0.0)
        weights = weights / sums.masked_fill(is_none.all(dim=-1, keepdim=True), 1.0)
    weights = (weights * one_or_nan(logits) * scale).masked_fill(is_none, 0.0)
    return weights, experts.masked_fill(is_none, num_experts)


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The slots of experts [T, K] in the order of their experts [N], and where each expert begins [E + 1]."""
    ids = experts.flatten().long()
    offsets = (ids[None, :] < torch.arange(num_experts + 1, device=ids.device)[:, None]).sum(dim=1)
    return ids.argsort(stable=True).int(), offsets.int()


def dispatch_tokens(tokens: Tensor, row_order: Tensor, top_k: int) -> Tensor:
    """Tokens [T, H] in the order of the experts [N, H]."""
    return tokens[row_order.long() // top_k]


def _by_slot(rows: Tensor, row_order: Tensor, top_k: int) -> Tensor:
    """Rows [N, H] in the order of the slots [T, K, H]."""
    slots = torch.zeros_like(rows).index_copy(0, row_order.long(), rows)
    return slots.view(rows.shape[0] // top_k, top_k, rows.shape[1])


def combine_tokens(rows: Tensor, weights: Tensor | None, row_order: Tensor, top_k: int) -> Tensor:
    """The sum [T, H], weighted or plain, of each token's rows [N, H]; rows of weight 0 are left out."""
    slots = _by_slot(rows, row_order, top_k)
    return (slots if weights is None else _weighted(slots, weights)).sum(dim=1)


def token_gram(rows: Tensor, weights: Tensor | None, row_order: Tensor, top_k: int) -> Tensor:
    """The inner products [T, K, K] of each token's rows [N, H]; rows of weight 0 count as zeros."""
    slots = _by_slot(rows, row_order, top_k)
    slots = slots if weights is None else torch.where(weights.unsqueeze(-1) == 0, 0.0, slots)
    wide = slots if slots.dtype == torch.float64 else slots.float()
    return wide @ wide.mT


class _Weighted(torch.autograd.Function):
    """Rows [*, H] times their weights [*]: one of weight 0 takes no part, but its weight's gradient reads it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        weights = weights.unsqueeze(-1)
        return torch.where(weights == 0, 0.0, weights * rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weights = ctx.saved_tensors
        return weights.unsqueeze(-1) * grad, (rows * grad).sum(dim=-1)


_weighted: Callable[[Tensor, Tensor], Tensor] = _Weighted.apply  # untyped in torch


def expert_mlp(
    tokens: Tensor,
    weights: Tensor,
    row_order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    down: Tensor,
    recompute_activations: bool = False,
) -> Tensor:
    """Tokens [T, H] through their experts' SwiGLU networks, weighted and summed [T, H]; whatever is recomputed."""
    top_k, factors = weights.shape[1], weights.flatten()
    output = torch.zeros_like(tokens)
    for expert in range(gate_up.shape[0]):
        slots = row_order[offsets[expert] : offsets[expert + 1]].long()
        for used in (True, False):  # a slot of weight 0 takes no part; its weight's gradient alone reads its row
            own = slots[(factors[slots] != 0) == used]
            inputs = tokens[own // top_k], gate_up[expert], down[expert]
            x, first, second = inputs if used else [tensor.detach() for tensor in inputs]
            gate, up = F.linear(x, first).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, second)
            output = output.index_add(0, own // top_k, _weighted(rows, factors[own]))
    return output


def expert_mlp_with_gram(
    tokens: Tensor,
    weights: Tensor,
    row_order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    down: Tensor,
    output_gram: bool = False,
    activation_gram: bool = False,
    recompute_activations: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`expert_mlp`, and the inner products [T, K, K] of a token's outputs and activations; nothing where not asked."""
    top_k, factors = weights.shape[1], weights.flatten()
    outputs = tokens.new_zeros(tokens.shape[0] * top_k, down.shape[1])
    activations = tokens.new_zeros(tokens.shape[0] * top_k, down.shape[2])
    for expert in range(gate_up.shape[0]):
        slots = row_order[offsets[expert] : offsets[expert + 1]].long()
        slots = slots[factors[slots] != 0]
        gate, up = F.linear(tokens[slots // top_k], gate_up[expert]).chunk(2, dim=-1)
        activation = F.silu(gate) * up
        outputs = outputs.index_copy(0, slots, F.linear(activation, down[expert]))
        activations = activations.index_copy(0, slots, activation)
    in_order = torch.arange(outputs.shape[0], device=tokens.device)
    grams = [
        token_gram(rows, None, in_order, top_k)
        if is_asked
        else token_gram(rows[:0], None, in_order[:0], top_k)[0:0, 0, 0]
        for rows, is_asked in ((outputs, output_gram), (activations, activation_gram))
    ]
    return expert_mlp(tokens, weights, row_order, offsets, gate_up, down), grams[0], grams[1]
