"""The command `edl trace`: a record of what another program has written."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from edl.command_line import add_command, tell, whole_number
from edl.diagnostics.traces import read_trace
from edl.diagnostics.traces.reading import KINDS
from edl.observe.unfinished import RECORD
from edl.report import words

if TYPE_CHECKING:
    from edl.command_line import Commands

_TRACE = """\
Makes a record for `edl report` of choices that another program has written: Megatron's router_trace, a list of router
replay, vLLM's routed_experts. What a trace does not say, token ids and domains, comes beside it as JSON lines, a line a
document: {"token_ids": [5, 8, 2], "domain": "code"}, or {"length": 3, "domain": "code"}."""

_EXAMPLES = """\
examples:
  edl trace traces --documents documents.jsonl --output routing       a folder of Megatron's
  edl trace replay.pt --num-experts 128 --output routing              an array [T, K] per layer
  edl trace responses.jsonl --output routing                          of vLLM, with --enable-return-routed-experts
then: edl report routing"""


def add_trace(commands: "Commands") -> None:
    """Adds `edl trace`."""
    line = "choices that Megatron, vLLM or router replay recorded, for a report"
    parser = add_command(commands, "trace", line, _TRACE, _EXAMPLES, _trace)
    parser.add_argument("trace", metavar="TRACE", help="a file or a folder")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for the record")
    parser.add_argument("--kind", choices=KINDS, help="of the trace (what it looks like)")
    parser.add_argument("--documents", type=pathlib.Path, help="JSON lines about the documents, in their order")
    parser.add_argument("--num-experts", type=whole_number(1), help="of a layer (the highest that was chosen, + 1)")
    parser.add_argument(
        "--micro-batch-size",
        type=whole_number(1),
        default=1,
        help="sequences whose tokens alternate in a micro-batch of Megatron (1)",
    )


def _trace(options: argparse.Namespace) -> None:
    path = options.output / RECORD
    if path.exists():
        raise ValueError(f"edl::trace: output must have no record yet (got {path}: remove it, or name another folder)")
    record = read_trace(options.trace, options.kind, options.documents, options.num_experts, options.micro_batch_size)
    options.output.mkdir(parents=True, exist_ok=True)
    record.save(path)
    result = {
        "output": str(options.output),
        "documents": len(record),
        "tokens": record.num_tokens,
        "layers": len(record.layers),
        "domains": list(record.domains),
    }
    sizes = {"document": len(record), "token": record.num_tokens}
    sizes |= {"layer": len(record.layers), "domain": len(record.domains)}
    line = ", ".join(words.count(number, name) for name, number in sizes.items())
    tell(options, result, lambda: [line, f"routing in {options.output}: edl report {options.output}"])
