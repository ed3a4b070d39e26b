"""Where the CUDA toolkit is: for setup.py, the tools and the tests, before anything is built."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

INSTALLED = Path("/usr/local/cuda")
ARCHITECTURES = ("8.0", "9.0", "10.0")  # compute capabilities that the kernels are compiled for


class Toolkit(NamedTuple):
    """What of a toolkit was found."""

    home: Path | None  # the folder that holds compiler and headers
    nvcc: Path | None
    include: Path | None  # the folder of cuda_runtime.h


def _homes() -> list[Path]:
    """Where a toolkit may be: CUDA_HOME alone where that is set, else around the nvcc of PATH, or INSTALLED."""
    named = os.environ.get("CUDA_HOME")
    if named:
        return [Path(named)]
    nvcc = shutil.which("nvcc")
    around = [Path(nvcc).resolve().parents[1]] if nvcc else []
    return [*around, INSTALLED]


def find() -> Toolkit:
    """The toolkit of this machine.

    Returns:
        The first place that has both compiler and headers; where none has, `home` is None, and the compiler is that of
        PATH, which may be a wrapper with the headers elsewhere.
    """
    places = [Toolkit(home, home / "bin" / "nvcc", home / "include") for home in _homes()]
    with_nvcc = [place for place in places if place.nvcc.exists()]
    with_headers = [place for place in places if (place.include / "cuda_runtime.h").exists()]
    for place in with_nvcc:
        if place in with_headers:
            return place
    nvcc = shutil.which("nvcc") or next((str(place.nvcc) for place in with_nvcc), None)
    return Toolkit(None, nvcc and Path(nvcc), next((place.include for place in with_headers), None))


def architectures(nvcc: Path) -> list[str]:
    """Those of ARCHITECTURES that a compiler knows: CUDA 12.8 is the first to know 10.0."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    numbers = re.findall(r"compute_(\d+)", known)
    return [architecture for architecture in ARCHITECTURES if architecture.replace(".", "") in numbers]
