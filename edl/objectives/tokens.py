"""What objectives read of tokens: distributions over experts, choices, and how many tokens count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from edl.objectives.base import Sums
from edl.ops import checks
from edl.reduction.ranks import reads_values
from edl.routing import Observation

INPUTS = ["logits", "probs"]


def check_input(op: str, input: str, scores: str) -> None:
    """Raises where the options that say what an objective reads are none."""
    checks.check_choice(op, "input", input, INPUTS)
    checks.check_choice(op, "scores", scores, checks.router_scores())


def needs_of(input: str) -> frozenset[str]:
    """The field of an observation that `input` names."""
    return frozenset({"logits" if input == "logits" else "scores"})


def routing_of(layers: Sequence[Observation], input: str) -> list[Tensor]:
    """The router's logits of each layer, or its scores with `input="probs"`."""
    routing = [layer.logits if input == "logits" else layer.scores for layer in layers]
    return [x for x in routing if x is not None]


def log_distribution(routing: Tensor, is_counted: Tensor, scores: str) -> Tensor:
    """The logarithms [T, E] of the distribution over experts, in float32 or float64; -inf where an expert has none.

    Args:
        routing (Tensor[T, E]): logits, or probabilities with `scores="none"`.
        is_counted (Tensor[T]): bool; the other tokens may hold NaN, and have no gradient.
        scores (str): "softmax", "sigmoid" (normalised over experts) or "none".
    """
    wide = routing if routing.dtype == torch.float64 else routing.float()
    wide = wide.where(is_counted.unsqueeze(1), 1.0)
    if scores == "softmax":
        return torch.log_softmax(wide, 1)
    if scores == "sigmoid":
        gates = torch.nn.functional.logsigmoid(wide)
        return gates - torch.logsumexp(gates, 1, keepdim=True)
    is_zero = wide == 0
    return torch.log(wide.masked_fill(is_zero, 1.0)).masked_fill(is_zero, -torch.inf)


def check_distributions(routing: Sequence[Tensor], segment_ids: Tensor) -> None:
    """Raises where scores of tokens that count are no distributions (on the CPU), which is what operators of edl say of
    those that they are given."""
    for layer in routing:
        torch.ops.edl.aggregate_routing(layer.detach(), segment_ids, 1, "none", caller="edl::Objectives")


def number_of_tokens(segment_ids: Tensor) -> Tensor:
    """How many tokens count, a float64 scalar; refuses ids of labels and mask values that are not allowed, in one
    segment."""
    ones = torch.ones([segment_ids.shape[0], 1], dtype=torch.float64, device=segment_ids.device)
    tokens: Tensor = torch.ops.edl.aggregate_routing(ones, segment_ids, 1, "none", caller="edl::Objectives")[0]
    return tokens.sum()


def mean_over_tokens(name: str, values: Sequence[Tensor], segment_ids: Tensor) -> Sums:
    """The two sums of a mean over the tokens that count.

    Args:
        name (str): of what is averaged.
        values (sequence of Tensor): a scalar for each layer or pair of layers, the sum over the tokens that count.
        segment_ids (Tensor[T]): of one segment.
    """
    return {name: torch.stack(list(values)), "tokens": number_of_tokens(segment_ids).expand(len(values))}


def chosen_experts(op: str, experts: Tensor, is_counted: Tensor, num_experts: int) -> Tensor:
    """The choices [T, K] as int64 in [0, E], E for none, as those of tokens that do not count.

    Raises:
        IndexError: an expert outside [0, E] (on the CPU; elsewhere with EDL_CHECK=1).
    """
    chosen = experts.where(is_counted.unsqueeze(1), num_experts)
    is_wrong = (chosen < 0) | (chosen > num_experts)
    if reads_values(chosen) and bool(is_wrong.any()):
        raise IndexError(
            f"edl::{op}: experts must be in [0, {num_experts}], {num_experts} for none (got {chosen[is_wrong][0]})"
        )
    return chosen.masked_fill(is_wrong, num_experts).long()
