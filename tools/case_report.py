"""pytest plugin of gpu.py: reports every case as soon as it ended, to the file that EDL_CASE_REPORT names.

A case that loses the device (after an illegal address every call fails) ends its process; pytest-xdist starts another
one and goes on with the next case.
"""

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

FILE = Path(os.environ["EDL_CASE_REPORT"])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases-of-each", type=int, help="run only so many cases of each operator, the first ones")


def _parameters(item: pytest.Item) -> list[Any]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def _test_of(name: str) -> str:
    return name.split("[", maxsplit=1)[0]


def _operator(item: pytest.Item) -> str:
    """The operator that a case is of, or else its test."""
    names = [value.op for value in _parameters(item) if isinstance(getattr(value, "op", None), str)]
    return names[0] if names else _test_of(item.nodeid)


def _elements(item: pytest.Item) -> int:
    """How large a case is: the elements of its sample's tensors, or else the sum of its numbers."""
    total = 0
    for value in _parameters(item):
        if hasattr(value, "arguments"):
            total += sum(x.numel() for x in value.arguments() if isinstance(x, torch.Tensor))
        elif isinstance(value, int):
            total += abs(value)
    return total


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("--cases-of-each")
    if most is None:
        return
    taken: dict[str, int] = {}
    kept: list[pytest.Item] = []
    for item in items:
        name = _operator(item)
        taken[name] = taken.get(name, 0) + 1
        if taken[name] <= most:
            kept.append(item)
    items[:] = kept


def _lost_device() -> str | None:
    """What the device says where this process can no longer use it."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().split("\n", maxsplit=1)[0]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when != "call" and report.passed:
        return report
    case: cases.Case = {"test": item.nodeid, "operator": _operator(item), "outcome": report.outcome}
    if report.failed:
        case["elements"] = _elements(item)
        case["says"] = str(call.excinfo.value if call.excinfo else "").strip().split("\n", maxsplit=1)[0][:300]
        case["lost"] = _lost_device()
    cases.write(FILE, case)
    if case.get("lost"):
        print(f"\n{item.nodeid} lost the device: {report.longreprtext}", file=sys.__stderr__, flush=True)
        os._exit(1)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What pytest-xdist says of a case whose process ended."""
    if report.when not in ("setup", "call", "teardown"):
        says = "its process ended: it crashed, or took too long"
        cases.write(
            FILE, {"test": report.nodeid, "operator": _test_of(report.nodeid), "outcome": "failed", "says": says}
        )
