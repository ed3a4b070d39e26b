"""The command `edl observe`: the routing of labelled text by a model, as statistics and a record."""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import edl
from edl.command_line import add_command, tell, whole_number
from edl.corpus import readers
from edl.corpus.documents import Shard
from edl.corpus.readers.listed import with_lists
from edl.diagnostics import interventions as interventions_file
from edl.diagnostics.extras import require
from edl.diagnostics.record import Record
from edl.labels import files as label_files
from edl.observe import interventions, models, running
from edl.observe.sample import Sample, Size, sample_of
from edl.observe.unfinished import RECORD, STATISTICS, Unfinished

if TYPE_CHECKING:
    from edl.command_line import Commands

_OBSERVE = """\
Runs labelled text through a Mixture-of-Experts model and writes down which experts its tokens choose: sums over all
tokens (statistics.safetensors), and the choices of sampled documents token by token (record.safetensors). `edl report`
makes a page of them. The same command goes on where a kill has interrupted it."""

_EXAMPLES = """\
examples:
  edl observe my-checkpoint my-text --output routing              the sub-folders of my-text are the domains
  edl observe my-checkpoint data/*.jsonl.zst --column source --output routing
  edl observe big-checkpoint my-text --device-map auto --dtype bfloat16 --output routing
  edl observe weights.pt my-text --loader my_model.py:load --output routing
then: edl report routing"""


def add_observe(commands: "Commands") -> None:
    """Adds `edl observe`."""
    line = "which experts the tokens of labelled text choose"
    parser = add_command(commands, "observe", line, _OBSERVE, _EXAMPLES, _observe, goes_on=True)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint of transformers, or what --loader is given")
    parser.add_argument("text", metavar="TEXT", nargs="+", help=f"folders, or files ({readers.known_suffixes()})")
    parser.add_argument("--output", required=True, help="folder for the results")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--column", help="column with the labels, such as source (the name of the sub-folder)")
    labels.add_argument("--labels", type=pathlib.Path, help="folder that `edl label` has written for the same text")
    parser.add_argument("--text-column", default="text", help="column with the text (text)")
    parser.add_argument("--group-column", help="column with the source of a document: those of one are not independent")
    parser.add_argument("--kind", choices=readers.KINDS, help="what to read of folders that hold several kinds")
    _add_size(parser)
    _add_model(parser)


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = Size()
    parser.add_argument(
        "--windows",
        type=whole_number(1),
        default=size.windows,
        help=f"documents of each domain, at least ({size.windows}); fewer than 30 give numbers without a test",
    )
    parser.add_argument(
        "--tokens", type=whole_number(0), default=size.tokens, help=f"of all windows, at least ({size.tokens})"
    )
    parser.add_argument(
        "--window",
        type=whole_number(1),
        help=f"tokens that the record keeps of a document ({size.window}, or what the model can read); shorter "
        "documents are left out",
    )
    parser.add_argument(
        "--sequence-length",
        type=whole_number(2),
        default=size.length,
        help=f"tokens of a document that the model reads at most ({size.length}, or what it can)",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the sample (0)")
    parser.add_argument("--weights", action="store_true", help="also keep the weights of the choices")
    parser.add_argument(
        "--knock-out",
        action="store_true",
        help="also measure what is lost without a domain's favourite experts, without random ones, and with each "
        "layer's choices swapped: reads the text of --knock-out-tokens again for every domain and layer",
    )
    parser.add_argument(
        "--knock-out-tokens", type=whole_number(1), default=8192, help="of each domain that --knock-out predicts (8192)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=whole_number(1), default=4, help="documents at a time (4)")
    parser.add_argument("--device-map", help="where the parts of the model go, for transformers: auto, cpu, cuda:0 …")
    parser.add_argument("--dtype", default="auto", help="of the model, for transformers (auto: the checkpoint's)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    parser.add_argument(
        "--scores", choices=["softmax", "sigmoid"], help="of the router's logits (what the architecture is known for)"
    )
    parser.add_argument(
        "--loader",
        help="module:function or file.py:function that is given MODEL and returns (model, tokenizer), None for bytes",
    )


def _observe(options: argparse.Namespace) -> None:
    shards = _labelled(options)
    watched = _load(options)
    size = _size(options, watched.context)
    tokenize = watched.tokenize(size.length)
    bar = _Bar(options.quiet)
    with bar.of(sum(shard.num_bytes for shard in shards), "B", "reading"):
        sample = sample_of(shards, tokenize, size, options.seed, bar.advance)
    plan = running.plan_of(sample, options.batch_size)
    scores = options.scores or watched.scores
    run = running.run_of(watched, plan, sample.domains, [options.weights, scores])
    facts = watched.facts | _facts_of_sample(sample, size, options)
    output = pathlib.Path(options.output)
    with Unfinished(output, run) as unfinished:
        if not unfinished.is_finished:
            with bar.of(plan.num_tokens, "token", "observing"):
                running.observe(
                    watched,
                    plan,
                    sample.domains,
                    unfinished,
                    options.weights,
                    scores,
                    lambda forecast: bar.write(_told(forecast, plan, options.output)),
                    bar.advance,
                )
            unfinished.finish(plan.order, facts, running.texts_in(plan, watched.tokenizer))
        if options.knock_out:
            _knock_out(options, watched, sample, bar)
    tell(options, _result(sample, size, output), lambda: _lines(sample, size, output))


def _knock_out(options: argparse.Namespace, watched: models.WatchedModel, sample: Sample, bar: "_Bar") -> None:
    output = pathlib.Path(options.output)
    path = output / interventions_file.FILE
    documents = interventions.documents_within(sample.documents, options.knock_out_tokens)
    numbers = [len(of_domain) for of_domain in documents]
    if path.exists() and interventions_file.read_interventions(path).documents.tolist() == numbers:
        return
    record = Record.load(output / RECORD)
    with bar.of(interventions.tokens_read(documents, len(record.layers)), "token", "knocking out"):
        result = interventions.intervene(watched, documents, record, options.seed, bar.advance)
    interventions_file.write_interventions(path, result)


def _labelled(options: argparse.Namespace) -> list[Shard]:
    shards = readers.shards_of(options.text, options.text_column, options.column, options.kind, options.group_column)
    without_text = [str(shard.source) for shard in shards if not shard.has_text]
    if without_text:
        raise ValueError(f"edl::observe: TEXT must be text, and not token ids (got {without_text[0]})")
    if options.labels:
        shards = with_lists(shards, options.labels, label_files.read(options.labels).domains)
    elif not options.column and not any(shard.label for shard in shards):
        raise ValueError(
            "edl::observe: labels must come from sub-folders, --column or --labels (got documents outside of "
            f"sub-folders, such as those of {shards[0].source})"
        )
    return shards


def _load(options: argparse.Namespace) -> models.WatchedModel:
    if not options.loader:
        return models.load_checkpoint(
            options.model,
            options.device_map,
            options.dtype,
            options.trust_remote_code,
            with_head=options.knock_out,
            with_bar=not options.quiet and sys.stderr.isatty(),
        )
    given = [
        name
        for name, is_given in {
            "--device-map": options.device_map is not None,
            "--dtype": options.dtype != "auto",
            "--trust-remote-code": options.trust_remote_code,
        }.items()
        if is_given
    ]
    if given:
        raise ValueError(f"edl::observe: --loader must come without {given[0]}, which is for transformers (got both)")
    return models.load_own(options.loader, options.model)


def _size(options: argparse.Namespace, context: int) -> Size:
    """What fits into the model; a window has no place for the first token."""
    length = min(options.sequence_length, context or options.sequence_length)
    window = min(options.window or Size.window, length - 1)
    if options.window and window < options.window:
        raise ValueError(
            f"edl::observe: --window must be less than the {length} tokens that are read (got {options.window})"
        )
    return Size(options.windows, options.tokens, window, length)


def _facts_of_sample(sample: Sample, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    names = ", ".join(pathlib.Path(path).resolve().name for path in options.text)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(sample.left_out.items()))
    return {
        "text": names,
        "documents of the text": f"{sum(sample.seen.values()):,}",
        "left out": left_out or "nothing",
        "window": f"{size.window} tokens",
        "tokens read of a document": f"at most {size.length}",
        "seed": str(options.seed),
        "edl": edl.__version__,
    }


def _told(forecast: running.Forecast, plan: running.Plan, output: str) -> str:
    windows = len(plan.documents)
    return (
        f"{windows:,} documents, {plan.num_tokens:,} tokens: about {_duration(forecast.seconds)} at "
        f"{forecast.tokens_per_second:,.0f} tokens a second, {_bytes(forecast.memory_bytes)} of memory, and "
        f"{_bytes(forecast.record_bytes)} for the record in {output}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bytes(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:.1f} GiB"


def _files(output: pathlib.Path) -> list[str]:
    names = (STATISTICS, RECORD, interventions_file.FILE)
    return [name for name in names if (output / name).exists()]


def _result(sample: Sample, size: Size, output: pathlib.Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "files": _files(output),
        "window": size.window,
        "domains": {name: len(documents) for name, documents in zip(sample.domains, sample.documents)},
        "documents_seen": dict(sample.seen),
        "left_out": dict(sample.left_out),
    }


def _lines(sample: Sample, size: Size, output: pathlib.Path) -> list[str]:
    rows = [(len(documents), name) for name, documents in zip(sample.domains, sample.documents)]
    width = max(len(f"{count:,}") for count, _ in rows)
    lines = [f"{count:>{width},}  {name}, of {sample.seen[name]:,} documents" for count, name in rows]
    lines += [f"left out: {count:,} {reason}" for reason, count in sorted(sample.left_out.items())]
    lines += [f"no document of {name} is long enough" for name in sorted(sample.seen.keys() - set(sample.domains))]
    return [*lines, f"{', '.join(_files(output))} in {output}, windows of {size.window} tokens: edl report {output}"]


class _Bar:
    """Progress bars, one after another."""

    def __init__(self, quiet: bool) -> None:
        self._tqdm, self._disable = require("tqdm", "observe").tqdm, True if quiet else None
        self._quiet = quiet

    def of(self, total: int, unit: str, what: str) -> Any:
        """A bar, as a context."""
        self._bar = self._tqdm(total=total, unit=unit, unit_scale=True, desc=what, disable=self._disable, leave=False)
        return self._bar

    def advance(self, number: int) -> None:
        """Moves the bar."""
        self._bar.update(number)

    def write(self, line: str) -> None:
        """A line beside the bar, on the standard error."""
        if not self._quiet:
            self._tqdm.write(line, file=sys.stderr)
