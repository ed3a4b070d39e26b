"""Coupling of layers: the experts that a token chooses go together along its way."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Objective, Sums
from edl.objectives.tokens import chosen_experts, log_distribution, mean_over_tokens
from edl.ops import checks
from edl.routing import Observation


@dataclasses.dataclass(frozen=True)
class CrossLayerCoupling(Objective):
    """-(1/T) Σ_t Σ_{e chosen in l} Σ_{v chosen in l+1} s_te s_tv, of each pair of adjacent MoE layers l and l + 1.

    Reconstructed: arXiv 2602.14159 (Hu et al.), whose abstract says that it maximises the joint probability of top-k
    routing in adjacent layers; the equation itself is second-hand, sign and mean over tokens and pairs are our choice.
    s_te is the score over all E experts: not renormalised over the chosen ones, of which the sum would be 1 for every
    token and every router, a loss without gradient. The sum over pairs is the product of the two layers' chosen mass.

    Between -1 and 0; it has L - 1 values, each named in logs after the first layer of its pair. With K = E it is
    constant. A choice that was dropped has no score. The choices are constants of the gradient.

    It needs all layers in one call: it refuses a single one, as routers that compute their losses alone (Megatron,
    torchtitan) have. Layers without routing in between are skipped. Stages of a pipeline see their own pairs, never the
    one across.

    Args:
        scores (str): the router's scores, "softmax" (default) or "sigmoid" (normalised over experts).

    Raises:
        ValueError: an unknown option.

    Source: arXiv 2602.14159, reconstructed; its weight is said to be 1e-3 or 1e-4.
    """

    scores: str = "softmax"

    needs = frozenset({"logits", "experts"})
    takes_all_layers = True

    def __post_init__(self) -> None:
        checks.check_choice("CrossLayerCoupling", "scores", self.scores, checks.router_scores())

    def of_tokens(self, layers: Sequence[Observation], segments: Segments) -> Sums:
        ids = segments.segment_ids
        if len(layers) < 2:
            raise ValueError(
                "edl::CrossLayerCoupling: needs two MoE layers or more in one call, which routers that compute their "
                f"losses alone do not have (got {len(layers)})"
            )
        masses = torch.stack([_chosen_mass(layer, ids, self.scores) for layer in layers])
        return mean_over_tokens("coupled", list((masses[:-1] * masses[1:]).sum(1)), ids)

    def formula(self, sums: Sums) -> Tensor:
        return -sums["coupled"] / sums["tokens"].clamp(min=1)

    def has_effect(self, sums: Sums) -> Tensor:
        return sums["tokens"].sum() > 0


def _chosen_mass(layer: Observation, segment_ids: Tensor, scores: str) -> Tensor:
    """What each token's chosen experts have of its scores [T], on the device of the segments; 0 where it does not
    count."""
    logits, experts = layer.logits, layer.experts
    assert logits is not None and experts is not None
    if logits.shape[0] != segment_ids.shape[0]:
        raise ValueError(
            "edl::CrossLayerCoupling: all layers must have the same tokens "
            f"(got {segment_ids.shape[0]} and {logits.shape[0]})"
        )
    is_counted = (segment_ids == 0).to(logits.device)
    chosen = chosen_experts("CrossLayerCoupling", experts, is_counted, logits.shape[1])
    padded = torch.nn.functional.pad(log_distribution(logits, is_counted, scores).exp(), (0, 1))
    return padded.gather(1, chosen).sum(1).to(segment_ids.device)
