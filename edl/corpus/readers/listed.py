"""Labels of a list beside the corpus: a file of numbers per shard, such as WebOrganizer's NAME__choice.npy."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from edl.corpus.documents import Document, Shard
from edl.corpus.extras import require
from edl.corpus.readers.streams import check_regular

_SUFFIXES = ("__choice.npy", ".npy")


@dataclasses.dataclass
class ListedShard(Shard):
    """The documents of another shard, with labels from a list.

    Attributes:
        shard: has the documents.
        numbers: file of an integer per document, in their order; negative = none.
        names: what they stand for; None: themselves.
    """

    shard: Shard
    numbers: pathlib.Path
    names: Sequence[str] | None

    def __post_init__(self) -> None:
        self.has_text = self.shard.has_text

    def facts(self) -> list[object]:
        return [type(self.shard).__name__, *self.shard.facts(), self.names]

    def documents(self, start: int = 0) -> Iterator[Document]:
        numbers = self._numbers()
        pairs = itertools.zip_longest(self.shard.documents(start), numbers[start:])
        for count, (document, number) in enumerate(pairs, start):
            if document is None or number is None:
                raise ValueError(
                    f"edl::corpus: a list must have a number for each document (got {len(numbers)} in {self.numbers}, "
                    f"{'more' if number is None else count} documents in {self.source})"
                )
            yield document._replace(label=self._name(int(number)))
            self.position = self.shard.position

    def _name(self, number: int) -> str | None:
        if number < 0:
            return None
        return self.names[number] if self.names and number < len(self.names) else str(number)

    def _numbers(self) -> Any:
        numpy = require("numpy")
        check_regular(self.numbers)
        try:
            numbers = numpy.load(self.numbers, mmap_mode="r", allow_pickle=False)
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(f"edl::corpus: a list must be an .npy file (got {self.numbers}: {error})") from error
        if getattr(numbers, "ndim", None) != 1 or numbers.dtype.kind not in "iu":
            raise ValueError(f"edl::corpus: a list must be integers [documents] (got {self.numbers})")
        return numbers


def with_lists(shards: Sequence[Shard], folder: pathlib.Path, names: Sequence[str] | None) -> list[Shard]:
    """The same shards with labels of FOLDER/NAME__choice.npy or FOLDER/NAME.npy.

    Raises:
        ValueError: a shard has no list.
    """
    return [_with_list(shard, folder, names) for shard in shards]


def _with_list(shard: Shard, folder: pathlib.Path, names: Sequence[str] | None) -> ListedShard:
    paths = [folder / f"{shard.name}{suffix}" for suffix in _SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ValueError(f"edl::corpus: every shard must have a list of labels (got neither {paths[0]} nor {paths[1]})")
    changed = max(shard.changed, path.stat().st_mtime_ns)
    return ListedShard(shard.name, shard.source, shard.num_bytes, changed, None, shard, path, names)
