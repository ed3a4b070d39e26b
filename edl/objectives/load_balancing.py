"""Load balancing: every expert gets its share."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from edl import ops
from edl.objectives.base import Objective, Sums
from edl.routing import Observation


@dataclasses.dataclass(frozen=True)
class LoadBalancing(Objective):
    """E · Σ_e f_e P_e: f_e the fraction of all choices that went to expert e, P_e the mean of its score over tokens.

    1 at perfect balance, E where one expert gets everything, 0 without a token that counts.

    Args:
        scores (str): the router's scores, "softmax" (default) or "sigmoid" (normalised over experts, as in
            DeepSeek-V3).
        scope (str): whose balance it is. "global" (default): of the tokens of all ranks together, so that ranks with
            different data may use different experts. "rank": the mean over ranks of each one's own.

    Raises:
        ValueError: an unknown option.

    Source: arXiv 2101.03961, Eq. 4 to 6, with f over all K choices (GShard, arXiv 2006.16668); over the global batch:
        arXiv 2501.11873.
    """

    scores: str = "softmax"
    scope: str = "global"

    needs = frozenset({"logits", "experts"})

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("scores", self.scores, ("softmax", "sigmoid")),
            ("scope", self.scope, ("global", "rank")),
        ):
            if value not in choices:
                raise ValueError(f"edl::LoadBalancing: {name} must be one of {list(choices)} (got {value!r})")

    def of_tokens(self, layers: Sequence[Observation], counted: Tensor) -> Sums:
        mass, tokens, choices = [], [], []
        for layer in layers:
            assert layer.logits is not None and layer.experts is not None
            num_experts = layer.logits.shape[1]
            scores, count = ops.aggregate_routing(layer.logits, counted, 1, self.scores)
            # The sort counts without a scatter; a token that does not count is a sentinel there.
            is_counted = (counted == 0).unsqueeze(1)
            chosen = torch.where(is_counted, layer.experts, torch.full_like(layer.experts, num_experts))
            _, offsets = ops.sort_by_expert(chosen, num_experts)
            mass.append(scores[0])
            tokens.append(count[0])
            choices.append(offsets.diff())
        sums = {"scores": torch.stack(mass), "tokens": torch.stack(tokens), "choices": torch.stack(choices)}
        if self.scope == "global":
            return sums
        loss = self._balance(sums)
        return {"loss": loss, "ranks": torch.ones_like(loss)}

    def formula(self, sums: Sums) -> Tensor:
        return self._balance(sums) if self.scope == "global" else sums["loss"] / sums["ranks"]

    def _balance(self, sums: Sums) -> Tensor:
        scores, choices = sums["scores"], sums["choices"].to(sums["scores"].dtype)
        fractions = choices / choices.sum(1, keepdim=True).clamp(min=1)
        means = scores / sums["tokens"].unsqueeze(1).clamp(min=1)
        return scores.shape[1] * (fractions * means).sum(1)
