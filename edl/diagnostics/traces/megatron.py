"""Megatron's router traces: JSON lines per rank, a line with the choices of one router for one micro-batch."""

import hashlib
import os
import pathlib
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.traces.arrays import natural
from edl.diagnostics.traces.router_replay import in_sequences
from edl.diagnostics.traces.trace import Trace, choices_of, json_lines

_PATTERN = "router_trace_rank*.jsonl"


class _Part(NamedTuple):
    """A micro-batch, or a step of inference: its step, and [T, K] of each layer by its number."""

    step: int
    layers: dict[int, Any]


def read(path: pathlib.Path, micro_batch_size: int) -> Trace:
    """Reads what `--moe-routing-trace-path` has written: a folder with a file per rank, or one of its files.

    Ranks hold different tokens and the same layers; one that repeats another to the last choice (tensor parallelism)
    counts once, and so does a micro-batch that is repeated within a step (recomputation). Layers of multi-token
    prediction are left out.

    Args:
        path: of the folder or the file.
        micro_batch_size: sequences whose tokens alternate in each micro-batch, position by position.

    Raises:
        ValueError: no such file, a broken or foreign one, ranks or micro-batches of different layers.
    """
    np = require("numpy", "read_trace")
    paths = sorted(path.glob(_PATTERN), key=lambda each: natural(each.name)) if os.path.isdir(path) else [path]
    if not paths:
        raise ValueError(f"edl::read_trace: {path} must be a folder with {_PATTERN} (got none there)")
    parts: list[_Part] = []
    ranks, repeated = set(), 0
    for each in paths:
        of_rank, again = _rank(each, micro_batch_size)
        mark = _digest(of_rank)
        repeated += again
        if mark in ranks:
            repeated += len(of_rank)
        else:
            parts += of_rank
            ranks.add(mark)
    if not parts:
        raise ValueError(f"edl::read_trace: {path} must hold choices (got none)")
    numbers = sorted(parts[0].layers)
    for part in parts:
        if sorted(part.layers) != numbers:
            raise ValueError(
                f"edl::read_trace: ranks and micro-batches in {path} must have the same layers, each pipeline stage is "
                f"read by itself (got {numbers[:8]} and {sorted(part.layers)[:8]})"
            )
    _check_widths(parts, path)
    layers = {number: np.concatenate([part.layers[number] for part in parts]) for number in numbers}
    lengths = [len(part.layers[numbers[0]]) // micro_batch_size for part in parts for _ in range(micro_batch_size)]
    return Trace(layers, lengths, facts={"ranks": len(ranks), "repeated_parts_left_out": repeated})


def _check_widths(parts: list[_Part], path: pathlib.Path) -> None:
    for number in parts[0].layers:
        widths = {part.layers[number].shape[1] for part in parts}
        if len(widths) > 1:
            raise ValueError(
                f"edl::read_trace: layer {number} in {path} must have one number of experts a token (got "
                f"{sorted(widths)[:8]})"
            )


def _rank(path: pathlib.Path, micro_batch_size: int) -> tuple[list[_Part], int]:
    """The parts of a rank that differ within their step, and how many do not."""
    steps: dict[int, dict[int, list[Any]]] = {}
    for name, row in json_lines(path):
        step, layer = row.get("step"), row.get("layer")
        if type(step) is not int or type(layer) is not int or not 0 <= layer < 2**31 or "top_indices" not in row:
            raise ValueError(
                f"edl::read_trace: {name} of {path} must have a step, a layer and top_indices (got {sorted(row)[:8]})"
            )
        if row.get("block", "decoder") == "decoder":
            steps.setdefault(step, {}).setdefault(layer, []).append(_choices(row["top_indices"], path, name))
    parts, repeated = [], 0
    for step, layers in steps.items():
        number = {len(of_layer) for of_layer in layers.values()}
        if len(number) > 1:
            raise ValueError(
                f"edl::read_trace: layers of step {step} in {path} must have as many micro-batches (got "
                f"{sorted(number)[:8]})"
            )
        marks = set()
        for place in range(number.pop()):
            part = _part(step, {layer: of_layer[place] for layer, of_layer in layers.items()}, micro_batch_size, path)
            mark = _digest([part])
            if mark in marks:
                repeated += 1
            elif part.layers:
                parts.append(part)
                marks.add(mark)
    return parts, repeated


def _choices(experts: Any, path: pathlib.Path, name: str) -> Any:
    """The choices of a line, None where it has no tokens."""
    return None if experts == [] else choices_of(experts, path, name, "tokens", "experts a token")


def _part(step: int, layers: dict[int, Any], micro_batch_size: int, path: pathlib.Path) -> _Part:
    tokens = {0 if layer is None else len(layer) for layer in layers.values()}
    if len(tokens) > 1:
        raise ValueError(
            f"edl::read_trace: layers of step {step} in {path} must have the same tokens (got {sorted(tokens)[:8]})"
        )
    if tokens == {0}:
        return _Part(step, {})
    return _Part(step, in_sequences(layers, micro_batch_size, path))


def _digest(parts: list[_Part]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for number, layer in sorted(part.layers.items()):
            digest.update(f"{part.step} {number} {layer.shape} {layer.dtype};".encode())
            digest.update(layer.tobytes())
    return digest.digest()
