"""Losses and updates that keep the load of the experts even."""

import math
import typing
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from edl import ops
from edl.moe import MoELayer
from edl.reduction.ranks import reads_values
from edl.routing import Routing
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


def _check_masks(op: str, attention_mask: Tensor | None, padding_mask: Tensor | None) -> None:
    ops._check_given(op, attention_mask=attention_mask, padding_mask=padding_mask)
    ops._check_memory(op, attention_mask=attention_mask, padding_mask=padding_mask)


def _layers_of(op: str, name: str, given: "_Routings") -> Sequence[Routing | Tensor]:
    """The layers of one or several, all of them tensors or routings of tensors."""
    layers = [given] if isinstance(given, (Routing, Tensor)) else given
    if not isinstance(layers, (list, tuple)):
        raise ValueError(
            f"edl::{op}: {name} must be a Routing, a tensor, or a list of them (got {type(given).__name__})"
        )
    for layer in layers:
        if not isinstance(layer, (Routing, Tensor)):
            raise ValueError(
                f"edl::{op}: {name} must hold tensors or Routings, and nothing for a layer without a router "
                f"(got a list with {type(layer).__name__})"
            )
        if isinstance(layer, Routing):
            ops._check_tensors(op, logits=layer.logits, experts=layer.experts)
            ops._check_memory(op, logits=layer.logits, experts=layer.experts)
        else:
            ops._check_tensor(op, name, layer)
            ops._check_memory(op, **{name: layer})
    return layers


def _check_layers(op: str, layers: list[Tensor], attention_mask: Tensor | None, padding_mask: Tensor | None) -> None:
    """Raises where router logits do not fit an operator, each other, or a mask."""
    for logits in layers:
        if logits.dim() != 2 and logits.dim() != 3:
            raise ValueError(
                f"edl::{op}: router logits must have the shape [T, E] or [B, S_len, E] (got {list(logits.shape)})"
            )
        if logits.shape[-1] == 0:
            raise ValueError(f"edl::{op}: router logits must have at least one expert (got {list(logits.shape)})")
        if logits.dtype not in [torch.float32, torch.float64, torch.bfloat16, torch.float16]:
            raise ValueError(
                f"edl::{op}: router logits must be float32, float64, bfloat16 or float16 (got {logits.dtype})"
            )
        if logits.device != layers[0].device:
            raise ValueError(
                f"edl::{op}: all layers must be on one device (got {layers[0].device} and {logits.device})"
            )
        for mask in [attention_mask, padding_mask]:
            if mask is not None and mask.device != logits.device:
                raise ValueError(
                    f"edl::{op}: the mask must be on the device of the router logits (got {mask.device} and "
                    f"{logits.device})"
                )


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
            assert top_k is not None
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
    this one.) Without any token that counts it is 0. A token whose logits are all -inf has no distribution: where it
    counts, the loss is NaN.

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
        layers = _layers_of("load_balancing_loss", "routings", routings)
        _check_masks("load_balancing_loss", attention_mask, padding_mask)
        ops._check_texts("load_balancing_loss", scores=scores)
        if any(not isinstance(layer, Routing) for layer in layers):
            if top_k is None:
                raise ValueError("edl::load_balancing_loss: router logits need top_k, the experts per token (got None)")
            ops._check_integers("load_balancing_loss", top_k=top_k)
        _check_layers("load_balancing_loss", _as_logits(layers), attention_mask, padding_mask)
        routings = _as_routings(layers, top_k, scores)
    if len(routings) == 0:
        raise ValueError("edl::load_balancing_loss: routings must hold at least one layer (got an empty list)")
    _check_layers("load_balancing_loss", [routing.logits for routing in routings], attention_mask, padding_mask)
    losses: list[Tensor] = []
    for routing in routings:
        logits, batch_size = _flat(routing.logits)
        if routing.experts.dim() != 2 or routing.experts.shape[0] != logits.shape[0]:
            raise ValueError(
                f"edl::load_balancing_loss: experts must have the shape [{logits.shape[0]}, K] (got "
                f"{list(routing.experts.shape)})"
            )
        if routing.experts.device != logits.device:
            raise ValueError(
                f"edl::load_balancing_loss: experts must be on the device of logits (got {routing.experts.device} and "
                f"{logits.device})"
            )
        counted = _counted(logits.shape[0], batch_size, logits.device, attention_mask, padding_mask)
        losses.append(_layer_balance(logits, routing.experts, counted, scores))
    return torch.stack(losses).mean()


def router_z_loss(
    router_logits: _RouterLogits,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The router z-loss of ST-MoE: the mean over tokens of logsumexp(logits)², mean over layers. It keeps logits small.

    A token whose logits are all -inf has no distribution: where it counts, the loss is NaN.

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
        layers = _layers_of("router_z_loss", "router_logits", router_logits)
        _check_masks("router_z_loss", attention_mask, padding_mask)
        router_logits = _as_logits(layers)
    if len(router_logits) == 0:
        raise ValueError("edl::router_z_loss: router_logits must hold at least one layer (got an empty list)")
    _check_layers("router_z_loss", router_logits, attention_mask, padding_mask)
    losses: list[Tensor] = []
    for layer in router_logits:
        logits, batch_size = _flat(layer)
        counted = _counted(logits.shape[0], batch_size, logits.device, attention_mask, padding_mask)
        wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
        if attention_mask is not None or padding_mask is not None:
            wide = torch.where((counted == 0).unsqueeze(1), wide, torch.zeros_like(wide))  # padding may hold NaN
        sums = torch.logsumexp(wide, dim=-1)
        sums = torch.where(torch.isneginf(sums), torch.full_like(sums, float("nan")), sums)
        terms = torch.where(counted == 0, sums.square(), torch.zeros_like(sums))
        # A sum of ones per token that counts, by the operator that refuses mask values which are not allowed.
        tokens, _ = ops.aggregate_routing(torch.ones_like(wide[:, :1]), counted, 1, "none")
        losses.append(terms.sum() / tokens[0, 0].clamp(min=1))
    return torch.stack(losses).mean()


def _bias_of(layer: MoELayer) -> Tensor:
    """The expert bias of a layer, in a type that resolves its steps."""
    if not hasattr(layer, "_widen_expert_bias"):
        raise ValueError(f"edl::update_expert_bias: layers must be of MoELayer (got {type(layer).__name__})")
    bias = layer._widen_expert_bias()
    if bias is None:
        raise ValueError("edl::update_expert_bias: layers must be made with expert_bias=True (got one without)")
    ops._check_tensors("update_expert_bias", expert_bias=bias)
    return bias


def _as_list(name: str, given: Any) -> list[Any]:
    try:
        return list(given)
    except (TypeError, NotImplementedError):  # the second is a scripted module's
        raise ValueError(
            f"edl::update_expert_bias: {name} must be that of one layer or a list (got {type(given).__name__})"
        ) from None


def _one_per_layer(name: str, given: Sequence[object], biases: list[Tensor]) -> list[Tensor]:
    """What is given per layer, checked."""
    if len(given) != len(biases):
        raise ValueError(
            f"edl::update_expert_bias: {name} must have one entry per layer (got {len(given)} for {len(biases)})"
        )
    tensors = []
    for bias, tensor in zip(biases, given):
        ops._check_tensor("update_expert_bias", name, tensor)
        assert isinstance(tensor, Tensor)
        ops._check_memory("update_expert_bias", **{name: tensor})
        if tensor.shape != bias.shape:
            raise ValueError(
                f"edl::update_expert_bias: {name} must have the shape [{bias.shape[0]}] (got {list(tensor.shape)})"
            )
        if tensor.is_complex() or (tensor.is_meta and not bias.is_meta):
            got = "a meta tensor" if tensor.is_meta else f"{tensor.dtype}"
            raise ValueError(f"edl::update_expert_bias: {name} must hold real numbers (got {got})")
        tensors.append(tensor)
    return tensors


@torch.no_grad()
def update_expert_bias(
    layers: MoELayer | Sequence[MoELayer],
    tokens_per_expert: Tensor | Routing | Sequence[Tensor | Routing],
    rate: float = 1e-3,
    group: Optional["torch.distributed.ProcessGroup"] = None,
    open_experts: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Moves each expert's bias towards balance by `rate`: up where its load is below the layer's mean, down above it.

    Call it once per optimizer step, in place of a load-balancing loss or beside a small one. A bias that is found in 16
    bits, which do not resolve such steps, becomes a float32 buffer first: the layer's `expert_bias` is then another
    tensor than before.

    Args:
        layers (MoELayer or list of MoELayer): layers made with `expert_bias=True`; their buffers are changed in place.
        tokens_per_expert (Tensor[E], Routing, or a list of them): one per layer; where a step has several
            micro-batches, the sum of their `Routing.tokens_per_expert`.
        rate (float): the size of a step, default 1e-3.
        group (ProcessGroup, optional): ranks whose tokens count together; one all-reduce for all layers.
        open_experts (Tensor[E] or a list of them, optional): bool, one per layer: the experts that some token could
            have chosen, because their logits were not masked with -inf. They alone move, against the mean of their
            loads. With `group`, an expert that is open on one rank is open. Default: all.

    Raises:
        ValueError: no MoELayer or one without expert bias, another number of entries than layers, a wrong shape or
            type, a DTensor; loads that are not finite (on CUDA with EDL_CHECK=1 only), on all ranks of `group`.

    Source: arXiv 2408.15664, Algorithm 1; arXiv 2412.19437, section 2.1.2.
    """
    ops._check_numbers("update_expert_bias", rate=rate)
    rate = float(rate)
    if not math.isfinite(rate):
        raise ValueError(f"edl::update_expert_bias: rate must be finite (got {rate})")
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            "edl::update_expert_bias: group must be a process group that holds this process (got "
            f"{type(group).__name__})"
        )
    several = _as_list("layers", [layers] if hasattr(layers, "_widen_expert_bias") else layers)
    biases = [_bias_of(layer) for layer in several]
    if isinstance(tokens_per_expert, (Routing, Tensor)):
        tokens_per_expert = [tokens_per_expert]
    given = _as_list("tokens_per_expert", tokens_per_expert)
    given = [load.tokens_per_expert if isinstance(load, Routing) else load for load in given]
    loads = _one_per_layer("tokens_per_expert", given, biases)
    masks = [torch.ones_like(bias, dtype=torch.bool) for bias in biases]
    if open_experts is not None:
        given = [open_experts] if isinstance(open_experts, Tensor) else _as_list("open_experts", open_experts)
        masks = _one_per_layer("open_experts", given, biases)
        for mask in masks:
            if mask.dtype != torch.bool:
                raise ValueError(f"edl::update_expert_bias: open_experts must be bool (got {mask.dtype})")
    if len(biases) == 0:
        return
    # In float64, which is exact for counts up to 2^53.
    wide = [tensor.to(biases[0].device, torch.float64) for tensor in loads + masks]
    if group is not None:
        together = torch.cat(wide)
        torch.distributed.all_reduce(together, group=group)
        wide = list(together.split([bias.shape[0] for bias in biases + biases]))
    if reads_values(wide[0]) and not all(load.isfinite().all() for load in wide[: len(biases)]):
        raise ValueError("edl::update_expert_bias: tokens_per_expert must be finite (got NaN or infinity)")
    for bias, load, mask in zip(biases, wide, wide[len(biases) :]):
        is_open = mask > 0
        own = torch.where(is_open, load, torch.zeros_like(load))
        # The mean is compared as a sum, which no division rounds.
        steps = torch.sign(own.sum() - own * is_open.sum()) * is_open
        bias.add_(steps.to(bias), alpha=rate)
