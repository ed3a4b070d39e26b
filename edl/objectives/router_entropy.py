"""The entropy of the router: sharp choices without labels."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Objective, Sums
from edl.objectives.tokens import (
    check_distributions,
    check_input,
    log_distribution,
    mean_over_tokens,
    needs_of,
    routing_of,
)
from edl.routing import Observation


@dataclasses.dataclass(frozen=True)
class RouterEntropy(Objective):
    """-(1/T) Σ_t Σ_e p_te log p_te: the mean over tokens of the entropy of the router's distribution, in nats.

    Ours, reconstructed from no paper: the control for objectives that separate domains, whose routers become sharp too.
    Trained on, it makes the router as sharp without knowing a domain. Between 0 (each token sure of one expert) and
    log E; 0 without a token that counts, and with E = 1. p = 0 adds 0. A token whose logits are all -inf has no
    distribution: where it counts, the loss is NaN.

    Args:
        input (str): "logits" (default) or "probs": what it reads of an observation, logits or scores.
        scores (str): of logits, "softmax" (default) or "sigmoid" (normalised over experts, as in DeepSeek-V3).

    Raises:
        ValueError: an unknown option.

    Source: ours; the entropy of a distribution, natural logarithm.
    """

    input: str = "logits"
    scores: str = "softmax"

    def __post_init__(self) -> None:
        check_input(type(self).__name__, self.input, self.scores)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.input)

    def of_tokens(self, layers: Sequence[Observation], segments: Segments) -> Sums:
        is_counted, routing = segments.segment_ids == 0, routing_of(layers, self.input)
        if self.input == "probs":
            check_distributions(routing, segments.segment_ids)
        scores = self.scores if self.input == "logits" else "none"
        entropies = [_sum_of_entropies(log_distribution(x, is_counted, scores), is_counted) for x in routing]
        return mean_over_tokens("entropies", entropies, segments.segment_ids)

    def formula(self, sums: Sums) -> Tensor:
        return sums["entropies"] / sums["tokens"].clamp(min=1)

    def has_effect(self, sums: Sums) -> Tensor:
        return sums["tokens"].sum() > 0


def _sum_of_entropies(log_scores: Tensor, is_counted: Tensor) -> Tensor:
    information = -log_scores.masked_fill(torch.isneginf(log_scores), 0.0)
    return (log_scores.exp() * information).sum(1).where(is_counted, 0.0).sum()
