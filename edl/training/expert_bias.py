"""Moves expert biases so that the load of the experts stays even."""

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from edl.moe import MoELayer
from edl.ops import checks
from edl.reduction.ranks import reads_values
from edl.routing import Routing


def _bias_of(layer: MoELayer) -> Tensor:
    """The expert bias of a layer, in a type that resolves its steps."""
    if not hasattr(layer, "_widen_expert_bias"):
        raise ValueError(f"edl::update_expert_bias: layers must be of MoELayer (got {type(layer).__name__})")
    bias = layer._widen_expert_bias()
    if bias is None:
        raise ValueError("edl::update_expert_bias: layers must be made with expert_bias=True (got one without)")
    checks.check_tensors("update_expert_bias", expert_bias=bias)
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
        checks.check_tensor("update_expert_bias", name, tensor)
        assert isinstance(tensor, Tensor)
        checks.check_memory("update_expert_bias", **{name: tensor})
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
    checks.check_numbers("update_expert_bias", rate=rate)
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
