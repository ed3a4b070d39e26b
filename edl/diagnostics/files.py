"""Files of diagnostics: safetensors with a JSON header. Nothing in them is ever executed."""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from edl.diagnostics.extras import require
from edl.diagnostics.layers import LayerFacts

# The key of our header in that of safetensors, whose values are strings.
_HEADER = "edl"


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that it is whole or as before."""
    path = pathlib.Path(path)
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except BaseException:
        pathlib.Path(unfinished).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def save(
    path: str | os.PathLike[str], kind: str, version: int, header: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Writes arrays and what is known of them; the file is whole or as before.

    Args:
        path: of the file.
        kind: what it holds.
        version: of the format.
        header: JSON.
        arrays: name → NumPy array.

    Raises:
        ImportError: no safetensors.
        OSError: it cannot be written.
    """
    np, numpy_files = require("numpy", kind), require("safetensors.numpy", kind)
    words = json.dumps({"kind": kind, "version": version, **header}, allow_nan=False)
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_whole(path, numpy_files.save(whole, {_HEADER: words}))


class Arrays:
    """A file of diagnostics that is open for reading: arrays are read when they are asked for.

    Args:
        path: of the file.
        kind: what it must hold.
        version: of the format, at most.

    Attributes:
        header (dict): what is known of the arrays.

    Raises:
        ImportError: no safetensors.
        ValueError: no such file, a broken one, one of another kind or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, version: int) -> None:
        self.path, self.kind = pathlib.Path(path), kind
        self.header = header_of(path, kind)
        if self.header["kind"] != kind:
            raise ValueError(f"edl::{kind}: {path} must hold a {kind} (got a {self.header['kind']})")
        if self.header["version"] > version:
            raise ValueError(
                f"edl::{kind}: {path} must be of version {version} or older (got {self.header['version']}: a newer edl "
                "reads it)"
            )
        self._file = require("safetensors", kind).safe_open(os.fspath(path), framework="numpy")
        self.names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Any:
        """An array, read into memory."""
        if name not in self.names:
            raise ValueError(f"edl::{self.kind}: {self.path} must hold {name} (got a file without)")
        return self._file.get_tensor(name)

    def checked(self, name: str, shape: tuple[int | None, ...], kinds: str) -> Any:
        """An array of this shape (None: any size), and of a type of these kinds of NumPy ("iu", "f").

        Raises:
            ValueError: it is missing, or another one.
        """
        array = self[name]
        fits = len(array.shape) == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape))
        if not fits or array.dtype.kind not in kinds:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"edl::{self.kind}: {name} in {self.path} must have the shape [{wanted}] and fit its type (got "
                f"{array.dtype} {list(array.shape)})"
            )
        return array


def header_of(path: str | os.PathLike[str], op: str) -> dict[str, Any]:
    """The header of a file of diagnostics.

    Args:
        path: of the file.
        op: in whose name it is refused.

    Raises:
        ImportError: no safetensors.
        ValueError: no file, or none of ours.
    """
    safetensors = require("safetensors", op)
    if not pathlib.Path(path).is_file():  # opening a pipe would wait for ever
        raise ValueError(f"edl::{op}: {path} must be a file (got none there)")
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            words = (file.metadata() or {}).get(_HEADER)
        if words is None:
            raise ValueError("tensors of something else")
        header = json.loads(words)
        if isinstance(header["kind"], str) and type(header["version"]) is int:
            return dict(header)
        raise ValueError("no kind and version")
    except (KeyError, OSError, RecursionError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"edl::{op}: {path} must be a file that edl has written (got {type(error).__name__}: {error})"
        ) from None


def layers_to_json(layers: tuple[LayerFacts, ...]) -> list[dict[str, Any]]:
    """The layers, for a header."""
    return [layer._asdict() for layer in layers]


def layers_of(header: Mapping[str, Any], path: object, op: str) -> tuple[LayerFacts, ...]:
    """The layers in a header.

    Raises:
        ValueError: there are none, or they are none.
    """
    try:
        layers = tuple(LayerFacts(**layer) for layer in header["layers"])
    except (KeyError, TypeError):
        layers = ()
    numbers = [value for layer in layers for value in (layer.number, layer.num_experts, layer.top_k)]
    is_right = all(type(number) is int and 0 <= number < 2**31 for number in numbers)
    if not layers or not is_right or not all(isinstance(layer.name, str) for layer in layers):
        raise ValueError(f"edl::{op}: layers in {path} must have a number, name, num_experts and top_k (got others)")
    if any(layer.num_experts < 1 for layer in layers) or len({layer.number for layer in layers}) < len(layers):
        raise ValueError(f"edl::{op}: layers in {path} must have experts and differ in number (got others)")
    return layers


def names_of(header: Mapping[str, Any], path: object, op: str) -> tuple[str, ...]:
    """The domains in a header.

    Raises:
        ValueError: there are none, or they are no names.
    """
    names = header.get("domains")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"edl::{op}: domains in {path} must be names (got others)")
    if len(set(names)) < len(names):
        raise ValueError(f"edl::{op}: domains in {path} must differ (got some twice)")
    return tuple(names)
