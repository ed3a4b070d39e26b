"""The tile loops of expert_mlp on plain C++ in the place of a matrix unit's instructions.

As a plugin of pytest (`-p tile_stand_in`) every test of the process runs bfloat16 on them.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from commands import ROOT, build_with_cmake

from edl import _extension


@functools.cache
def _library() -> ctypes.CDLL:
    build = ROOT / "build" / "tile-stand-in"
    build_with_cmake(ROOT / "tests" / "cpp" / "tiles", build, "", f"-DEDL_LIBRARY={_extension.LIBRARY}")
    return ctypes.CDLL(str(build / "libedl_tile_stand_in.so"))


def use(is_used: bool) -> None:
    """From now on, in this process."""
    _library().edl_use_tile_stand_in(ctypes.c_bool(is_used))


@contextmanager
def in_use() -> Iterator[None]:
    use(True)
    try:
        yield
    finally:
        use(False)


def pytest_configure() -> None:
    use(True)
