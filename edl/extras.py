"""Packages that come with an extra, imported when they are used: `import edl` needs torch alone."""

import importlib
from typing import Any


def require(package: str, op: str, extra: str) -> Any:
    """Imports a package.

    Args:
        package (str): its name in Python.
        op (str): in whose name it is missed.
        extra (str): what brings it.

    Raises:
        ImportError: it is missing; one sentence says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"edl::{op}: {package.partition('.')[0]} must be installed, pip install 'expert-divergence[{extra}]' "
            f"(got {error})"
        ) from error
