"""Packages that reading and labelling a corpus need beside torch."""

from typing import Any

from edl import extras


def require(package: str, extra: str = "label") -> Any:
    """As `edl.extras.require`, of the extra that labels have."""
    return extras.require(package, "corpus", extra)
