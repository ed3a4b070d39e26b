"""What a machine can reach at best, measured."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

SOURCE = Path(__file__).with_name("peak.cpp")
SECONDS = 0.1  # of one measurement, of which the best counts
TIMES = 10
WORKING_SETS = {"registers": 0, "L1": 32 << 10, "L2": 1 << 20}  # bytes that tiles are loaded from, on each thread
TRAFFIC = {"read": 0, "write": 1, "copy": 2}
MEMORY_BYTES = 256 << 20  # read or written, of all threads together: more than the caches hold


class Peaks(NamedTuple):
    """The best of a few tenths of a second each; what cannot be measured is missing."""

    multiply_adds: float | None  # GFLOP/s of them in float32; on CUDA of a product in bfloat16
    dots: float | None  # GFLOP/s of the instruction vdpbf16ps
    tiles: dict[str, float]  # GFLOP/s in bfloat16, by where the tiles lie
    memory: dict[str, float]  # GB/s
    how: str  # the first was measured, or why it was not

    @property
    def note(self) -> str:
        """The first in words."""
        if self.multiply_adds is None:
            return f"not measured: {self.how}"
        large = self.multiply_adds >= 1e5
        speed = self.multiply_adds * (1e-3 if large else 1)
        return f"{speed:.0f} {'TFLOP/s' if large else 'GFLOP/s'} ({self.how})"

    def of(self, dtype: torch.dtype) -> float | None:
        """GFLOP/s that products of a type are held against: where there are tiles, they are for bfloat16."""
        return self.tiles["registers"] if dtype == torch.bfloat16 and self.tiles else self.multiply_adds

    def lines(self) -> dict[str, str]:
        """Each in a line, by its name."""
        lines = {}
        if self.dots is not None:
            lines["dot products of bfloat16 on registers alone"] = f"{self.dots:.0f} GFLOP/s"
        if self.tiles:
            rates = ", ".join(f"{speed:.0f} from {place}" for place, speed in self.tiles.items())
            lines["tiles of bfloat16"] = f"{rates} GFLOP/s"
        if self.memory:
            rates = ", ".join(f"{kind} {speed:.1f}" for kind, speed in self.memory.items())
            lines["memory"] = f"{rates} GB/s"
        return lines


@functools.cache
def library() -> ctypes.CDLL | str:
    """The functions of peak.cpp for this processor, or why there are none."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return "no C++ compiler"
    options = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread"]
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the file may go
        file = str(Path(folder) / "peak.so")
        try:
            subprocess.run([compiler, *options, str(SOURCE), "-o", file], check=True, capture_output=True, timeout=60)
            functions = ctypes.CDLL(file)
        except (subprocess.SubprocessError, OSError) as error:
            return f"{type(error).__name__} of {compiler}"
    functions.multiply_adds.argtypes = [ctypes.c_int, ctypes.c_double]
    functions.dots.argtypes = functions.multiply_adds.argtypes
    functions.tiles.argtypes = [ctypes.c_int, ctypes.c_double, ctypes.c_int64]
    functions.memory.argtypes = [ctypes.c_int, ctypes.c_double, ctypes.c_int, ctypes.c_int64]
    for function in (functions.multiply_adds, functions.dots, functions.tiles, functions.memory):
        function.restype = ctypes.c_double
    return functions


def _cuda_peak() -> float:
    """GFLOP/s of torch's largest bfloat16 product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.mm(a, b)
    start.record()
    for _ in range(10):
        torch.mm(a, b)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / start.elapsed_time(end) * 1e-6


def multiply_adds(threads: int) -> float | None:
    """GFLOP/s of float32 multiply-adds on registers alone in this moment."""
    functions = library()
    return None if isinstance(functions, str) else functions.multiply_adds(threads, SECONDS)


def peaks(device: torch.device, threads: int) -> Peaks:
    """What the machine reaches."""
    if device.type == "cuda":
        return Peaks(_cuda_peak(), None, {}, {}, "bfloat16 product of 8192 x 8192 matrices")
    functions = library()
    if isinstance(functions, str):
        return Peaks(None, None, {}, {}, functions)
    places = WORKING_SETS if functions.has_tiles() else {}

    def best(function: Callable[..., float], *arguments: int) -> float:
        return max(function(threads, SECONDS, *arguments) for _ in range(TIMES))

    tiles = {place: best(functions.tiles, size) for place, size in places.items()}
    memory = {kind: functions.memory(threads, TIMES * SECONDS, code, MEMORY_BYTES) for kind, code in TRAFFIC.items()}
    dots = best(functions.dots) if functions.has_dots() else None
    return Peaks(best(functions.multiply_adds), dots, tiles, memory, "float32 multiply-adds on registers alone")
