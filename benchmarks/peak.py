"""What a machine can reach at best, measured."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peak.cpp")


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


def peak(device: torch.device, threads: int) -> tuple[float | None, str]:
    """GFLOP/s that the machine can reach, if it can be measured, and how it was."""
    if device.type == "cuda":
        speed = _cuda_peak()
        return speed, f"{speed / 1e3:.0f} TFLOP/s (bfloat16 product of 8192 x 8192 matrices)"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None, "not measured: no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peak")
        build = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-pthread", str(SOURCE), "-o", program]
        try:
            subprocess.run(build, check=True, capture_output=True, timeout=60)
            speed = float(subprocess.run([program, str(threads)], check=True, capture_output=True, timeout=60).stdout)
        except (subprocess.SubprocessError, OSError) as error:
            return None, f"not measured: {type(error).__name__} of {compiler}"
    return speed, f"{speed:.0f} GFLOP/s (float32 multiply-adds on registers alone)"
