"""Lines of JSON objects, plain or compressed: one document a line."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from edl.corpus.documents import BAD_UTF8, NOT_JSON, TOO_LONG, Document, RowShard, document_of, label_of
from edl.corpus.readers.streams import reading

# Read in bounded memory: what is longer is passed over and counted.
LONGEST_LINE = 64 * 2**20


@dataclasses.dataclass
class JsonlShard(RowShard):
    """One document a line; empty lines are none."""

    def documents(self, start: int = 0) -> Iterator[Document]:
        with reading(self.source) as (stream, file):
            for number, line in enumerate(_lines(stream)):
                self.position = file.tell()
                if number >= start:
                    yield self._document(line)

    def _document(self, line: bytes | None) -> Document:
        if line is None:
            return Document(None, self.label, TOO_LONG)
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return Document(None, self.label, BAD_UTF8)
        except (ValueError, RecursionError):
            return Document(None, self.label, NOT_JSON)
        if not isinstance(row, dict):
            return Document(None, self.label, NOT_JSON)
        label = label_of(_value(row, self.label_column)) if self.label_column else self.label
        if not self.text_column:
            return Document(None, label, None)
        text = _value(row, self.text_column)
        if b"\\u" in line and _has_half_a_pair(text):
            return Document(None, label, BAD_UTF8)
        return document_of(text, label, label_of(_value(row, self.group_column)) if self.group_column else None)


def _has_half_a_pair(text: object) -> bool:
    """Whether there is half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    return isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in set(text))


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """The lines that are not empty; None for one that is too long."""
    while line := stream.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST_LINE)
            yield None
        elif not line.isspace():
            yield line


def _value(row: dict[str, Any], column: str) -> object:
    """The value of a key, or of a path of keys."""
    if column in row or "." not in column:
        return row.get(column)
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return _value(inner, rest) if isinstance(inner, dict) else None
