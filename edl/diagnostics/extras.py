"""Packages that diagnostics need beside torch."""

from typing import Any

from edl import extras


def require(package: str, op: str, extra: str = "report") -> Any:
    """As `edl.extras.require`, of the extra that reports have."""
    return extras.require(package, op, extra)
