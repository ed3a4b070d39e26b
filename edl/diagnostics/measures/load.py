"""How the choices of a group of tokens fall on the experts of a layer."""

from typing import Any

import torch
from torch import Tensor

from edl.diagnostics.measures.arguments import numbers, shares_of, strength
from edl.ops import checks

# Rounding of a sum of shares, which must not ask for one more expert.
_ROUNDING = 1e-9


def shares(choices: Any) -> Tensor:
    """The share of the choices that falls on each expert.

    Args:
        choices (Tensor[..., E]): how often each was chosen, or the mass of its scores; at least 0.

    Returns:
        Tensor[..., E], float64: rows add up to 1, and are NaN where nothing was chosen.

    Raises:
        ValueError: no such numbers.
    """
    choices = numbers("shares", "choices", choices, "E")
    parts: Tensor = choices / choices.sum(-1, keepdim=True)
    return parts


def entropy(shares: Any) -> Tensor:
    """The entropy of the choice of an expert, in nats: log E where all are chosen alike, 0 where one is.

    Args:
        shares (Tensor[..., E]): rows add up to 1, or are NaN.

    Returns:
        Tensor[...], float64, NaN where the row is.

    Raises:
        ValueError: no such shares.
    """
    shares, _ = shares_of("entropy", shares, "E")
    entropies: Tensor = torch.special.entr(shares).sum(-1)
    return entropies


def max_violation(load: Any) -> Tensor:
    """MaxVio: by how much the busiest expert's load exceeds the mean, (busiest - mean) / mean; 0 is balance.

    Args:
        load (Tensor[..., E]): choices of each expert, at least 0.

    Returns:
        Tensor[...], float64, from 0 to E - 1; NaN where nothing was chosen.

    Raises:
        ValueError: no such load.

    Source: arXiv 2408.15664.
    """
    load = numbers("max_violation", "load", load, "E")
    excess: Tensor = load.amax(-1) / load.mean(-1) - 1
    return excess


def dead_experts(load: Any) -> Tensor:
    """How many experts nobody chose.

    Args:
        load (Tensor[..., E]): choices of each expert, at least 0.

    Returns:
        Tensor[...], float64, from 0 to E - 1; NaN where nothing was chosen.

    Raises:
        ValueError: no such load.
    """
    load = numbers("dead_experts", "load", load, "E")
    is_known = load.sum(-1) > 0  # not where there is a NaN, either
    numbers_of_dead: Tensor = (load == 0).sum(-1).double().where(is_known, torch.nan)
    return numbers_of_dead


def coefficient_of_variation(load: Any) -> Tensor:
    """The standard deviation of the load over its mean; 0 is balance.

    Args:
        load (Tensor[..., E]): choices of each expert, at least 0. They are all experts, no sample: the squares'
            divisor is E.

    Returns:
        Tensor[...], float64, from 0 to sqrt(E - 1); NaN where nothing was chosen.

    Raises:
        ValueError: no such load.
    """
    load = numbers("coefficient_of_variation", "load", load, "E")
    variation: Tensor = load.std(-1, correction=0) / load.mean(-1)
    return variation


def coverage(shares: Any, mass: float = 0.9) -> Tensor:
    """How few experts hold a given share of the choices: what may be kept when the others are pruned or offloaded.

    Args:
        shares (Tensor[..., E]): rows add up to 1, or are NaN.
        mass (float): what they must hold, in (0, 1]. Default: 0.9.

    Returns:
        Tensor[...], float64, from 1 to E; NaN where the row is.

    Raises:
        ValueError: no such shares, a mass outside its range.
    """
    checks.check_numbers("coverage", mass=mass)
    if not 0 < mass <= 1:
        raise ValueError(f"edl::coverage: mass must be in (0, 1] (got {mass})")
    shares, present = shares_of("coverage", shares, "E")
    held = shares.sort(-1, descending=True).values.cumsum(-1)
    held = held / held[..., -1:]
    number = (held < mass - _ROUNDING).sum(-1) + 1
    numbers_of_experts: Tensor = number.double().where(present, torch.nan)
    return numbers_of_experts


def partners(coactivation: Any, number: int = 8) -> tuple[Tensor, Tensor]:
    """The experts that are chosen together with an expert more often than their load says, strongest first.

    With C the co-activation, the tokens of expert a choose n_a = Σ_{b≠a} C_ab others; b is expected among them
    m_ab = n_a C_bb / Σ_{c≠a} C_cc times. Partners are ordered by (C_ab + 10) / (m_ab + 10), so that a pair seen once
    does not come first.

    Args:
        coactivation (Tensor[..., E, E]): how often two experts were chosen by one token, choices on the diagonal.
        number (int): of partners, at most; E - 1 are there. Default: 8.

    Returns:
        experts (Tensor[..., E, number], int64), -1 where there are no more partners, and their lift C_ab / m_ab
        (Tensor[..., E, number], float64), above 1, or NaN.

    Raises:
        ValueError: no such numbers.
    """
    number = checks.as_integer("partners", "number", number, lowest=1)
    counts = numbers("partners", "coactivation", coactivation, "E, E")
    num_experts = counts.shape[-1]
    if counts.shape[-2] != num_experts:
        raise ValueError(f"edl::partners: coactivation must have the shape [..., E, E] (got {list(counts.shape)})")
    load = counts.diagonal(dim1=-2, dim2=-1)
    others = load.sum(-1, keepdim=True) - load
    together = counts - load.diag_embed()
    expected = together.sum(-1, keepdim=True) * load.unsqueeze(-2) / others.unsqueeze(-1)
    size = min(number, num_experts - 1)
    order = strength(together, expected)
    order = order.masked_fill(torch.eye(num_experts, dtype=torch.bool, device=order.device), -torch.inf)
    order, experts = order.sort(dim=-1, descending=True, stable=True)
    experts, is_partner = experts[..., :size], order[..., :size] > -torch.inf
    lift = (together / expected).gather(-1, experts)
    return experts.where(is_partner, -1), lift.where(is_partner, torch.nan)
