"""Statistics as tensors with names and a header, in files and checkpoints."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edl.diagnostics import files
from edl.diagnostics.extras import require
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.statistics.sums import OP, CourseSums, LayerSums, course_of, shapes_of
from edl.ops import checks

KIND = "routing_statistics"
VERSION = 1
_COUNTS = {"choices", "tokens", "coactivation"}


def named(
    layers: Sequence[LayerFacts],
    num_domains: int,
    sums: Mapping[int, LayerSums],
    courses: Sequence[Mapping[int, CourseSums]],
) -> dict[str, Tensor]:
    """Sums and those of M snapshots by name, on the CPU; a layer that a snapshot did not know yet has none in it."""
    tensors = {}
    for number, num_experts in ((layer.number, layer.num_experts) for layer in layers):
        for field, tensor in sums[number]._asdict().items():
            tensors[f"layer.{number}.{field}"] = tensor.detach().to("cpu", copy=True)
        if not courses:
            continue
        for field, shape in course_of(shapes_of(num_domains, num_experts))._asdict().items():
            unknown = torch.zeros(shape, dtype=_type_of(field))
            of_course = [getattr(course[number], field) if number in course else unknown for course in courses]
            tensors[f"snapshots.{number}.{field}"] = torch.stack(of_course)
    return tensors


def unnamed(
    layers: Sequence[LayerFacts], num_snapshots: int, tensors: Mapping[str, Tensor]
) -> tuple[dict[int, LayerSums], list[dict[int, CourseSums]]]:
    """What `named` was given."""
    numbers = [layer.number for layer in layers]
    sums = {
        number: LayerSums(*(tensors[f"layer.{number}.{field}"].clone() for field in LayerSums._fields))
        for number in numbers
    }
    courses = [
        {
            number: CourseSums(*(tensors[f"snapshots.{number}.{field}"][place] for field in CourseSums._fields))
            for number in numbers
        }
        for place in range(num_snapshots)
    ]
    return sums, courses


def shapes_by_name(
    layers: Sequence[LayerFacts], num_domains: int, num_snapshots: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and type of each tensor of `named`."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for layer in layers:
        whole = shapes_of(num_domains, layer.num_experts)
        for field, shape in whole._asdict().items():
            shapes[f"layer.{layer.number}.{field}"] = tuple(shape), _type_of(field)
        for field, shape in course_of(whole)._asdict().items() if num_snapshots else ():
            shapes[f"snapshots.{layer.number}.{field}"] = (num_snapshots, *shape), _type_of(field)
    return shapes


def _type_of(field: str) -> torch.dtype:
    return torch.int64 if field in _COUNTS else torch.float64


def of_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file.

    Raises:
        ImportError: no safetensors.
        ValueError: no such file, or a broken or foreign one.
    """
    np = require("numpy", KIND)
    arrays = files.Arrays(path, KIND, VERSION)
    header = _checked_header(arrays.header, path)
    layers = [LayerFacts(**layer) for layer in header["layers"]]
    tensors = {}
    for name, (shape, dtype) in shapes_by_name(layers, len(header["domains"]), len(header["steps"])).items():
        is_count = dtype == torch.int64
        array = arrays.checked(name, shape, "iu" if is_count else "f")
        if is_count and array.size and (array.min() < 0 or array.max() > np.iinfo(np.int64).max):
            raise ValueError(f"edl::{KIND}: {name} in {path} must not be negative (got {array.min()})")
        tensors[name] = torch.from_numpy(array.astype(np.int64 if is_count else np.float64))
    return header, tensors


def of_checkpoint(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a state.

    Raises:
        ValueError: something else.
    """
    try:
        header = json.loads(state_dict["header"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"edl::{OP}: a state must be what state_dict() gives (got others)") from None
    header = _checked_header(header, "a state")
    layers = [LayerFacts(**layer) for layer in header["layers"]]
    tensors = {}
    for name, (shape, dtype) in shapes_by_name(layers, len(header["domains"]), len(header["steps"])).items():
        tensor = state_dict.get(name)
        checks.check_tensor(OP, f"{name} of a state", tensor)
        assert isinstance(tensor, Tensor)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"edl::{OP}: {name} of a state must be {dtype} {list(shape)} (got {tensor.dtype} {list(tensor.shape)})"
            )
        tensors[name] = tensor.detach().cpu()
    return header, tensors


def _checked_header(header: Any, path: object) -> dict[str, Any]:
    """The header with what it must have.

    Raises:
        ValueError: it has something else.
    """
    if not isinstance(header, dict):
        raise ValueError(f"edl::{KIND}: {path} must have a header (got {type(header).__name__})")
    layers = files.layers_of(header, path, KIND) if header.get("layers") != [] else ()
    domains = files.names_of(header, path, KIND)
    steps: Any = header.get("steps")
    top_k, labels = header.get("top_k"), header.get("labels")
    is_course = isinstance(steps, list) and all(type(step) is int and step >= 0 for step in steps)
    if not is_course or sorted(set(steps)) != steps:
        raise ValueError(f"edl::{KIND}: steps in {path} must be those of snapshots, one after another (got others)")
    is_option = (top_k is None or (type(top_k) is int and top_k > 0)) and isinstance(labels, str)
    if not is_option or header.get("scores") not in checks.router_scores():
        raise ValueError(f"edl::{KIND}: {path} must have the options of RoutingStatistics (got others)")
    facts = header.get("facts", {})
    if not isinstance(facts, dict):
        raise ValueError(f"edl::{KIND}: facts in {path} must stand by name (got {type(facts).__name__})")
    return {
        **header,
        "layers": files.layers_to_json(layers),
        "domains": list(domains),
        "facts": facts,
    }
