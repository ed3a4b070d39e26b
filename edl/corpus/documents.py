"""What every reader gives: documents with the label that they come with, and what is wrong with some of them."""

import abc
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

BAD_UTF8 = "bad UTF-8"
EMPTY = "empty"
NO_TEXT = "no text"
TOO_LONG = "too long"
UNREADABLE = "unreadable"
NOT_JSON = "not a JSON object"
NO_LABEL = "no label"
UNKNOWN_LABEL = "unknown label"
IMPROBABLE = "no probable domain"
# Why a document has the label -1. Files of interrupted runs hold positions in this tuple.
PROBLEMS = (
    BAD_UTF8,
    EMPTY,
    NO_TEXT,
    TOO_LONG,
    UNREADABLE,
    NOT_JSON,
    NO_LABEL,
    UNKNOWN_LABEL,
    IMPROBABLE,
)
# Longer ones are no names of domains, and would fill the memory with what is in the wrong column.
LONGEST_LABEL = 256


class Document(NamedTuple):
    """A document of a shard.

    Attributes:
        text: its text, of a file longer than 1 MiB the beginning; None where there is none or it cannot be read.
        label: what it comes with: the name of its folder or the value of a column; None without one.
        problem: None, or one of `PROBLEMS`: the document is labelled -1 and counted.
        group: its source, such as a site or a book, of which there may be several documents; None: it has its own.
    """

    text: str | None
    label: str | None
    problem: str | None
    group: str | None = None


@dataclasses.dataclass
class Shard(abc.ABC):
    """Documents in an order that stays: a file of rows, or a folder of files.

    Attributes:
        name: what its labels are called: NAME.npy.
        source: the file or folder.
        num_bytes: size of the source.
        changed: when the source was changed last, in nanoseconds.
        label: the folder that it lies in, None outside of one.
        position: bytes of the source that were read so far.
        has_text: whether its documents are text; token ids are not.
    """

    name: str
    source: pathlib.Path
    num_bytes: int
    changed: int
    label: str | None
    position: int = dataclasses.field(default=0, init=False, compare=False)
    has_text: bool = dataclasses.field(default=True, init=False)

    def facts(self) -> list[object]:
        """What its labels depend on: all fields but its place on the disk and its age, which a copy has not."""
        fields = [field.name for field in dataclasses.fields(self) if field.compare]
        return [getattr(self, name) for name in fields if name not in ("source", "changed")]

    @abc.abstractmethod
    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents in their order, from the start-th on.

        Raises:
            ValueError: the source is broken.
        """


@dataclasses.dataclass
class RowShard(Shard):
    """Documents that are rows with columns.

    Attributes:
        text_column: name of the text; None: the text is not looked at.
        label_column: name of the label, `a.b` for a field of a field; None: the label is the shard's.
        group_column: name of the source, likewise; None: there is none.
    """

    text_column: str | None
    label_column: str | None
    group_column: str | None = None

    def __post_init__(self) -> None:
        self.has_text = self.text_column is not None


def document_of(text: object, label: str | None, group: str | None) -> Document:
    """The document of a row whose text may be anything."""
    if not isinstance(text, str):
        return Document(None, label, NO_TEXT)
    if not text or text.isspace():
        return Document(None, label, EMPTY)
    return Document(text, label, None, group)


def label_of(value: object) -> str | None:
    """A value of a column as the name of a domain; None where it is none: null, negative, fractional, longer than
    `LONGEST_LABEL` characters, a list."""
    if isinstance(value, bool) or (isinstance(value, int) and value >= 0):
        value = str(value)
    return value if isinstance(value, str) and 0 < len(value) <= LONGEST_LABEL else None
