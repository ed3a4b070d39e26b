"""The commands `edl label train` and `edl label cluster`: models that `edl label apply --model` takes."""

import argparse
from typing import TYPE_CHECKING, Any

from edl.command_line import add_command, printable, tell, whole_number
from edl.corpus import readers
from edl.corpus.classifier import MODEL, Classifier
from edl.corpus.clusters import cluster
from edl.corpus.features import Features
from edl.corpus.sample import Sample, sample_of
from edl.corpus.training import train

if TYPE_CHECKING:
    from edl.command_line import Command, Commands

_TRAIN = """\
Trains a model on documents that have labels: the sub-folder that they lie in, or a column. Prints how good it is on
documents that it has not seen, what it takes for what, and how many examples are enough."""

_TRAIN_EXAMPLES = """\
examples:
  edl label train labelled --output topics                      50 documents in each sub-folder of labelled
  edl label train labelled.jsonl --column topic --output topics
then: edl label apply my-text --model topics --threshold 0.5 --output labels"""

_CLUSTER = """\
Groups documents without labels by what they look like, and prints the words that tell each group from the others."""

_CLUSTER_EXAMPLES = """\
example:
  edl label cluster my-text --clusters 8 --output groups
then: name them in groups/model.json (the same name twice makes one domain of two), and
      edl label apply my-text --model groups --output labels"""


def add_train(commands: "Commands") -> None:
    """Adds `train` to the commands of `edl label`."""
    parser = _parser(commands, "train", "makes a model from labelled examples", _TRAIN, _TRAIN_EXAMPLES, _train)
    parser.add_argument("--column", help="column with the labels, such as source (the name of the sub-folder)")
    parser.add_argument(
        "--examples", type=whole_number(5), default=500, help="of a domain, at most: a random sample (500)"
    )


def add_cluster(commands: "Commands") -> None:
    """Adds `cluster` to the commands of `edl label`."""
    parser = _parser(commands, "cluster", "makes a model without any labels", _CLUSTER, _CLUSTER_EXAMPLES, _cluster)
    parser.add_argument("--clusters", type=whole_number(2), required=True, help="how many")
    parser.add_argument("--documents", type=whole_number(2), default=10000, help="at most, a random sample (10000)")


def _parser(
    commands: "Commands", name: str, line: str, description: str, examples: str, run: "Command"
) -> argparse.ArgumentParser:
    parser = add_command(commands, name, line, description, examples, run)
    parser.add_argument("input", nargs="+", help=f"folders, or files ({readers.known_suffixes()})")
    parser.add_argument("--output", required=True, help="folder for the model, a new one")
    parser.add_argument("--text-column", default="text", help="column with the text (text)")
    parser.add_argument("--kind", choices=readers.KINDS, help="what to read of folders that hold several kinds")
    parser.add_argument(
        "--max-characters",
        type=whole_number(1),
        default=2000,
        help="of a document, how many are read, later too (2000)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of samples (0); the same again gives the same bits"
    )
    return parser


def _train(options: argparse.Namespace) -> None:
    features = Features(max_characters=options.max_characters)
    shards = readers.shards_of(options.input, options.text_column, options.column, options.kind)
    sample = sample_of(shards, options.examples, features.max_characters, True, options.seed, options.quiet)
    labels = [label for label in sample.labels if label is not None]
    model = train(sample.texts, labels, features, options.seed, options.quiet).save(options.output)
    result = {"output": options.output, "left_out": sample.left_out, **model.measured}
    tell(options, result, lambda: [*_left_out(sample), *report(model), "", f"model in {options.output}"])


def _cluster(options: argparse.Namespace) -> None:
    features = Features(max_characters=options.max_characters)
    shards = readers.shards_of(options.input, options.text_column, None, options.kind)
    sample = sample_of(shards, options.documents, features.max_characters, False, options.seed, options.quiet)
    model = cluster(sample.texts, options.clusters, features, options.seed).save(options.output)
    groups = [{name: row[name] for name in ("name", "documents", "telling")} for row in model.rows]
    result = {"output": options.output, "left_out": sample.left_out, "groups": groups}
    tell(options, result, lambda: _described(model, sample, options.output))


def _described(model: Classifier, sample: Sample, output: str) -> list[str]:
    """Lines about the groups that were found."""
    lines = []
    for row in model.rows:
        lines += [
            f"{row['name']}, {row['documents']} of {len(sample.texts)} documents",
            f"  {', '.join(row['telling'])}",
        ]
        lines += [f"  “{example}”" for example in row["examples"]]
    return [*lines, *_left_out(sample), f'To name them, change each "name" in {output}/{MODEL}.']


def _left_out(sample: Sample) -> list[str]:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(sample.left_out.items()))
    return [f"left out: {reasons}"] if reasons else []


def report(model: Classifier) -> list[str]:
    """Lines about how good a trained model is."""
    measured, names = model.measured, [printable(row["name"]) for row in model.rows]
    width = max(8, *map(len, names))
    lines = [f"Held-out accuracy {_percent(measured['held_out'])}", ""]
    lines.append(f"{'domain':{width}} examples  correct  taken for")
    for place, (name, confused) in enumerate(zip(names, measured["confusion"])):
        others = sorted((-count, other) for other, count in enumerate(confused) if other != place and count)
        wrong = ", ".join(f"{names[other]} {-count}" for count, other in others)
        lines.append(f"{name:{width}} {sum(confused):8}  {confused[place] / sum(confused):7.1%}  {wrong}".rstrip())
    lines += ["", "examples of a domain  accuracy"]
    lines += [f"{line['examples']:20}  {_percent(line)}" for line in measured["curve"]]
    lines += [_enough(measured["curve"]), "", "threshold  labelled  accuracy of those"]
    lines += [f"{line['threshold']:9.2f}  {line['labelled']:8.1%}  {_percent(line)}" for line in measured["thresholds"]]
    return lines


def _enough(curve: list[dict[str, Any]]) -> str:
    """How many examples do as well as all, within the interval of these."""
    enough = next(line for line in curve if line["accuracy"] >= curve[-1]["interval"][0])["examples"]
    if enough < curve[-1]["examples"]:
        return f"{enough} examples a domain are as good as all, within the interval."
    return "Accuracy still rises: more examples would help."


def _percent(shared: dict[str, Any]) -> str:
    low, high = shared["interval"]
    if not shared["documents"]:
        return "-"
    return f"{shared['accuracy']:.1%} [{low:.1%}, {high:.1%}] ({shared['correct']} of {shared['documents']})"
