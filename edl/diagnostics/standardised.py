"""Differences of domains at equal tokens: what of a routing is not told by the current token.

Domains of different vocabulary route differently through any router. Here the routings of two domains are averaged over
the tokens that both have, with the same weights (direct standardisation), and compared as routings are.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.findings import BeyondToken
from edl.diagnostics.multipliers import (
    NOTHING,
    Pairs,
    Summary,
    over,
    pairs_of,
    signs_of,
    summarised,
    units_of,
)
from edl.diagnostics.record import Record
from edl.diagnostics.vocabulary import Vocabulary, vocabulary_of

# So many draws tell a bias; only tests and intervals need all.
_DRAWS_FOR_BIAS = 199
# Elements of a table [cells, E] at a time.
_BLOCK = 2**23


class _Rates(NamedTuple):
    """The routing by token of one domain in one layer.

    Attributes:
        shares (array[tokens, E]): of each controlled token's choices.
        choices (array[tokens]): how many.
        weights (array[D, tokens]): of the tokens, against each other domain; rows add up to 1, or are 0.
        variances (array[tokens, E]): of the shares.
        influences (array[units, D, E]): of the units, on the routing standardised against each other domain.
        units (array[D]): how many have a token of those compared.
    """

    shares: Any
    choices: Any
    weights: Any
    variances: Any
    influences: Any
    units: Any


class _Composed(NamedTuple):
    """Routings that a router would show which sees the token alone.

    Attributes:
        shares (array[D, E]): NaN where a domain has no two documents with choices.
        moves (array[draws, D, E]): their influences times signs.
    """

    shares: Any
    moves: Any


class _Mixture(NamedTuple):
    """What tokens are, whatever the domain, in one layer.

    Attributes:
        sizes (array[D]): choices of each domain.
        frequencies (array[D, tokens]): shares of a domain's choices that are a token's.
        rates (array[tokens, E]): routing of a token over all domains, which weigh alike.
    """

    sizes: Any
    frequencies: Any
    rates: Any


def _table(rows: Any, chosen: Any, number: int, num_experts: int, kind: Any) -> Any:
    """Counts of choices, array[number, E] of this type."""
    np = require("numpy", "significance")
    cells = rows[:, None] * (num_experts + 1) + chosen
    counts = np.bincount(cells.ravel(), minlength=number * (num_experts + 1))
    return counts.reshape(number, num_experts + 1)[:, :num_experts].astype(kind)


class Layer:
    """Choices of one layer by domain and token.

    Args:
        record: of the choices.
        place: of the layer among the record's.
        vocabulary: of the record.
    """

    def __init__(self, record: Record, place: int, vocabulary: Vocabulary) -> None:
        np = require("numpy", "significance")
        self.vocabulary, self.num_experts = vocabulary, record.layers[place].num_experts
        self.chosen = record.experts(place)
        shape = (len(vocabulary.domains), vocabulary.number)
        sizes, frequencies = np.zeros(shape[0]), np.zeros(shape)
        rates = np.zeros((vocabulary.number, self.num_experts))
        self.counts = []
        for number, domain in enumerate(vocabulary.domains):
            of_tokens = np.repeat(np.searchsorted(domain.tokens, domain.cell_tokens), np.diff(domain.starts))
            table = _table(of_tokens, self.chosen[domain.order], len(domain.tokens), self.num_experts, np.float64)
            self.counts.append(table[np.searchsorted(domain.tokens, vocabulary.controlled[number])])
            sizes[number] = table.sum()
            if sizes[number]:
                rates[domain.tokens] += table / sizes[number]
                frequencies[number, domain.tokens] = table.sum(1) / sizes[number]
        self.mixture = _Mixture(sizes, frequencies, over(rates, frequencies.sum(0)[:, None]))

    def _blocks(self, number: int) -> Iterator[tuple[Any, Any, Any]]:
        """The units of a domain, some at a time: their places, bounds of their cells, counts[cells, E] of float32."""
        np = require("numpy", "significance")
        domain = self.vocabulary.domains[number]
        most = max(_BLOCK // self.num_experts, 1)
        begin = 0
        while begin < len(domain.units):
            end = int(np.searchsorted(domain.unit_starts, domain.unit_starts[begin] + most, "right")) - 1
            end = min(max(end, begin + 1), len(domain.units))
            bounds = domain.unit_starts[begin : end + 1]
            starts = domain.starts[bounds[0] : bounds[-1] + 1]
            rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            chosen = self.chosen[domain.order[starts[0] : starts[-1]]]
            counts = _table(rows, chosen, len(starts) - 1, self.num_experts, np.float32)
            yield np.arange(begin, end), bounds, counts
            begin = end

    def rates(self) -> list[_Rates]:
        """The routing by token of each domain, with what each unit does to the standardised ones."""
        np = require("numpy", "significance")
        controlled = np.unique(np.concatenate(self.vocabulary.controlled))
        choices = np.zeros((len(self.counts), len(controlled)))
        places = [np.searchsorted(controlled, tokens) for tokens in self.vocabulary.controlled]
        for number, counts in enumerate(self.counts):
            choices[number, places[number]] = counts.sum(1)
        rates = []
        for number, counts in enumerate(self.counts):
            own, others = choices[number, places[number]], choices[:, places[number]].copy()
            others[number] = 0.0
            weights = over(own * others, own + others)
            weights = over(weights, weights.sum(1, keepdims=True))
            rates.append(self._influenced(number, over(counts, own[:, None]), own, weights))
        return rates

    def _influenced(self, number: int, shares: Any, choices: Any, weights: Any) -> _Rates:
        np, sparse = require("numpy", "significance"), require("scipy.sparse", "significance")
        domain, controlled = self.vocabulary.domains[number], self.vocabulary.controlled[number]
        influences = np.zeros((len(domain.units), len(weights), self.num_experts), np.float32)
        variances = np.zeros(shares.shape)
        narrow, narrow_weights, documents = shares.astype(np.float32), weights.astype(np.float32), np.zeros(len(shares))
        units = np.zeros(len(weights), np.int64)
        for places, bounds, counts in self._blocks(number):
            tokens = domain.cell_tokens[bounds[0] : bounds[-1]]
            kept = np.flatnonzero(np.isin(tokens, controlled, kind="table"))
            rows = np.searchsorted(controlled, tokens[kept])
            counts = counts[kept]
            sizes = counts.sum(1)
            counts -= sizes[:, None] * narrow[rows]
            counts *= over(1.0, choices[rows] - sizes)[:, None].astype(np.float32)
            sums = sparse.csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), (len(shares), len(rows)))
            variances += sums @ np.square(counts)
            documents += sums @ (sizes > 0)
            ends = np.searchsorted(kept, bounds - bounds[0])
            for unit, begin, end in zip(places, ends, ends[1:]):
                of_unit = narrow_weights[:, rows[begin:end]]
                np.matmul(of_unit, counts[begin:end], out=influences[unit])
                units += (of_unit @ sizes[begin:end]) > 0
        # Squares of what changes when one is left out add up to more than the variance, n / (n - 1) times it.
        variances *= over(np.maximum(documents - 1, 0), documents)[:, None]
        return _Rates(shares, choices, weights, variances, influences, units)

    def composed(self, signs: Any) -> _Composed:
        """The routings that tokens alone would give."""
        np = require("numpy", "significance")
        sizes, frequencies, rates = self.mixture
        shares = frequencies @ rates
        moves = np.zeros((len(signs), len(sizes) * self.num_experts), np.float32)
        for number, domain in enumerate(self.vocabulary.domains):
            influences, of_units = self._composing(number)
            if (of_units > 0).sum() < 2:  # the absence of a domain's only document tells nothing
                shares[number] = np.nan
                continue
            # A unit takes its part of the domain's choices with it, so that documents that are alike change nothing.
            influences -= of_units[:, None] * (influences.sum(0, keepdims=True) / np.float32(sizes[number]))
            influences *= over(1.0, sizes[number] - of_units)[:, None].astype(np.float32)
            moves += signs[:, domain.units] @ influences
        return _Composed(shares, moves.reshape(len(signs), len(sizes), self.num_experts))

    def _composing(self, number: int) -> tuple[Any, Any]:
        """What units of a domain add to the sums of `composed`, array[units, D * E], and their choices, [units]."""
        np = require("numpy", "significance")
        sizes, frequencies, rates = self.mixture
        domain, narrow, scale = self.vocabulary.domains[number], rates.astype(np.float32), over(1.0, frequencies.sum(0))
        sums = np.zeros((len(domain.units), len(sizes), self.num_experts), np.float32)
        of_units = np.zeros(len(domain.units), np.float32)
        for places, bounds, counts in self._blocks(number):
            tokens = domain.cell_tokens[bounds[0] : bounds[-1]]
            expected, of_cells = narrow[tokens], counts.sum(1)
            counts -= of_cells[:, None] * expected
            weights = (frequencies[:, tokens] * scale[tokens]).astype(np.float32)
            for unit, (begin, end) in zip(places, itertools.pairwise(bounds - bounds[0])):
                # Its tokens' rates, in all domains; and the tokens that it has, in its own.
                np.matmul(weights[:, begin:end], counts[begin:end], out=sums[unit])
                sums[unit, number] += of_cells[begin:end] @ expected[begin:end]
                of_units[unit] = of_cells[begin:end].sum()
        return sums.reshape(len(sums), len(sizes) * self.num_experts), of_units


def beyond_token(record: Record, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> BeyondToken:
    """Whether domains differ in the choices of experts at equal tokens.

    Args:
        record: of tokens and choices.
        seed: of the signs. Default: 0.
        progress: called with the layers done and all layers, after each.

    Returns:
        BeyondToken: NaN for pairs that share no token in 8 independent documents of both.

    Raises:
        ImportError: no numpy or scipy.
        ValueError: seed is no integer from 0 on.
    """
    np = require("numpy", "significance")
    units = units_of(record)
    signs, vocabulary = signs_of(units, seed), vocabulary_of(record, units)
    composition, same_token = [], []

    def layers() -> Iterator[Pairs]:
        for place in range(len(record.layers)):
            layer = Layer(record, place, vocabulary)
            composition.append(_composition(layer.composed(signs[:_DRAWS_FOR_BIAS])))
            rates = layer.rates()
            same_token.append(_same_token(rates, vocabulary))
            yield _pairs(layer, rates, signs)
            if progress is not None:
                progress(place + 1, len(record.layers))

    summary = summarised(layers())
    return BeyondToken(summary.comparison, np.array(composition), np.array(same_token), vocabulary.covered)


def standardised(record: Record, seed: int) -> Summary:
    """The standardised comparison alone, with how its value moves."""
    units = units_of(record)
    signs, vocabulary = signs_of(units, seed), vocabulary_of(record, units)
    layers = (Layer(record, place, vocabulary) for place in range(len(record.layers)))
    return summarised(_pairs(layer, layer.rates(), signs) for layer in layers)


def _pairs(layer: Layer, rates: list[_Rates], signs: Any) -> Pairs:
    np = require("numpy", "significance")
    experts, domains = layer.num_experts, layer.vocabulary.domains
    pairs = list(zip(*np.triu_indices(len(rates), 1)))

    def routing(one: int, other: int) -> Any:
        weights = rates[one].weights[other]
        return weights @ rates[one].shares if weights.any() else np.full(experts, np.nan)

    def moves(one: int, other: int) -> Any:
        return signs[:, domains[one].units] @ np.ascontiguousarray(rates[one].influences[:, other])

    return pairs_of(
        np.array([routing(first, second) for first, second in pairs]).reshape(-1, experts),
        np.array([routing(second, first) for first, second in pairs]).reshape(-1, experts),
        ((moves(first, second), moves(second, first)) for first, second in pairs),
        np.array([min(rates[first].units[second], rates[second].units[first]) for first, second in pairs], int),
    )


def _composition(composed: _Composed) -> Any:
    """Corrected divergences of the routings that tokens alone would give, array[P]."""
    np = require("numpy", "significance")
    shares, moves = composed
    first, second = np.triu_indices(len(shares), 1)
    of_pairs = ((moves[:, one], moves[:, other]) for one, other in zip(first, second))
    # A domain without two units has no shares here.
    return pairs_of(shares[first], shares[second], of_pairs, np.full(len(first), 2), len(moves)).corrected


def _same_token(rates: list[_Rates], vocabulary: Vocabulary) -> Any:
    """Mean divergence of the routings of one and the same token, corrected, array[P].

    A token has few choices for many experts, so that expansions of a divergence do not hold. What holds at any number:
    documents that are alike differ in squares, over the routing of both, by as much as their variances say. The plain
    divergence is multiplied by the share of the squares that is more than this.
    """
    np, special = require("numpy", "significance"), require("scipy.special", "significance")
    alone = [-special.entr(rate.shares).sum(1) / 2 for rate in rates]
    values = []
    for first, second in zip(*np.triu_indices(len(rates), 1)):
        _, ours, theirs = np.intersect1d(
            vocabulary.controlled[first], vocabulary.controlled[second], assume_unique=True, return_indices=True
        )
        weights, one, other = rates[first].weights[second, ours], rates[first], rates[second]
        if not weights.any():
            values.append(np.nan)
            continue
        mine, yours = one.shares[ours], other.shares[theirs]
        part = over(one.choices[ours], one.choices[ours] + other.choices[theirs])[:, None]
        scale = over(weights[:, None], part * mine + (1 - part) * yours)
        squares = float(np.einsum("ve,ve->", np.square(mine - yours), scale))
        noise = float(np.einsum("ve,ve->", one.variances[ours] + other.variances[theirs], scale))
        plain = weights @ (special.entr((mine + yours) / 2).sum(1) + alone[first][ours] + alone[second][theirs])
        values.append(plain * (squares - noise) / squares if squares > NOTHING else 0.0)
    return np.array(values, float)
