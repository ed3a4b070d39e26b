"""The operators of the loss: token → sequence → domain → pairs."""

import torch
from torch import Tensor

from edl.ops import checks


def sequence_segment_ids(labels: Tensor, num_tokens: int) -> Tensor:
    """The segment of every token of a batch of sequences of one length, where each sequence is a segment.

    Args:
        labels (Tensor[B]): int32 or int64; -1 = the sequence is not counted; other values are not looked at.
        num_tokens (int): T, a multiple of B; the token at position s of sequence b is row b·T/B + s.

    Returns:
        Tensor[T], int32: b for a token of sequence b, -1 for one that is not counted. No gradient.

    Raises:
        ValueError: a wrong shape or dtype, a number of tokens that is no multiple of B.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("sequence_segment_ids", labels=labels)
        checks.check_integers("sequence_segment_ids", num_tokens=num_tokens)
    segment_ids: Tensor = torch.ops.edl.sequence_segment_ids(labels, num_tokens)
    return segment_ids


def aggregate_routing(
    routing: Tensor, segment_ids: Tensor, num_segments: int, scores: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Sums the router's distribution over the tokens of each segment (a sequence, a document, or a whole domain).

    Args:
        routing (Tensor[T, E]): logits, or probabilities with `scores="none"`; float32, float64, bfloat16 or float16,
            rows with any stride.
        segment_ids (Tensor[T]): int32 or int64, in [-1, num_segments); -1 = the token is not counted.
        num_segments (int): S, at least 0.
        scores (str): those of `route_tokens`, divided by their sum + 1e-20 where each is of one logit (DeepSeek-V3), or
            "none". Default: "softmax".

    Returns:
        sums (Tensor[S, E]) and counts (Tensor[S], tokens per segment), float32, or float64 for float64 input.
        Differentiable in `routing`; rows that are not counted get a zero gradient. A row whose logits are all -inf has
        no distribution: where it is counted, its segment is NaN.

    Raises:
        ValueError: wrong shapes, dtypes or devices; on the CPU also logits passed as probabilities, or the reverse.
        IndexError: an id outside its range (on CUDA the sums become NaN, unless EDL_CHECK=1 is set).

    Source: the first level of the aggregation in arXiv 2603.00054.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("aggregate_routing", routing=routing, segment_ids=segment_ids)
        checks.check_integers("aggregate_routing", num_segments=num_segments)
        checks.check_texts("aggregate_routing", scores=scores)
    results: tuple[Tensor, Tensor] = torch.ops.edl.aggregate_routing(routing, segment_ids, num_segments, scores)
    return results


def domain_moments(
    segment_sums: Tensor, segment_counts: Tensor, labels: Tensor, num_domains: int, squares: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums the segments' mean distributions x = segment_sums / segment_counts, and their squares, over each domain.

    Sums of the results over ranks or micro-batches are the results of the union.

    Args:
        segment_sums (Tensor[..., S, E]): from `aggregate_routing`, layers stacked in front; float32 or float64.
        segment_counts (Tensor[..., S] or Tensor[S]): tokens per segment, shared by all layers if [S]; same dtype.
        labels (Tensor[S] or Tensor[S, D]): domain of each segment, int32 or int64 in [-1, num_domains), -1 = not
            counted; or weights per domain, floating, at least 0. A segment without tokens or without weight is skipped
            unread.
        num_domains (int): D, at least 1.
        squares (bool): also sum x², which the correction of the bias needs. Default: False.

    Returns:
        sums (Tensor[..., D, E]), squares (the same shape, or no element) and counts (Tensor[..., D]: segments, or
        weight), float64. Differentiable in `segment_sums`.

    Raises:
        ValueError: wrong shapes, dtypes or devices, a negative weight.
        IndexError: a label outside its range (on CUDA the sums become NaN).

    Source: the second level of the aggregation in arXiv 2603.00054: every sequence weighs the same.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("domain_moments", segment_sums=segment_sums, segment_counts=segment_counts, labels=labels)
        checks.check_integers("domain_moments", num_domains=num_domains)
        checks.check_flags("domain_moments", squares=squares)
    moments: tuple[Tensor, Tensor, Tensor] = torch.ops.edl.domain_moments(
        segment_sums, segment_counts, labels, num_domains, squares
    )
    return moments


def expert_divergence(
    sums: Tensor,
    counts: Tensor,
    eps: float = 1e-6,
    reduction: str = "mean_of_logs",
    squares: Tensor | None = None,
) -> Tensor:
    """The Expert Divergence loss of domain moments: mean over pairs of -log(JSD(p_j, p_k) + eps), p = sums / counts.

    Args:
        sums (Tensor[..., D, E]): float64, from `domain_moments`.
        counts (Tensor[..., D]): float64; a domain whose count is 0 drops out.
        eps (float): at least 0; bounds the loss of equal domains at -log(eps). Default: 1e-6.
        reduction (str): "mean_of_logs" (the paper, default) or "log_of_mean": -log(mean over pairs of JSD + eps).
        squares (Tensor[..., D, E], optional): float64, from `domain_moments(..., squares=True)`; with them the bias is
            corrected: the gradient is that of JSD less its expectation under equal domains, the value stays, and only
            domains of two segments or more count.

    Returns:
        The loss (Tensor[...]), float64, in nats; 0 with zero gradient where fewer than two domains are left.
        Differentiable in `sums` and `squares`.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an unknown reduction, a negative eps, squares with "log_of_mean".

    Source: arXiv 2603.00054. It gives neither eps nor the base of the logarithm; we chose 1e-6 and the natural one. The
        bias correction is ours.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("expert_divergence", sums=sums, counts=counts)
        checks.check_given("expert_divergence", squares=squares)
        checks.check_numbers("expert_divergence", eps=eps)
        checks.check_texts("expert_divergence", reduction=reduction)
    loss: Tensor = torch.ops.edl.expert_divergence(sums, counts, eps, reduction, squares)
    return loss


def pairwise_divergence(sums: Tensor, counts: Tensor, squares: Tensor | None = None) -> Tensor:
    """The Jensen-Shannon divergence of every pair of domains, in nats: a diagnostic without gradient.

    Args:
        sums (Tensor[..., D, E]): float64, from `domain_moments`.
        counts (Tensor[..., D]): float64.
        squares (Tensor[..., D, E], optional): float64; with them what noise alone would give is subtracted, and the
            result may be negative.

    Returns:
        Tensor[..., D, D], float64, between 0 and log 2 without squares; 0 on the diagonal, NaN where a domain has no
        segment (with squares: fewer than two).

    Raises:
        ValueError: wrong shapes, dtypes or devices.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("pairwise_divergence", sums=sums, counts=counts)
        checks.check_given("pairwise_divergence", squares=squares)
    divergences: Tensor = torch.ops.edl.pairwise_divergence(sums, counts, squares)
    return divergences
