"""The definition of a loss that travels in a gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale.to(loss))
        return carrier.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.saved_tensors[0].clone(), None


def inject(carrier: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """A copy of the carrier whose backward pass hands `scale` to the loss."""
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] = _Inject.apply  # untyped in torch
    return apply(carrier, loss, scale)
