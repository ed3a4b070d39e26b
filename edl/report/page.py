"""The page: one file that shows what experts do, and loads nothing."""

import base64
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from edl.diagnostics import files
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Change, Findings
from edl.report import answers, colours, packing, summaries, tables, words

_GENERATOR = '<meta name="generator" content="edl report">'
_FOLDER = pathlib.Path(__file__).parent / "page"
# In the order in which they need each other.
_SCRIPTS = ("data", "colours", "chart", "heat_map", "lines", "tree", "tables", "explore", "start")


class Section(NamedTuple):
    """A section of the caller's own.

    Attributes:
        title (str): a line, also in the navigation.
        html (str): what stands in it: `markupsafe.Markup` as it is, and it may show images of data: addresses, though
            neither scripts nor styles run; any other text is escaped.
    """

    title: str
    html: str


def write_page(
    runs: Sequence[Findings],
    path: str | os.PathLike[str],
    changes: Sequence[Change] = (),
    sections: Sequence[Section] = (),
) -> None:
    """Writes the page; the file is whole or as before.

    Args:
        runs (sequence of Findings): one, or several to see beside each other.
        path: of the file.
        changes (sequence of Change): between runs. Default: none.
        sections (sequence of Section): further ones, shown after the answer. Default: none.

    Raises:
        ImportError: no jinja2, numpy or scipy.
        OSError: it cannot be written.
        ValueError: no run.
    """
    files.write_whole(path, page(runs, changes, sections).encode())


def page(runs: Sequence[Findings], changes: Sequence[Change] = (), sections: Sequence[Section] = ()) -> str:
    """The page as HTML.

    Its Content-Security-Policy lets it run its own script, known by its hash, and load nothing. Names and texts in it
    are foreign: what HTML holds is escaped, what scripts read is packed.

    Args:
        runs (sequence of Findings): one, or several to see beside each other.
        changes (sequence of Change): between runs. Default: none.
        sections (sequence of Section): further ones, shown after the answer. Default: none.

    Raises:
        ImportError: no jinja2, numpy or scipy.
        ValueError: no run.
    """
    if not runs:
        raise ValueError("edl::page: runs must be one or more (got none)")
    jinja2, markupsafe = require("jinja2", "page"), require("markupsafe", "page")
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(_FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = style_of(), script_of()
    widest = max(answers.reach(run) for run in runs) or 1.0
    html = environment.get_template("page.html").render(
        title=" · ".join(words.name(run.title) for run in runs),
        runs=[parts_of(run, widest) for run in runs],
        changes=[
            {"change": change, "values": answers.of_change(change), "table": tables.of_change(change)}
            for change in changes
        ],
        sections=sections,
        facts=tables.of_runs(runs),
        packed=[packing.pack_run(run) for run in runs],
        packed_changes=packing.pack_changes(changes),
        generator=markupsafe.Markup(_GENERATOR),
        style=style,
        script=script,
        style_hash=hash_of(style),
        script_hash=hash_of(script),
        words=words,
    )
    return words.whole(str(html))


def is_page(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a page that was written here, and may be written anew."""
    if not pathlib.Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return _GENERATOR.encode() in file.read(4096)


def parts_of(run: Findings, widest: float) -> dict[str, Any]:
    """What the template shows of a run."""
    strongest = summaries.strongest(run, tables.MOST_LISTED)
    return {
        "findings": run,
        "verdicts": answers.verdicts(run),
        "sentences": answers.sentences(run, strongest),
        "bars": answers.bars(run, widest),
        "strongest_layer": answers.strongest_layer(run),
        "load": answers.of_load(run),
        "coverage": answers.of_coverage(run),
        "silenced": answers.of_silenced(run),
        "tables": {
            "layers": tables.of_layers(run),
            "load": tables.of_load(run),
            "domains": tables.of_domains(run, strongest),
            "coverage": tables.of_coverage(run),
            "silenced": tables.of_silenced(run),
            "permuted": tables.of_permuted(run),
            "tokens": tables.of_tokens(run, strongest),
            "pairs": tables.of_pairs(run),
            "measures": tables.of_measures(run),
        },
    }


def style_of() -> str:
    """The style sheet."""
    return (_FOLDER / "page.css").read_text(encoding="utf-8")


def script_of() -> str:
    """The scripts as one, which leaves nothing behind in the window."""
    maps = {
        "sequential": [colours.SEQUENTIAL, colours.SEQUENTIAL_DARK],
        "diverging": [colours.DIVERGING, colours.DIVERGING_DARK],
    }
    parts = [f"const COLOURS = {maps};"]  # Python's lists of plain words are also JavaScript's
    parts += [(_FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


def hash_of(text: str) -> str:
    """How a Content-Security-Policy knows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
