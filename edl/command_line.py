"""What all commands of `edl` have in common: options, sentences, exit codes."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
Command = Callable[[argparse.Namespace], None]


def printable(text: str) -> str:
    """A text without what a terminal would obey instead of showing it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def add_command(
    commands: "Commands",
    name: str,
    line: str,
    description: str,
    examples: str,
    run: Command,
    goes_on: bool = False,
) -> argparse.ArgumentParser:
    """Adds a command, which can be told to be quiet or to print JSON.

    It ends with the status 0; 2 and a sentence where input, output or options are at fault; 130 where it was
    interrupted.

    Args:
        commands: where to.
        name: the word.
        line: what it does, for the list of commands.
        description: what it does, for `--help`.
        examples: lines to copy.
        run: the command itself.
        goes_on: whether the same command goes on where it was interrupted. Default: False.

    Returns:
        Its parser, for further options.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=line, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    voice = parser.add_mutually_exclusive_group()
    voice.add_argument("--quiet", action="store_true", help="print nothing but what went wrong")
    voice.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_in_sentences(run, parser.prog, goes_on))
    return parser


def _in_sentences(command: Command, name: str, goes_on: bool) -> Command:
    """A command that ends with a sentence and the status 2 where input, output or options are at fault."""

    def run(options: argparse.Namespace) -> None:
        try:
            command(options)
        except (ImportError, OSError, ValueError) as error:
            sentence = str(error)
            if isinstance(error, OSError):
                operator = "::".join(name.split()[:2])
                sentence = f"{operator}: files must be readable and the output writable (got {error})"
            elif not sentence.startswith("edl::"):  # a mistake of ours
                raise
            print(printable(sentence), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"{name}: interrupted{'; the same command goes on from here' * goes_on}", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def tell(options: argparse.Namespace, result: Mapping[str, Any], lines: Callable[[], list[str]]) -> None:
    """Prints what a command has to say: lines for a person, or JSON, or nothing.

    Args:
        options: with `quiet` and `json`.
        result: JSON.
        lines: gives the lines.
    """
    if options.json:
        print(json.dumps(result, allow_nan=False))
    elif not options.quiet:
        for line in lines():
            print(printable(line))


def whole_number(lowest: int) -> Callable[[str], int]:
    """What argparse takes for an integer that is at least this one."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {lowest} (got {text!r})")
        return int(text)

    return number
