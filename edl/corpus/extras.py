"""Packages that only labelling needs, imported when they are used."""

import importlib
from typing import Any


def require(package: str, extra: str = "label") -> Any:
    """Imports a package of an extra.

    Raises:
        ImportError: it is missing; one sentence says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"edl::label: {package.partition('.')[0]} must be installed, pip install 'expert-divergence[{extra}]' "
            f"(got {error})"
        ) from error
