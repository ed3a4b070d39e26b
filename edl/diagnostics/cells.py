"""Which experts a domain uses otherwise than other domains do, beyond chance."""

from typing import Any

from edl.diagnostics.choices import Routings, moves_of, routings_of
from edl.diagnostics.extras import require
from edl.diagnostics.multipliers import DRAWS, FEWEST, LEVEL, NOTHING, over, signs_of, units_of
from edl.diagnostics.record import Record


def certain_cells(record: Record, place: int, seed: int = 0) -> Any:
    """Which experts a domain uses more or less than the other domains do on average, beyond chance.

    Chance is that of the largest difference in the layer, each over its variance. Domains of fewer than 30 independent
    documents are left out.

    Args:
        record: of the choices.
        place: of the layer among the record's.
        seed: of the signs. Default: 0.

    Returns:
        array[D, E] of bool.

    Raises:
        ImportError: no numpy.
        ValueError: seed is no integer from 0 on.
    """
    np = require("numpy", "significance")
    units = units_of(record)
    routings = routings_of(record, place, units)
    certain = np.zeros(routings.shares.shape, bool)
    tested = np.flatnonzero(routings.units >= FEWEST)
    signs = signs_of(units, seed)
    if len(tested) < 2:
        return certain
    every = moves_of(routings, units, signs)
    total, others = sum(every[domain] for domain in tested), len(tested) - 1
    shares = routings.shares[tested]
    of_others = (shares.sum(0) - shares) / others
    missing = _missing_variances(routings, units.domains, tested, of_others)
    squares = (shares - of_others) ** 2
    relative, highest = np.zeros(squares.shape), np.zeros(DRAWS)
    for row, domain in enumerate(tested):
        drawn = (every[domain] - (total - every[domain]) / others) ** 2
        variances = drawn.mean(0) + missing[row]
        # Where nothing varies, whatever differs is certain.
        certainly = np.where(squares[row] > NOTHING, np.inf, 0.0)
        relative[row] = np.where(variances > NOTHING, over(squares[row], variances), certainly)
        np.maximum(highest, (drawn * over(1.0, variances)).max(1), out=highest)
    certain[tested] = relative > np.sort(highest)[-int(LEVEL * (DRAWS + 1))]
    return certain


def _missing_variances(routings: Routings, domains: Any, tested: Any, of_others: Any) -> Any:
    """What a variance lacks, array[tested, E], where a domain has fewer choices of an expert than it should have.

    An expert that a domain never chose by chance varies not at all in its documents, and would differ for certain. It
    varies at least as it would at the others' rate, with the dispersion of this expert's choices over all domains.
    """
    np = require("numpy", "significance")
    variances = np.zeros(routings.shares.shape)
    np.add.at(variances, domains, routings.influences**2)
    variances, sizes = variances[tested], routings.sizes[tested, None]
    dispersion = over((variances * sizes).sum(0), routings.shares[tested].sum(0))
    return np.maximum(dispersion * of_others / sizes - variances, 0.0)
