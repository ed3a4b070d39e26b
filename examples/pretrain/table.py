"""The table of measures: rows for the terminal and the report."""

import itertools
import math
import unicodedata
from typing import NamedTuple

# With more pairs of domains than this, a table shows the closest, the mean and the farthest instead of all.
MOST_PAIRS = 6
# Below this rise, in bits per byte, a ratio of rises would be a ratio of noise.
SMALLEST_RISE = 0.005


class Group(NamedTuple):
    """Rows that belong together.

    Attributes:
        title: what is measured and in which unit.
        meaning: how it is measured and how to read it, one or two sentences.
        rows: list of (label, list of one string per arm).
    """

    title: str
    meaning: str
    rows: list


def pairs(number):
    """Returns all pairs (j, k) with j < k of `number` domains."""
    return list(itertools.combinations(range(number), 2))


def off_diagonal(matrix):
    """Returns the values of a [D, D] matrix above its diagonal, in the order of `pairs`."""
    return [matrix[j, k].item() for j, k in pairs(len(matrix))]


def mean(values):
    """Returns the mean of the values that are numbers, NaN when none is."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def number(value, digits=3, sign=""):
    """Formats a number; a dash where there is none."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-0.000"


def build(results, names):
    """Builds the whole table.

    Arguments:
        results: list of Result, one per arm.
        names: list of D names of domains.

    Returns:
        List of Group.
    """
    found = [result.measures for result in results]
    return [
        _bits_per_byte(found, names),
        Group(
            "load balance",
            "Load of the busiest expert over the mean load; 1 is even.",
            _layer_rows([one.load for one in found], 2),
        ),
        Group(
            "divergence between domains",
            "Jensen-Shannon divergence between the domains' mean router probabilities, in nats: 0 is the same routing, "
            "0.693 is no expert in common.",
            _pair_rows([one.divergence for one in found], names),
        ),
        Group(
            "divergence on the same byte",
            "The same between tokens that are the same byte, averaged over bytes, so that the alphabet explains "
            "nothing; corrected for the noise of small samples, which can make it slightly negative.",
            _pair_rows([one.same_byte for one in found], names),
        ),
        Group(
            "mutual information of expert and domain",
            "What a chosen expert tells about the domain, in nats; at most the logarithm of the number of domains or "
            "of experts, whichever is smaller.",
            _layer_rows([one.information for one in found]),
        ),
        Group(
            "expert overlap",
            "Choices that two domains share: the sum over experts of the smaller of their shares, mean over pairs; 1 "
            "is the same use, 0 is no expert in common.",
            _layer_rows([one.overlap for one in found]),
        ),
        _knock_out(found, names),
        Group(
            "token entropy of the router",
            "How undecided the router is about a single token, in nats; the logarithm of the number of experts is "
            "fully undecided, 0 is certain.",
            _layer_rows([one.token_entropy for one in found], 2),
        ),
        _time(results),
    ]


def _bits_per_byte(found, names):
    """Makes the group of a row per domain and the mean."""
    rows = [(name, [number(one.bits_per_byte[place].item()) for one in found]) for place, name in enumerate(names)]
    rows.append(("mean", [number(one.bits_per_byte.mean().item()) for one in found]))
    return Group("held-out bits per byte", "Cross entropy on text the model has not seen; lower is better.", rows)


def _knock_out(found, names):
    """Makes the group of the rises, their ratio, and the ratio of each domain."""
    own, others = ([getattr(one, name) for one in found] for name in ("rise_own", "rise_others"))
    rows = [
        ("own text", [number(rise.mean().item(), sign="+") for rise in own]),
        ("others' text", [number(rise.mean().item(), sign="+") for rise in others]),
        ("ratio", [ratio(mine.mean().item(), theirs.mean().item()) for mine, theirs in zip(own, others)]),
    ]
    for place, name in enumerate(names):
        ratios = [ratio(mine[place].item(), theirs[place].item()) for mine, theirs in zip(own, others)]
        rows.append((f"ratio, {name}", ratios))
    return Group(
        "knock-out",
        "In every layer a quarter of the experts is switched off: those that a domain uses most in comparison with the "
        "others. Rise of bits per byte on the domain's own text and on the others' (mean over domains), and the ratio "
        "of the two: 1 is no specialisation. Below, the ratio of each domain.",
        rows,
    )


def _time(results):
    """Makes the group of what a step and the loss in it took."""
    return Group(
        "time",
        "Median training step, and what the divergence loss takes in it: its forward and backward pass down to the "
        "router logits, median of 31, all measured in this run.",
        [
            ("step, ms", [number(1e3 * result.step_seconds, 0) for result in results]),
            ("loss added, ms", [number(1e3 * result.loss_seconds, 2) for result in results]),
            ("share of step", [share(result) for result in results]),
        ],
    )


def ratio(own, others):
    """Formats a knock-out ratio; a dash where the others lost too little for one."""
    return f"{own / others:.1f}" if others >= SMALLEST_RISE else "–"


def share(result):
    """Formats the share of a step that the divergence loss takes."""
    value = 100 * result.loss_seconds / result.step_seconds
    return "–" if math.isnan(value) else f"{value:.2f} %"


def _layer_rows(values, digits=3):
    """Makes a row per layer from [L] or, mean over pairs, [L, D, D] values, one tensor per arm."""
    averaged = [[mean(off_diagonal(layer)) if layer.dim() else layer.item() for layer in arm] for arm in values]
    return [
        (f"layer {place + 1}", [number(value, digits) for value in row]) for place, row in enumerate(zip(*averaged))
    ]


def _pair_rows(matrices, names):
    """Makes rows for [L, D, D] matrices, one matrix per arm."""
    places = pairs(len(names))
    rows = []
    for layer in range(len(matrices[0])):
        columns = [off_diagonal(matrix[layer]) for matrix in matrices]
        if len(places) <= MOST_PAIRS:
            for place, (j, k) in enumerate(places):
                label = f"layer {layer + 1}, {names[j]}–{names[k]}"
                rows.append((label, [number(column[place]) for column in columns]))
        else:
            for label, choose in (("closest pair", min), ("mean", mean), ("farthest pair", max)):
                known = [[value for value in column if not math.isnan(value)] or [math.nan] for column in columns]
                rows.append((f"layer {layer + 1}, {label}", [number(choose(column)) for column in known]))
    return rows


def as_text(groups, titles):
    """Lays the table out for a terminal.

    Arguments:
        groups: list of Group.
        titles: list of the arms' titles.

    Returns:
        String of several lines.
    """
    wrapped = [
        title.replace(", ", ",\n").replace("expert divergence", "expert\ndivergence").split("\n") for title in titles
    ]
    height = max(len(lines) for lines in wrapped)
    label_width = 2 + max(_columns(label) for group in groups for label, _ in group.rows)
    widths = [max(10, *(len(line) for line in lines)) for lines in wrapped]
    lines = []
    for row in range(height):
        cells = [([""] * (height - len(title)) + title)[row] for title in wrapped]
        lines.append(" " * label_width + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths)))
    for group in groups:
        lines.append(group.title)
        for label, values in group.rows:
            cells = "".join(f"  {value:>{width}}" for value, width in zip(values, widths))
            lines.append(f"  {label}{' ' * (label_width - 2 - _columns(label))}{cells}")
    return "\n".join(lines)


def _columns(words):
    """Returns how many columns of a terminal a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in words)
