"""Finds libedl, compares versions, and loads it; every failure is one sentence that says what to do."""

import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

DISTRIBUTION = "expert-divergence"
_REBUILD = "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
_PACKAGE = Path(__file__).parent
LIBRARY = _PACKAGE / "lib" / "libedl.so"
# A CMake list for CMAKE_PREFIX_PATH: find_package(edl) and find_package(Torch) both work with it.
CMAKE_PREFIX_PATH = f"{_PACKAGE / 'share' / 'cmake'};{torch.utils.cmake_prefix_path}"


def _minor(version: str) -> str:
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])


def _hidden_installation() -> Path | None:
    """The folder of another edl that has been built, where the sources that were imported stand before it."""
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != _PACKAGE.parent.resolve()]
    for finder in sys.meta_path:
        spec = finder.find_spec("edl", elsewhere)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent
            if folder.resolve() != _PACKAGE.resolve() and (folder / "lib" / LIBRARY.name).exists():
                return folder
    return None


def _remedy(otherwise: str) -> str:
    """What to do about a library that is missing or does not fit."""
    hidden = _hidden_installation()
    if hidden is None:
        return otherwise
    return (
        f"leave the folder {_PACKAGE.parent}, or take it off the path, as it hides the edl that is installed in "
        f"{hidden}"
    )


def check_build(built_torch: str, built_cuda: str, torch_version: str, torch_cuda: str | None) -> None:
    """Raises ImportError where the library was built for another torch or CUDA than the running one."""
    if _minor(built_torch) != _minor(torch_version):
        raise ImportError(
            f"edl was built for torch {built_torch} but torch {torch_version} is running: {_remedy(_REBUILD)}"
        )
    if built_cuda and built_cuda != (torch_cuda or ""):
        raise ImportError(
            f"edl was built for CUDA {built_cuda} but the running torch {torch_version} has CUDA {torch_cuda}: "
            f"{_remedy(_REBUILD)}"
        )


def warn_of_namesakes() -> None:
    """Warns where a distribution called `edl`, another project's or ours of old, is installed beside ours."""

    def installed(name: str) -> importlib.metadata.Distribution | None:
        found = importlib.metadata.distributions(name=name)
        return next((each for each in found if each.read_text("RECORD") is not None), None)

    namesake = installed("edl")
    if namesake is None or installed(DISTRIBUTION) is None:
        return
    is_ours = "Expert Divergence" in (namesake.metadata["Summary"] or "")
    whose = (
        f"the former name of {DISTRIBUTION}, and should go"
        if is_ours
        else "another project, whose package is called edl too"
    )
    warnings.warn(
        f"edl: beside {DISTRIBUTION} the distribution edl {namesake.version} is installed, which is {whose}: run "
        f"`pip uninstall edl {DISTRIBUTION}`, then install {DISTRIBUTION} again",
        stacklevel=4,
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
    warn_of_namesakes()
    try:
        from edl import _build
    except ImportError as error:
        remedy = _remedy("run `pip install --no-build-isolation .`")
        raise ImportError(f"edl has not been built for this Python: {remedy} (got: {error})") from error
    check_build(_build.torch_version, _build.cuda_version, torch.__version__, torch.version.cuda)
    if not LIBRARY.exists():
        raise ImportError(f"edl's library is missing: {_remedy(_REBUILD)} (looked for {LIBRARY})")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"edl's library, built for torch {_build.torch_version}, does not load with torch {torch.__version__}: "
            f"{_remedy(_REBUILD)} (got: {error})"
        ) from error
    if not _build.cuda_version:
        _refuse_cuda()
