"""Which tokens domains share, and in which documents they are."""

import itertools
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.multipliers import Units, over
from edl.diagnostics.record import Record

# A token id is compared where so many independent documents of both domains have it.
DOCUMENTS_OF_A_TOKEN = 8


class DomainTokens(NamedTuple):
    """A domain's tokens, sorted by unit and token id. A cell is a token id in a unit.

    Attributes:
        units (array): the domain's among all.
        unit_starts (array[units + 1]): where cells of a unit begin.
        cell_tokens (array[cells]): which token, as `Vocabulary` numbers them.
        starts (array[cells + 1]): where tokens of a cell begin in `order`.
        order (array): places in the record.
        tokens (array): which occur, sorted.
    """

    units: Any
    unit_starts: Any
    cell_tokens: Any
    starts: Any
    order: Any
    tokens: Any


class Vocabulary(NamedTuple):
    """The tokens of a record, numbered: those of several domains, then one for the rest of each domain.

    Nothing but their own domain is known of the rest, so it may stay together.

    Attributes:
        domains (list of DomainTokens): D.
        number (int): of tokens, the rests included.
        controlled (list of array): of each domain, the tokens that enough of its documents, and those of another, have.
        covered (array[P]): the share of two domains' tokens that both have in enough documents.
    """

    domains: list[DomainTokens]
    number: int
    controlled: list[Any]
    covered: Any


def vocabulary_of(record: Record, units: Units) -> Vocabulary:
    """The tokens of a record, by domain and unit."""
    np = require("numpy", "significance")
    number_of_domains = len(record.domains)
    labels = record.labels[record.documents]
    _, ids = np.unique(record.token_ids, return_inverse=True)
    ids = ids.ravel()
    several = int(ids.max()) + 1 if len(ids) else 0
    is_shared = np.bincount(np.unique(labels.astype(np.int64) * several + ids) % max(several, 1), minlength=several) > 1
    shared = int(is_shared.sum())
    tokens = np.where(is_shared[ids], (np.cumsum(is_shared) - 1)[ids], shared + labels)
    number = shared + number_of_domains
    cells = units.of_documents[record.documents] * number + tokens
    order = np.argsort(cells, kind="stable")
    found, starts = np.unique(cells[order], return_index=True)
    starts = np.append(starts, len(order))
    unit_bounds = np.searchsorted(units.domains, np.arange(number_of_domains + 1))
    domains = []
    documents, numbers = np.zeros((2, number_of_domains, number), np.int64)
    for domain, (first, last) in enumerate(itertools.pairwise(unit_bounds)):
        begin, end = np.searchsorted(found, [first * number, last * number])
        of_cells = found[begin:end] % number
        domains.append(
            DomainTokens(
                np.arange(first, last),
                np.searchsorted(found[begin:end], np.arange(first, last + 1) * number),
                of_cells,
                starts[begin : end + 1] - starts[begin],
                order[starts[begin] : starts[end]],
                np.unique(of_cells),
            )
        )
        documents[domain] = np.bincount(of_cells, minlength=number)
        numbers[domain] = np.bincount(of_cells, np.diff(starts[begin : end + 1]), minlength=number)
    enough = documents >= DOCUMENTS_OF_A_TOKEN
    is_controlled = enough & (enough.sum(0) > 1)
    covered = [
        over(numbers[[a, b]][:, enough[a] & enough[b]].sum(dtype=float), numbers[[a, b]].sum(dtype=float))
        for a, b in zip(*np.triu_indices(number_of_domains, 1))
    ]
    return Vocabulary(domains, number, [np.flatnonzero(row) for row in is_controlled], np.array(covered, float))
