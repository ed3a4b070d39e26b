"""Objectives on the rows of the router: experts that are asked for different directions."""

import abc
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.objectives.base import Objective, Sums
from edl.objectives.weights import mean_over_units, no_tokens, one_unit
from edl.ops import checks
from edl.routing import Observation


class OfRouterGram(abc.ABC):
    """What objectives on the Gram matrix of a router's rows have in common: all ranks have the same rows, and each is
    one unit of a mean."""

    needs = frozenset({"router_gram"})

    @abc.abstractmethod
    def losses_of(self, grams: Tensor) -> Tensor:
        """The loss of each layer [L], of the Gram matrices [L, E, E] of their routers' rows."""

    def segments(self, batch: Batch) -> Segments:
        return no_tokens(batch)

    def of_tokens(self, layers: Sequence[Observation], segments: Segments) -> Sums:
        grams = [_gram_of(type(self).__name__, layer) for layer in layers]
        return one_unit(self.losses_of(torch.stack(grams)))

    def formula(self, sums: Sums) -> Tensor:
        return mean_over_units(sums)


def _gram_of(op: str, layer: Observation) -> Tensor:
    gram = layer.router_gram
    assert gram is not None
    if gram.shape[0] != gram.shape[1] or gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"edl::{op}: router_gram must be float32 or float64 and have the shape [E, E] (got {gram.dtype} "
            f"{list(gram.shape)})"
        )
    return gram


@dataclasses.dataclass(frozen=True)
class RouterOrthogonality(OfRouterGram, Objective):
    """(1/E²) Σ_{i≠j} cos²(w_i, w_j) = ‖Ŵ Ŵᵀ - I‖_F² / E²: the router's rows point in directions of their own.

    Verified in the code of ERNIE 4.5 (with its groups and its eps), whose report was not read; the margin is
    second-hand, of a variant for Megatron. cos(w_i, w_j) = w_i·w_j / (max(‖w_i‖, eps) max(‖w_j‖, eps)). The diagonal
    of Ŵ Ŵᵀ - I, which is 0, is left out: in ERNIE's code a row shorter than eps adds up to 1 there, with a gradient of
    1/eps, and a row of zeros adds 1. Here a row of zeros adds nothing and gets no gradient.

    Between 0, for orthogonal rows, which there are for E ≤ H alone, and 1 - G/E, for parallel ones. It costs E²/(3TKI)
    of the layer's work, needs no token, and looks at no mask or label. The weights are the same on all ranks, each of
    which is one unit of a mean.

    Args:
        groups (int): G, in which E/G experts each stand together, in their order; rows of a group alone are compared,
            and divided by G (E/G)². Default: 1. (ERNIE has as many as experts per token.)
        margin (float): m in [0, 1): cosines count as far as they exceed it, max(abs(cos) - m, 0)². Default: 0.
        eps (float): the least length by which a row is divided, above 1e-18, whose square float32 does not lose.
            Default: 1e-12, which is ERNIE's.

    Raises:
        ValueError: options outside of these ranges.

    Source: github.com/PaddlePaddle/ERNIE; a configuration there has the weight 1e-2, others 0. The variant with a
        margin has 1e-3 and m = 0.1.
    """

    groups: int = 1
    margin: float = 0.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        checks.as_integer("RouterOrthogonality", "groups", self.groups, lowest=1)
        checks.check_numbers("RouterOrthogonality", margin=self.margin, eps=self.eps)
        if not 0.0 <= self.margin < 1.0:
            raise ValueError(f"edl::RouterOrthogonality: margin must be in [0, 1) (got {self.margin})")
        if not 1e-18 < self.eps < math.inf:
            raise ValueError(f"edl::RouterOrthogonality: eps must be finite and above 1e-18 (got {self.eps})")

    def losses_of(self, grams: Tensor) -> Tensor:
        num_experts = grams.shape[1]
        if num_experts % self.groups != 0 or num_experts < 2 * self.groups:
            raise ValueError(
                "edl::RouterOrthogonality: groups must divide the number of experts into two or more each, which it "
                f"compares (got {self.groups} for {num_experts})"
            )
        squares = grams.diagonal(dim1=1, dim2=2)
        is_long = squares > self.eps**2
        inverse = squares.where(is_long, 1.0).rsqrt().where(is_long, 1.0 / self.eps)
        excess = torch.relu((grams * inverse.unsqueeze(1) * inverse.unsqueeze(2)).abs() - self.margin)
        group = torch.arange(num_experts, device=grams.device) // (num_experts // self.groups)
        is_pair = (group == group.unsqueeze(1)).fill_diagonal_(False)
        return excess.square().where(is_pair, 0.0).sum((1, 2)) * (self.groups / num_experts**2)


@dataclasses.dataclass(frozen=True)
class RouterSimilarity(OfRouterGram, Objective):
    """(1/E²) Σ_ij |w_i·w_j - δ_ij|: the router's rows are orthogonal and of length 1, so that tokens stay as alike in
    their scores as they are.

    Second-hand: SIMBAL, arXiv 2506.14038, ‖RᵀR - I_E‖_1 of the router R [H, E], as summaries of the paper give it. Ours
    is to read the norm as a sum over entries, and the mean over these, so that the weight does not depend on E: a
    weight for the sum is E² times as large here. Rows are not normalised. At an entry that is as it should be the
    gradient is 0.

    At least 0, and 0 for orthonormal rows, which there are for E ≤ H alone. It costs E²/(3TKI) of the layer's work,
    needs no token, and looks at no mask or label. The weights are the same on all ranks, each of which is one unit of a
    mean.

    Source: arXiv 2506.14038; its weight is not known to us.
    """

    def losses_of(self, grams: Tensor) -> Tensor:
        identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
        return (grams - identity).abs().mean((1, 2))
