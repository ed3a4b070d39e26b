"""The choices that router replay (R3) hands over: a list of [T, K] per layer, -1 where there is none."""

import pathlib
import re
from typing import Any

from edl.diagnostics.traces.arrays import read_arrays
from edl.diagnostics.traces.trace import Trace, choices_of


def read(path: pathlib.Path, micro_batch_size: int) -> Trace:
    """Reads `.npz`, `.safetensors` or `.pt` with an array [T, K] per layer, or `.npy` or `.pt` with one [L, T, K].

    A number in the array's name is that of its layer; else layers count from 0. `RouterReplay.get_recorded_data()` of
    Megatron and `RouterReplay.collect()` of NeMo give such lists.

    Args:
        path: of the file.
        micro_batch_size: sequences whose tokens alternate, position by position.

    Raises:
        ImportError: a missing package.
        ValueError: a broken or foreign file.
    """
    arrays = read_arrays(path)
    if list(arrays) == [""] and arrays[""].ndim == 3:
        whole = choices_of(arrays[""], path, "the array", "layers", "tokens", "experts a token")
        arrays = {str(place): layer for place, layer in enumerate(whole)}
    numbers = _numbers(list(arrays))
    layers = {
        number: choices_of(array, path, name or "the array", "tokens", "experts a token")
        for number, (name, array) in sorted(zip(numbers, arrays.items()))
    }
    lengths = {len(layer) for layer in layers.values()}
    if len(lengths) > 1:
        raise ValueError(f"edl::read_trace: layers in {path} must have the same tokens (got {sorted(lengths)[:8]})")
    sequences = in_sequences(layers, micro_batch_size, path)
    return Trace(sequences, [lengths.pop() // micro_batch_size] * micro_batch_size)


def in_sequences(layers: dict[int, Any], micro_batch_size: int, path: pathlib.Path) -> dict[int, Any]:
    """Rows [S · B, K] that alternate between B sequences, sequence after sequence."""
    for layer in layers.values():
        if len(layer) % micro_batch_size:
            raise ValueError(
                f"edl::read_trace: micro_batch_size must divide the {len(layer)} tokens of each part of {path} (got "
                f"{micro_batch_size})"
            )
    return {
        number: layer.reshape(-1, micro_batch_size, layer.shape[1]).swapaxes(0, 1).reshape(layer.shape)
        for number, layer in layers.items()
    }


def _numbers(names: list[str]) -> list[int]:
    """The numbers of layers by their arrays' names; their places where names do not tell."""
    found = [re.findall(r"\d+", name) for name in names]
    numbers = [int(each[-1]) for each in found if each and len(each[-1]) < 10]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))
