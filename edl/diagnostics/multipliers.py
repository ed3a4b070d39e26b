"""The one mechanism behind tests and intervals: influences of documents, times random signs.

How much a domain's routing would move with other documents is told by its documents: each has an influence, what its
absence changes. With random signs as multipliers their sum moves as the routing does. Tests, intervals and the maximum
over many comparisons read the same draws.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.findings import Comparison, Estimate
from edl.diagnostics.record import Record

DRAWS = 999
# Fewer independent documents give no test.
FEWEST = 30
LEVEL = 0.05
# A statistic below this is rounding: routings agree to 10 digits.
NOTHING = 1e-20


class Units(NamedTuple):
    """What is independent: the documents of one domain and one group, U of them, sorted by domain.

    Attributes:
        domains (array[U]): of each.
        groups (array[U]): number of its group; units of one group share their signs.
        of_documents (array[N]): the unit of each document.
    """

    domains: Any
    groups: Any
    of_documents: Any


def units_of(record: Record) -> Units:
    """The independent units of a record's documents."""
    np = require("numpy", "significance")
    names, groups = np.unique(record.groups, return_inverse=True)
    cells, of_documents = np.unique(record.labels * len(names) + groups.ravel(), return_inverse=True)
    return Units(cells // max(len(names), 1), cells % max(len(names), 1), of_documents.ravel())


def signs_of(units: Units, seed: int) -> Any:
    """Random signs, array[draws, U] of float32.

    Raises:
        ValueError: seed is no integer from 0 on.
    """
    np = require("numpy", "significance")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"edl::significance: seed must be an integer of at least 0 (got {seed!r})")
    number = int(units.groups.max()) + 1 if len(units.groups) else 0
    signs = np.random.default_rng(seed).integers(0, 2, (DRAWS, number), np.int8) * 2 - 1
    return signs[:, units.groups].astype(np.float32)


class Pair(NamedTuple):
    """Two routings, as the sample has them and as the draws move them.

    Attributes:
        plain (float): Jensen-Shannon divergence, nats.
        statistic (float): sum over experts of squared differences over the mean.
        drawn (array[draws]): the statistic of moved differences.
        linear, quadratic (array[draws]): how the divergence moves, the terms of first and second order.
        is_tested (bool): whether there are documents enough.
    """

    plain: float
    statistic: float
    drawn: Any
    linear: Any
    quadratic: Any
    is_tested: bool


def pair_of(first: Any, second: Any, first_moves: Any, second_moves: Any, is_tested: bool) -> Pair:
    """Compares two routings.

    Args:
        first, second (array[E]): of float64, shares that add up to 1.
        first_moves, second_moves (array[draws, E]): of float32, their influences times signs.
        is_tested: whether there are documents enough.
    """
    np = require("numpy", "significance")
    both = first + second
    alike = over(np.sqrt(2.0), np.sqrt(both))
    differences = _scaled(first_moves, second_moves, alike, alike)
    # The second derivatives of the divergence are a square: q/p·dp² + p/q·dq² - 2·dp·dq, over 4 (p + q).
    own, other = over(np.sqrt(second), np.sqrt(first * both)) / 2, over(np.sqrt(first), np.sqrt(second * both)) / 2
    curved = _scaled(first_moves, second_moves, own, other)
    slopes = [_log(over(2 * each, both)).astype(np.float32) / 2 for each in (first, second)]
    statistic = 2 * float((over((first - second) ** 2, both)).sum())
    return Pair(
        divergence(first, second),
        statistic if statistic > NOTHING else 0.0,
        np.einsum("be,be->b", differences, differences),
        first_moves @ slopes[0] + second_moves @ slopes[1],
        np.einsum("be,be->b", curved, curved),
        is_tested,
    )


def without_moves(pair: Pair) -> Pair:
    """A pair of which one has a single document, whose absence tells nothing: its bias is not known."""
    return pair._replace(quadratic=pair.quadratic * float("nan"))


def divergence(first: Any, second: Any) -> float:
    """Jensen-Shannon divergence of two routings, nats; at least 0."""
    special = require("scipy.special", "significance")
    mean = (first + second) / 2
    total = special.rel_entr(first, mean).sum() + special.rel_entr(second, mean).sum()
    return max(float(total) / 2, 0.0)


def _scaled(first: Any, second: Any, own: Any, other: Any) -> Any:
    scaled = first * own.astype(first.dtype)
    scaled -= second * other.astype(first.dtype)
    return scaled


def over(numerators: Any, denominators: Any) -> Any:
    """A quotient of arrays, 0 where there is nothing to divide by."""
    np = require("numpy", "significance")
    numerators, denominators = np.broadcast_arrays(numerators, denominators)
    return np.divide(numerators, denominators, out=np.zeros(denominators.shape), where=denominators > 0)


def _log(values: Any) -> Any:
    np = require("numpy", "significance")
    return np.log(values, out=np.zeros(values.shape), where=values > 0)


class Summary(NamedTuple):
    """A comparison, and how its value moves.

    Attributes:
        comparison (Comparison): for a page.
        moves (array[draws]): of the mean over layers and pairs, without its bias.
    """

    comparison: Comparison
    moves: Any


class _Layer(NamedTuple):
    """What is kept of a layer: its value, statistic and p by pair, and their draws."""

    value: float
    moves: Any
    statistic: float
    drawn: Any
    plain: Any
    corrected: Any
    ratios: Any


def summarised(layers: Iterable[Sequence[Pair | None]]) -> Summary:
    """The pairs of all layers, taken one layer after the other.

    Args:
        layers: of each its pairs; None where one of the two has no routing.
    """
    np = require("numpy", "significance")
    highest = np.full(DRAWS, -np.inf)
    kept = [_layer_of(pairs, highest) for pairs in layers]
    tested = [layer for layer in kept if not np.isnan(layer.statistic)]
    top = np.max([layer.drawn for layer in tested], axis=0) if tested else None
    layer_p = np.array([_p(layer.statistic, top) for layer in kept])
    bounds = [_interval(layer.value, layer.moves, p) for layer, p in zip(kept, layer_p)]
    # The mean is over what can be tested, so that value, interval and test are of the same thing.
    used = tested or [layer for layer in kept if not np.isnan(layer.value)]
    value, moves, whole_p = np.nan, np.full(DRAWS, np.nan), np.nan
    if used:
        value, moves = np.mean([layer.value for layer in used]), np.mean([layer.moves for layer in used], axis=0)
    if tested:
        whole_p = _p(np.mean([layer.statistic for layer in tested]), np.mean([layer.drawn for layer in tested], axis=0))
    comparison = Comparison(
        whole=Estimate(float(value), *_interval(value, moves, whole_p), float(whole_p)),
        layer_value=np.array([layer.value for layer in kept]),
        layer_low=np.array([low for low, _ in bounds]),
        layer_high=np.array([high for _, high in bounds]),
        layer_p=layer_p,
        plain=np.array([layer.plain for layer in kept]),
        corrected=np.array([layer.corrected for layer in kept]),
        p=np.array([[_p(ratio, highest) for ratio in layer.ratios] for layer in kept]),
    )
    return Summary(comparison, moves)


def _layer_of(pairs: Sequence[Pair | None], highest: Any) -> _Layer:
    """Sums a layer up, and raises the maximum over all layers and pairs in place."""
    np = require("numpy", "significance")
    plain, corrected, ratios = (np.full(len(pairs), np.nan) for _ in range(3))
    moves, drawn = [], []
    has_tested = any(pair is not None and pair.is_tested for pair in pairs)
    for place, pair in enumerate(pairs):
        if pair is None:
            continue
        bias = float(pair.quadratic.mean())
        plain[place], corrected[place] = pair.plain, pair.plain - bias
        if pair.is_tested:
            ratios[place], shares = _relative(pair.statistic, pair.drawn)
            drawn.append(shares)
            np.maximum(highest, shares, out=highest)
        if pair.is_tested or not (has_tested or np.isnan(bias)):
            moves.append(pair.linear + pair.quadratic - bias)
    used = ~np.isnan(ratios) if has_tested else ~np.isnan(corrected)
    none = np.full(DRAWS, np.nan)
    return _Layer(
        float(corrected[used].mean()) if used.any() else np.nan,
        np.mean(moves, axis=0) if used.any() else none,
        float(ratios[used].mean()) if has_tested else np.nan,
        np.mean(drawn, axis=0) if has_tested else none,
        plain,
        corrected,
        ratios,
    )


def _relative(statistic: float, drawn: Any) -> tuple[float, Any]:
    """A statistic and its draws, over the mean of the draws."""
    np = require("numpy", "significance")
    mean = float(drawn.mean())
    if mean <= NOTHING:
        return (np.inf if statistic > 0 else 0.0), np.zeros(DRAWS)
    return statistic / mean, drawn / mean


def _p(statistic: float, drawn: Any) -> float:
    np = require("numpy", "significance")
    return np.nan if np.isnan(statistic) else float((drawn >= statistic).sum() + 1) / (DRAWS + 1)


def _interval(value: float, moves: Any, p: float) -> tuple[float, float]:
    """The 95 % interval of a divergence; only its upper bound where the test does not reject."""
    np = require("numpy", "significance")
    if np.isnan(p):
        return np.nan, np.nan
    low, high = np.quantile(moves, [LEVEL / 2, 1 - LEVEL / 2])
    if p > LEVEL:
        return np.nan, float(max(value, 0.0) - low)
    return float(max(value - high, 0.0)), float(value - low)
