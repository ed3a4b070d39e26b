"""Facts about a machine and what is installed there, for reports and for `edl info`.

Imports nothing of edl, so that tools can run this file by its path before edl is built.
"""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

_VECTOR_FLAGS = ("amx", "asimd", "avx", "f16c", "fma", "sve")  # how the names of vector instructions begin


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor, where the system lists them."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", maxsplit=1)[0]
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = [line.split(":", maxsplit=1) for line in text.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def name(device: torch.device) -> str:
    """Which processor, in one line.

    Args:
        device (torch.device): a CUDA device, or the CPU.

    Returns:
        For the CPU its model, family and number of processors; for a CUDA device the driver's name of it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    fields = _cpuinfo()
    model = fields.get("model name") or platform.processor() or platform.machine()
    family, number = fields.get("cpu family", "?"), fields.get("model", "?")
    return f"{model}, family {family}, model {number}, {os.cpu_count()} processors"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts(device: torch.device) -> dict[str, str]:
    """What a reader needs to compare figures.

    Args:
        device (torch.device): where they were measured.

    Returns:
        Names and values, each one line: the processor, the system, versions of torch, Python and transformers; for the
        CPU its vector instructions and what torch uses of them, for a CUDA device the versions of CUDA.
    """
    result = {
        "machine": name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }
    if device.type == "cuda":
        result["CUDA"] = str(torch.version.cuda)
        result["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return result
    fields = _cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    result["CPU flags"] = " ".join(flag for flag in flags if flag.startswith(_VECTOR_FLAGS))
    result["torch uses"] = torch.backends.cpu.get_cpu_capability()
    return result
