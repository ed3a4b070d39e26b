"""What a page says of findings beyond what is in them: orders, extremes and means."""

from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.findings import Findings, LayerFindings


class Cell(NamedTuple):
    """What one domain does with one expert.

    Attributes:
        layer (int): its place among the run's layers.
        domain (int): which.
        expert (int): which.
        share (float): of the domain's choices.
        ratio (float): of that to the mean share over domains.
    """

    layer: int
    domain: int
    expert: int
    share: float
    ratio: float


def mean_of(array: Any, axis: int | None = None) -> Any:
    """The mean of what is known; NaN where nothing is."""
    np = require("numpy", "page")
    array = np.asarray(array, np.float64)
    known = np.isfinite(array)
    number = known.sum(axis)
    return np.where(number > 0, np.where(known, array, 0).sum(axis) / np.maximum(number, 1), np.nan)[()]


def ratios(usage: Any) -> Any:
    """Shares by the mean share over domains, [D, E]; NaN for an expert that nobody chose."""
    np = require("numpy", "page")
    usage = np.asarray(usage, np.float64)
    mean = mean_of(usage, 0)
    return usage / np.where(mean > 0, mean, np.nan)


def specialisation(usage: Any) -> Any:
    """How far the domains of each expert are from all alike, bits from 0 to log2 D, [E]: the divergence of the domains
    that choose it, weighing alike, from even ones."""
    np = require("numpy", "page")
    ratio = ratios(usage)
    known = np.isfinite(ratio)
    bits = np.where(ratio > 0, ratio * np.log2(np.where(known & (ratio > 0), ratio, 1)), 0)
    return mean_of(np.where(known, bits, np.nan), 0)


def load(run: Findings, layer: LayerFindings) -> Any:
    """The experts' shares of all counted choices by an even share, [E]."""
    np = require("numpy", "page")
    usage, tokens = np.asarray(layer.usage, np.float64), np.asarray(run.tokens, np.float64)
    counts = np.isfinite(usage).all(1) & (tokens > 0)
    if not counts.any():
        return np.full(usage.shape[1], np.nan)
    return tokens[counts] @ usage[counts] / tokens[counts].sum() * usage.shape[1]


def strongest(run: Findings, number: int) -> list[list[Cell]]:
    """For each domain so many experts of all layers that set it apart most: by its share times the logarithm of the
    ratio, so that a rare expert does not stand first; where there was a test, of those that it found."""
    np = require("numpy", "page")
    found: list[list[tuple[float, Cell]]] = [[] for _ in run.domains]
    for place, layer in enumerate(run.layers):
        usage, ratio = np.asarray(layer.usage, np.float64), ratios(layer.usage)
        weight = np.where(ratio > 1, usage * np.log2(np.where(ratio > 1, ratio, 1)), 0)
        if layer.is_certain is not None:
            weight = weight * np.asarray(layer.is_certain)
        best = np.argsort(-weight, 1, kind="stable")[:, :number]
        for domain, experts in enumerate(best.tolist()):
            found[domain] += [
                (weight[domain, each], Cell(place, domain, each, usage[domain, each], ratio[domain, each]))
                for each in experts
                if weight[domain, each] > 0
            ]
    for cells in found:
        cells.sort(key=lambda pair: -pair[0])
    return [[cell for _, cell in cells[:number]] for cells in found]


def names_of_pairs(run: Findings) -> list[tuple[int, int]]:
    """The two domains of each pair."""
    D = len(run.domains)
    return [(one, other) for one in range(D) for other in range(one + 1, D)]


def tree(run: Findings) -> list[tuple[int, int, float, int]]:
    """Domains joined by how alike they are routed, nearest first: average linkage of the mean divergence over layers.

    Args:
        run (Findings): of D domains.

    Returns:
        D - 1 rows (one, other, height, number of domains), clusters numbered from D on, as SciPy's; none for fewer than
        three domains, or where a divergence is not known.
    """
    np = require("numpy", "page")
    hierarchy = require("scipy.cluster.hierarchy", "page")
    values = mean_of(divergence(run), 0)
    if len(run.domains) < 3 or not np.isfinite(values).all():
        return []
    rows = hierarchy.optimal_leaf_ordering(hierarchy.average(np.maximum(values, 0)), np.maximum(values, 0))
    return [(int(one), int(other), float(height), int(size)) for one, other, height, size in rows]


def divergence(run: Findings) -> Any:
    """Of choices, [L, P]: corrected where there is a record."""
    return run.divergence if run.compared is None else run.compared.corrected
