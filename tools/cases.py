"""The outcomes of test cases while they come in: written by case_report.py, read by gpu.py, as lines of JSON."""

import json
import os
import sys
from pathlib import Path
from typing import TypedDict


class Case(TypedDict, total=False):
    """How one case ended."""

    test: str  # pytest's name of it
    operator: str  # what it is a case of: an operator, or else a test
    outcome: str  # passed, failed or skipped
    elements: int  # its size, where it failed
    says: str  # the error's first line
    lost: str | None  # what the device said where it could not be used any more


def write(file: Path, case: Case) -> None:
    """Adds a case, with one write: processes side by side do not mix their lines."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, (json.dumps(case) + "\n").encode())
    os.close(descriptor)


def read(file: Path) -> list[Case]:
    """The cases so far, each once. Of two reports the one of the case's own process stands, which comes first."""
    cases: dict[str, Case] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            case: Case = json.loads(line)
        except json.JSONDecodeError:  # its writer was killed
            continue
        known = cases.get(case["test"])
        if known is None or (case["outcome"] == "failed" and known["outcome"] != "failed"):
            cases[case["test"]] = case
    return list(cases.values())


def _row(cells: list[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _smallest(group: list[Case], total: int) -> str:
    """The row of an operator: how many cases failed, and the smallest of them."""
    case = min(group, key=lambda failed: failed.get("elements", sys.maxsize))
    lost = f" (the device was lost: {case['lost']})" if case.get("lost") else ""
    failed = f"{len(group)} of {total}"
    return _row([case["operator"], failed, case["test"], case.get("elements", "?"), f"{case['says']}{lost}"])


def page(title: str, cases: list[Case], outcome: str) -> str:
    """Markdown: counts, the smallest failing case of every operator or test, and the names of all that failed."""
    counts = [f"{sum(case['outcome'] == name for case in cases)} {name}" for name in ("passed", "failed", "skipped")]
    text = f"# {title}\n\n{outcome}: {', '.join(counts)}\n"
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case["outcome"] == "failed":
            groups.setdefault(case["operator"], []).append(case)
    if not groups:
        return text
    rows = [
        _smallest(groups[operator], sum(case["operator"] == operator for case in cases)) for operator in sorted(groups)
    ]
    header = ["operator or test", "failed", "smallest failing case", "elements", "what it says"]
    rows = [_row([*header]), _row(["---"] * len(header)), *rows]
    names = [f"- {case['test']}" for group in groups.values() for case in group]
    return "\n".join([text, "## The smallest failing case of each\n", *rows, "\n## All that failed\n", *names, ""])
