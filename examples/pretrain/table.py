"""The numbers of all arms in a few rows: for the terminal and the page."""

import math
import unicodedata
from typing import NamedTuple

from edl.report import words

BITS = 1 / math.log(2)  # in a nat


class Group(NamedTuple):
    """Rows that belong together.

    Attributes:
        title: what is measured and in which unit.
        rows: list of (label, list of one string per arm).
    """

    title: str
    rows: list


def number(value, digits=3, sign=""):
    """Formats a number; a dash where there is none."""

    return f"{round(value, digits) + 0.0:{sign}.{digits}f}" if math.isfinite(value) else "–"


def build(results, runs):
    """Builds the table.

    Arguments:
        results: list of train.Result, one per arm.
        runs: list of edl.diagnostics.findings.Findings, one per arm; empty where nothing could be observed.

    Returns:
        List of Group.
    """
    return [_bits_per_byte(results), *(_observed(runs) if runs else []), _time(results)]


def _bits_per_byte(results):
    """Makes the group of a row per domain and the mean."""
    rows = [
        (name, [" ± ".join(map(number, result.bits_per_byte[name])) for result in results])
        for name in results[0].bits_per_byte
    ]
    rows.append(("mean", [number(result.mean_bits) for result in results]))
    return Group("held-out bits per byte ± standard error", rows)


def _observed(runs):
    """Makes the groups of what the experts do."""
    divergence = [run.compared and run.compared.whole for run in runs]
    beyond = [run.beyond_token and run.beyond_token.standardised.whole for run in runs]
    lost = [run.interventions for run in runs]
    rises = {name: [mean_rise(getattr(each, name)) for each in lost] for name in ("own", "others", "random")}
    labels = {"own": "its own text", "others": "the others' text", "random": "its own, random experts"}
    return [
        Group("divergence of the domains' choices, nats", _estimated(divergence)),
        Group("the same at equal bytes: beyond the token", _estimated(beyond)),
        Group(
            "bits per byte lost without a domain's favourite experts",
            [(labels[name], [number(rise, sign="+") for rise in values]) for name, values in rises.items()],
        ),
    ]


def mean_rise(rises):
    """Returns the mean over domains of rows (mean, low, high) in nats, as bits."""
    return BITS * sum(float(row[0]) for row in rises) / len(rises)


def _estimated(estimates):
    """Makes the rows of a number that was tested, without the bias of small samples."""
    return [
        ("mean, corrected", [number(each.value, 4) if each else "–" for each in estimates]),
        ("95 % interval", [_interval(each) if each else "–" for each in estimates]),
        ("p", [number(each.p) if each else "–" for each in estimates]),
    ]


def _interval(estimate):
    if math.isfinite(estimate.p) and not words.rejects(estimate.p):
        return "chance"
    ends = [number(end, 4) for end in (estimate.low, estimate.high)]
    return "–" if "–" in ends else " to ".join(ends)


def _time(results):
    """Makes the group of what a step and the loss in it took."""
    return Group(
        "time of a training step",
        [
            ("step, ms", [number(1e3 * result.step_seconds, 0) for result in results]),
            ("loss in it, ms", [number(1e3 * result.loss_seconds, 2) for result in results]),
            ("share of step", [share(result) for result in results]),
        ],
    )


def share(result):
    """Formats the share of a step that the divergence loss takes."""
    value = 100 * result.loss_seconds / result.step_seconds
    return "–" if math.isnan(value) else f"{value:.2f} %"


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
    values = [[cells[place] for group in groups for _, cells in group.rows] for place in range(len(titles))]
    widths = [max(map(_columns, [*lines, *cells])) for lines, cells in zip(wrapped, values)]
    lines = []
    for row in range(height):
        cells = [([""] * (height - len(title)) + title)[row] for title in wrapped]
        lines.append(" " * label_width + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths)))
    for group in groups:
        lines.append(group.title)
        for label, cells in group.rows:
            line = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths))
            lines.append(f"  {label}{' ' * (label_width - 2 - _columns(label))}{line}")
    return "\n".join(lines)


def _columns(line):
    """Returns how many columns of a terminal a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)
