"""Time and memory: interleaved timing, saved bytes, peak memory."""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_RUNS = 100


class Timing(NamedTuple):
    """Milliseconds of one function."""

    median: float
    minimum: float
    runs: int

    def __str__(self) -> str:
        median, minimum = (f"{time:.0f}" if time >= 100 else f"{time:.3g}" for time in (self.median, self.minimum))
        return f"{median} ({minimum})"


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """One call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    known: dict[str, float] | None = None,
) -> dict[str, Timing]:
    """Times functions that have run before, in turn, so that a slow moment of the machine meets all of them.

    Each function is called 3 to 100 times, for `seconds` in all where that allows it, and its calls are spread evenly
    over the whole measurement. `known` holds milliseconds of a call already made. Where that takes more than five times
    `seconds` one more call is made, and where it takes more than twenty times `seconds` it stands as the measurement.
    """
    known = known or {}
    first = known | {name: milliseconds(functions[name], device) for name in functions if name not in known}
    runs = {name: min(MOST_RUNS, max(3, int(seconds * 1e3 / time))) for name, time in first.items()}
    runs |= {name: int(time < 20e3 * seconds) for name, time in first.items() if time > 5e3 * seconds}
    times: dict[str, list[float]] = {name: [] for name in functions}
    rounds = max(runs.values())
    for turn in range(rounds):
        for name, function in functions.items():
            if (turn + 1) * runs[name] // rounds > turn * runs[name] // rounds:
                times[name].append(milliseconds(function, device))
    times = {name: values or [first[name]] for name, values in times.items()}
    return {name: Timing(statistics.median(values), min(values), len(values)) for name, values in times.items()}


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed, as the allocators do that are advised for training on CPUs.

    Handed back instead, large tensors come as fresh pages on every call, and every way is timed with the system's
    clearing of them, which can take as long as the products and differs most between machines. Only glibc knows these
    switches.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(mmap_max, 0)
        set_option(trim_threshold, 2**31 - 1)
        set_option(top_pad, 2**28)


class Probe(NamedTuple):
    """What one call gave and took."""

    result: Any
    milliseconds: float
    saved_bytes: int  # kept for the backward pass, parameters excluded, each storage once
    peak_bytes: int | None  # most memory during the call above what stood before; None where it cannot be measured


def probe(function: Callable[[], Any], parameters: list[Tensor], device: torch.device) -> Probe:
    """Calls the function once, and watches its memory."""
    kept = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    @torch.compiler.disable
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    results = []
    before = _start_peak(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.compiler.disable(lambda tensor: tensor)):
        time = milliseconds(lambda: results.append(function()), device)
    after = _read_peak(device)
    peak = None if before is None or after is None else after - before
    return Probe(results[0], time, sum(saved.values()), peak)


def _start_peak(device: torch.device) -> int | None:
    """Forgets the peak so far; returns the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that malloc holds back would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def _read_peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int | None:
    """Bytes of this process in memory now (VmRSS), or at most since the peak was forgotten (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def error(result: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    """The largest distance of a tensor to its reference, relative to the reference's norm."""
    pairs = zip(result, reference, strict=True)
    return max(((x.detach().double() - y.double()).norm() / y.double().norm()).item() for x, y in pairs)
