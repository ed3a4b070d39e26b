"""The command `edl label`: domains for the documents of a corpus."""

import argparse
import dataclasses
import json
import os
import pathlib
from typing import TYPE_CHECKING

from edl.command_line import add_command, tell, whole_number
from edl.corpus import labelling, model_commands, readers, weborganizer
from edl.corpus.models import Model
from edl.corpus.readers.listed import with_lists

if TYPE_CHECKING:
    from edl.command_line import Commands

# Bytes; starting a process takes seconds.
_WORTH_A_PROCESS = 64 * 2**20

_APPLY = """\
Labels every document of a corpus with its domain: by the sub-folder that it lies in, by a column of its row, or by a
model. Writes an int16 file per shard, NAME.npy, in the order of the documents, -1 = unlabelled, and domains.json. The
same command goes on where a kill has interrupted it."""

_KNOWN = {"weborganizer-topics": weborganizer.TOPICS, "weborganizer-formats": weborganizer.FORMATS}

_APPLY_EXAMPLES = """\
examples:
  edl label apply my-text --output labels                             the sub-folders of my-text are the domains
  edl label apply data/*.jsonl.zst --column source --output labels    the values of a column are
  edl label apply data --model topics --threshold 0.5 --output labels a model finds them"""


def add_commands(label: argparse.ArgumentParser) -> None:
    """Adds what `edl label` can do to its parser."""
    commands = label.add_subparsers(title="commands", required=True)
    _add_apply(commands)
    model_commands.add_train(commands)
    model_commands.add_cluster(commands)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1 (got {text!r})")
    return value


def _add_apply(commands: "Commands") -> None:
    parser = add_command(
        commands, "apply", "labels a corpus by folders, a column or a model", _APPLY, _APPLY_EXAMPLES, _apply, True
    )
    parser.add_argument("input", nargs="+", help=f"folders, or files ({readers.known_suffixes()})")
    parser.add_argument("--output", required=True, help="folder for the labels")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--column", help="column with the labels, such as source; meta.source inside of an object")
    source.add_argument("--model", type=pathlib.Path, help="folder of a classifier, or .bin file of fastText")
    source.add_argument("--lists", type=pathlib.Path, help="folder of NAME__choice.npy or NAME.npy, numbers of domains")
    parser.add_argument("--threshold", type=_probability, help="less probable domains of --model become -1")
    parser.add_argument(
        "--domains",
        type=pathlib.Path,
        help=f"names in their order: a domains.json, a file with a name a line, {' or '.join(_KNOWN)}",
    )
    parser.add_argument("--text-column", default="text", help="column with the text (text)")
    parser.add_argument("--no-text", action="store_true", help="do not look at texts: rows without one count too")
    parser.add_argument("--kind", choices=readers.KINDS, help="what to read of folders that hold several kinds")
    parser.add_argument("--processes", type=whole_number(1), help="a shard each (all processors, where it is worth it)")


def _apply(options: argparse.Namespace) -> None:
    shards = readers.shards_of(
        options.input, None if options.no_text else options.text_column, options.column, options.kind
    )
    if options.threshold is not None and options.model is None:
        raise ValueError("edl::label: --threshold must come with --model (got labels without probabilities)")
    if options.domains and options.model:
        raise ValueError("edl::label: --domains must come without --model, which has its own (got both)")
    if not (options.column or options.model or options.lists or any(shard.label for shard in shards)):
        raise ValueError(
            "edl::label: labels must come from sub-folders, --column, --lists or --model (got documents outside of "
            f"sub-folders, such as those of {shards[0].source})"
        )
    labeller = Model(options.model, options.threshold) if options.model else None
    domains = _names(options.domains) if options.domains else None
    if options.lists:
        shards = with_lists(shards, options.lists, domains)
    processes = options.processes or _worthwhile_processes(sum(shard.num_bytes for shard in shards))
    summary = labelling.apply(shards, labeller, options.output, domains, processes, options.quiet)
    tell(options, {"output": options.output, **dataclasses.asdict(summary)}, lambda: _lines(summary, options.output))


def _worthwhile_processes(num_bytes: int) -> int:
    return len(os.sched_getaffinity(0)) if num_bytes > _WORTH_A_PROCESS else 1


def _names(path: pathlib.Path) -> list[str]:
    """Names of domains that are known, in a file of an earlier run, or one a line."""
    if str(path) in _KNOWN:
        return list(_KNOWN[str(path)])
    try:
        if path.suffix == ".json":
            return [str(name) for name in json.loads(path.read_text())["domains"]]
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"edl::label: --domains must be a domains.json, or have a name a line (got {error!r})"
        ) from error


def _lines(summary: labelling.Summary, output: str) -> list[str]:
    """A line for each domain and each problem."""
    lines = [*summary.counts.items(), *((f"-1, {name}", count) for name, count in summary.unlabelled.items())]
    width = max((len(f"{count:,}") for _, count in lines), default=0)
    total = sum(count for _, count in lines)
    return [
        *(f"{count:>{width},}  {name}" for name, count in lines),
        f"{total:>{width},}  documents, labels in {output}",
    ]
