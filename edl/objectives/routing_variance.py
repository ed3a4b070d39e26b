"""The variance of routing weights: an expert is used much by some tokens and little by others."""

import dataclasses

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.tokens import chosen_experts, distributions, mean_over_tokens, number_of_tokens, stacked
from edl.ops import checks


@dataclasses.dataclass(frozen=True)
class RoutingVariance(Objective):
    """-(1/E) Σ_e (1/T) Σ_t (s_te - s̄_e)²: minus the variance over tokens of the weights after top-k, mean over experts.

    Verified: arXiv 2505.22323, Eq. 7, L_v of its text, but for the mean over tokens, where Eq. 7 has a sum, so that the
    weight does not depend on the number of tokens. s_te is the weight of expert e for token t, 0 where it was not
    chosen, renormalised here to add up to 1 over the chosen experts, without any factor of the layer. Only weights of
    chosen experts have a gradient, (2 / (E T)) (s_te - s̄_e) before that of the renormalisation; none with K = 1,
    whose weights are constants. Choices that were dropped are none, and tokens without any count with weights of 0.

    Between -(1 - 1/E) / E and 0, and 0 without a token that counts.

    Args:
        variant (str): "equation" (default). "released_code": what the authors' code computes in its place: minus the
            mean over tokens of the unbiased variance over experts of the softmax of all logits. It makes each token
            sharp, also where all tokens choose the same experts.

    Raises:
        ValueError: an unknown variant.

    Source: arXiv 2505.22323, whose weight is 1e-3 after a scaling to the size of the balance loss, which we do not
        have, as it reads values; its code is github.com/HongcanGuo/Auxloss-For-Advancing-Expert-Specialization.
    """

    variant: str = "equation"

    def __post_init__(self) -> None:
        checks.check_choice("RoutingVariance", "variant", self.variant, ["equation", "released_code"])

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "weights", "experts"} if self.variant == "equation" else {"logits"})

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        if self.variant == "released_code":
            return mean_over_tokens("variances", _variances_over_experts(layers, segments), layers, segments)
        dense = _dense_weights(layers, segments)
        return {
            "weights": dense.sum(1),
            "squares": dense.square().sum(1),
            "tokens": number_of_tokens(layers, segments),
        }

    def formula(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"].double().clamp(min=1)
        if self.variant == "released_code":
            return -sums["variances"] / tokens
        means, squares = (sums[name].double() / tokens.unsqueeze(1) for name in ("weights", "squares"))
        return (means.square() - squares).mean(1)


def _dense_weights(layers: Layers, segments: Segments) -> Tensor:
    """The weights [L, T, E], which add up to 1 for each token, 0 where it did not choose or does not count."""
    weights, experts = stacked(layers, "weights"), stacked(layers, "experts")
    num_experts = stacked(layers, "logits").shape[2]
    if weights.shape != experts.shape:
        raise ValueError(
            f"edl::RoutingVariance: weights and experts must have one shape (got {list(weights.shape[1:])} and "
            f"{list(experts.shape[1:])})"
        )
    chosen = chosen_experts(layers, segments)
    wide = weights if weights.dtype == torch.float64 else weights.float()
    wide = wide.masked_fill(chosen == num_experts, 0.0)
    total = wide.sum(2, keepdim=True)
    shares = wide / total.masked_fill(total == 0, 1.0)
    return shares.new_zeros(*shares.shape[:2], num_experts + 1).scatter(2, chosen, shares)[..., :num_experts]


def _variances_over_experts(layers: Layers, segments: Segments) -> Tensor:
    scores = distributions(layers, segments, "logits", "softmax")
    if scores.shape[2] < 2:
        raise ValueError(
            "edl::RoutingVariance: variant='released_code' needs at least two experts, whose variance it is (got 1)"
        )
    return scores.var(2)
