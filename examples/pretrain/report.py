"""The report of a run: a table on the terminal, a page without outside parts, a picture, and all numbers as JSON."""

import base64
import errno
import html
import json
import math
import os
import textwrap
from typing import NamedTuple

import figures
import findings
import table
import torch

import edl
from edl import machine

REPORT, PICTURE, NUMBERS = "report.html", "heatmaps.png", "results.json"
ROOM = 2 * 2**20  # bytes: more than these take together
PICTURE_ARMS = ("baseline", "divergence", "corrected")  # what the README shows


class Run(NamedTuple):
    """Everything there is to report.

    Attributes:
        domains: list of data.Domain.
        settings: parsed command line.
        results: list of train.Result.
        sizes: name -> number, sizes that follow from the settings.
        seconds: time for all arms, evaluation included.
        left_out: list of sentences about domains with too little text.
    """

    domains: list
    settings: object
    results: list
    sizes: dict
    seconds: float
    left_out: list


def check(output):
    """Raises OSError where a run could not be written into a folder, which it makes: before the run, not after it."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, PICTURE, NUMBERS):
        if (output / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output / name))
    unfinished = output / f".{NUMBERS}"
    try:
        _save(unfinished, bytes(ROOM))
    finally:
        unfinished.unlink(missing_ok=True)


def _save(path, content):
    """Writes a file so that it is whole or as before."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write(run, output):
    """Writes report.html, heatmaps.png and results.json.

    Arguments:
        run: Run.
        output: pathlib.Path of a folder.

    Raises:
        OSError: a file could not be written; it is then as it was before.
    """
    names = [domain.name for domain in run.domains]
    groups, seen = table.build(run.results, names), findings.write(run.results, names)
    chosen = [result for result in run.results if result.arm.key in PICTURE_ARMS]
    _save(output / NUMBERS, as_json(run).encode())
    _save(output / REPORT, page(run, groups, seen).encode())
    _save(output / PICTURE, figures.as_png(figures.heat_maps(chosen, names, panel_width=2.7)))


def as_text(run):
    """Returns the table and what was seen, for the terminal."""
    names = [domain.name for domain in run.domains]
    notes = "\n".join(
        textwrap.fill(paragraph, 110, initial_indent="- ", subsequent_indent="  ")
        for paragraph in findings.write(run.results, names)
    )
    return (
        f"\n{table.as_text(table.build(run.results, names), [result.arm.title for result in run.results])}\n\n"
        f"What was seen, seed {run.settings.seed}, {run.settings.steps} steps per arm, {run.seconds:.0f} s in all:\n"
        f"{notes}\n"
    )


def machine_facts():
    """Returns what a reader needs to compare times: list of (name, value)."""
    facts = {"edl": edl.__version__, "threads": str(torch.get_num_threads())}
    return [*facts.items(), *machine.facts(torch.device("cpu")).items()]


def as_json(run):
    """Returns settings, measures and curves of all arms."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return plain(value.tolist())
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON knows no NaN

    arms = {
        result.arm.key: {
            "title": result.arm.title,
            **result.measures._asdict(),
            "knock_out_ratio": result.measures.knock_out_ratio,
            "step_seconds": result.step_seconds,
            "loss_seconds": result.loss_seconds,
            "curves": result.curves,
        }
        for result in run.results
    }
    return json.dumps(
        {
            "domains": [domain.name for domain in run.domains],
            "left_out": run.left_out,
            "settings": settings_of(run),
            "sizes": run.sizes,
            "seconds": run.seconds,
            "machine": dict(machine_facts()),
            "arms": plain(arms),
        },
        indent=1,
        allow_nan=False,
    )


def settings_of(run):
    """Returns the settings that decide the numbers; folders are nobody's business."""
    return {key: value for key, value in vars(run.settings).items() if key not in ("data", "cache", "output")}


def page(run, groups, seen):
    """Returns the whole page as HTML; pictures and styles are inside it."""
    names = [domain.name for domain in run.domains]
    maps = as_image(
        figures.heat_maps(run.results, names, panel_width=1.8),
        "Share of each domain's choices that fall on each expert",
    )
    curves = as_image(figures.curves(run.results), "Training curves of all arms")
    sections = [
        ("What was seen", "<ul>" + "".join(f"<li>{html.escape(paragraph)}</li>" for paragraph in seen) + "</ul>"),
        ("Who uses which expert", HEAT_MAP_TEXT + maps),
        ("The measures", measures_table(groups, run.results)),
        ("Training", CURVES_TEXT + curves),
        ("The text", data_table(run)),
        ("Settings and machine", settings_tables(run)),
        ("How to read the measures", definitions(groups)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    return PAGE.format(style=STYLE, lead=lead(run), arms=arms_list(run), body=body)


def lead(run):
    """Says in a paragraph what was done."""
    settings, sizes = run.settings, run.sizes
    return (
        f"A byte-level language model with {settings.layers} Mixture-of-Experts layers ({settings.experts} experts, "
        f"{settings.top_k} per token; {sizes['parameters']:,} parameters in all) was trained {len(run.results)} times "
        f"from the same start on the same {sizes['training bytes per arm']:,} bytes of "
        f"{html.escape(findings.join([domain.name for domain in run.domains]))}, in the same order: "
        f"{settings.steps} steps of {sizes['sequences per step']} sequences of {settings.sequence_length} bytes. Only "
        f"the loss differed. Seed {settings.seed}, one run per arm, {run.seconds:.0f} seconds in all."
    )


def arms_list(run):
    """Explains the arms, each beside the line that stands for it in the curves."""
    settings = run.settings
    entries = "".join(
        f"<li>{line_of(result.arm)}<b>{html.escape(result.arm.title)}</b>: {html.escape(result.arm.meaning)}</li>"
        for result in run.results
    )
    return (
        f'<ul class="arms">{entries}</ul><p>The loss is that of the language model + {settings.balance_weight:g} · '
        f"load balancing + {settings.divergence_weight:g} · expert divergence.</p>"
    )


def line_of(arm):
    """Returns a piece of an arm's line as HTML."""
    look = figures.STYLES[arm.key]
    kind = "solid" if isinstance(look["linestyle"], str) else "dashed"
    return f'<span class="key" style="border-top: 4px {kind} {look["color"]}"></span>'


def as_image(figure, description):
    """Returns a figure as an image element that holds its own data."""
    encoded = base64.b64encode(figures.as_svg(figure).encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{encoded}" alt="{html.escape(description)}">'


def measures_table(groups, results):
    """Lays the table of measures out as HTML."""
    heads = "".join(f'<th scope="col">{line_of(result.arm)}{html.escape(result.arm.title)}</th>' for result in results)
    rows = []
    for group in groups:
        rows.append(f'<tr class="group"><th colspan="{len(results) + 1}">{html.escape(group.title)}</th></tr>')
        for label, values in group.rows:
            cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
            rows.append(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>')
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    return f'<div class="wide"><table class="numbers">{head}{"".join(rows)}</table></div>'


def data_table(run):
    """Lists the sources of every domain with sizes, licences, the split and what was left out, domains too."""
    rows = []
    for domain in run.domains:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(domain.skipped.items())) or "nothing"
        about_domain = (
            f"{domain.train.numel() / 1e6:.2f} MB in {domain.documents[0]} documents",
            f"{domain.held_out.numel() / 1e6:.2f} MB in {domain.documents[1]} documents, {domain.split}",
            skipped,
        )
        span = f' rowspan="{len(domain.sources)}"'
        for place, source in enumerate(domain.sources):
            about_source = (f"{source.name} {source.version}".strip(), f"{source.size / 1e6:.2f} MB", source.licence)
            cells = "".join(f'<td class="short">{html.escape(cell)}</td>' for cell in about_source)
            if place == 0:
                cells = f'<th scope="row"{span}>{html.escape(domain.name)}</th>{cells}'
                cells += "".join(f"<td{span}>{html.escape(cell)}</td>" for cell in about_domain)
            rows.append(f"<tr>{cells}</tr>")
    heads = ("domain", "source", "size", "licence", "text to train on", "text held out", "left out")
    head = "".join(f'<th scope="col">{word}</th>' for word in heads)
    body = f'<div class="wide"><table class="text"><thead><tr>{head}</tr></thead>{"".join(rows)}</table></div>'
    dropped = "".join(f"<p>Left out as a domain: {html.escape(sentence)}.</p>" for sentence in run.left_out)
    return body + dropped + SPLIT_TEXT


def settings_tables(run):
    """Lists settings, sizes and facts about the machine."""
    settings = [(key.replace("_", " "), value) for key, value in settings_of(run).items()]
    sizes = [(key, f"{value:,}") for key, value in run.sizes.items()]
    tables = []
    for pairs in (settings, sizes + machine_facts()):
        rows = "".join(
            f'<tr><th scope="row">{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>' for k, v in pairs
        )
        tables.append(f"<table>{rows}</table>")
    return f'<div class="columns">{"".join(tables)}</div>'


def definitions(groups):
    """Explains every group of the table."""
    entries = "".join(f"<dt>{html.escape(group.title)}</dt><dd>{html.escape(group.meaning)}</dd>" for group in groups)
    return f"<dl>{entries}</dl>"


HEAT_MAP_TEXT = (
    "<p>Share of a domain's choices that fall on each expert, in per cent, on held-out text. Rows sum to 100. The "
    "numbers of experts mean nothing across arms and layers, so each panel is sorted by the domain that uses an expert "
    "most; its number stands below.</p>"
)
CURVES_TEXT = (
    "<p>Running means over training steps. The divergence loss of the baseline is watched, not trained on. Arms with "
    "random labels see their own random groups in the third panel and the true domains in the fourth.</p>"
)
SPLIT_TEXT = (
    "<p>Lines of at least 32 bytes that stand in the training text too were removed from the held-out text. The text "
    "itself is not part of this page.</p>"
)
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: #1f2933;
       background: #fff; max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: 1.25rem; border-top: 1px solid #e4e7eb; }
p, li, dd { max-width: 78ch; }
li { margin-bottom: .5rem; }
.lead { font-size: 1.08rem; color: #3e4c59; }
img { display: block; width: 100%; height: auto; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; }
th, td { padding: .32rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid #eef1f4;
         font-weight: 400; }
thead th { vertical-align: bottom; border-bottom: 2px solid #9aa5b1; font-weight: 600; }
.numbers { width: 100%; font-variant-numeric: tabular-nums; }
.numbers td, .numbers thead th { text-align: right; }
.numbers tbody tr:hover td, .numbers tbody tr:hover th { background: #f5f8fb; }
.numbers .group th { padding-top: 1.1rem; font-weight: 600; background: none; border-bottom: 1px solid #cbd2d9; }
.key { display: inline-block; width: 2.2rem; }
.numbers .key { display: block; margin: 0 0 .35rem auto; }
.numbers thead th + th { width: 15%; }
.text .short { white-space: nowrap; }
.arms { list-style: none; padding: 0; }
.arms li { margin-bottom: .25rem; padding-left: 3rem; position: relative; }
.arms .key { position: absolute; left: 0; top: .72em; }
.columns { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }
dt { font-weight: 600; margin-top: .8rem; } dd { margin: 0; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Expert divergence: one run</title>
<style>{style}</style>
</head>
<body>
<h1>Expert divergence: what the experts learned in one short run</h1>
<p class="lead">{lead}</p>
{arms}
{body}
</body>
</html>
"""
