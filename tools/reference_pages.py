"""Writes the pages of the reference that no docstring holds: the commands, and the schemas of the operators.

python tools/reference_pages.py
"""

import argparse
import pathlib
import re

FOLDER = pathlib.Path(__file__).parents[1] / "docs/reference"
WRITTEN = "<!-- written by tools/reference_pages.py -->\n"


def _as_text(words: str) -> str:
    """Words as Markdown that shows them as they are."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", words)


def _cell(action: argparse.Action) -> str:
    """An option, or the place of an argument, as one types it."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}{' ...' * (action.nargs == '+')}`"
    takes = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(f"`{option}{takes}`" for option in action.option_strings)


def _meaning(action: argparse.Action, program: str) -> str:
    said = (action.help or "") % {**vars(action), "prog": program}
    choices = f": {', '.join(map(str, action.choices))}" if action.choices else ""
    return _as_text(f"{said}{choices}{'; must be given' * (action.required and bool(action.option_strings))}")


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    parts = [f"## {name}", _as_text(parser.description or "")]
    rows = []
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if isinstance(action, argparse._HelpAction):
            continue
        rows.append(f"| {_cell(action)} | {_meaning(action, parser.prog)} |")
    parts.append("\n".join(["| option | what it is |", "|---|---|", *rows]))
    if parser.epilog:
        parts.append(f"```\n{parser.epilog}\n```")
    return "\n\n".join(parts)


def _commands_of(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """The sections of a command, or of those that it has."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [text for word, each in action.choices.items() for text in _commands_of(f"{name} {word}", each)]
    return [_section(name, parser)]


def command_line() -> str:
    """The page of the commands."""
    from edl.cli import make_parser

    begin = """# Command line

What `--help` says of each command. A command ends with the status 0; with 2 and a sentence where input, output or
options are at fault; with 130 where it was interrupted. `python -m edl` is the same as `edl`, and `edl --version`
prints the version."""
    return "\n\n".join([WRITTEN + begin, *_commands_of("edl", make_parser())]) + "\n"


def torch_operators() -> str:
    """The page of the operators' schemas."""
    import torch

    import edl

    begin = """# torch.ops.edl

The schemas of the operators as torch has them, for TorchScript and C++: call `torch.ops.edl.route_tokens(...)` where
[`edl.ops`](operators.md), which has the descriptions, cannot be imported. Those that begin with `_` are not
listed, and may change."""
    schemas = {each.name: str(each) for each in torch._C._jit_get_all_schemas() if each.name.startswith("edl::")}
    parts = [WRITTEN + begin]
    for name, schema in sorted(schemas.items()):
        short = name.removeprefix("edl::")
        if short.startswith("_"):
            continue
        described = (
            f"\n\nDescribed at [`edl.ops.{short}`](operators.md#edl.ops.{short})." if short in edl.ops.__all__ else ""
        )
        arguments, results = schema.split(") -> ")
        name, _, arguments = arguments.partition("(")
        listed = ",\n".join(f"    {each}" for each in arguments.split(", "))
        parts.append(f"## {short}\n\n```\n{name}(\n{listed}\n) -> {results}\n```{described}")
    return "\n\n".join(parts) + "\n"


PAGES = {"command_line.md": command_line, "torch_operators.md": torch_operators}


def main() -> None:
    """Writes them."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
