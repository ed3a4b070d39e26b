"""Finds libedl, compares versions, and loads it; every failure is one sentence that says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

_REBUILD = "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
LIBRARY = Path(__file__).parent / "lib" / "libedl.so"
# A CMake list for CMAKE_PREFIX_PATH: find_package(edl) and find_package(Torch) both work with it.
CMAKE_PREFIX_PATH = f"{Path(__file__).parent / 'share' / 'cmake'};{torch.utils.cmake_prefix_path}"


def _minor(version: str) -> str:
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])


def check_build(built_torch: str, built_cuda: str, torch_version: str, torch_cuda: str | None) -> None:
    """Raises ImportError where the library was built for another torch or CUDA than the running one."""
    if _minor(built_torch) != _minor(torch_version):
        raise ImportError(f"edl was built for torch {built_torch} but torch {torch_version} is running: {_REBUILD}")
    if built_cuda and built_cuda != (torch_cuda or ""):
        raise ImportError(
            f"edl was built for CUDA {built_cuda} but the running torch {torch_version} has CUDA {torch_cuda}: "
            f"{_REBUILD}"
        )


_cuda_refusals: torch.library.Library | None = None  # they last as long as this object


def _refuse_cuda() -> None:
    """Tells what is missing where an edl built without CUDA is given a CUDA tensor."""

    def refuser(name: str) -> Callable[..., NoReturn]:
        def refuse(*arguments: Any, **options: Any) -> NoReturn:
            raise ValueError(
                f"{name}: edl was built without CUDA, {_REBUILD} where nvcc is found; `edl info` tells (got a CUDA "
                "tensor)"
            )

        return refuse

    global _cuda_refusals
    _cuda_refusals = torch.library.Library("edl", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("edl::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            _cuda_refusals.impl(name, refuser(name.split(".")[0]))


def load() -> None:
    """Loads libedl, which registers the operators `torch.ops.edl.*`."""
    try:
        from edl import _build
    except ImportError as error:
        raise ImportError(
            f"edl has not been built for this Python: run `pip install --no-build-isolation .` (got: {error})"
        ) from error
    check_build(_build.torch_version, _build.cuda_version, torch.__version__, torch.version.cuda)
    if not LIBRARY.exists():
        raise ImportError(f"edl's library is missing: {_REBUILD} (looked for {LIBRARY})")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"edl's library, built for torch {_build.torch_version}, does not load with torch {torch.__version__}: "
            f"{_REBUILD} (got: {error})"
        ) from error
    if not _build.cuda_version:
        _refuse_cuda()
