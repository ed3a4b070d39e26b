"""Text of three domains that every Python environment with torch holds: for machines without Debian's tools.

English is documentation (the language reference that `help()` shows, and the descriptions of installed packages),
Python is the source of the standard library, mathematics is what sympy and mpmath say about themselves.
"""

import ast
import importlib.metadata
import importlib.util
import pathlib
import sysconfig


def english():
    """Yields (name, bytes) of English documentation."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    for name, text in sorted(topics.items()):
        yield f"pydoc/{name}", text.encode()
    for distribution in sorted(importlib.metadata.distributions(), key=lambda found: str(found.metadata["Name"])):
        description = distribution.metadata.get_payload()
        if isinstance(description, str):
            yield f"description/{distribution.metadata['Name']}", description.encode(errors="ignore")


def python():
    """Yields (name, bytes) of the modules at the top of the standard library."""
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.name, path.read_bytes()


def mathematics():
    """Yields (name, bytes) of the docstrings of sympy and mpmath, one document per module."""
    for package in ("sympy", "mpmath"):
        found = importlib.util.find_spec(package)
        if found is None:
            continue
        root = pathlib.Path(found.origin).parent
        for path in sorted(root.rglob("*.py")):
            if "tests" not in path.parts:
                yield str(path.relative_to(root.parent)), docstrings(path.read_bytes())


def docstrings(source):
    """Returns the docstrings of a module, its classes and its functions as bytes."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, owners))
        return "\n\n".join(docstring for docstring in found if docstring).encode(errors="ignore")
    except (SyntaxError, ValueError):
        return b""


# Domain -> (where its text comes from, licence, function that yields it).
DOMAINS = {
    "English": ("documentation of Python and of installed packages", "PSF-2.0 and those of the packages", english),
    "Python": ("standard library of Python", "PSF-2.0", python),
    "mathematics": ("docstrings of sympy and mpmath", "BSD-3-Clause", mathematics),
}
