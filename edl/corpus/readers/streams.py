"""The bytes of a file, plain or compressed, in bounded memory; pipes and broken files end in a sentence."""

import contextlib
import gzip
import io
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from edl.corpus.extras import require

COMPRESSED = (".gz", ".zst")
# What expands further than this is made to fill a disk or a memory, not to be read.
LARGEST_EXPANSION = 1000
HARMLESS_SIZE = 256 * 2**20
CHUNK = 2**20


def check_regular(path: pathlib.Path) -> os.stat_result:
    """The state of a regular file.

    Raises:
        ValueError: there is none, or it is a pipe, a socket or a device, whose reading might never end.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise ValueError(f"edl::corpus: input must be a file or a folder that can be read (got {error})") from error
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"edl::corpus: input must be a regular file (got {path}: {stat.filemode(state.st_mode)})")
    return state


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file.

    Args:
        path: a regular file; `.gz` and `.zst` are decompressed.

    Returns:
        (stream of its content, the file itself, whose `tell` is how far reading has come).

    Raises:
        ValueError: the file cannot be read, is cut off or damaged; also while it is read.
    """
    check_regular(path)
    try:
        # It may have become a pipe meanwhile, and waiting for a writer would be for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if path.suffix in COMPRESSED:
                yield io.BufferedReader(_Expanded(path, file), CHUNK), file
            else:
                yield file, file
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"edl::corpus: input must be files that are whole (got {path}: {error})") from error


class _Expanded(io.RawIOBase):
    """The content of a compressed file, as long as it is in proportion."""

    def __init__(self, path: pathlib.Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, 0
        if path.suffix == ".gz":
            self.content = gzip.GzipFile(fileobj=file)
        else:
            # The package zstandard takes a file that is cut off for one that ends there.
            pyarrow = require("pyarrow")
            self.content = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        got: int = self.content.readinto(buffer)
        self.size += got
        if self.size > max(HARMLESS_SIZE, LARGEST_EXPANSION * self.file.tell()):
            raise OSError(f"expands to more than {LARGEST_EXPANSION} times its size")
        return got
