"""The one mechanism behind tests and intervals: influences of documents, times random signs.

How much a domain's routing would move with other documents is told by its documents: each has an influence, what its
absence changes. With random signs as multipliers their sum moves as the routing does. Tests, intervals and the maximum
over many comparisons read the same draws.
"""

from collections.abc import Iterable
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
    """The independent units of a record's documents.

    Raises:
        ValueError: there are no domains or layers.
    """
    np = require("numpy", "significance")
    if not record.domains or not record.layers:
        raise ValueError(
            f"edl::significance: a record must have domains and layers (got {len(record.domains)} and "
            f"{len(record.layers)})"
        )
    names, groups = np.unique(record.groups, return_inverse=True)
    cells, of_documents = np.unique(record.labels.astype(np.int64) * len(names) + groups.ravel(), return_inverse=True)
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


class Pairs(NamedTuple):
    """Routings two by two, as the sample has them and as the draws move them.

    Attributes:
        plain (array[P]): Jensen-Shannon divergences, nats; NaN where one of the two has no routing.
        statistic (array[P]): sums over experts of squared differences over the mean.
        drawn (array[P, draws]): the statistic of moved differences.
        linear, quadratic (array[P, draws]): how divergences move, the terms of first and second order; the mean of the
            second is the bias, NaN where one of the two has a single unit, whose absence tells nothing.
        is_tested (array[P]): bool, whether both have units enough.
    """

    plain: Any
    statistic: Any
    drawn: Any
    linear: Any
    quadratic: Any
    is_tested: Any

    @property
    def corrected(self) -> Any:
        """Divergences without their bias, array[P]."""
        return self.plain - self.quadratic.mean(1)


def pairs_of(first: Any, second: Any, moves: Iterable[tuple[Any, Any]], units: Any, draws: int = DRAWS) -> Pairs:
    """Compares routings two by two.

    Args:
        first, second (array[P, E]): of float64, shares that add up to 1; NaN without.
        moves: of each pair, the influences times signs of both, array[draws, E] of float32.
        units (array[P]): how many there are, in the one of the two that has fewer.
        draws: how many. Default: 999.
    """
    np, special = require("numpy", "significance"), require("scipy.special", "significance")
    both = first + second
    plain = (special.rel_entr(first, both / 2) + special.rel_entr(second, both / 2)).sum(1) / 2
    statistic = 2 * over((first - second) ** 2, both).sum(1)
    alike = over(np.sqrt(2.0), np.sqrt(both)).astype(np.float32)
    # The second derivatives of the divergence are a square: q/p·dp² + p/q·dq² - 2·dp·dq, over 4 (p + q).
    curves = [
        (over(np.sqrt(other), np.sqrt(own * both)) / 2).astype(np.float32)
        for own, other in ((first, second), (second, first))
    ]
    slopes = [(_log(over(2 * own, both)) / 2).astype(np.float32) for own in (first, second)]
    drawn, linear, quadratic = np.zeros((3, len(first), draws), np.float32)
    for place, (ours, theirs) in enumerate(moves):
        differences = (ours - theirs) * alike[place]
        drawn[place] = np.einsum("be,be->b", differences, differences)
        linear[place] = ours @ slopes[0][place] + theirs @ slopes[1][place]
        curved = ours * curves[0][place]
        curved -= theirs * curves[1][place]
        quadratic[place] = np.einsum("be,be->b", curved, curved)
    quadratic[units < 2] = np.nan
    statistic[statistic < NOTHING] = 0.0
    return Pairs(np.maximum(plain, 0.0), statistic, drawn, linear, quadratic, units >= FEWEST)


def over(numerators: Any, denominators: Any) -> Any:
    """A quotient of arrays, 0 where there is nothing to divide by."""
    np = require("numpy", "significance")
    out = np.zeros(np.broadcast(numerators, denominators).shape)
    return np.divide(numerators, denominators, out=out, where=denominators > 0)


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


def summarised(layers: Iterable[Pairs]) -> Summary:
    """The pairs of all layers, taken one layer after the other.

    Args:
        layers: of each its pairs.
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


def _layer_of(pairs: Pairs, highest: Any) -> _Layer:
    """Sums a layer up, and raises the maximum over all layers and pairs in place."""
    np = require("numpy", "significance")
    none = np.full(DRAWS, np.nan)
    corrected, tested = pairs.corrected, np.flatnonzero(pairs.is_tested)
    ratios, statistic, drawn = np.full(len(corrected), np.nan), np.nan, none
    if len(tested):
        means = pairs.drawn[tested].mean(1)
        shares = over(pairs.drawn[tested], means[:, None])
        # Where nothing varies, whatever differs is beyond chance.
        fixed = np.where(pairs.statistic[tested] > 0, np.inf, 0.0)
        ratios[tested] = np.where(means > NOTHING, over(pairs.statistic[tested], means), fixed)
        np.maximum(highest, shares.max(0), out=highest)
        statistic, drawn = float(ratios[tested].mean()), shares.mean(0)
    used = tested if len(tested) else np.flatnonzero(~np.isnan(corrected))
    value, moves = np.nan, none
    if len(used):
        value = float(corrected[used].mean())
        moves = (pairs.linear[used] + pairs.quadratic[used]).mean(0) + value - pairs.plain[used].mean()
    return _Layer(value, moves, statistic, drawn, pairs.plain, corrected, ratios)


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
