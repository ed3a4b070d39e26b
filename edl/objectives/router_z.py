"""The router z-loss: logits stay small."""

import dataclasses
import typing

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.arguments import RouterLogits, as_logits, check_logits, check_masks, counted_tokens, flat, layers_of
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.tokens import mean_over_tokens, readable_logits


@dataclasses.dataclass(frozen=True)
class RouterZ(Objective):
    """The mean over tokens of logsumexp(logits)²; 0 without a token that counts.

    A token whose logits are all -inf has no distribution: where it counts, the loss is NaN.

    Source: arXiv 2202.08906, Eq. 5.
    """

    needs = frozenset({"logits"})

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        z = torch.logsumexp(readable_logits(layers, segments), dim=2)
        return mean_over_tokens("squares", _or_nan(z).square(), layers, segments)

    def formula(self, sums: Sums) -> Tensor:
        return sums["squares"] / sums["tokens"].clamp(min=1)


def _or_nan(z: Tensor) -> Tensor:
    """A token without an open expert has no distribution."""
    return z.masked_fill(torch.isneginf(z), float("nan"))


def _squares_and_tokens(logits: Tensor, counted: Tensor, is_masked: bool, op: str) -> tuple[Tensor, Tensor]:
    """The sum of logsumexp(logits)² over the tokens that count, and their number."""
    wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    is_counted = counted == 0
    if is_masked:
        wide = torch.where(is_counted.unsqueeze(1), wide, torch.zeros_like(wide))  # padding may hold NaN
    z = _or_nan(torch.logsumexp(wide, dim=1))
    squares = torch.where(is_counted, z.square(), torch.zeros_like(z)).sum()
    # A sum of ones, by the operator that refuses mask values which are not allowed.
    tokens, _ = torch.ops.edl.aggregate_routing(
        torch.ones_like(z).unsqueeze(1), counted, 1, "none", caller="edl::" + op
    )
    return squares, tokens.sum()


def router_z_loss(
    router_logits: RouterLogits,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The router z-loss of ST-MoE: the mean over tokens of logsumexp(logits)², mean over layers. It keeps logits small.

    `edl.objectives.RouterZ` of one process. A token whose logits are all -inf has no distribution: where it counts, the
    loss is NaN.

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
        layers = layers_of("router_z_loss", "router_logits", router_logits)
        check_masks("router_z_loss", attention_mask, padding_mask)
        router_logits = as_logits(layers)
    if len(router_logits) == 0:
        raise ValueError("edl::router_z_loss: router_logits must hold at least one layer (got an empty list)")
    check_logits("router_z_loss", router_logits, attention_mask, padding_mask)
    is_masked = attention_mask is not None or padding_mask is not None
    losses: list[Tensor] = []
    for layer in router_logits:
        logits, batch_size = flat(layer)
        counted = counted_tokens(
            "router_z_loss", logits.shape[0], batch_size, logits.device, attention_mask, padding_mask
        )
        squares, tokens = _squares_and_tokens(logits, counted, is_masked, "router_z_loss")
        losses.append(squares / tokens.clamp(min=1))
    return torch.stack(losses).mean()
