"""The command `edl report`: a page about what the experts of one run or several do."""

import argparse
import itertools
import pathlib
import re
import sys
from typing import TYPE_CHECKING, Any

from edl.command_line import add_command, tell, whole_number
from edl.diagnostics import exports, significance
from edl.diagnostics.exports.numbers import as_json
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Change, Findings
from edl.report import answers, summaries
from edl.report.page import is_page, write_page
from edl.report.runs import Run, read_runs

if TYPE_CHECKING:
    from edl.command_line import Commands

_REPORT = """\
Makes a page, one HTML file without outside parts, of what `edl observe` or a training with edl.RoutingStatistics has
written: whether experts specialise, beyond the token and beyond chance, and which do. Several runs stand beside each
other, and each is compared with the one before."""

# What keeps foreign names apart from the text around them, on a page.
_ISOLATES = re.compile("[\u2066-\u2069]")

_EXAMPLES = """\
examples:
  edl report routing                                    routing/report.html
  edl report before after                               comparison.html, and what training in between has changed
  edl report routing --png figures --csv tables         also for a paper"""


def add_report(commands: "Commands") -> None:
    """Adds `edl report`."""
    parser = add_command(commands, "report", "a page about what experts do", _REPORT, _EXAMPLES, _report)
    parser.add_argument("runs", metavar="FILE", nargs="+", help="folders of `edl observe`, statistics, records")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="the page (report.html in the folder of a run, comparison.html here of several)",
    )
    parser.add_argument("--title", action="append", help="of a run, once for each (the names of their folders)")
    parser.add_argument(
        "--examples",
        type=whole_number(0),
        default=0,
        help="documents of each domain whose text is shown (0: a page may be shared where its text may not)",
    )
    parser.add_argument("--png", type=pathlib.Path, help="folder for figures")
    parser.add_argument("--csv", type=pathlib.Path, help="folder for tables")
    parser.add_argument("--data", type=pathlib.Path, help="JSON file for all numbers, of a single run")
    parser.add_argument("--moelens", type=pathlib.Path, help="JSON file as MoELens reads it, of a single run")
    parser.add_argument("--tensorboard", type=pathlib.Path, help="folder for TensorBoard, of a single run")


def _report(options: argparse.Namespace) -> None:
    runs = read_runs(options.runs, options.title)
    alone = [name for name in ("csv", "data", "moelens", "tensorboard") if getattr(options, name)]
    if alone and len(runs) > 1:
        raise ValueError(f"edl::report: --{alone[0]} must be of a single run (got {len(runs)})")
    output = _output(options, len(runs))
    progress = _Progress(options.quiet)
    found = [run.findings(options.examples, progress.told) for run in runs]
    changes, reasons = _changes(runs)
    progress.close()
    write_page(found, output, changes)
    written = [f"page in {output}", *_write_others(options, found)]
    tell(
        options,
        _result(found, changes, output),
        lambda: [
            *(line for findings in found for line in _lines(findings)),
            *map(_line_of, changes),
            *reasons,
            *written,
        ],
    )


def _output(options: argparse.Namespace, runs: int) -> pathlib.Path:
    """Where the page goes; what is there already must be a page.

    Raises:
        ValueError: it is something else.
    """
    first = pathlib.Path(options.runs[0])
    beside = (first if first.is_dir() else first.parent) / "report.html"
    output: pathlib.Path = options.output or (beside if runs == 1 else pathlib.Path("comparison.html"))
    if output.exists() and not is_page(output):
        raise ValueError(f"edl::report: --output must be new, or a page to be written anew (got {output})")
    return output


def _changes(runs: list[Run]) -> tuple[list[Change], list[str]]:
    """What is different in each run from the one before, and why that is not known of others."""
    changes, reasons = [], []
    for earlier, later in itertools.pairwise(runs):
        if earlier.record and later.record:
            try:
                changes.append(significance.compare_runs(earlier.record, later.record, earlier.title, later.title))
            except ValueError as error:  # they are of other text, or of other models
                reasons.append(f"{earlier.title} and {later.title} are not compared: {error}")
    return changes, reasons


def _write_others(options: argparse.Namespace, found: list[Findings]) -> list[str]:
    """Whatever else was asked for; lines that say so."""
    lines = []
    if options.png:
        from edl.report.figures import write_figures

        lines.append(f"{len(write_figures(found, options.png))} figures in {options.png}")
    if options.csv:
        exports.write_csv(found[0], options.csv)
        lines.append(f"tables in {options.csv}")
    if options.data:
        exports.write_json(found[0], options.data)
        lines.append(f"all numbers in {options.data}")
    if options.moelens:
        exports.write_moelens(found[0], options.moelens)
        lines.append(f"MoELens' numbers in {options.moelens}")
    if options.tensorboard:
        tensorboard = require("torch.utils.tensorboard", "report", "tensorboard")
        with tensorboard.SummaryWriter(str(options.tensorboard)) as writer:
            exports.write_tensorboard(found[0], writer, 0)
        lines.append(f"TensorBoard's log in {options.tensorboard}")
    return lines


class _Progress:
    """A bar for each thing that is computed."""

    def __init__(self, quiet: bool) -> None:
        self._tqdm, self._disable = require("tqdm", "report").tqdm, True if quiet else None
        self._what = ""
        self._bar: Any = None

    def told(self, what: str, done: int, total: int) -> None:
        """So many steps of this are done."""
        if what != self._what or self._bar is None:
            self.close()
            self._what = what
            self._bar = self._tqdm(total=total, desc=what, disable=self._disable, leave=False, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _result(found: list[Findings], changes: list[Change], output: pathlib.Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "runs": [_headline(findings) for findings in found],
        "changes": [as_json(change) for change in changes],
    }


def _answer(findings: Findings) -> list[str]:
    return answers.sentences(findings, summaries.strongest(findings, 1))


def _headline(findings: Findings) -> dict[str, Any]:
    """What the top of the page says."""
    compared, beyond = findings.compared, findings.beyond_token
    return {
        "title": findings.title,
        "divergence": as_json(compared.whole if compared else None),
        "beyond_token": as_json(beyond.standardised.whole if beyond else None),
        "dead": [len(experts) for experts in findings.dead],
        "answer": _answer(findings),
        "notes": list(findings.notes),
    }


def _lines(findings: Findings) -> list[str]:
    sentences = [*_answer(findings), answers.of_silenced(findings), *findings.notes]
    return [findings.title, *(f"  {_plain(sentence)}" for sentence in sentences if sentence)]


def _line_of(change: Change) -> str:
    """What is different in a run from the one before."""
    values = "; ".join(f"{what}: {value}" for what, value in answers.of_change(change))
    return _plain(f"{change.later} less {change.earlier}: {values}. {change.note}")


def _plain(line: str) -> str:
    """A line of the page for a terminal."""
    return _ISOLATES.sub("", line).replace("\u202f", " ").replace("\xa0", " ")
