"""Time and memory: interleaved timing, saved bytes, peak memory."""

import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from memory import hand_back_freed_memory
from torch import Tensor
from watch import Call, Function, Watch, milliseconds

MOST_RUNS = 100
MOST_REPEATS = 3  # of a call that was disturbed
ENOUGH_RUNS = 3


class Timing(NamedTuple):
    """Milliseconds of one function. Calls that were disturbed are left out, unless hardly any others are left."""

    median: float
    minimum: float
    runs: int
    is_quiet: bool = True

    @property
    def mark(self) -> str:
        """Of what could not be measured quietly."""
        return "" if self.is_quiet else "~"

    def __str__(self) -> str:
        median, minimum = (f"{time:.0f}" if time >= 100 else f"{time:.3g}" for time in (self.median, self.minimum))
        return f"{self.mark}{median} ({minimum})"

    def times(self, number: int) -> "Timing":
        """Of so many calls."""
        return self._replace(median=number * self.median, minimum=number * self.minimum)


def interleaved(
    functions: dict[str, Function], watch: Watch, seconds: float, known: dict[str, float] | None = None
) -> dict[str, Timing]:
    """Times functions that have run before, in turn, so that a slow moment of the machine meets all of them.

    Each function is called 3 to 100 times, for `seconds` in all where that allows it, and its calls are spread evenly
    over the whole measurement. `known` holds milliseconds of a call already made. Where a call takes more than five
    times `seconds` one counts, and where it is known to take more than twenty times as long, that call stands. Calls
    that the watch finds disturbed are made again, up to three times while its seconds for that last.
    """
    calls = {name: [] if name in (known or {}) else [watch.time(functions[name])] for name in functions}
    first = (known or {}) | {name: done[0].milliseconds for name, done in calls.items() if done}
    runs = {name: min(MOST_RUNS, max(ENOUGH_RUNS, int(seconds * 1e3 / time))) for name, time in first.items()}
    for name, time in first.items():
        if time > 5e3 * seconds:
            runs[name] = int(bool(calls[name]) or time < 20e3 * seconds)
        elif calls[name]:
            calls[name].clear()  # it told how long a call takes
    left = {name: runs[name] - len(calls[name]) for name in functions}
    for repeat in range(1 + MOST_REPEATS):
        begin = perf_counter()
        _call_in_turn(functions, left, watch, calls)
        left = {name: max(0, runs[name] - sum(map(watch.is_quiet, calls[name]))) for name in functions}
        watch.repeat_seconds -= perf_counter() - begin if repeat > 0 else 0.0
        if watch.repeat_seconds <= 0 or not any(left.values()):
            break
    return {name: _timing(calls[name], runs[name], first[name], watch) for name in functions}


def _call_in_turn(
    functions: dict[str, Function], numbers: dict[str, int], watch: Watch, calls: dict[str, list[Call]]
) -> None:
    """Calls each function so many times, spread evenly."""
    rounds = max(numbers.values())
    for turn in range(rounds):
        for name, function in functions.items():
            if (turn + 1) * numbers[name] // rounds > turn * numbers[name] // rounds:
                calls[name].append(watch.time(function))
    watch.end()


def _timing(calls: list[Call], runs: int, known: float, watch: Watch) -> Timing:
    quiet = [call.milliseconds for call in calls if watch.is_quiet(call)]
    watch.timed += len(calls)
    watch.disturbed += len(calls) - len(quiet)
    is_quiet = 0 < min(ENOUGH_RUNS, runs) <= len(quiet)
    values = quiet if is_quiet else [call.milliseconds for call in calls] or [known]
    return Timing(statistics.median(values), min(values), len(values), is_quiet)


class Witness(NamedTuple):
    """What one call gave and took."""

    result: Any
    milliseconds: float
    saved_bytes: int  # kept for the backward pass, parameters excluded, each storage once
    peak_bytes: int | None  # most memory during the call above what stood before; None where it cannot be measured


def witness(function: Callable[[], Any], parameters: list[Tensor], device: torch.device) -> Witness:
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
    return Witness(results[0], time, sum(saved.values()), peak)


def _start_peak(device: torch.device) -> int | None:
    """Forgets the peak so far; returns the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        hand_back_freed_memory()  # pages that malloc holds back would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
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
