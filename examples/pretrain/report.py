"""The report of a run: a table on the terminal, `edl report`'s page with a section on the arms, a picture, numbers."""

import base64
import errno
import json
import os
import textwrap
from typing import NamedTuple

import figures
import findings
import markupsafe
import table
import torch

import edl
from edl import machine
from edl.diagnostics.exports.numbers import as_json
from edl.diagnostics.files import write_whole
from edl.report.page import Section, write_page

REPORT, PICTURE, NUMBERS = "report.html", "heatmaps.png", "results.json"
FOLDERS = ("models", "routing", "held-out")
ROOM = 32 * 2**20  # bytes: more than all of them take together
PICTURE_ARMS = ("baseline", "divergence", "corrected")  # what the README shows


class Run(NamedTuple):
    """Everything there is to report.

    Attributes:
        domains: data.Domains.
        settings: parsed command line.
        results: list of train.Result.
        sizes: name -> number, sizes that follow from the settings.
        seconds: time for all arms, evaluation included.
        findings: list of edl.diagnostics.findings.Findings, one per arm; empty where nothing could be observed.
        changes: list of edl.diagnostics.findings.Change between arms.
    """

    domains: list
    settings: object
    results: list
    sizes: dict
    seconds: float
    findings: list = ()
    changes: list = ()


def check(output):
    """Raises OSError where a run could not be written into a folder, which it makes: before the run, not after it."""
    for name in (REPORT, PICTURE, NUMBERS):
        if (output / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output / name))
    for name in FOLDERS:
        (output / name).mkdir(parents=True, exist_ok=True)
    unfinished = output / f".{NUMBERS}"
    try:
        unfinished.write_bytes(bytes(ROOM))
    finally:
        unfinished.unlink(missing_ok=True)


def write(run, output):
    """Writes report.html, heatmaps.png and results.json.

    Arguments:
        run: Run.
        output: pathlib.Path of a folder.

    Raises:
        OSError: a file could not be written; it is then as it was before.
    """
    chosen = [found for result, found in zip(run.results, run.findings) if result.arm.key in PICTURE_ARMS]
    write_whole(output / NUMBERS, numbers(run).encode())
    write_page(run.findings, output / REPORT, run.changes, [Section("The arms", section(run))])
    write_whole(output / PICTURE, figures.as_png(figures.heat_maps(chosen)))


def as_text(run):
    """Returns the table and what was seen, for the terminal."""
    notes = "\n".join(
        textwrap.fill(paragraph, 110, initial_indent="- ", subsequent_indent="  ")
        for paragraph in findings.write(run.results, run.findings)
    )
    groups = table.build(run.results, run.findings)
    return (
        f"\n{table.as_text(groups, [result.arm.title for result in run.results])}\n\n"
        f"What was seen, seed {run.settings.seed}, {run.settings.steps} steps per arm, {run.seconds:.0f} s in all:\n"
        f"{notes}\n"
    )


def machine_facts():
    """Returns what a reader needs to compare times: list of (name, value)."""
    return [("edl", edl.__version__), *machine.facts(torch.device("cpu")).items()]


def numbers(run):
    """Returns settings, curves and all that was found of all arms, as JSON."""
    arms = {
        result.arm.key: {
            "title": result.arm.title,
            "bits_per_byte": {name: bits for name, (bits, _) in result.bits_per_byte.items()},
            "standard_error": {name: error for name, (_, error) in result.bits_per_byte.items()},
            "step_seconds": result.step_seconds,
            "loss_seconds": result.loss_seconds,
            "curves": result.curves,
            "findings": found,
        }
        for result, found in zip(run.results, run.findings)
    }
    everything = {
        "domains": [domain.name for domain in run.domains],
        "left_out": run.domains.left_out,
        "settings": settings_of(run),
        "sizes": run.sizes,
        "seconds": run.seconds,
        "machine": dict(machine_facts()),
        "arms": arms,
        "changes": run.changes,
    }
    return json.dumps(as_json(everything), indent=1, allow_nan=False)


def settings_of(run):
    """Returns the settings that decide the numbers; folders are nobody's business."""
    return {key: value for key, value in vars(run.settings).items() if key not in ("data", "cache", "output")}


def markup(template, *values):
    """Fills values into HTML; what is not markup is escaped."""
    return markupsafe.Markup(template).format(*values)


def joined(parts):
    """Puts pieces of HTML one after another."""
    return markupsafe.Markup("").join(parts)


def section(run):
    """Returns what the page says of the arms beside what it says of any run."""
    curves = joined(curve(run.results, key) for key in figures.CURVES)
    return joined(
        [
            markup('<p class="lead">{}</p>', lead(run)),
            rows_of(["arm", "loss"], arms(run)),
            markup('<ul class="notes">{}</ul>', joined(markup("<li>{}</li>", each) for each in seen(run))),
            markup("<h3>Numbers of the arms</h3>{}", numbers_table(run)),
            markup("<h3>Training</h3>{}", CURVES_TEXT),
            markup('<p class="legend">{}</p><div class="pair-of-charts">{}</div>', keys(run), curves),
            markup("<h3>The text</h3>{}{}", sources(run), joined(dropped(run))),
            markup("<h3>Settings and machine</h3>{}", rows_of(["setting", "value"], settings(run))),
        ]
    )


def lead(run):
    """Says in a paragraph what was done."""
    settings, sizes = run.settings, run.sizes
    return (
        f"A byte-level language model with {settings.layers} Mixture-of-Experts layers ({settings.experts} experts, "
        f"{settings.top_k} per token; {sizes['parameters']:,} parameters in all) was trained {len(run.results)} times "
        f"from the same start on the same {sizes['training bytes per arm']:,} bytes of "
        f"{findings.join([domain.name for domain in run.domains])}, in the same order: "
        f"{settings.steps} steps of {sizes['sequences per step']} sequences of {settings.sequence_length} bytes. Only "
        f"the loss differed: that of the language model + {settings.balance_weight:g} · load balancing + "
        f"{settings.divergence_weight:g} · expert divergence. Seed {settings.seed}, one run per arm, {run.seconds:.0f} "
        "seconds in all. Tokens are bytes here."
    )


def arms(run):
    """Explains the arms, each beside the line that stands for it in the curves."""
    return [(markup("{}{}", line_of(result.arm), result.arm.title), result.arm.meaning) for result in run.results]


def seen(run):
    """Returns what the numbers say."""
    return findings.write(run.results, run.findings)


def line_of(arm):
    """Returns a piece of an arm's line as HTML."""
    look = figures.STYLES[arm.key]
    dashes = "" if isinstance(look["linestyle"], str) else markup(' stroke-dasharray="7 3"')
    line = (
        '<svg width="32" height="10" aria-hidden="true"><line x1="0" x2="26" y1="6" y2="6" stroke="{}" stroke-width="3"'
    )
    return markup(line + "{}/></svg>", look["color"], dashes)


def keys(run):
    """Returns the legend of the curves."""
    return joined(
        markup('<span class="key">{}{}</span>', line_of(result.arm), result.arm.title) for result in run.results
    )


def curve(results, key):
    """Returns a curve as an element that holds pictures of its own, for light and dark."""
    title, unit = figures.CURVES[key]
    drawn = figures.as_svg(figures.curve(results, key))
    light, dark = address(drawn), address(figures.for_dark(drawn))
    picture = '<picture><source media="(prefers-color-scheme: dark)" srcset="{}"><img src="{}" alt="{}"></picture>'
    return markup("<div><h4>{}</h4>{}</div>", title, markup(picture, dark, light, f"{title}, {unit}, over the steps"))


def address(picture):
    """Returns the text of an SVG file as an address that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"


def numbers_table(run):
    """Lays the table of the terminal out as HTML."""
    heads = joined(markup('<th scope="col" class="number">{}</th>', result.arm.title) for result in run.results)
    rows = []
    for group in table.build(run.results, run.findings):
        rows.append(
            markup('<tr><th colspan="{}" scope="colgroup"><b>{}</b></th></tr>', len(run.results) + 1, group.title)
        )
        for label, values in group.rows:
            cells = joined(markup('<td class="number">{}</td>', value) for value in values)
            rows.append(markup('<tr><th scope="row">{}</th>{}</tr>', label, cells))
    return scrolled(
        "numbers", "numbers-table", markup("<thead><tr><td></td>{}</tr></thead><tbody>{}</tbody>", heads, joined(rows))
    )


def sources(run):
    """Lists where the text of every domain is from, with licences, and how it was split."""
    origins, splits = [], []
    for domain in run.domains:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(domain.skipped.items())) or "nothing"
        held_out = sum(map(len, domain.held_out))
        trained = f"{domain.train.numel() / 1e6:.2f} MB in {domain.documents[0]} documents"
        split = f"{held_out / 1e6:.2f} MB in {domain.documents[1]} documents, {domain.split}"
        splits.append((domain.name, trained, split, skipped))
        for source in domain.sources:
            size = f"{source.size / 1e6:.2f} MB"
            origins.append((domain.name, f"{source.name} {source.version}".strip(), f"{source.licence}, {size}"))
    return joined(
        [
            rows_of(["domain", "source", "licence and size"], origins),
            rows_of(["domain", "text to train on", "text held out", "left out"], splits),
            SPLIT_TEXT,
        ]
    )


def dropped(run):
    """Names the domains with too little text."""
    return [markup("<p>Left out as a domain: {}.</p>", sentence) for sentence in run.domains.left_out]


def settings(run):
    """Lists settings, sizes and facts about the machine."""
    given = [(key.replace("_", " "), value) for key, value in settings_of(run).items()]
    return [*given, *((key, f"{value:,}") for key, value in run.sizes.items()), *machine_facts()]


def rows_of(heads, rows):
    """Lays rows out as a table whose first column names them."""
    head = joined(markup('<th scope="col">{}</th>', word) for word in heads)
    body = [
        markup('<tr><th scope="row">{}</th>{}</tr>', first, joined(markup("<td>{}</td>", other) for other in others))
        for first, *others in rows
    ]
    # Two columns fit a phone, more scroll.
    kind = "facts-table" if len(heads) == 2 else "text-table"
    return scrolled(heads[0], kind, markup("<thead><tr>{}</tr></thead><tbody>{}</tbody>", head, joined(body)))


def scrolled(label, kind, rows):
    """Returns a table that scrolls sideways where it must, as those of the page."""
    frame = '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table class="{}">{}</table></div>'
    return markup(frame, label, kind, rows)


CURVES_TEXT = markupsafe.Markup(
    '<p class="hint">Running means over training steps. The divergence loss of the baseline is watched, not trained '
    "on. Arms with random labels see random groups of their own in it, and the true domains in the last picture, which "
    "is of all scores of the router, while the page speaks of choices.</p>"
)
SPLIT_TEXT = markupsafe.Markup(
    '<p class="hint">Lines of at least 32 bytes that stand in the training text too were removed from the held-out '
    "text. Of that, pieces of each document lie in the folder held-out beside this page, which does not hold them.</p>"
)
