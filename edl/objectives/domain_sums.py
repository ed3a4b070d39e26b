"""Routing of domains, languages or modalities: sums of the router's scores over the tokens of each, whose labels may be
weights."""

from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Sums
from edl.objectives.tokens import are_ignored, distributions, number_of_tokens, sums_by_segment


def domain_sums(layers: Layers, segments: Segments, input: str, scores: str) -> Sums:
    """Sums of the scores of the tokens of each domain [L, D, E], and the number of its tokens, or their weight [L, D].

    Args:
        layers (Layers): L of one size.
        segments (Segments): what `Batch.tokens` gave.
        input (str): "logits" or "probs".
        scores (str): of logits, "softmax" or "sigmoid".
    """

    def make() -> tuple[Tensor, Tensor]:
        if segments.labels.is_floating_point():
            sums, counts = _weighted_sums(layers, segments, input, scores)
        else:
            sums, counts = sums_by_segment(layers, segments, input, scores)
        return sums, counts.detach().double().expand(len(layers), -1)

    sums, counts = layers.once(("domain_sums", segments.segment_ids, segments.labels, input, scores), make)
    return {"sums": sums, "counts": counts}


def _weighted_sums(layers: Layers, segments: Segments, input: str, scores: str) -> tuple[Tensor, Tensor]:
    weights = segments.labels.detach().masked_fill(are_ignored(layers, segments).unsqueeze(1), 0.0)
    tokens = number_of_tokens(layers, segments)[0]  # refuses weights that are not allowed
    of_experts = distributions(layers, segments, input, scores)
    return weights.t().to(of_experts.dtype) @ of_experts, weights.double().sum(0) + (tokens - tokens)


def joint_of(sums: Sums, prior: str) -> Tensor:
    """The joint distribution of domains and experts [L, D, E], float64, which adds up to 1; zeros without a token.

    Args:
        sums (Sums): of `domain_sums`, over all ranks.
        prior (str): "batch": a domain is as probable as its tokens are many; "uniform": all that occur are alike.
    """
    counts = sums["counts"].detach().double()
    if prior == "uniform":
        is_present = counts != 0
        means = sums["sums"].double() / counts.where(is_present, 1.0).unsqueeze(-1)
        return means / is_present.sum(-1)[:, None, None].clamp(min=1)
    total = counts.sum(-1)
    return sums["sums"].double() / total.where(total != 0, 1.0)[:, None, None]


def information(sums: Sums, joint: Tensor) -> Tensor:
    """Σ_de P(d, e) log(P(d, e) / (P(d) P(e))) of each layer, in nats; P = 0 adds 0, and one domain tells nothing.

    Args:
        sums (Sums): of `domain_sums`, over all ranks.
        joint (Tensor[L, D, E]): their joint distribution.
    """
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    adds = (joint != 0) & (independent != 0)  # NaN does
    ratio = joint.where(adds, 1.0) / independent.where(adds, 1.0)
    nats = (joint * ratio.log()).sum((-1, -2))
    return nats.where((sums["counts"] != 0).sum(-1) > 1, nats - nats)  # 0 and no rounding; NaN stays
