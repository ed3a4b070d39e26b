"""Coupling of experts and routers: an expert answers loudest to the tokens that the router sends it."""

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
from edl.reduction.ranks import reads_values
from edl.routing import Observation


@dataclasses.dataclass(frozen=True)
class ExpertRouterCoupling(Objective):
    """(1/E²) Σ_i Σ_{j≠i} [max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0)], M_ij = ‖R~_i W_g^jᵀ‖.

    Second-hand: ERC, arXiv 2512.23447, after notes and a reimplementation of the pseudocode of its Fig. 8. Row R_i of
    the router stands for the tokens of expert i; W_g^j is the gate projection of expert j. Each row is answered
    loudest by its own expert, and each expert answers its own row loudest. R~_i is R_i with noise, uniform in a box
    in which it stays nearest to itself: see `edl.moe.router_weights.responses_of`. Ours, where the source is silent:
    the box is a constant of the gradient; it is 0 for a row of zeros and is not cut off where it is wider than the row
    is long; the noise is a function of the router's own digits, hence the same on all ranks and in replays, and new
    after each step; it is always there. Routing itself never sees it.

    At least 0. It is not invariant to the scale of weights: rows and gates that shrink have a smaller loss. It needs
    no token, and looks at no mask or label.

    It costs E²/(3TK) of the layer's work (8 % with E 64, T 2048, K 8; E 64 with 64 K tokens 0.3 %), and keeps
    E · E_local · I numbers of a layer until its backward pass. Layers make what it needs where they are asked for it:
    `MoELayer(router_responses=True)`.

    With experts spread over ranks each has the columns of its own experts, and all of them are added: `group` and
    `sequence_group` must hold all ranks of the layer's `expert_group`. The gradient is then that of one process, for
    the experts as for the router, whatever the number of replicas.

    Args:
        alpha (float): a, the fraction of an expert's answer to its own row beyond which other answers count, at least
            0: the smaller, the stronger the coupling. Default: 1 (64 experts; 0.5 with 256; 2 hardly helped, and 3 did
            nothing).

    Raises:
        ValueError: an alpha that is negative or not finite.

    Source: arXiv 2512.23447; its weight is not known, the reimplementation's is 1.
    """

    alpha: float = 1.0

    needs = frozenset({"router_responses"})

    def __post_init__(self) -> None:
        checks.check_numbers("ExpertRouterCoupling", alpha=self.alpha)
        if not 0.0 <= self.alpha < math.inf:
            raise ValueError(f"edl::ExpertRouterCoupling: alpha must be finite and not negative (got {self.alpha})")

    def segments(self, batch: Batch) -> Segments:
        return no_tokens(batch)

    def of_tokens(self, layers: Sequence[Observation], segments: Segments) -> Sums:
        columns = [_columns(layer) for layer in layers]
        if columns[0].shape[1] == columns[0].shape[0]:
            return one_unit(self._losses(torch.stack(columns)))
        owned = [torch.ones_like(x) for x in columns]
        return {
            "responses": torch.stack([_in_their_places(x, layer) for x, layer in zip(columns, layers)]),
            "owners": torch.stack([_in_their_places(x, layer)[0] for x, layer in zip(owned, layers)]),
        }

    def formula(self, sums: Sums) -> Tensor:
        if "loss" in sums:
            return mean_over_units(sums)
        owners = sums["owners"]
        if reads_values(owners) and bool((owners == 0).any()):
            raise ValueError(
                "edl::ExpertRouterCoupling: group and sequence_group must hold all ranks of the layer's expert_group "
                f"(got {int((owners == 0).sum(1).max())} of {owners.shape[1]} experts on none of them)"
            )
        return self._losses(sums["responses"] / owners.unsqueeze(1))

    def _losses(self, responses: Tensor) -> Tensor:
        """The loss [L] of whole responses [L, E, E]."""
        num_experts = responses.shape[1]
        own = self.alpha * responses.diagonal(dim1=1, dim2=2).unsqueeze(2)
        excess = torch.relu(responses - own) + torch.relu(responses.transpose(1, 2) - own)
        is_itself = torch.eye(num_experts, dtype=torch.bool, device=responses.device)
        return excess.masked_fill(is_itself, 0.0).sum((1, 2)) / num_experts**2


def _columns(layer: Observation) -> Tensor:
    """The responses [E, E_local] of a layer."""
    columns = layer.router_responses
    assert columns is not None
    num_experts, num_own = columns.shape
    if num_experts < 2 or not 0 < num_own <= num_experts or not 0 <= layer.first_expert <= num_experts - num_own:
        raise ValueError(
            "edl::ExpertRouterCoupling: router_responses must have the shape [E, E_local] for two or more experts, of "
            f"which those of the columns are some (got {list(columns.shape)} from expert {layer.first_expert} on)"
        )
    return columns


def _in_their_places(columns: Tensor, layer: Observation) -> Tensor:
    """Columns [E, E_local] among zeros for the experts of other ranks, [E, E]."""
    num_experts, num_own = columns.shape
    return torch.nn.functional.pad(columns, (layer.first_expert, num_experts - num_own - layer.first_expert))
