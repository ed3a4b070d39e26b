"""What objectives read of tokens: distributions over experts, choices, and how many tokens count. All of it is of the
layers of a call at once, and computed once for all objectives that see the same."""

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Sums
from edl.ops import checks
from edl.reduction.ranks import reads_values

INPUTS = ["logits", "probs"]


def check_input(op: str, input: str, scores: str) -> None:
    """Raises where the options that say what an objective reads are none."""
    checks.check_choice(op, "input", input, INPUTS)
    checks.check_choice(op, "scores", scores, checks.router_scores())


def needs_of(input: str) -> frozenset[str]:
    """The field of an observation that `input` names."""
    return frozenset({"logits" if input == "logits" else "scores"})


def routing_of(layers: Layers, input: str) -> list[Tensor]:
    """The router's logits of each layer, or its scores with `input="probs"`."""
    routing = [layer.logits if input == "logits" else layer.scores for layer in layers]
    return [x for x in routing if x is not None]


def stacked(layers: Layers, field: str) -> Tensor:
    """A field of all layers [L, ...], which are of one size."""

    def make() -> Tensor:
        tensors: list[Tensor] = [getattr(layer, field) for layer in layers]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    return layers.once(("stacked", field), make)


def are_ignored(layers: Layers, segments: Segments) -> Tensor:
    """Whether each token does not count, bool [T]."""

    def make() -> Tensor:
        ids, num_segments, _ = segments
        return ids != 0 if num_segments == 1 else (ids < 0) | (ids >= num_segments)

    return layers.once(("are_ignored", segments.segment_ids), make)


def readable_logits(layers: Layers, segments: Segments) -> Tensor:
    """The logits [L, T, E] in float32 or float64; those of tokens that do not count, which may hold NaN, are 1 and have
    no gradient."""
    return layers.once(
        ("readable", segments.segment_ids), lambda: _readable(stacked(layers, "logits"), layers, segments)
    )


def _readable(routing: Tensor, layers: Layers, segments: Segments) -> Tensor:
    wide = routing if routing.dtype == torch.float64 else routing.float()
    return wide.masked_fill(are_ignored(layers, segments).unsqueeze(1), 1.0)


def log_scores(layers: Layers, segments: Segments, input: str, scores: str) -> Tensor:
    """The logarithms [L, T, E] of the distributions over experts, in float32 or float64; -inf where an expert has none.
    Tokens that do not count have some distribution without gradient.

    Args:
        layers (Layers): of one size.
        segments (Segments): that say which tokens count.
        input (str): "logits", or "probs", whose scores must be distributions where tokens count.
        scores (str): of logits, "softmax" or "sigmoid" (normalised over experts).
    """

    def make() -> Tensor:
        if input == "probs":
            _check_distributions(layers, segments)
            wide = _readable(stacked(layers, "scores"), layers, segments)
            is_zero = wide == 0
            return torch.log(wide.masked_fill(is_zero, 1.0)).masked_fill(is_zero, -torch.inf)
        wide = readable_logits(layers, segments)
        if scores == "softmax":
            return torch.log_softmax(wide, 2)
        gates = torch.nn.functional.logsigmoid(wide)
        return gates - torch.logsumexp(gates, 2, keepdim=True)

    return layers.once(("log_scores", segments.segment_ids, input, scores), make)


def distributions(layers: Layers, segments: Segments, input: str, scores: str) -> Tensor:
    """The distributions over experts [L, T, E], of what `log_scores` takes."""
    return layers.once(
        ("distributions", segments.segment_ids, input, scores),
        lambda: log_scores(layers, segments, input, scores).exp(),
    )


def _check_distributions(layers: Layers, segments: Segments) -> None:
    """Raises where scores of tokens that count are no distributions (on the CPU), which is what operators of edl say of
    those that they are given."""
    for layer in routing_of(layers, "probs"):
        torch.ops.edl.aggregate_routing(
            layer.detach(), segments.segment_ids, segments.num_segments, "none", caller="edl::Objectives"
        )


def number_of_tokens(layers: Layers, segments: Segments) -> Tensor:
    """How many tokens count in each layer, float64 [L], of one segment; refuses mask values that are not allowed."""

    def make() -> Tensor:
        ids = segments.segment_ids
        ones = torch.ones([ids.shape[0], 1], dtype=torch.float64, device=ids.device)
        tokens: Tensor = torch.ops.edl.aggregate_routing(ones, ids, 1, "none", caller="edl::Objectives")[0]
        return tokens.view(1).expand(len(layers))

    return layers.once(("number_of_tokens", segments.segment_ids), make)


def sum_over_tokens(values: Tensor, layers: Layers, segments: Segments) -> Tensor:
    """The sums of numbers [L, T, ...] over the tokens that count, [L, ...]."""
    is_ignored = are_ignored(layers, segments)
    return values.masked_fill(is_ignored.view(-1, *[1] * (values.dim() - 2)), 0.0).sum(1)


def sums_by_segment(layers: Layers, segments: Segments, input: str, scores: str) -> tuple[Tensor, Tensor]:
    """The sums of the distributions over experts of the tokens of each segment [L, S, E], and their numbers [L, S].

    Args:
        layers (Layers): of one size.
        segments (Segments): S; ids of labels and mask values that are not allowed are refused.
        input (str): "logits", or "probs", whose scores must be distributions where tokens count.
        scores (str): of logits, "softmax" or "sigmoid" (normalised over experts).
    """

    def make() -> tuple[Tensor, Tensor]:
        sums, counts = torch.ops.edl._segment_sums(
            routing_of(layers, input),
            segments.segment_ids,
            segments.num_segments,
            scores if input == "logits" else "none",
            "edl::Objectives",
        )
        return sums, counts.detach().expand(len(layers), -1)

    return layers.once(("sums_by_segment", segments.segment_ids, input, scores), make)


def mean_over_tokens(name: str, values: Tensor, layers: Layers, segments: Segments) -> Sums:
    """The two sums of a mean over the tokens that count, `name` and tokens.

    Args:
        name (str): of what is averaged.
        values (Tensor[L, T]): of each token.
        layers (Layers): of one size.
        segments (Segments): one, of all tokens that count, as `Batch.counted` gives it.
    """
    return {
        name: sum_over_tokens(values, layers, segments),
        "tokens": number_of_tokens(layers, segments).narrow(0, 0, 1).expand(len(values)),
    }


def chosen_experts(layers: Layers, segments: Segments) -> Tensor:
    """The choices [L, T, K] as int64 in [0, E], E for none, as those of tokens that do not count.

    Raises:
        IndexError: an expert outside [0, E] (on the CPU; elsewhere with EDL_CHECK=1).
    """

    def make() -> Tensor:
        num_experts = stacked(layers, "logits").shape[2]
        chosen = stacked(layers, "experts").masked_fill(are_ignored(layers, segments).unsqueeze(1), num_experts)
        is_wrong = (chosen < 0) | (chosen > num_experts)
        if reads_values(chosen) and bool(is_wrong.any()):
            raise IndexError(
                f"edl::Objectives: experts must be in [0, {num_experts}], {num_experts} for none "
                f"(got {chosen[is_wrong][0]})"
            )
        return chosen.masked_fill(is_wrong, num_experts).long()

    return layers.once(("chosen_experts", segments.segment_ids), make)
