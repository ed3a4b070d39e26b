"""What is known of the documents of a trace: their tokens, their lengths and their domains."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.traces.trace import json_lines, token_ids_of

Documents = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


class Parts(NamedTuple):
    """Documents, N: lengths [N], labels [N] into domains, and token ids [T] or None."""

    lengths: list[int]
    labels: list[int]
    domains: list[str]
    token_ids: Any


def read(documents: Documents) -> Parts:
    """Reads what the user says of the documents.

    Raises:
        ValueError: they are no such documents.
    """
    np = require("numpy", "read_trace")
    lengths: list[int] = []
    labels: list[int] = []
    names: dict[str, int] = {}
    token_ids: list[Any] = []
    for name, row in _rows(documents):
        ids = row.get("token_ids")
        domain, length = row.get("domain", "all"), row.get("length")
        if ids is not None:
            ids = token_ids_of(ids, "documents", f"token_ids of {name}")
            length = len(ids) if length is None else length
        if type(length) is not int or length < 0 or (ids is not None and length != len(ids)):
            raise ValueError(
                f"edl::read_trace: {name} of documents must have token_ids, or a length (got {str(length)[:40]})"
            )
        if not isinstance(domain, str):
            raise ValueError(
                f"edl::read_trace: the domain of {name} of documents must be a name (got {str(domain)[:40]})"
            )
        lengths.append(length)
        labels.append(names.setdefault(domain, len(names)))
        token_ids.append(ids)
    if not lengths:
        raise ValueError("edl::read_trace: documents must be at least one (got none)")
    if any(ids is None for ids in token_ids) and any(ids is not None for ids in token_ids):
        raise ValueError("edl::read_trace: documents must all have token_ids, or none (got some)")
    known = np.concatenate(token_ids) if token_ids[0] is not None else None
    return Parts(lengths, labels, list(names), known)


def _rows(documents: Documents) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(documents, (str, os.PathLike)):
        yield from json_lines(pathlib.Path(documents))
        return
    if not isinstance(documents, Iterable) or isinstance(documents, Mapping):
        raise ValueError(f"edl::read_trace: documents must be a path, or mappings (got {type(documents).__name__})")
    for number, row in enumerate(documents):
        if not isinstance(row, Mapping):
            raise ValueError(f"edl::read_trace: documents must be a path, or mappings (got {type(row).__name__})")
        yield f"document {number}", row
