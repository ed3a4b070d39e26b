"""One's own numbers become everybody's: what a formula reads is the total, what it differentiates is one's own part."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, factor: float, worth: Tensor | None, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.factor = factor
        ctx.dtypes = [x.dtype for x in own]
        ctx.save_for_backward(worth)
        if not torch.compiler.is_compiling():  # which gives zeros
            ctx.set_materialize_grads(False)  # what no loss was made of has no gradient, not one of 0 times infinity
        pieces = total.split([x.numel() for x in own])
        shared = tuple([piece.view(x.shape) for piece, x in zip(pieces, own)])
        ctx.mark_non_differentiable(*[x for x, is_needed in zip(shared, ctx.needs_input_grad[3:]) if not is_needed])
        return shared

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (worth,) = ctx.saved_tensors
        of_own: list[Tensor | None] = []
        for grad, dtype, is_needed in zip(grads, ctx.dtypes, ctx.needs_input_grad[3:]):
            if grad is None or not is_needed:
                of_own.append(None)
                continue
            if ctx.factor != 1.0:
                grad = grad * ctx.factor
            if worth is not None:
                grad = grad * worth.to(grad.dtype)
            of_own.append(grad.to(dtype))
        return None, None, None, *of_own


def share(own: Sequence[Tensor], total: Tensor, factor: float = 1.0, worth: Tensor | None = None) -> tuple[Tensor, ...]:
    """The total, differentiable in one's own part of it.

    Every rank computes the same loss of the total and has the gradient of its own tokens alone; the framework's
    averaging makes their sum of it. What it divides by too often is multiplied here, once in a chain, and never on a
    loss.

    Args:
        own (sequence of Tensor): this rank's numbers of this micro-batch.
        total (Tensor[N]): the sums over all ranks and micro-batches of all numbers in a row, the same bits on every
            rank; without gradient.
        factor (float): what the gradient is multiplied by: the ranks over which a framework averages. Default: 1.
        worth (Tensor, optional): a scalar that the host need not know: the number of micro-batches in the total.

    Returns:
        tuple of Tensor, of the shapes of `own`, in the values and the type of `total`.
    """
    shared: tuple[Tensor, ...] = _Share.apply(total, factor, worth, *own)  # type: ignore[no-untyped-call]
    return shared
