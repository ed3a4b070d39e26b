"""What a training changed: two records of the same documents."""

from typing import Any

from edl.diagnostics import measures
from edl.diagnostics.choices import moves_of, routings_of
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Change, Estimate
from edl.diagnostics.information import information_of, moved
from edl.diagnostics.multipliers import DRAWS, FEWEST, LEVEL, signs_of, units_of
from edl.diagnostics.record import Record
from edl.diagnostics.standardised import standardised


def compare_runs(
    earlier_record: Record, later_record: Record, earlier_title: str, later_title: str, seed: int = 0
) -> Change:
    """What differs between two runs on the documents that both have, by their keys.

    Domains are matched by name, layers by number. The same document has the same sign in both, so what it does to both
    cancels. Differences may be of either direction: their interval stands whether or not it holds 0.

    Args:
        earlier_record, later_record: of the runs.
        earlier_title, later_title: of the runs.
        seed: of the signs. Default: 0.

    Returns:
        Change: the later run less the earlier one.

    Raises:
        ImportError: no numpy or scipy.
        ValueError: no document or layer in common, a key twice, a document of two domains, or a seed that is no integer
            from 0 on.
    """
    np = require("numpy", "significance")
    layers, places = _common_layers(earlier_record, later_record)
    documents = _common_documents(earlier_record, later_record)
    names = tuple(earlier_record.domains[label] for label in np.unique(earlier_record.labels[documents[0]]))
    groups = earlier_record.groups[documents[0]]
    earlier = _part(earlier_record, documents[0], [place for place, _ in places], names, groups)
    later = _part(later_record, documents[1], [place for _, place in places], names, groups)
    by_layer, moves = _information_changes(earlier, later, seed)
    known = ~np.isnan(by_layer)
    few = np.bincount(units_of(earlier).domains, minlength=len(names)).min() < FEWEST
    whole = float(by_layer[known].mean()) if known.any() else np.nan
    whole_moves = moves[known].mean(0) if known.any() and not few else np.full(DRAWS, np.nan)
    beyond = [standardised(part, seed) for part in (earlier, later)]
    values = [each.comparison.whole.value for each in beyond]
    tested = all(not np.isnan(each.comparison.whole.p) for each in beyond)
    beyond_moves = beyond[1].moves - beyond[0].moves if tested else np.full(DRAWS, np.nan)
    agree = np.array_equal(earlier.token_ids, later.token_ids) and np.array_equal(earlier.offsets, later.offsets)
    return Change(
        earlier=earlier_title,
        later=later_title,
        paired=len(documents[0]),
        information=_estimate(whole, whole_moves),
        standardised=_estimate(values[1] - values[0], beyond_moves),
        layers=layers,
        layer_information=by_layer,
        layer_saturation=np.array(
            [_saturation(earlier, later, place) if agree else np.nan for place in range(len(layers))]
        ),
        note=_note((earlier_record, later_record), (earlier, later), agree, bool(few)),
    )


def _common_layers(earlier: Record, later: Record) -> tuple[list[int], list[tuple[int, int]]]:
    """Numbers of the layers that both have, and their places in both."""
    later_places = {layer.number: place for place, layer in enumerate(later.layers)}
    common = [
        (layer.number, (place, later_places[layer.number]))
        for place, layer in enumerate(earlier.layers)
        if layer.number in later_places
    ]
    if not common:
        raise ValueError(
            "edl::compare_runs: the two runs must have layers of one number (got "
            f"{[layer.number for layer in earlier.layers]} and {sorted(later_places)})"
        )
    return [number for number, _ in common], [places for _, places in common]


def _common_documents(earlier: Record, later: Record) -> tuple[Any, Any]:
    """The documents that both have, in the same order: their places in both."""
    np = require("numpy", "significance")
    for record in (earlier, later):
        if len(np.unique(record.keys)) < len(record):
            raise ValueError("edl::compare_runs: keys of documents must differ within a record (got some twice)")
    common, ours, theirs = np.intersect1d(earlier.keys, later.keys, assume_unique=True, return_indices=True)
    if not len(common):
        raise ValueError("edl::compare_runs: the two runs must have documents in common, by their keys (got none)")
    for mine, yours in zip(earlier.labels[ours], later.labels[theirs]):
        if earlier.domains[mine] != later.domains[yours]:
            raise ValueError(
                f"edl::compare_runs: a document must be of one domain in both runs (got {earlier.domains[mine]!r} and "
                f"{later.domains[yours]!r})"
            )
    return ours, theirs


def _part(record: Record, documents: Any, places: list[int], names: tuple[str, ...], groups: Any) -> Record:
    """A record of these documents and layers alone."""
    np = require("numpy", "significance")
    lengths = np.diff(record.offsets)[documents]
    offsets = np.append(0, np.cumsum(lengths))
    tokens = np.arange(offsets[-1]) + np.repeat(record.offsets[documents] - offsets[:-1], lengths)
    number_of = np.array([names.index(name) if name in names else -1 for name in record.domains])
    return Record(
        [record.layers[place] for place in places],
        names,
        record.token_ids[tokens],
        offsets,
        number_of[record.labels[documents]],
        lambda place: record.experts(places[place])[tokens],
        groups=groups,
    )


def _information_changes(earlier: Record, later: Record, seed: int) -> tuple[Any, Any]:
    """Differences of mutual information, array[L], and how they move, array[L, draws]."""
    np = require("numpy", "significance")
    units = units_of(earlier)
    signs = signs_of(units, seed)
    values, moves = [], []
    for place in range(len(earlier.layers)):
        change, shifted = 0.0, np.zeros(DRAWS)
        for sign, record in ((-1, earlier), (1, later)):
            routings = routings_of(record, place, units)
            found = information_of(routings, units)
            change += sign * (found.plain - found.bias)
            shifted += sign * (moved(routings, found.domains, moves_of(routings, units, signs)) - found.bias)
        values.append(change)
        moves.append(shifted)
    return np.array(values), np.array(moves)


def _estimate(value: float, moves: Any) -> Estimate:
    """A difference of either sign, its interval, and the test that it is 0."""
    np = require("numpy", "significance")
    if np.isnan(value) or np.isnan(moves).any():
        return Estimate(float(value), np.nan, np.nan, np.nan)
    low, high = np.quantile(moves, [LEVEL / 2, 1 - LEVEL / 2])
    p = (int((abs(moves) >= abs(value)).sum()) + 1) / (DRAWS + 1)
    return Estimate(float(value), float(value - high), float(value - low), p)


def _saturation(earlier: Record, later: Record, place: int) -> float:
    """The share of a token's choices in the earlier run that the later one makes too, mean over tokens with choices."""
    num_experts = earlier.layers[place].num_experts
    if num_experts != later.layers[place].num_experts:
        return float("nan")
    return float(measures.saturation(earlier.experts(place), later.experts(place), num_experts))


def _note(records: tuple[Record, Record], paired: tuple[Record, Record], agree: bool, few: bool) -> str:
    """What the comparison cannot say."""
    sentences = ["One seed each: what another seed would change is not known."]
    left_out = max(map(len, records)) - len(paired[0])
    if left_out:
        sentences.append(f"Up to {left_out} documents of a run are not in the other one.")
    if few:
        sentences.append(f"Fewer than {FEWEST} independent documents in a domain: no interval.")
    if not agree:
        sentences.append("The tokens are others, so saturation is not known.")
    layers = paired[0].layers
    others = [ours.number for ours, theirs in zip(layers, paired[1].layers) if ours.num_experts != theirs.num_experts]
    if others:
        sentences.append(f"Other numbers of experts in layers {others}: saturation is not known there.")
    if len(layers) < max(len(record.layers) for record in records):
        sentences.append("Layers that one run alone has are left out.")
    return " ".join(sentences)
