"""What readers of traces hand over, and what they all refuse."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edl.diagnostics.extras import require
from edl.diagnostics.record import MOST_EXPERTS

# Lines are read in bounded memory.
_LONGEST_LINE = 64 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The choices of a sequence of tokens.

    Attributes:
        layers (mapping of int to array[T, K]): number of the layer → choices, integers, -1 = none.
        lengths (sequence of int): tokens of each sequence or request, in order; their sum is T.
        token_ids (array[T], optional): where the format has them.
        facts (mapping): for people to read.
    """

    layers: Mapping[int, Any]
    lengths: Sequence[int]
    token_ids: Any = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_file(path: pathlib.Path) -> None:
    """Raises where there is no regular file: opening a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise ValueError(f"edl::read_trace: {path} must be a file (got none there)")


@contextlib.contextmanager
def broken_in_a_sentence(path: pathlib.Path) -> Iterator[None]:
    """Makes one sentence of whatever a parser of foreign bytes raises."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("edl::"):
            raise
        what = str(error).partition("\n")[0][:200]
        raise ValueError(f"edl::read_trace: {path} must be whole (got {type(error).__name__}: {what})") from None


def choices_of(array: Any, path: pathlib.Path, name: object, *axes: str) -> Any:
    """Choices of these dimensions, none empty, as int16 where they fit, else as int32.

    Raises:
        ValueError: they are no such integers, or no numbers of experts.
    """
    array = _array(array)
    if array.ndim != len(axes) or array.dtype.kind not in "iu" or array.size == 0:
        raise ValueError(
            f"edl::read_trace: {name} in {path} must be integers [{', '.join(axes)}] (got {array.dtype} "
            f"{list(array.shape)})"
        )
    lowest, highest = int(array.min()), int(array.max())
    if lowest < -1 or highest >= MOST_EXPERTS:
        raise ValueError(
            f"edl::read_trace: {name} in {path} must have experts from 0 to {MOST_EXPERTS - 1}, or -1 for none (got "
            f"{lowest} to {highest})"
        )
    return array.astype("int16" if highest < 2**15 else "int32", copy=False)


def _array(values: Any) -> Any:
    np = require("numpy", "read_trace")
    try:
        return np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return np.array(None)  # an object, which is no integer


def token_ids_of(values: Any, path: object, name: object) -> Any:
    """Token ids, array[T] of int32.

    Raises:
        ValueError: they are none.
    """
    array = _array(values)
    if array.ndim == 1 and array.size == 0:
        return array.astype("int32")
    if array.ndim != 1 or array.dtype.kind not in "iu" or int(array.min()) < 0 or int(array.max()) >= 2**31:
        raise ValueError(
            f"edl::read_trace: {name} in {path} must be integers of at least 0 in one row (got {array.dtype} "
            f"{list(array.shape)})"
        )
    return array.astype("int32", copy=False)


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, each with a name for sentences.

    Raises:
        ValueError: no file, a line that is too long or no JSON object.
    """
    check_file(path)
    with broken_in_a_sentence(path), open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if line.isspace():
                continue
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"edl::read_trace: lines in {path} must be shorter than 64 MiB (got line {number})")
            yield f"line {number}", _object(line, path, number)


def _object(line: bytes, path: pathlib.Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"edl::read_trace: lines in {path} must be JSON objects (got another line {number})")
    return row
