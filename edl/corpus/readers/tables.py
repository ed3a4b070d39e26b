"""Tables of Arrow, in parquet files and as Hugging Face datasets keep them on disk: one document a row."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from edl.corpus.documents import BAD_UTF8, Document, RowShard, document_of, label_of
from edl.corpus.extras import require
from edl.corpus.readers.streams import CHUNK, check_regular

# Rows that become Python's objects at once.
_ROWS = 64
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclasses.dataclass
class TableShard(RowShard):
    """One document a row."""

    @contextlib.contextmanager
    def _broken_in_a_sentence(self) -> Iterator[None]:
        check_regular(self.source)
        try:
            yield
        except (require("pyarrow").lib.ArrowException, OSError, MemoryError) as error:
            what = str(error).partition("\n")[0]
            raise ValueError(f"edl::corpus: tables must be whole (got {self.source}: {what})") from error

    def _columns(self, schema: Any) -> "_Columns":
        names = (self.text_column, self.label_column, self.group_column)
        text, label, group = (_path(schema, name, self) for name in names)
        return _Columns(text, label, group, schema)

    def _documents(self, batch: Any, start: int, columns: "_Columns") -> Iterator[Document]:
        """The documents of a record batch from the start-th on."""
        for begin in range(start, batch.num_rows, _ROWS):
            rows = batch.slice(begin, _ROWS)
            texts = _values(rows, columns.text)
            labels = _values(rows, columns.label)
            groups = _values(rows, columns.group)
            for text, label, group in zip(texts, labels, groups):
                name = columns.name(label) if columns.label else self.label
                yield _document(text, name, _name(group)) if columns.text else Document(None, name, None)


@dataclasses.dataclass
class ParquetShard(TableShard):
    """The rows of a parquet file."""

    def documents(self, start: int = 0) -> Iterator[Document]:
        parquet = require("pyarrow.parquet")
        with (
            self._broken_in_a_sentence(),
            parquet.ParquetFile(str(self.source), buffer_size=CHUNK, pre_buffer=False) as file,
        ):
            columns = self._columns(file.schema_arrow)
            names = [".".join(path) for path in (columns.text, columns.label, columns.group) if path]
            done = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if done + num_rows <= start:
                    done += num_rows
                    continue
                for batch in file.iter_batches(_ROWS, [group], names, use_threads=False):
                    yield from self._documents(batch, max(0, start - done), columns)
                    done += batch.num_rows
                    self.position = self.num_bytes * done // file.metadata.num_rows


@dataclasses.dataclass
class ArrowShard(TableShard):
    """The rows of an Arrow file: a stream, as `Dataset.save_to_disk` writes them, or one with random access."""

    def documents(self, start: int = 0) -> Iterator[Document]:
        self._check_order()
        with self._broken_in_a_sentence(), require("pyarrow").memory_map(str(self.source)) as file:
            done = 0
            for batch in _batches(file):
                columns = self._columns(batch.schema)
                yield from self._documents(batch, max(0, start - done), columns)
                done += batch.num_rows
                self.position = file.tell()

    def _check_order(self) -> None:
        """Datasets of old may keep the order of their rows in another file."""
        state = self.source.with_name("state.json")
        if state.is_file() and b'"_indices_data_files": [' in state.read_bytes():
            raise ValueError(
                f"edl::corpus: a dataset must have its rows in their order, flatten_indices makes it so (got {state})"
            )


def _batches(file: Any) -> Iterator[Any]:
    """The record batches of an open file.

    Raises:
        OSError: the file ends before it says that it does.
    """
    ipc = require("pyarrow.ipc")
    if file.read(6) == b"ARROW1":
        reader = ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    file.seek(max(0, file.size() - len(_END_OF_STREAM)))
    if file.read() != _END_OF_STREAM:
        raise OSError("it is cut off")
    file.seek(0)
    yield from ipc.open_stream(file)


class _Columns:
    """Where text, label and source of a row are, and the names that numbers of labels stand for
    (`datasets.ClassLabel`)."""

    def __init__(self, text: list[str], label: list[str], group: list[str], schema: Any) -> None:
        self.text, self.label, self.group = text, label, group
        try:
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
            self.names = features[label[0]]["names"] if len(label) == 1 else []
        except (IndexError, KeyError, TypeError, ValueError):
            self.names = []

    def name(self, label: object) -> str | None:
        if self.names and isinstance(label, int) and 0 <= label < len(self.names):
            label = self.names[label]
        return _name(label)


def _name(value: object) -> str | None:
    return label_of(value.decode(errors="replace") if isinstance(value, bytes) else value)


def _path(fields: Iterable[Any], column: str | None, shard: RowShard) -> list[str]:
    """A column as the names of a field and of fields in it.

    Raises:
        ValueError: there is no such column.
    """
    path: list[str] = []
    rest = column
    while rest:
        types = {field.name: field.type for field in fields}
        name = rest if rest in types else rest.partition(".")[0]
        if name not in types or (name != rest and not require("pyarrow.types").is_struct(types[name])):
            raise ValueError(f"edl::corpus: {shard.source} must have the column {column} (got {', '.join(types)})")
        path.append(name)
        rest = rest[len(name) + 1 :]
        fields = types[name] if rest else ()
    return path


def _values(rows: Any, path: list[str]) -> list[object]:
    """A column as Python's objects; strings as bytes, which may be no UTF-8."""
    if not path:
        return [None] * rows.num_rows
    array = rows.column(path[0])
    for name in path[1:]:
        array = require("pyarrow.compute").struct_field(array, name)
    array = _as_bytes(array)
    array.validate(full=True)  # of a file that is mapped, nobody has looked at the offsets
    values: list[object] = array.to_pylist()
    return values


def _as_bytes(array: Any) -> Any:
    pyarrow, types = require("pyarrow"), require("pyarrow.types")
    if types.is_dictionary(array.type):
        values = _as_bytes(array.dictionary)
        return pyarrow.DictionaryArray.from_arrays(array.indices, values, safe=True).dictionary_decode()
    for is_text, of_bytes in (
        (types.is_string, pyarrow.binary()),
        (types.is_large_string, pyarrow.large_binary()),
        (types.is_string_view, pyarrow.binary_view()),
    ):
        if is_text(array.type):
            return array.view(of_bytes)
    return array


def _document(text: object, label: str | None, group: str | None) -> Document:
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return Document(None, label, BAD_UTF8)
    return document_of(text, label, group)
