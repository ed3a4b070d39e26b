"""The definition of what has no operator: how far each expert's output lies in the span of a token's others."""

import torch
from torch import Tensor


def projections_on_others(outputs: Tensor, eps: float = 1e-6) -> Tensor:
    """The mean [T] over a token's K outputs [T, K, H] of the squared lengths of an output's projections on the others,
    which are made orthonormal one after the other; eps is added to the lengths that they are divided by."""
    total = torch.zeros_like(outputs[:, 0, 0])
    for own, output in enumerate(outputs.unbind(1)):
        units: list[Tensor] = []
        for other, vector in enumerate(outputs.unbind(1)):
            if other == own:
                continue
            for unit in units:
                vector = vector - (vector * unit).sum(dim=1, keepdim=True) * unit
            units.append(vector / (vector.norm(dim=1, keepdim=True) + eps))
        for unit in units:
            total = total + ((output * unit).sum(dim=1, keepdim=True) * unit).square().sum(dim=1)
    return total / outputs.shape[1]
