"""docs/options.md says what signatures, docstrings, setup.py and pyproject.toml say."""

import importlib
import inspect
import re

import options_tables
import pytest
from commands import ROOT

import edl

PAGE = (ROOT / "docs" / "options.md").read_text()
TABLES = re.findall(r"<!-- options of (\w+) in (\S+) -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_tables_are_up_to_date():
    """`python tools/options_tables.py` writes them."""
    assert options_tables.page_with_tables(PAGE) == PAGE


def test_no_bar_cuts_a_row_short():
    rows = [row for _, _, table in TABLES for row in table.splitlines()]
    assert {row.count("|") for row in rows} == {4}


@pytest.mark.parametrize("name, path, table", TABLES, ids=[name for name, _, _ in TABLES])
def test_options_are_those_of_the_signature(name, path, table):
    """Asked of Python, where the tables are read from the sources."""
    for framework in ("transformers", "megatron", "torchtitan"):
        if f"/{framework}/" in path:
            pytest.importorskip(f"{framework}.core" if framework == "megatron" else framework)
    if "/torchtitan/" in path:
        from torchtitan_released import without_triton

        without_triton()
    subject = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    parameters = [
        parameter
        for parameter in inspect.signature(subject).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.name[0] != "_"
    ]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", table, re.MULTILINE)
    assert [option for option, _, _ in rows] == [parameter.name for parameter in parameters]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in table.splitlines())
    for (option, default, told), parameter in zip(rows, parameters):
        assert (default == "required") == (parameter.default is parameter.empty), option
        assert told, option


def test_every_objective_has_a_table():
    classes = [getattr(edl.objectives, name) for name in edl.objectives.__all__]
    objectives = {
        each.__name__
        for each in classes
        if inspect.isclass(each) and issubclass(each, edl.objectives.Objective) and each is not edl.objectives.Objective
    }
    assert len(objectives) >= 15 and objectives <= {name for name, _, _ in TABLES}


def test_environment_variables():
    sources = [*(ROOT / "edl").rglob("*.py"), ROOT / "setup.py"]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu")]
    reads = re.compile(r'(?:getenv\(|environ(?:\.get\(|\[))"(EDL_\w+)"')
    read = {name for path in sources for name in reads.findall(path.read_text())}
    assert read == set(re.findall(r"^\| `(EDL_\w+)` \|", PAGE, re.MULTILINE))


def versions(name):
    """From and to, of the table of versions."""
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*?) \| (.*?) \|", PAGE, re.MULTILINE)
    return row


def test_versions():
    setup = (ROOT / "setup.py").read_text()
    oldest, newest = re.search(r"OLDEST_TORCH, NEWEST_TORCH = \((\d+, \d+)\), \((\d+, \d+)\)", setup).groups()
    assert versions("torch") == (oldest.replace(", ", "."), newest.replace(", ", "."))
    assert versions("setuptools")[0] == re.search(r"OLDEST_SETUPTOOLS = (\d+)", setup)[1]
    assert versions("Python")[0] == re.search(r'requires-python = ">=(.*?)"', PROJECT)[1]
    assert versions("transformers")[0] == re.search(r"transformers>=([\d.]+)", PROJECT)[1]
    assert versions("megatron-core")[0] == re.search(r"megatron-core>=([\d.]+)", PROJECT)[1]


def test_extras():
    section = PROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    extras = re.findall(r"^(\w+) = \[(.*)\]$", section, re.MULTILINE)
    assert len(extras) == len(section.splitlines())
    for name, packages in extras:
        names = ", ".join(re.findall(r'"([\w-]+)', packages))
        assert f"| `{name}` | {names} |" in PAGE
