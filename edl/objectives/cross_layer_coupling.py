"""Coupling of layers: the experts that a token chooses go together along its way."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.tokens import chosen_experts, distributions, mean_over_tokens
from edl.ops import checks


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

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        if len(layers) < 2:
            raise ValueError(
                "edl::CrossLayerCoupling: needs two MoE layers or more in one call, which routers that compute their "
                f"losses alone do not have (got {len(layers)})"
            )
        masses = _chosen_masses(layers, segments, self.scores)
        return mean_over_tokens("coupled", masses[:-1] * masses[1:], layers, segments)

    def formula(self, sums: Sums) -> Tensor:
        return -sums["coupled"] / sums["tokens"].clamp(min=1)


def _chosen_masses(layers: Layers, segments: Segments, scores: str) -> Tensor:
    """What each token's chosen experts have of its scores [L, T], on the device of the segments; of layers of whatever
    sizes."""
    num_tokens = segments.segment_ids.shape[0]
    by_size: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        logits, experts = layer.logits, layer.experts
        assert logits is not None and experts is not None
        if logits.shape[0] != num_tokens:
            raise ValueError(
                "edl::CrossLayerCoupling: all layers must have the same tokens "
                f"(got {num_tokens} and {logits.shape[0]})"
            )
        by_size.setdefault((logits.shape, logits.dtype, logits.device, experts.shape, experts.dtype), []).append(place)
    if len(by_size) == 1:
        return _chosen_masses_of_one_size(layers, segments, scores)
    masses: dict[int, Tensor] = {}
    for places in by_size.values():
        of_size = Layers([layers[place] for place in places])
        masses.update(zip(places, _chosen_masses_of_one_size(of_size, segments, scores)))
    return torch.stack([masses[place] for place in range(len(layers))])


def _chosen_masses_of_one_size(layers: Layers, segments: Segments, scores: str) -> Tensor:
    logits = layers[0].logits
    assert logits is not None
    ids = segments.segment_ids
    there = segments if logits.device == ids.device else segments._replace(segment_ids=ids.to(logits.device))
    chosen = chosen_experts(layers, there)
    of_experts = distributions(layers, there, "logits", scores)
    num_experts = of_experts.shape[2]
    of_chosen = of_experts.gather(2, chosen.clamp(max=num_experts - 1)).masked_fill(chosen == num_experts, 0.0)
    return of_chosen.sum(2).to(ids.device)
