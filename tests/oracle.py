"""The loss once more, straight from the paper: loops over tokens and pairs, textbook formulas, nothing shared with
edl."""

import itertools
import math

import torch
from torch import Tensor

LOG_2 = math.log(2.0)


def softmax(logits: Tensor) -> Tensor:
    return logits.double().softmax(dim=-1)


def normalised_sigmoid(logits: Tensor) -> Tensor:
    gates = logits.double().sigmoid()
    return gates / gates.sum(dim=-1, keepdim=True)


def textbook_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence [] of p and q [E] in nats, 0 log 0 = 0; loses digits where p and q are close."""
    m = (p + q) / 2
    return (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).nansum() / 2


def domain_means(distributions: Tensor, tokens: list) -> dict[int, Tensor]:
    """Mean distribution [E] of each domain over its sequences, of distributions [T, E] of tokens.

    A token is a (sequence, domain), or None where it does not count.
    """
    sequences: dict = {}
    for row, token in enumerate(tokens):
        if token is not None and token[1] >= 0:
            sequences.setdefault(token, []).append(distributions[row])
    domains: dict = {}
    for (_, domain), rows in sequences.items():
        domains.setdefault(domain, []).append(torch.stack(rows).mean(dim=0))
    return {domain: torch.stack(means).mean(dim=0) for domain, means in domains.items()}


def paper_loss(distributions: Tensor, tokens: list, eps: float = 1e-6, pair_reduction: str = "mean_of_logs") -> Tensor:
    """Mean over pairs of domains of -log(divergence + eps), float64; 0 with fewer than two domains."""
    means = domain_means(distributions, tokens)
    pairs = list(itertools.combinations(sorted(means), 2))
    if not pairs:
        return distributions.new_zeros(())
    divergences = torch.stack([textbook_divergence(means[j], means[k]) for j, k in pairs])
    if pair_reduction == "log_of_mean":
        return -(divergences.mean() + eps).log()
    return -(divergences + eps).log().mean()
