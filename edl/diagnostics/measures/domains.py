"""How the domains of a layer differ in the choice of experts."""

from typing import Any

import torch
from torch import Tensor

import edl.ops
from edl.diagnostics.measures.arguments import shares_of


def pairwise_divergence(shares: Any) -> Tensor:
    """The Jensen-Shannon divergence of every pair of domains, as the sample has it: noise alone makes it positive.

    Args:
        shares (Tensor[..., D, E]): of each domain; rows add up to 1, or are NaN where a domain is absent.

    Returns:
        Tensor[..., D, D], float64, nats, from 0 to log 2; 0 on the diagonal, NaN where one of the two is absent.

    Raises:
        ValueError: no such shares.
    """
    shares, present = shares_of("pairwise_divergence", shares, "D, E")
    return edl.ops.pairwise_divergence(shares.where(present.unsqueeze(-1), 0.0), present.double())


def information(shares: Any) -> Tensor:
    """The mutual information of expert and domain, I(E;D), as the sample has it; all domains weigh alike.

    Args:
        shares (Tensor[..., D, E]): of each domain; rows add up to 1, or are NaN where a domain is absent and is left
            out.

    Returns:
        Tensor[...], float64, nats, from 0 to the smaller one of log D and log E; NaN where fewer than two domains are
        there, which leaves nothing to tell apart.

    Raises:
        ValueError: no such shares.
    """
    shares, present = shares_of("information", shares, "D, E")
    number = present.sum(-1)
    return information_of(shares, present).where(number > 1, torch.nan)


def information_of(shares: Tensor, present: Tensor) -> Tensor:
    """I(E;D) [...] of shares [..., D, E] and which domains are there [..., D]; NaN without a domain.

    The mean of the domains' divergences from their mean m, Σ p log(p / m) - p + m, of which no term is negative: a
    difference of entropies would lose all digits where domains are nearly alike.
    """
    shares = shares.where(present.unsqueeze(-1), 0.0)
    number = present.sum(-1, keepdim=True)
    mean = shares.sum(-2) / number
    scale = mean.unsqueeze(-2)
    above = (shares / scale - 1).where(scale > 0, 0.0)  # p / m - 1
    terms = scale * (torch.special.xlog1py(above + 1, above) - above)
    means: Tensor = terms.where(present.unsqueeze(-1), 0.0).sum((-2, -1)) / number.squeeze(-1)
    return means


def overlap(shares: Any) -> Tensor:
    """The choices that two domains share, the sum over experts of the smaller share: 1 is the same experts.

    Args:
        shares (Tensor[..., D, E]): of each domain; rows add up to 1, or are NaN where a domain is absent.

    Returns:
        Tensor[..., D, D], float64, from 0 to 1; 1 on the diagonal, NaN where one of the two is absent.

    Raises:
        ValueError: no such shares.
    """
    shares, _ = shares_of("overlap", shares, "D, E")
    rows = [torch.minimum(shares, row.unsqueeze(-2)).sum(-1) for row in shares.unbind(-2)]
    return torch.stack(rows, dim=-2)


def specialisation(shares: Any) -> Tensor:
    """log2 of an expert's share of a domain's choices over its mean share: 1 is twice as much as on average.

    Args:
        shares (Tensor[..., D, E]): of each domain; rows add up to 1, or are NaN where a domain is absent. The mean is
            over the domains that are there, all alike.

    Returns:
        Tensor[..., D, E], float64, at most log2 D; -inf where the domain never chooses the expert, NaN where no domain
        does, or this one is absent.

    Raises:
        ValueError: no such shares.
    """
    shares, present = shares_of("specialisation", shares, "D, E")
    here = present.unsqueeze(-1)
    mean = shares.where(here, 0.0).sum(-2, keepdim=True) / here.sum(-2, keepdim=True)
    logarithms: Tensor = (shares / mean).log2()
    return logarithms
