"""How the documents of a layer differ in the choice of experts, within a domain and between domains.

A document's routing is the share of its choices that falls on each expert. Documents of a domain weigh alike, and so do
domains. Documents without a label, or without a choice, are left out.
"""

from typing import Any

import torch
from torch import Tensor

from edl.diagnostics.measures.arguments import labels_of, numbers
from edl.diagnostics.measures.domains import information_of
from edl.ops import checks


def decomposition(counts: Any, labels: Any) -> Tensor:
    """The entropy of the mean routing, in parts that add up to it: what the domain tells of the expert, what else the
    document tells, and what is left within documents.

    With p(x) the routing of document x, p̄_d the mean of domain d's and p̄ that of the domains':
    H(p̄) = I(E;D) + mean_d [H(p̄_d) - mean_x H(p(x))] + mean_d mean_x H(p(x)).
    Documents of few tokens have a small entropy by chance, which the third part then has on top.

    Args:
        counts (Tensor[..., N, E]): how often each document chose each expert.
        labels (Tensor[N]): the domain of each document, from 0; -1 = left out.

    Returns:
        Tensor[..., 4], float64, nats, none negative but by rounding: H(p̄), I(E;D), between documents of a domain,
        within documents. NaN where no document is left.

    Raises:
        ValueError: no such counts or labels.

    Source: the split of the total diversity that arXiv 2603.00054 names without a formula; the choice is ours.
    """
    routings, belongs = _documents("decomposition", counts, labels)
    means, present = _means(routings, belongs)
    number = present.sum(-1)
    total = torch.special.entr(means.sum(-2) / number.unsqueeze(-1)).sum(-1)
    of_domains = _mean_present(torch.special.entr(means).sum(-1), present)
    of_documents = _mean_present(
        _means(torch.special.entr(routings).sum(-1, keepdim=True), belongs)[0][..., 0], present
    )
    return torch.stack((total, information_of(means, present), of_domains - of_documents, of_documents), dim=-1)


def document_entropy(counts: Any, labels: Any, num_domains: int) -> Tensor:
    """The entropy of a document's choices, mean over the documents of each domain.

    Args:
        counts (Tensor[..., N, E]): how often each document chose each expert.
        labels (Tensor[N]): the domain of each document, in [0, D); -1 = left out.
        num_domains (int): D, at least 1.

    Returns:
        Tensor[..., D], float64, nats, from 0 to log E; NaN for a domain without a document.

    Raises:
        ValueError: no such counts or labels.
    """
    num_domains = checks.as_integer("document_entropy", "num_domains", num_domains, lowest=1)
    routings, belongs = _documents("document_entropy", counts, labels, num_domains)
    return _entropies(routings, belongs).where(belongs.any(-2), torch.nan)


def document_overlap(counts: Any, labels: Any) -> Tensor:
    """The choices that two documents have in common, Σ_e min(p_e(x), p_e(y)), mean over pairs of documents.

    Args:
        counts (Tensor[..., N, E]): how often each document chose each expert.
        labels (Tensor[N]): the domain of each document, from 0; -1 = left out.

    Returns:
        Tensor[..., 2], float64, from 0 to 1: of two documents of one domain (domains of two documents or more weigh
        alike; NaN without one), and of two domains (pairs of domains weigh alike; NaN without one).

    Raises:
        ValueError: no such counts or labels.
    """
    routings, belongs = _documents("document_overlap", counts, labels)
    sizes = belongs.sum(-2)
    weights = belongs / sizes.clamp(min=1).unsqueeze(-2)  # [..., N, D]: a domain's add up to 1
    present = sizes > 0
    within, inner = torch.zeros_like(sizes), torch.zeros_like(sizes)
    for domain in range(sizes.shape[-1]):
        members = belongs[..., domain].reshape(-1, belongs.shape[-2]).any(0)  # in one of the layers, if not in all
        own = _sum_of_smaller(routings[..., members, :], weights[..., members, domain])
        size = sizes[..., domain]
        inner[..., domain] = own
        within[..., domain] = own * size * size / (size * (size - 1) / 2)
    across = _sum_of_smaller(routings, weights.sum(-1)) - inner.sum(-1)
    number = present.sum(-1)
    return torch.stack((_mean_present(within, sizes > 1), across / (number * (number - 1) / 2)), dim=-1)


def _documents(op: str, counts: Any, labels: Any, num_domains: int | None = None) -> tuple[Tensor, Tensor]:
    """Routings [..., N, E], 0 where a document has no choice, and which document is of which domain [..., N, D]."""
    counts = numbers(op, "counts", counts, "N, E")
    if counts.isnan().any():
        raise ValueError(f"edl::{op}: counts must be numbers (got NaN)")
    labels, num_domains = labels_of(op, labels, counts.shape[-2], num_domains)
    totals = counts.sum(-1, keepdim=True)
    routings = counts / totals.where(totals > 0, 1.0)
    of_domain = labels.unsqueeze(-1) == torch.arange(num_domains, device=labels.device)
    return routings, ((totals > 0) & of_domain.to(totals.device)).double()


def _means(values: Tensor, belongs: Tensor) -> tuple[Tensor, Tensor]:
    """Means of values [..., N, E] over each domain's documents [..., D, E], 0 without one, and where there is one."""
    sizes = belongs.sum(-2)
    return (belongs.mT @ values) / sizes.clamp(min=1).unsqueeze(-1), sizes > 0


def _entropies(routings: Tensor, belongs: Tensor) -> Tensor:
    """The mean entropy of each domain's documents [..., D], 0 without one."""
    means, _ = _means(torch.special.entr(routings).sum(-1, keepdim=True), belongs)
    return means.squeeze(-1)


def _mean_present(values: Tensor, present: Tensor) -> Tensor:
    """The mean of values [..., D] over the domains that are there; NaN without one."""
    return values.where(present, 0.0).sum(-1) / present.sum(-1)


def _sum_of_smaller(routings: Tensor, weights: Tensor) -> Tensor:
    """Σ_{x<y} w_x w_y Σ_e min(p_e(x), p_e(y)) of routings [..., N, E] and weights [..., N], in N log N steps: of values
    that are sorted, the smaller one of a pair comes first."""
    values, order = routings.sort(-2)
    sorted_weights = weights.unsqueeze(-1).expand_as(routings).gather(-2, order)
    later = sorted_weights.sum(-2, keepdim=True) - sorted_weights.cumsum(-2)
    return (values * sorted_weights * later).sum((-2, -1))
