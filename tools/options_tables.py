"""Writes the tables of docs/options.md, from signatures and docstrings.

    python tools/options_tables.py

A table stands between `<!-- options of NAME in FILE -->` and `<!-- end -->`, and has what it takes: each option, its
default, and the first sentence that the docstring says of it. Nothing is imported, so that no
framework need be there.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "options.md"
TABLE = re.compile(r"(<!-- options of (\S+) in (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
ENTRY = re.compile(r"(\**[\w*, ]+?)(?: \((?:[^()]|\([^()]*\))*\))?: (.*)")  # name (type): text


def definition(name: str, path: str) -> ast.ClassDef | ast.FunctionDef:
    """A class or function at the top of a file of the package."""
    tree = ast.parse((ROOT / path).read_text())
    found = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name]
    return found[-1]  # before it stand overloads


def signature(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str | None]:
    """Names to defaults as they are written; None where there is none."""
    if isinstance(node, ast.FunctionDef):
        return of_arguments(node.args)
    makers = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    if makers:
        return {name: default for name, default in of_arguments(makers[0].args).items() if name != "self"}
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each)]
    return {ast.unparse(each.target): ast.unparse(each.value) if each.value else None for each in fields}


def of_arguments(arguments: ast.arguments) -> dict[str, str | None]:
    plain = [*arguments.posonlyargs, *arguments.args]
    without = [None] * (len(plain) - len(arguments.defaults))
    pairs = [*zip(plain, [*without, *arguments.defaults]), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return {argument.arg: ast.unparse(default) if default else None for argument, default in pairs}


def descriptions(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """What the section `Args:` of the docstring says of each option, in one line each."""
    _, _, section = (ast.get_docstring(node) or "").partition("\nArgs:\n")
    entries: list[str] = []
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if line[4] == " ":
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    found = [ENTRY.match(entry) for entry in entries]
    return {name: each[2] for each in found if each for name in each[1].replace("*", "").split(", ")}


def row(option: str, default: str | None, told: str) -> str:
    """A line of the table; what the docstring calls the default stands for None."""
    in_words = re.search(r"Default: (.*?)\.(?: |$)", told)
    shown = "required" if default is None else f"`{default}`"
    if default == "None" and in_words and not in_words[1].startswith("None"):
        shown = in_words[1]
    sentence = re.split(r"(?<=\.) (?=[A-Z`\"])| ?Default: ", told)[0].rstrip(".").replace("|", "\\|")
    return f"| `{option}` | {shown} | {sentence} |"


def table(name: str, path: str) -> str:
    """Markdown."""
    node = definition(name, path)
    told = descriptions(node)
    options = {name: default for name, default in signature(node).items() if not name.startswith("_")}
    rows = [row(option, default, told.get(option, "")) for option, default in options.items()]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows, ""])


def page_with_tables(text: str) -> str:
    """The page with all its tables made anew."""
    return TABLE.sub(lambda found: found[1] + table(found[2], found[3]) + found[4], text)


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text()))
