"""Labels of a shard while they are made: a file that grows, of which after a kill every whole block counts."""

import fcntl
import json
import os
import pathlib
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

# Of a block: bytes of the names that are new (JSON), bytes of the codes (int16).
_SIZES = struct.Struct("<II")
# Of all of it, sizes too: zeros, which a power failure may leave, are no block.
_CHECKSUM = struct.Struct("<I")
# An interrupted run's processes notice within a batch that nobody waits for them.
_PATIENCE = 60


class Part:
    """The codes of a shard's documents, as far as they are known; one process at a time has it.

    A code is the position of a name among those met so far, or -1 less a position in `PROBLEMS`.

    Args:
        path: of the file, which is made where there is none.
        run: what the labels depend on, in a line; a file of another run is refused.

    Attributes:
        num_documents: how many have a code.
        names: the position of each name.
        whole: whether all documents of the shard have a code.

    Raises:
        ValueError: the file is of another run, or another process has it.
    """

    def __init__(self, path: pathlib.Path, run: str) -> None:
        self.num_documents, self.whole = 0, False
        self.names: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            lock(self._file.fileno(), path, _PATIENCE)
            self._take_up(f"{run}\n".encode())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _take_up(self, first_line: bytes) -> None:
        """Counts the blocks that are whole, and cuts off what a kill left behind them."""
        found = self._file.read(len(first_line))
        if not first_line.startswith(found):
            raise ValueError(
                "edl::corpus: output must be empty, or of a run with the same input and options (got "
                f"{self._path} of another one: remove it, or name another folder)"
            )
        self._file.seek(0)
        self._file.write(first_line)
        self._begin = end = self._file.tell()
        for names, codes in _blocks(self._file):
            self.names |= {name: len(self.names) + number for number, name in enumerate(names)}
            self.num_documents += len(codes) // 2
            self.whole = not (names or codes)
            end = self._file.tell()
        self._file.seek(end)
        self._file.truncate()

    def append(self, new_names: list[str], codes: bytes) -> None:
        """Adds the codes of the next documents, int16, and the names that they are the first to use."""
        names = json.dumps(new_names).encode() if new_names else b""
        block = _SIZES.pack(len(names), len(codes)) + names + codes
        self._file.write(block + _CHECKSUM.pack(zlib.crc32(block)))
        self._file.flush()
        self.num_documents += len(codes) // 2

    def finish(self) -> None:
        """Says that there are no more documents; then the file outlasts a power failure too."""
        self.append([], b"")
        os.fsync(self._file.fileno())
        self.whole = True

    def codes(self) -> Iterator[bytes]:
        """The codes, block by block."""
        self._file.seek(self._begin)
        return (codes for _, codes in _blocks(self._file))


def _blocks(file: BinaryIO) -> Iterator[tuple[list[Any], bytes]]:
    """(new names, codes) of each block up to the first that is not whole."""
    while len(sizes := file.read(_SIZES.size)) == _SIZES.size:
        size_of_names, size_of_codes = _SIZES.unpack(sizes)
        content = file.read(size_of_names + size_of_codes)
        checksum = file.read(_CHECKSUM.size)
        if checksum != _CHECKSUM.pack(zlib.crc32(sizes + content)):
            return
        names = content[:size_of_names]
        yield json.loads(names) if names else [], content[size_of_names:]


def lock(descriptor: int, path: pathlib.Path, patience: float = 0.0) -> None:
    """Holds a file or a folder for this process until the descriptor is closed.

    Raises:
        ValueError: another process still holds it after so many seconds.
    """
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise ValueError(f"edl::corpus: one run at a time must write an output (got {path}, in use)") from error
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return None
