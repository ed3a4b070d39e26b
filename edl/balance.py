"""Losses and updates that keep the load of the experts even."""

import typing
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from edl import ops
from edl.moe import MoELayer, Routing
from edl.segments import mask_segments

if typing.TYPE_CHECKING:
    _Routings = Routing | Tensor | Sequence[Routing | Tensor]
    _RouterLogits = Routing | Tensor | Sequence[Routing | Tensor]
else:  # what TorchScript takes
    _Routings = list[Routing]
    _RouterLogits = list[Tensor]


def _counted(
    num_tokens: int,
    batch_size: int,
    device: torch.device,
    attention_mask: Tensor | None,
    padding_mask: Tensor | None,
) -> Tensor:
    """Segment ids [T]: 0 = the token counts, -1 = it does not, 1 = its mask value is not allowed (operators refuse
    it)."""
    ids = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    return mask_segments(ids, 1, batch_size, attention_mask, padding_mask)


def _refuse_dtensor(
    op: str, layers: Sequence[Routing | Tensor], attention_mask: Tensor | None, padding_mask: Tensor | None
) -> None:
    for layer in layers:
        ops._refuse_dtensor(op, *(layer if isinstance(layer, Routing) else [layer]))
    ops._refuse_dtensor(op, attention_mask, padding_mask)


def _flat(logits: Tensor) -> tuple[Tensor, int]:
    """Logits as [T, E], and the number of sequences where the shape says it, else -1."""
    if logits.dim() == 3:
        return logits.flatten(0, 1), logits.shape[0]
    return logits, -1


def _layer_balance(logits: Tensor, experts: Tensor, counted: Tensor, scores: str) -> Tensor:
    """E · Σ_e f_e P_e of one layer."""
    num_experts = logits.shape[1]
    sums, tokens = ops.aggregate_routing(logits, counted, 1, scores)
    mean_scores = sums[0] / tokens[0].clamp(min=1)
    # The sort counts without a scatter; a token that does not count is a sentinel there.
    chosen = torch.where((counted == 0).unsqueeze(1), experts, torch.full_like(experts, num_experts))
    _, offsets = ops.sort_by_expert(chosen, num_experts)
    fractions = (offsets[1:] - offsets[:-1]).to(mean_scores.dtype) / offsets[-1].clamp(min=1)
    return num_experts * (fractions * mean_scores).sum()


def _as_routings(routings: Sequence[Routing | Tensor], top_k: int | None, scores: str) -> list[Routing]:
    """The layers' routings, from several, or from router logits."""
    layers = []
    for routing in routings:
        if not isinstance(routing, Routing):
            if top_k is None:
                raise ValueError("edl::load_balancing_loss: router logits need top_k, the experts per token (got None)")
            logits = _flat(routing)[0]
            weights, experts = ops.route_tokens(logits.detach(), top_k, scores)
            routing = Routing(routing, weights, experts, experts.new_empty(0))
        layers.append(routing)
    return layers


def _as_logits(layers: Sequence[Routing | Tensor]) -> list[Tensor]:
    return [layer.logits if isinstance(layer, Routing) else layer for layer in layers]


def load_balancing_loss(
    routings: _Routings,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    scores: str = "softmax",
    top_k: int | None = None,
) -> Tensor:
    """The load-balancing loss of Switch Transformers: E · Σ_e f_e P_e per layer, mean over layers.

    f_e is the fraction of all choices that went to expert e, P_e the mean of its score over tokens; both sum to 1 over
    experts, so the loss is 1 at perfect balance and E when one expert gets everything. (transformers' value is K times
    this one.) Without any token that counts it is 0.

    Args:
        routings (Routing, or a list or tuple of them): one per layer, as `MoELayer` returns them. Also router logits, a
            Tensor[T, E] or Tensor[B, S_len, E] or a list or tuple of them, together with `top_k`. Scripted: a list of
            Routing only.
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
        scores (str): the router's scores, "softmax" (default) or "sigmoid" (normalised over experts, as in
            DeepSeek-V3).
        top_k (int, optional): K, for router logits.

    Returns:
        The loss, a scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: no layer, wrong shapes, both masks, logits without `top_k`, a DTensor.
        IndexError: a mask value other than 0 and 1 (on the CPU; elsewhere the loss is NaN).

    Source: arXiv 2101.03961, Eq. 4 to 6, with f over all K choices (GShard, arXiv 2006.16668); tokens of all sequences
        together.
    """
    if typing.TYPE_CHECKING or not torch.jit.is_scripting():  # type checkers: from here on a list of Routing
        layers = [routings] if isinstance(routings, (Routing, Tensor)) else routings
        _refuse_dtensor("load_balancing_loss", layers, attention_mask, padding_mask)
        routings = _as_routings(layers, top_k, scores)
    if len(routings) == 0:
        raise ValueError("edl::load_balancing_loss: routings must hold at least one layer (got an empty list)")
    losses: list[Tensor] = []
    for routing in routings:
        logits, batch_size = _flat(routing.logits)
        counted = _counted(logits.shape[0], batch_size, logits.device, attention_mask, padding_mask)
        losses.append(_layer_balance(logits, routing.experts, counted, scores))
    return torch.stack(losses).mean()


def router_z_loss(
    router_logits: _RouterLogits,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The router z-loss of ST-MoE: the mean over tokens of logsumexp(logits)², mean over layers. It keeps logits small.

    Args:
        router_logits (Tensor[T, E] or Tensor[B, S_len, E] or Routing, or a list or tuple of them): one per layer.
            Scripted: a list of tensors only.
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).

    Returns:
        The loss, a scalar, float32 (float64 for float64 logits). 0 without any token that counts.

    Raises:
        ValueError: no layer, wrong shapes, both masks, a DTensor.
        IndexError: a mask value other than 0 and 1 (on the CPU; elsewhere the loss is NaN).

    Source: arXiv 2202.08906, Eq. 5.
    """
    if typing.TYPE_CHECKING or not torch.jit.is_scripting():  # type checkers: from here on a list of tensors
        layers = [router_logits] if isinstance(router_logits, (Routing, Tensor)) else router_logits
        _refuse_dtensor("router_z_loss", layers, attention_mask, padding_mask)
        router_logits = _as_logits(layers)
    if len(router_logits) == 0:
        raise ValueError("edl::router_z_loss: router_logits must hold at least one layer (got an empty list)")
    losses: list[Tensor] = []
    for layer in router_logits:
        logits, batch_size = _flat(layer)
        counted = _counted(logits.shape[0], batch_size, logits.device, attention_mask, padding_mask)
        wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
        if attention_mask is not None or padding_mask is not None:
            wide = torch.where((counted == 0).unsqueeze(1), wide, torch.zeros_like(wide))  # padding may hold NaN
        terms = torch.where(counted == 0, torch.logsumexp(wide, dim=-1).square(), torch.zeros_like(wide[:, 0]))
        # A sum of ones per token that counts, by the operator that refuses mask values which are not allowed.
        tokens, _ = ops.aggregate_routing(torch.ones_like(wide[:, :1]), counted, 1, "none")
        losses.append(terms.sum() / tokens[0, 0].clamp(min=1))
    return torch.stack(losses).mean()


@torch.no_grad()
def update_expert_bias(
    layers: MoELayer | Sequence[MoELayer],
    tokens_per_expert: Tensor | Routing | Sequence[Tensor | Routing],
    rate: float = 1e-3,
    group: Optional["torch.distributed.ProcessGroup"] = None,
) -> None:
    """Moves each expert's bias towards balance by `rate`: up where its load is below the layer's mean, down above it.

    Call it once per optimizer step, in place of a load-balancing loss or beside a small one.

    Args:
        layers (MoELayer or list of MoELayer): layers made with `expert_bias=True`; their buffers are changed in place.
        tokens_per_expert (Tensor[E], Routing, or a list of them): one per layer; where a step has several
            micro-batches, the sum of their `Routing.tokens_per_expert`.
        rate (float): the size of a step, default 1e-3.
        group (ProcessGroup, optional): ranks whose tokens count together; one all-reduce for all layers.

    Raises:
        ValueError: a layer without expert bias, another number of counts than layers, a wrong shape, a DTensor.

    Source: arXiv 2408.15664, Algorithm 1; arXiv 2412.19437, section 2.1.2.
    """
    layers = [layers] if isinstance(layers, MoELayer) else list(layers)
    given = [tokens_per_expert] if isinstance(tokens_per_expert, (Routing, Tensor)) else list(tokens_per_expert)
    loads = [load.tokens_per_expert if isinstance(load, Routing) else load for load in given]
    ops._refuse_dtensor("update_expert_bias", *loads)
    if len(layers) != len(loads):
        raise ValueError(
            f"edl::update_expert_bias: tokens_per_expert must have one entry per layer (got {len(loads)} for "
            f"{len(layers)})"
        )
    biases: list[Tensor] = []
    for layer, load in zip(layers, loads):
        if layer.expert_bias is None:
            raise ValueError("edl::update_expert_bias: layers must be made with expert_bias=True (got one without)")
        biases.append(layer.expert_bias)
        if load.shape != layer.expert_bias.shape:
            raise ValueError(
                f"edl::update_expert_bias: tokens_per_expert must have the shape [{layer.num_experts}] (got "
                f"{list(load.shape)})"
            )
    if group is not None:
        together = torch.cat(loads)
        torch.distributed.all_reduce(together, group=group)
        loads = list(together.split([layer.num_experts for layer in layers]))
    for bias, load in zip(biases, loads):
        wide = load.to(bias.dtype)
        bias.add_(torch.sign(wide.mean() - wide), alpha=rate)
