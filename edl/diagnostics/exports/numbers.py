"""All numbers of findings as JSON."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from edl.diagnostics.exports.load import check_findings, load_measures, loads
from edl.diagnostics.extras import require
from edl.diagnostics.files import write_whole
from edl.diagnostics.findings import Findings

VERSION = 1


def write_json(findings: Findings, path: str | os.PathLike[str]) -> None:
    """Writes all that is in the findings under the names of their fields; the file is whole or as before.

    Besides, `load` has further measures of each layer's load. What is not known is null.

    Args:
        findings (Findings): of a run.
        path: of the file.

    Raises:
        ImportError: no numpy.
        ValueError: no findings.
        OSError: it cannot be written.
    """
    check_findings("write_json", findings)
    more = {
        "kind": "edl findings",
        "version": VERSION,
        "load": as_json([load_measures(load) for load in loads(findings)]),
    }
    write_whole(path, json.dumps({**more, **as_json(findings)}, allow_nan=False).encode())


def as_json(value: Any) -> Any:
    """A value of findings in what JSON knows: arrays as lists, null for what is no finite number."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    return _array(value)


def _array(values: Any) -> Any:
    np = require("numpy", "write_json")
    array = np.asarray(values)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        array = np.where(np.isfinite(array), array.astype(object), None)
    return array.tolist()
