"""The router z-loss: logits stay small."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from edl import ops
from edl.objectives.base import Objective, Sums
from edl.routing import Observation


@dataclasses.dataclass(frozen=True)
class RouterZ(Objective):
    """The mean over tokens of logsumexp(logits)²; 0 without a token that counts.

    A token whose logits are all -inf has no distribution: where it counts, the loss is NaN.

    Source: arXiv 2202.08906, Eq. 5.
    """

    needs = frozenset({"logits"})

    def of_tokens(self, layers: Sequence[Observation], counted: Tensor) -> Sums:
        squares, tokens = [], []
        is_counted = counted == 0
        for layer in layers:
            assert layer.logits is not None
            logits = layer.logits if layer.logits.dtype == torch.float64 else layer.logits.float()
            logits = logits.where(is_counted.unsqueeze(1), 0.0)  # padding may hold NaN
            z = torch.logsumexp(logits, dim=1)
            z = z.where(z != -torch.inf, torch.nan)
            squares.append(z.square().where(is_counted, 0.0).sum())
            # A sum of ones, by the operator that refuses mask values which are not allowed.
            count, _ = ops.aggregate_routing(torch.ones_like(logits[:, :1]), counted, 1, "none")
            tokens.append(count[0, 0])
        return {"squares": torch.stack(squares), "tokens": torch.stack(tokens)}

    def formula(self, sums: Sums) -> Tensor:
        return sums["squares"] / sums["tokens"].clamp(min=1)
