"""The command `edl`: what is installed, labels of a corpus, and what the experts of a model do."""

import argparse

import torch

import edl
from edl import _build, _extension, machine
from edl.command_line import add_command, tell
from edl.corpus.commands import add_commands as add_label_commands
from edl.observe.commands import add_observe
from edl.observe.trace_commands import add_trace
from edl.report.commands import add_report

_INFO = "Says what is installed and what runs: versions, how edl was built, the instruction set in use, CUDA."


def build_facts() -> dict[str, str]:
    """What `edl info` prints, line by line."""
    facts = machine.facts(torch.device("cpu"))
    return {
        "edl": f"{edl.__version__} (built with {_build.compiler})",
        **facts,
        "torch": f"{facts['torch']} (edl was built for {_build.torch_version})",
        "instruction set": _instruction_set(),
        "CPU threads": str(torch.get_num_threads()),
        "CUDA": _cuda(),
        "library": str(_extension.LIBRARY),
        "CMake": edl.cmake_prefix_path,
    }


def _instruction_set() -> str:
    text = f"{torch.ops.edl._cpu_instruction_set()} of {', '.join(_build.instruction_sets)}"
    return f"{text} (the system refuses this process AMX)" if torch.ops.edl._is_amx_refused() else text


def _cuda() -> str:
    if not _build.cuda_version:
        return f"edl was built without it (torch has CUDA {torch.version.cuda})" if torch.version.cuda else "no"
    if not torch.cuda.is_available():
        return f"built for {_build.cuda_version}, no device found"
    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    return f"built for {_build.cuda_version}, devices: {', '.join(names)}"


def _tell_info(options: argparse.Namespace) -> None:
    facts = build_facts()
    width = max(map(len, facts))
    tell(options, facts, lambda: [f"{name:{width}}  {value}" for name, value in facts.items()])


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="edl", description=edl.__doc__)
    parser.add_argument("--version", action="version", version=f"edl {edl.__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    line = "versions, build facts, instruction set in use, CUDA"
    add_command(commands, "info", line, _INFO, "example:\n  edl info --json | jq .CUDA", _tell_info)
    label = commands.add_parser("label", help="domain labels for the documents of a corpus")
    add_label_commands(label)
    add_observe(commands)
    add_trace(commands)
    add_report(commands)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; `arguments` default to those of the process."""
    options = make_parser().parse_args(arguments)
    options.run(options)
