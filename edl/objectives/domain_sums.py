"""Routing of domains, languages or modalities: sums of the router's scores over the tokens of each, whose labels may be
weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Sums
from edl.objectives.tokens import check_distributions, log_distribution, number_of_tokens, routing_of
from edl.routing import Observation


def domain_sums(layers: Sequence[Observation], segments: Segments, input: str, scores: str) -> Sums:
    """Sums of the scores of the tokens of each domain [L, D, E], and the number of its tokens, or their weight [L, D].

    Args:
        layers (sequence of Observation): of L layers.
        segments (Segments): what `Batch.tokens` gave.
        input (str): "logits" or "probs".
        scores (str): of logits, "softmax" or "sigmoid".
    """
    routing = routing_of(layers, input)
    scores = scores if input == "logits" else "none"
    if not segments.labels.is_floating_point():
        sums, counts = torch.ops.edl._segment_sums(
            routing, segments.segment_ids, segments.num_segments, scores, "edl::Objectives"
        )
    else:
        if input == "probs":
            check_distributions(routing, segments.segment_ids)
        sums, counts = _weighted_sums(routing, segments, scores)
    return {"sums": sums, "counts": counts.detach().double().expand(len(layers), -1)}


def _weighted_sums(routing: Sequence[Tensor], segments: Segments, scores: str) -> tuple[Tensor, Tensor]:
    ids = segments.segment_ids
    is_counted = ids == 0
    weights = segments.labels.detach().where(is_counted.unsqueeze(1), 0.0)
    tokens = number_of_tokens(ids)  # refuses weights that are not allowed
    sums = [log_distribution(x, is_counted, scores).exp() for x in routing]
    return torch.stack([weights.t().to(x.dtype) @ x for x in sums]), weights.double().sum(0) + (tokens - tokens)


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
