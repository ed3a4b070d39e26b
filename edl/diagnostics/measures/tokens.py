"""What tokens say of a layer, choice by choice."""

from typing import Any

import torch
from torch import Tensor

from edl.diagnostics.measures.arguments import integers, strength
from edl.ops import checks

# Cells of token × expert that are counted at once; only memory depends on it.
_CELLS = 2**24


def saturation(earlier_experts: Any, later_experts: Any, num_experts: int) -> Tensor:
    """Router saturation: the share of a token's choices that another snapshot of the model makes too.

    Args:
        earlier_experts (Tensor[T, K]): integers; what is outside of [0, E) is none.
        later_experts (Tensor[T, K2]): of the same tokens.
        num_experts (int): E, at least 1.

    Returns:
        Tensor[], float64, from 0 to 1, mean over the tokens that have an earlier choice; NaN without one.

    Raises:
        ValueError: no such choices, another number of tokens.

    Source: arXiv 2409.02060 (OLMoE), where the later snapshot is the last one.
    """
    num_experts = checks.as_integer("saturation", "num_experts", num_experts, lowest=1)
    earlier = integers("saturation", "earlier_experts", earlier_experts, None, None)
    later = integers("saturation", "later_experts", later_experts, len(earlier), None)
    is_choice = (earlier >= 0) & (earlier < num_experts)
    is_kept = torch.zeros_like(is_choice)
    for column in later.unbind(1):
        is_kept |= earlier == column.unsqueeze(1)
    number = is_choice.sum(1)
    kept = (is_kept & is_choice).sum(1).double()
    return (kept / number)[number > 0].mean()


def top_tokens(token_ids: Any, experts: Any, num_experts: int, number: int) -> list[list[tuple[int, int, float]]]:
    """The tokens that each expert reads most for their frequency, strongest first.

    With n_ev the choices of expert e by token v, n_v those of all experts by it, n_e those of e and n all, m_ev =
    n_e n_v / n choices are expected and n_ev / m_ev is the lift. Tokens with a lift above 1 are ordered by
    (n_ev + 10) / (m_ev + 10), so that a token seen once does not come first.

    Args:
        token_ids (Tensor[T]): integers; a negative one is not known, and left out.
        experts (Tensor[T, K]): integers; what is outside of [0, E) is none.
        num_experts (int): E, at least 1.
        number (int): of tokens for each expert, at most.

    Returns:
        For each expert a list of (token id, choices of the expert by it, lift).

    Raises:
        ValueError: no such tokens or choices.
    """
    num_experts = checks.as_integer("top_tokens", "num_experts", num_experts, lowest=1)
    number = checks.as_integer("top_tokens", "number", number, lowest=1)
    token_ids = integers("top_tokens", "token_ids", token_ids, None)
    experts = integers("top_tokens", "experts", experts, len(token_ids), None)
    vocabulary, places = token_ids.unique(return_inverse=True)
    size = len(vocabulary)
    is_choice = (experts >= 0) & (experts < num_experts) & (token_ids >= 0).unsqueeze(1)
    of_tokens = torch.bincount(places, weights=is_choice.sum(1), minlength=size).double() / max(int(is_choice.sum()), 1)
    at_once = max(1, _CELLS // max(size, 1))
    lists = []
    for start in range(0, num_experts, at_once):
        stop = min(start + at_once, num_experts)
        is_here = is_choice & (experts >= start) & (experts < stop)
        elsewhere = (stop - start) * size  # a cell more, which is cheaper than to leave choices out
        cells = ((experts - start) * size + places.unsqueeze(1)).where(is_here, elsewhere)
        counts = torch.bincount(cells.flatten(), minlength=elsewhere + 1)[:elsewhere].view(stop - start, size)
        lists += [_strongest(seen, of_tokens, vocabulary, number) for seen in counts]
    return lists


def _strongest(seen: Tensor, of_tokens: Tensor, vocabulary: Tensor, number: int) -> list[tuple[int, int, float]]:
    """The tokens of one expert, from its choices by each token and the part of each token in all choices."""
    read = seen.nonzero().squeeze(1)
    expected = seen.sum() * of_tokens[read]
    values = strength(seen[read].double(), expected)
    lowest = values.topk(min(number, len(values))).values[-1:]
    order = ((values >= lowest) & (values > -torch.inf)).nonzero().squeeze(1)
    order = order[values[order].argsort(descending=True, stable=True)][:number]  # of two alike, the smaller id first
    best = read[order]
    lift = seen[best] / expected[order]
    return list(zip(vocabulary[best].tolist(), seen[best].tolist(), lift.tolist()))
