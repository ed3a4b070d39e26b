"""What sums say, as numbers with the names under which others log them: NeMo Automodel's and verl's, beside ours."""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edl.diagnostics import measures
from edl.diagnostics.statistics.sums import CourseSums


def measures_of(
    domains: Sequence[str], sums: Mapping[int, CourseSums], per_layer: bool, per_pair: bool
) -> dict[str, float]:
    """What `RoutingStatistics.measures` returns."""
    by_layer: dict[int, dict[str, float]] = {}
    utilization: list[float] = []
    pairs: dict[str, float] = {}
    for number in sorted(sums):
        choices = sums[number].choices.cpu()
        load = choices.sum(0)
        shares = measures.shares(choices)
        divergences = measures.pairwise_divergence(shares)
        by_layer[number] = _of_layer(sums[number], load, shares, divergences)
        if load.sum() > 0:
            utilization += (load / load.double().mean()).tolist()
        for one in range(len(domains)):
            for other in range(one + 1, len(domains)):
                name = f"moe/layer_{number}/domain_divergence/{domains[one]}-{domains[other]}"
                pairs[name] = divergences[one, other].item()
    whole = _over_layers(by_layer) | _of_utilization(utilization)
    if per_layer:
        whole |= {
            f"moe/layer_{number}/{name}": x for number, of_layer in by_layer.items() for name, x in of_layer.items()
        }
    if per_pair:
        whole |= pairs
    return {name: value for name, value in whole.items() if not math.isnan(value)}


def _of_layer(sums: CourseSums, load: Tensor, shares: Tensor, divergences: Tensor) -> dict[str, float]:
    tokens = sums.tokens.sum().cpu()
    one, other = torch.triu_indices(len(divergences), len(divergences), 1)
    values = {
        "cv": measures.coefficient_of_variation(load),
        "max_vio": measures.max_violation(load),
        "dead_expert_frac": measures.dead_experts(load) / len(load),
        "token_entropy": sums.entropy.sum().cpu() / tokens,
        "margin": sums.margin.sum().cpu() / tokens,
        "domain_information": measures.information(shares),
        "domain_divergence": divergences[one, other].nanmean(),
        "domain_coverage": measures.coverage(shares).nanmean(),
    }
    return {name: value.item() for name, value in values.items()}


def _over_layers(by_layer: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Of the layers that have a value."""
    whole: dict[str, float] = {}
    for name in next(iter(by_layer.values()), {}):
        values = [of_layer[name] for of_layer in by_layer.values() if not math.isnan(of_layer[name])]
        if not values:
            continue
        whole[f"moe/{name}_mean"] = statistics.fmean(values)
        if name in ("cv", "max_vio"):
            whole[f"moe/{name}_max"] = max(values)
        if name == "cv":
            whole |= {"moe/cv_median": statistics.median(values), "moe/cv_min": min(values)}
    return whole


def _of_utilization(utilization: list[float]) -> dict[str, float]:
    """Of the loads of all experts over the mean of their layer."""
    if not utilization:
        return {}
    values = torch.tensor(utilization, dtype=torch.float64)
    places = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    names = ("min", "p25", "median", "p75", "max")
    quantiles = values.quantile(places).tolist()
    return {f"moe/expert_utilization_{name}": value for name, value in zip(names, quantiles)}
