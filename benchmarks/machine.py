"""What a reader needs to compare figures: processor, instruction sets, versions, and the measured peak."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import edl

PEAK_SOURCE = Path(__file__).with_name("peak.cpp")


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor, where the system lists them."""
    file = Path("/proc/cpuinfo")
    text = file.read_text().split("\n\n")[0] if file.exists() else ""
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def name(device: torch.device) -> str:
    """One line: which processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    fields = _cpuinfo()
    model = fields.get("model name", platform.processor() or platform.machine())
    return (
        f"{model}, family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}, {os.cpu_count()} "
        "processors"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts(device: torch.device) -> dict[str, str]:
    """Names and values, one line each."""
    result = {"machine": name(device), "edl": edl.__version__, "torch": torch.__version__}
    result |= {"transformers": _version("transformers"), "Python": platform.python_version()}
    if device.type == "cuda":
        return result | {"CUDA": str(torch.version.cuda), "capability": str(torch.cuda.get_device_capability(device))}
    flags = [flag for flag in _cpuinfo().get("flags", "").split() if flag.startswith(("avx", "fma", "amx", "f16c"))]
    result["CPU flags"] = " ".join(flags)
    result["edl runs"] = torch.ops.edl._cpu_instruction_set()
    result["torch runs"] = torch.backends.cpu.get_cpu_capability()
    return result


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
        build = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-pthread", str(PEAK_SOURCE), "-o", program]
        try:
            subprocess.run(build, check=True, capture_output=True, timeout=60)
            speed = float(subprocess.run([program, str(threads)], check=True, capture_output=True, timeout=60).stdout)
        except (subprocess.SubprocessError, OSError) as error:
            return None, f"not measured: {type(error).__name__} of {compiler}"
    return speed, f"{speed:.0f} GFLOP/s (float32 multiply-adds on registers alone)"
