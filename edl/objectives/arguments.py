"""Arguments of the losses of one process: what TorchScript takes too."""

import typing
from collections.abc import Sequence

import torch
from torch import Tensor

from edl.labels.segments import mask_segments
from edl.ops import checks
from edl.routing import Routing

if typing.TYPE_CHECKING:
    Routings = Routing | Tensor | Sequence[Routing | Tensor]
    RouterLogits = Routing | Tensor | Sequence[Routing | Tensor]
else:  # what TorchScript takes
    Routings = list[Routing]
    RouterLogits = list[Tensor]


def counted_tokens(
    op: str,
    num_tokens: int,
    batch_size: int,
    device: torch.device,
    attention_mask: Tensor | None,
    padding_mask: Tensor | None,
) -> Tensor:
    """Segment ids [T]: 0 = the token counts, -1 = it does not, 1 = its mask value is not allowed (operators refuse
    it)."""
    ids = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    return mask_segments(ids, 1, batch_size, attention_mask, padding_mask, op)


def check_masks(op: str, attention_mask: Tensor | None, padding_mask: Tensor | None) -> None:
    checks.check_given(op, attention_mask=attention_mask, padding_mask=padding_mask)
    checks.check_memory(op, attention_mask=attention_mask, padding_mask=padding_mask)


def layers_of(op: str, name: str, given: "Routings") -> Sequence[Routing | Tensor]:
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
            checks.check_tensors(op, logits=layer.logits, experts=layer.experts)
            checks.check_memory(op, logits=layer.logits, experts=layer.experts)
        else:
            checks.check_tensor(op, name, layer)
            checks.check_memory(op, **{name: layer})
    return layers


def check_logits(op: str, layers: list[Tensor], attention_mask: Tensor | None, padding_mask: Tensor | None) -> None:
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


def flat(logits: Tensor) -> tuple[Tensor, int]:
    """Logits as [T, E], and the number of sequences where the shape says it, else -1."""
    if logits.dim() == 3:
        return logits.flatten(0, 1), logits.shape[0]
    return logits, -1


def as_logits(layers: Sequence[Routing | Tensor]) -> list[Tensor]:
    return [layer.logits if isinstance(layer, Routing) else layer for layer in layers]
