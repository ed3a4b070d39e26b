"""One's own numbers become everybody's: what a formula reads is the total, what it differentiates is one's own part."""

from typing import Any

import torch
from torch import Tensor


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, total: Tensor, factor: float, worth: Tensor | None) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(worth)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (worth,) = ctx.saved_tensors
        if ctx.factor != 1.0:
            grad = grad * ctx.factor
        return grad if worth is None else grad * worth.to(grad.dtype), None, None, None


def share(own: Tensor, total: Tensor, factor: float = 1.0, worth: Tensor | None = None) -> Tensor:
    """The total, differentiable in one's own part of it.

    Every rank computes the same loss of the total and has the gradient of its own tokens alone; the framework's
    averaging makes their sum of it. What it divides by too often is multiplied here, once in a chain, and never on a
    loss.

    Args:
        own (Tensor): this rank's numbers of this micro-batch.
        total (Tensor): the sum over all ranks and micro-batches, of the same shape, the same bits on every rank;
            without gradient.
        factor (float): what the gradient is multiplied by: the ranks over which a framework averages. Default: 1.
        worth (Tensor, optional): a scalar that the host need not know: the number of micro-batches in the total.

    Returns:
        Tensor, of the shape and values of `total`.
    """
    shared: Tensor = _Share.apply(own, total, factor, worth)  # type: ignore[no-untyped-call]
    return shared
