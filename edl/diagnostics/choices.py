"""Differences of domains in the choices of experts, beyond chance."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.findings import Comparison
from edl.diagnostics.multipliers import Pairs, Summary, Units, pairs_of, signs_of, summarised, units_of
from edl.diagnostics.record import Record


class Routings(NamedTuple):
    """The routings of domains by one layer, and what each unit does to them.

    Attributes:
        shares (array[D, E]): a domain's choices by expert, over all of them; NaN where it has none.
        influences (array[U, E]): how a domain's routing differs from that without the unit.
        sizes (array[D]): all choices.
        units (array[D]): how many units have choices.
    """

    shares: Any
    influences: Any
    sizes: Any
    units: Any


def routings_of(record: Record, place: int, units: Units) -> Routings:
    """The routings of a record's domains by the place-th layer: documents weigh by their choices, as tokens do."""
    np = require("numpy", "significance")
    counts = np.zeros((len(units.domains), record.layers[place].num_experts))
    np.add.at(counts, units.of_documents, record.counts(place))
    sizes = counts.sum(1)
    totals = np.zeros((len(record.domains), counts.shape[1]))
    np.add.at(totals, units.domains, counts)
    all_sizes = totals.sum(1)
    with np.errstate(invalid="ignore"):
        shares = totals / all_sizes[:, None]
    others = all_sizes[units.domains] - sizes
    usable = (sizes > 0) & (others > 0)
    influences = np.zeros_like(counts)
    own = shares[units.domains[usable]]
    influences[usable] = (counts[usable] - sizes[usable, None] * own) / others[usable, None]
    number = np.bincount(units.domains[sizes > 0], minlength=len(record.domains))
    return Routings(shares, influences, all_sizes, number)


def moves_of(routings: Routings, units: Units, signs: Any) -> list[Any]:
    """How the draws move each domain's routing, arrays [draws, E] of float32."""
    np = require("numpy", "significance")
    influences = routings.influences.astype(np.float32)
    bounds = np.searchsorted(units.domains, np.arange(len(routings.shares) + 1))
    return [signs[:, begin:end] @ influences[begin:end] for begin, end in itertools.pairwise(bounds)]


def compare(record: Record, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Whether domains differ in the choices of experts, layer by layer and pair by pair.

    A domain's routing is its choices by expert over all its choices, so a document weighs by the number of its choices;
    it is `usage` of the same record. The mean over pairs is over those whose domains have 30 independent documents (all
    pairs, without test and interval, where none has).

    Args:
        record: of the choices.
        seed: of the signs. Default: 0.
        progress: called with the layers done and all layers, after each.

    Returns:
        Comparison: of Jensen-Shannon divergences.

    Raises:
        ImportError: no numpy or scipy.
        ValueError: seed is no integer from 0 on.
    """
    return compared(record, seed, progress).comparison


def compared(record: Record, seed: int, progress: Callable[[int, int], None] | None = None) -> Summary:
    """As `compare`, with how the value moves."""
    np = require("numpy", "significance")
    units = units_of(record)
    signs = signs_of(units, seed)

    def layers() -> Iterator[Pairs]:
        for place in range(len(record.layers)):
            routings = routings_of(record, place, units)
            moves = moves_of(routings, units, signs)
            first, second = np.triu_indices(len(moves), 1)
            yield pairs_of(
                routings.shares[first],
                routings.shares[second],
                ((moves[one], moves[other]) for one, other in zip(first, second)),
                np.minimum(routings.units[first], routings.units[second]),
            )
            if progress is not None:
                progress(place + 1, len(record.layers))

    return summarised(layers())
