"""A loss that travels in the gradient of another tensor."""

import torch
from torch import Tensor

from edl.ops import checks


def inject(carrier: Tensor, loss: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns a copy of `carrier` that carries a loss which cannot be returned, for example from a pipeline stage.

    In the backward pass the carrier's gradient passes unchanged, and `loss` receives the gradient `scale`. Attach it to
    a small tensor that the final loss depends on, such as the routing weights.

    Args:
        carrier (Tensor): of any shape.
        loss (Tensor): a scalar.
        scale (Tensor, optional): a scalar, the factor of a gradient scaler. Default: 1.

    Returns:
        A copy of carrier.

    Raises:
        ValueError: `loss` or `scale` is no scalar.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("inject", carrier=carrier, loss=loss)
        checks.check_given("inject", scale=scale)
    copy: Tensor = torch.ops.edl.inject(carrier, loss, torch.ones_like(loss) if scale is None else scale)
    return copy
