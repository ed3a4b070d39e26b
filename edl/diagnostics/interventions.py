"""The file of what a model loses when experts are silent or swapped."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from edl.diagnostics.extras import require
from edl.diagnostics.files import write_whole
from edl.diagnostics.findings import Interventions

FILE = "interventions.json"
_FIELDS = tuple(field.name for field in dataclasses.fields(Interventions))


def write_interventions(path: pathlib.Path, interventions: Interventions) -> None:
    """Writes them as JSON."""
    rows = {name: _plain(getattr(interventions, name)) for name in _FIELDS}
    write_whole(path, f"{json.dumps(rows, indent=1, allow_nan=False)}\n".encode())


def read_interventions(path: pathlib.Path) -> Interventions:
    """Reads what `write_interventions` has written.

    Raises:
        ValueError: a broken or foreign file.
    """
    np = require("numpy", "report")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        arrays = {name: np.array(rows[name], float) for name in _FIELDS}
    except (KeyError, OSError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"edl::report: {path} must be what `edl observe` has written (got {error})") from None
    number = arrays["tokens"].size
    shapes = {name: (number,) if name in ("tokens", "documents", "loss") else (number, 3) for name in _FIELDS}
    shapes["permuted"] = (*arrays["permuted"].shape[:1], 3)
    if any(arrays[name].shape != shape for name, shape in shapes.items()):
        raise ValueError(f"edl::report: {path} must have rows of one length (got others)")
    for name in ("tokens", "documents"):
        if not all(count.is_integer() and count >= 0 for count in arrays[name].tolist()):
            raise ValueError(f"edl::report: {name} in {path} must be numbers of them (got {arrays[name].tolist()})")
    return Interventions(**arrays)


def _plain(array: Any) -> Any:
    values = array.tolist()

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None  # JSON knows no NaN

    return plain(values)
