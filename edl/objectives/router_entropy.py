"""The entropy of the router: sharp choices without labels."""

import dataclasses

from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.tokens import check_input, distributions, log_scores, mean_over_tokens, needs_of

_LOWEST = -1e30  # stands for log 0, times 0


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

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        of_tokens = layers, segments, self.input, self.scores
        nats = (distributions(*of_tokens) * log_scores(*of_tokens).clamp(min=_LOWEST)).sum(2)
        return mean_over_tokens("nats", nats, layers, segments)

    def formula(self, sums: Sums) -> Tensor:
        return -sums["nats"] / sums["tokens"].clamp(min=1)
