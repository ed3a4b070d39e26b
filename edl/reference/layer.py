"""The definitions of the layer: token → expert → token."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edl.reference.loss import one_or_nan


def route_tokens(
    logits: Tensor,
    top_k: int,
    scores: str,
    bias: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weights and experts [T, K] that each token of logits [T, E] gets."""
    score = logits.softmax(dim=-1) if scores == "softmax" else logits.sigmoid()
    # Scores rise with the logits, and logits keep apart what rounding would make equal.
    order = logits if bias is None else score + bias
    ranks = order.argsort(dim=-1, descending=True, stable=True)
    # Open experts first, whatever the bias, then the masked ones.
    masked = logits == -math.inf
    by_number = torch.where(masked, torch.arange(logits.shape[1], device=logits.device), -1).gather(1, ranks)
    experts = ranks.gather(1, by_number.argsort(dim=-1, stable=True))[:, :top_k]
    weights = score.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + (1e-20 if scores == "sigmoid" else 0.0))
    return weights * one_or_nan(logits) * scale, experts


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The slots of experts [T, K] in the order of their experts [N], and where each expert begins [E + 1]."""
    ids = experts.flatten().long()
    offsets = (ids[None, :] < torch.arange(num_experts + 1, device=ids.device)[:, None]).sum(dim=1)
    return ids.argsort(stable=True).int(), offsets.int()


def dispatch_tokens(tokens: Tensor, row_order: Tensor, top_k: int) -> Tensor:
    """Tokens [T, H] in the order of the experts [N, H]."""
    return tokens[row_order.long() // top_k]


def combine_tokens(rows: Tensor, weights: Tensor | None, row_order: Tensor, top_k: int) -> Tensor:
    """The sum [T, H], weighted or plain, of each token's rows [N, H]; rows of weight 0 are left out."""
    slots = torch.zeros_like(rows).index_copy(0, row_order.long(), rows)
    slots = slots.view(rows.shape[0] // top_k, top_k, rows.shape[1])
    return (slots if weights is None else _weighted(slots, weights)).sum(dim=1)


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
    tokens: Tensor, weights: Tensor, row_order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Tokens [T, H] through their experts' SwiGLU networks, weighted and summed [T, H]."""
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
