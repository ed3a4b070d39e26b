"""Mutual information of expert and domain."""

from typing import Any, NamedTuple

from edl.diagnostics.choices import Routings, routings_of
from edl.diagnostics.extras import require
from edl.diagnostics.multipliers import DRAWS, Units, over, units_of
from edl.diagnostics.record import Record


class Information(NamedTuple):
    """Mutual information, and what it takes to move it.

    Attributes:
        plain (float): as the sample has it, nats.
        bias (float): of it; NaN where it is not known.
        domains (array): which have choices.
    """

    plain: float
    bias: float
    domains: Any


def information(record: Record, place: int) -> float:
    """Mutual information I(E;D) of expert and domain in the place-th layer, without its bias; domains weigh alike.

    Returns:
        float: nats, below 0 by chance where there is none; 0 for a single domain; NaN where no domain has choices, or
            one of several has a single independent document.

    Raises:
        ImportError: no numpy or scipy.
    """
    units = units_of(record)
    found = information_of(routings_of(record, place, units), units)
    return found.plain - found.bias


def information_of(routings: Routings, units: Units) -> Information:
    """As `information`, of routings."""
    np = require("numpy", "significance")
    special = require("scipy.special", "significance")
    domains = np.flatnonzero(routings.units)
    if not len(domains):
        return Information(np.nan, np.nan, domains)
    shares = routings.shares[domains]
    mean = shares.mean(0)
    plain = float(special.rel_entr(shares, mean).sum()) / len(domains)
    if len(domains) > 1 and routings.units[domains].min() < 2:
        return Information(plain, np.nan, domains)
    # The mean of the second-order term of `moved` over all signs.
    own = np.zeros(routings.shares.shape)
    np.add.at(own, units.domains, routings.influences**2)
    of_groups = np.zeros((int(units.groups.max()) + 1, len(mean)))
    np.add.at(of_groups, units.groups, routings.influences / len(domains))
    bias = (over(own[domains], shares).sum() / len(domains) - over((of_groups**2).sum(0), mean).sum()) / 2
    return Information(plain, float(bias), domains)


def moved(routings: Routings, domains: Any, moves: Any) -> Any:
    """How the mutual information moves with the routings, to the second order: array[draws].

    Args:
        routings: of the domains.
        domains (array): which have choices.
        moves: of each domain, array[draws, E].
    """
    np = require("numpy", "significance")
    if not len(domains):
        return np.full(DRAWS, np.nan)
    shares = routings.shares[domains]
    mean, total = shares.mean(0), sum(moves[domain] for domain in domains) / len(domains)
    change = -np.square(total) @ over(0.5, mean)
    for share, domain in zip(shares, domains):
        ratios = over(share, mean)
        slopes = np.log(ratios, out=np.zeros(len(ratios)), where=ratios > 0)
        change += (moves[domain] @ slopes + np.square(moves[domain]) @ over(0.5, share)) / len(domains)
    return change
