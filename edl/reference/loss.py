"""The definitions of the loss: token → sequence → domain → pairs."""

import itertools
import math

import torch
from torch import Tensor

LOWEST_LOG_RATIO = math.log(2.0**-126)


def sequence_segment_ids(labels: Tensor, num_tokens: int) -> Tensor:
    """The sequence of every token [T], -1 where that has the label -1."""
    length = num_tokens // max(1, labels.shape[0])
    ids = torch.arange(labels.shape[0], dtype=torch.int32, device=labels.device)
    return torch.where(labels == -1, -1, ids).repeat_interleave(length)


def router_scores(logits: Tensor, scores: str) -> Tensor:
    """The scores of logits [T, E]: each its share of all, or that of its own logit alone."""
    return logits.softmax(dim=-1) if scores == "softmax" else logits.sigmoid()


def normalised(values: Tensor, scores: str) -> Tensor:
    """Scores [T, *] over their sum."""
    return values / (values.sum(dim=-1, keepdim=True) + (0.0 if scores == "softmax" else 1e-20))


def routing_scores(routing: Tensor, scores: str) -> Tensor:
    """The distribution over experts [T, E] that `scores` makes of logits [T, E]; with "none" they are one."""
    if scores == "none":
        return routing
    return normalised(router_scores(routing, scores), scores) * one_or_nan(routing)


def one_or_nan(logits: Tensor) -> Tensor:
    """1 per row [T, 1]; NaN where all logits are -inf: such a row has no distribution."""
    masked = (logits == -math.inf).all(dim=-1, keepdim=True)
    return torch.where(masked, math.nan, 1.0).to(logits.dtype)


def aggregate_routing(
    routing: Tensor, segment_ids: Tensor, num_segments: int, scores: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Sums of the tokens' distributions per segment [S, E], and tokens per segment [S]."""
    counted = segment_ids >= 0
    probabilities = routing_scores(routing[counted], scores)
    sums = probabilities.new_zeros(num_segments, routing.shape[1])
    sums = sums.index_add(0, segment_ids[counted].long(), probabilities)
    counts = torch.bincount(segment_ids[counted].long(), minlength=num_segments)
    return sums, counts.to(sums.dtype)


def domain_moments(
    segment_sums: Tensor, segment_counts: Tensor, labels: Tensor, num_domains: int, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w x, Σ w x² [..., D, E] and Σ w [..., D] over the segments' mean distributions x, in float64.

    A segment without tokens or weight takes no part, whatever it holds; a count of NaN does.
    """
    if labels.dim() == 1:
        weights = torch.nn.functional.one_hot(labels.long() + 1, num_domains + 1)[:, 1:].double()
    else:
        weights = labels.double()
    segment_counts = segment_counts.double().expand(segment_sums.shape[:-1]).unsqueeze(-1)
    weights = weights.masked_fill(segment_counts <= 0, 0.0)  # [..., S, D]
    empty = (weights == 0).unsqueeze(-1)
    means = segment_sums.double() / segment_counts.masked_fill(segment_counts <= 0, 1.0)
    means = means.unsqueeze(-2)  # [..., S, 1, E]
    terms = (weights.unsqueeze(-1) * means).masked_fill(empty, 0.0)
    sums = terms.sum(dim=-3)
    squared = (terms * means).masked_fill(empty, 0.0).sum(dim=-3) if squares else sums.new_empty(0)
    return sums, squared, weights.sum(dim=-2)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence [] of two distributions [E], in nats, by the series where logarithms would cancel."""
    mean = (p + q) / 2
    tiny = torch.finfo(p.dtype).tiny
    u = (p - q) / (p + q).clamp(min=tiny)
    series = torch.zeros_like(u)
    for n in range(1, 17):
        series = series + u.square() ** n / (n * (2 * n - 1))
    log_mean = mean.clamp(min=tiny).log()
    log_p = (p.clamp(min=tiny).log() - log_mean).clamp(min=LOWEST_LOG_RATIO)
    log_q = (q.clamp(min=tiny).log() - log_mean).clamp(min=LOWEST_LOG_RATIO)
    # The slopes are dD/dp = log(p / mean) / 2: the logarithms' own derivatives cancel, and have no place where p is 0.
    terms = torch.where(u.abs() < 0.3, mean * series, p * log_p.detach() + q * log_q.detach())
    return terms.sum() / 2


def divergence_bias(mean_j: Tensor, spread_j: Tensor, mean_k: Tensor, spread_k: Tensor) -> Tensor:
    """The divergence [] that two noisy means [E] of one distribution have, to second order; spread = variance of the
    mean."""
    mean = (mean_j + mean_k) / 2
    inverse = torch.where(mean > 0, 1 / mean.clamp(min=torch.finfo(mean.dtype).tiny), torch.zeros_like(mean))
    return ((spread_j + spread_k) * inverse).sum() / 8


def _present(counts: Tensor, bias_correction: bool) -> list[int]:
    """Domains of one layer [D] that take part in a pair; a count of NaN does."""
    return [d for d, n in enumerate(counts.tolist()) if not (n < 2 if bias_correction else n <= 0)]


def segment_spreads(sums: Tensor, squares: Tensor, counts: Tensor) -> Tensor:
    """Unbiased variance between a domain's segments over their number [D, E], of domains of two segments or more."""
    n = counts.unsqueeze(-1)
    return (squares - sums.square() / n) / (n - 1) / n


def _pair_divergences(sums: Tensor, counts: Tensor, squares: Tensor | None) -> list[tuple[int, int, Tensor, Tensor]]:
    """Domains j < k, divergence [] and, with squares, its bias [] of all pairs of one layer [D, E]."""
    present = _present(counts, squares is not None)
    sums, counts = sums[present], counts[present]
    means = sums / counts.unsqueeze(-1)
    spreads = None if squares is None else segment_spreads(sums, squares[present], counts)
    pairs = []
    for a, b in itertools.combinations(range(len(present)), 2):
        divergence = jensen_shannon(means[a], means[b])
        bias = (
            divergence.new_zeros(()) if spreads is None else divergence_bias(means[a], spreads[a], means[b], spreads[b])
        )
        pairs.append((present[a], present[b], divergence, bias))
    return pairs


def _layers(sums: Tensor, counts: Tensor, squares: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Moments [..., D, E] as a list of layers [D, E]."""
    num_layers = math.prod(sums.shape[:-2])
    shape = [num_layers, *sums.shape[-2:]]
    squares_of = [None] * num_layers if squares is None else list(squares.reshape(shape))
    return list(zip(sums.reshape(shape), counts.reshape(num_layers, counts.shape[-1]), squares_of, strict=True))


def _layer_loss(sums: Tensor, counts: Tensor, squares: Tensor | None, eps: float, reduction: str) -> Tensor:
    pairs = _pair_divergences(sums, counts, squares)
    if not pairs:
        return sums[:0].sum()
    if reduction == "log_of_mean":
        return -(torch.stack([divergence for _, _, divergence, _ in pairs]).mean() + eps).log()
    terms = []
    for _, _, divergence, bias in pairs:
        term = -(divergence + eps).log()
        if squares is not None:
            corrected = divergence - bias
            scale = torch.maximum(divergence, bias) + bias + eps
            term = term.detach() - (corrected - corrected.detach()) / scale.detach()
        terms.append(term)
    return torch.stack(terms).mean()


def expert_divergence(
    sums: Tensor, counts: Tensor, eps: float, reduction: str, squares: Tensor | None = None
) -> Tensor:
    """The Expert Divergence loss [...] of domain moments [..., D, E]; with squares, its bias corrected."""
    losses = [_layer_loss(*layer, eps, reduction) for layer in _layers(sums, counts, squares)]
    return torch.stack(losses).reshape(sums.shape[:-2]) if losses else sums.sum(dim=(-2, -1))


def pairwise_divergence(sums: Tensor, counts: Tensor, squares: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence of every pair of domains [..., D, D], less its bias with squares."""
    num_domains = sums.shape[-2]
    result = sums.new_full((math.prod(sums.shape[:-2]), num_domains, num_domains), math.nan)
    for matrix, layer in zip(result, _layers(sums, counts, squares), strict=True):
        for d in _present(layer[1], squares is not None):
            matrix[d, d] = 0.0
        for j, k, divergence, bias in _pair_divergences(*layer):
            matrix[j, k] = matrix[k, j] = divergence - bias
    return result.reshape(*sums.shape[:-1], num_domains)
