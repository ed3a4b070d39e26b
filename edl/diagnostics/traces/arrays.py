"""Files of arrays of integers: `.npy`, `.npz`, `.safetensors` and `.pt`, of which nothing is ever executed.

What a file says of its sizes is compared with its bytes before anything of that size is made.
"""

import math
import pathlib
import re
import zipfile
from typing import Any

import torch
from torch import Tensor

from edl.diagnostics.extras import require
from edl.diagnostics.traces.trace import broken_in_a_sentence, check_file

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")
# Choices shrink to a tenth at most; what shrinks further is made to fill a memory.
_LARGEST_EXPANSION = 100
_HARMLESS_SIZE = 256 * 2**20


def read_arrays(path: pathlib.Path) -> dict[str, Any]:
    """The arrays of a file by name, in the order of the numbers in their names; one without a name is "".

    Raises:
        ImportError: no numpy, or no safetensors.
        ValueError: no such file, a broken one, or one of something else than integers.
    """
    check_file(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"edl::read_trace: arrays must be in one of {', '.join(SUFFIXES)} (got {path})")
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}
    with broken_in_a_sentence(path):
        arrays = readers.get(path.suffix, _torch)(path)
    if not arrays:
        raise ValueError(f"edl::read_trace: {path} must hold arrays (got none)")
    return {name: arrays[name] for name in sorted(arrays, key=natural)}


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 2 comes before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() and len(part) < 20 else (-1, part) for part in parts]


def _no_integers(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(f"edl::read_trace: {path} must hold integers only (got {what})")


def _header(stream: Any, size: int, path: pathlib.Path) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, order and type of an array in the format of NumPy, whose numbers follow in the stream and fill it."""
    format = require("numpy", "read_trace").lib.format
    version = format.read_magic(stream)
    readers = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format {version}")
    shape, is_fortran, dtype = readers[version](stream)
    if dtype.kind not in "iu":
        raise _no_integers(path, str(dtype))
    if math.prod(shape) * dtype.itemsize != size - stream.tell():
        raise ValueError(f"{size} bytes for {dtype} {list(shape)}")
    return shape, is_fortran, dtype


def array_of(stream: Any, size: int, path: pathlib.Path) -> Any:
    """The array in the format of NumPy that fills a stream of so many bytes."""
    np = require("numpy", "read_trace")
    shape, is_fortran, dtype = _header(stream, size, path)
    return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if is_fortran else "C")


def _npy(path: pathlib.Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"": array_of(file, path.stat().st_size, path)}


def _npz(path: pathlib.Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > max(_HARMLESS_SIZE, _LARGEST_EXPANSION * path.stat().st_size):
            raise ValueError(f"{size} bytes in a file of {path.stat().st_size}")
        arrays = {}
        for entry in entries:
            with archive.open(entry) as stream:
                arrays[entry.filename.removesuffix(".npy")] = array_of(stream, entry.file_size, path)
        return arrays


def _safetensors(path: pathlib.Path) -> dict[str, Any]:
    with require("safetensors", "read_trace").safe_open(str(path), framework="numpy") as file:
        names = list(file.keys())
        types = {file.get_slice(name).get_dtype() for name in names}
        if others := [dtype for dtype in types if dtype[0] not in "IU"]:
            raise _no_integers(path, others[0])
        return {name: file.get_tensor(name) for name in names}


def _torch(path: pathlib.Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size:  # torch packs nothing
        raise ValueError(f"{size} bytes in a file of {path.stat().st_size}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        content = {"": content}
    elif isinstance(content, (list, tuple)):
        content = {str(place): layer for place, layer in enumerate(content)}
    if not isinstance(content, dict):
        raise _no_integers(path, type(content).__name__)
    return {str(name): _numpy(value, path) for name, value in content.items() if value is not None}


def _numpy(value: object, path: pathlib.Path) -> Any:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_floating_point():
        raise _no_integers(path, str(value.dtype) if isinstance(value, Tensor) else type(value).__name__)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # one number as if it were many
        raise ValueError(f"{value.untyped_storage().nbytes()} bytes for {value.dtype} {list(value.shape)}")
    return value.detach().numpy()
