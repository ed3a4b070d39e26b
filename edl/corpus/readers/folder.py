"""Folders of text: one document a file, plain or compressed."""

import codecs
import dataclasses
import os
import pathlib
import stat
from collections.abc import Iterator

from edl.corpus.documents import BAD_UTF8, EMPTY, TOO_LONG, UNREADABLE, Document, Shard
from edl.corpus.readers.streams import CHUNK, COMPRESSED, reading

# Of a longer document the beginning is kept; the rest is only looked through for bytes that are no UTF-8.
KEPT = 2**20
# A compressed file may be any length once it is unpacked.
LONGEST_UNPACKED = 2**30


def walk(folder: pathlib.Path, depth: int | None = None) -> Iterator[tuple[pathlib.Path, os.stat_result | None]]:
    """The files of a folder in their order: sorted by name, those of a folder before those of its sub-folders.

    Names that begin with a dot are left out, and links to folders, which may lead in a circle.

    Args:
        folder: where to begin; may itself be a link.
        depth: how many floors of sub-folders to enter; None: all.

    Returns:
        (path, its state), the state None of what is no regular file or cannot be looked at.

    Raises:
        ValueError: a folder cannot be read.
    """
    waiting = [(folder, 0)]
    while waiting:
        place, floor = waiting.pop()
        try:
            names = sorted(name for name in os.listdir(place) if not name.startswith("."))
        except OSError as error:
            raise ValueError(f"edl::corpus: input must be folders that can be read (got {error})") from error
        folders = []
        for name in names:
            path = place / name
            state = _state(path)
            if state is None or stat.S_ISREG(state.st_mode):
                yield path, state
            elif not stat.S_ISDIR(state.st_mode):
                yield path, None
            elif not path.is_symlink() and (depth is None or floor < depth):
                folders.append((path, floor + 1))
        waiting += reversed(folders)


def _state(path: pathlib.Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


@dataclasses.dataclass
class FolderShard(Shard):
    """One document a file; those of a folder in it are of one source.

    Attributes:
        depth: how many floors of sub-folders belong to it; None: all.
    """

    depth: int | None = None

    def documents(self, start: int = 0) -> Iterator[Document]:
        for number, (path, state) in enumerate(walk(self.source, self.depth)):
            if number >= start:
                yield self._document(path, state)
            self.position += state.st_size if state else 0

    def _document(self, path: pathlib.Path, state: os.stat_result | None) -> Document:
        try:
            text, problem = _read(path) if state else (None, UNREADABLE)
        except UnicodeDecodeError:
            return Document(None, self.label, BAD_UTF8)
        except ValueError:
            return Document(None, self.label, UNREADABLE)
        below = path.relative_to(self.source).parts
        return Document(text, self.label, problem, below[0] if len(below) > 1 else None)


def _read(path: pathlib.Path) -> tuple[str | None, str | None]:
    """(the beginning of a file's text, None), or (None, what is wrong with it)."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    pieces, kept, size, blank = [], 0, 0, True
    with reading(path) as (stream, _):
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            if size > LONGEST_UNPACKED and path.suffix in COMPRESSED:
                return None, TOO_LONG
            piece = decoder.decode(chunk)
            blank = blank and (not piece or piece.isspace())
            if kept < KEPT:
                pieces.append(piece[: KEPT - kept])
                kept += len(pieces[-1])
        decoder.decode(b"", final=True)
    return (None, EMPTY) if blank else ("".join(pieces), None)
