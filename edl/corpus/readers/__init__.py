"""Corpora as they lie on disks, as shards: folders of text, JSONL, parquet, Hugging Face datasets, Megatron's files."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

from edl.corpus.documents import Shard
from edl.corpus.readers.folder import FolderShard, walk
from edl.corpus.readers.jsonl import JsonlShard
from edl.corpus.readers.megatron import MegatronShard
from edl.corpus.readers.streams import check_regular
from edl.corpus.readers.tables import ArrowShard, ParquetShard

# By which end of a name a kind is known, longer ones first; what has none of them is text.
SUFFIXES = {
    "jsonl": tuple(
        f".{name}{compressed}" for name in ("jsonl", "ndjson", "json") for compressed in (".gz", ".zst", "")
    ),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "megatron": (".idx",),
}
KINDS = ("text", *SUFFIXES)
# What `Dataset.save_to_disk` writes beside its Arrow files.
_OF_DATASETS = {"state.json", "dataset_info.json", "dataset_dict.json"}


def shards_of(
    paths: Iterable[str | pathlib.Path],
    text_column: str | None = "text",
    label_column: str | None = None,
    kind: str | None = None,
    group_column: str | None = None,
) -> list[Shard]:
    """The shards of a corpus, sorted by name.

    Of a folder of text each sub-folder is a shard; every other file is one of its own. Names are paths below the folder
    that was given, without suffixes; of several folders each name begins with that of its folder.

    Args:
        paths: files and folders. The sub-folder of a folder in which a document lies is its label.
        text_column: where a row's text is; None: texts are not looked at.
        label_column: where a row's label is, in the place of the folder's name.
        kind: one of `KINDS`: what to read of folders that hold several, and of files with another suffix.
        group_column: where the source of a row is, of which there may be several documents.

    Raises:
        ValueError: there is nothing to read, there are several kinds, or names that are the same, or pipes.
    """
    inputs = [pathlib.Path(path) for path in paths]
    shards = []
    for path in inputs:
        prefix = f"{path.resolve().name}/" if len(inputs) > 1 and path.is_dir() else ""
        shards += _Input(path, prefix, text_column, label_column, kind, group_column).shards()
    if not shards:
        raise ValueError(f"edl::corpus: input must hold documents (got none in {', '.join(map(str, inputs))})")
    [(name, count)] = collections.Counter(shard.name for shard in shards).most_common(1)
    if count > 1:
        sources = ", ".join(str(shard.source) for shard in shards if shard.name == name)
        raise ValueError(f"edl::corpus: the names of shards must differ (got {name} for {sources})")
    return sorted(shards, key=lambda shard: shard.name)


@dataclasses.dataclass
class _Input:
    """A file or a folder, and how to read it."""

    path: pathlib.Path
    prefix: str
    text_column: str | None
    label_column: str | None
    kind: str | None
    group_column: str | None

    def shards(self) -> list[Shard]:
        if not self.path.is_dir():
            if not self.path.exists():
                raise ValueError(f"edl::corpus: input must be files and folders (got {self.path}, which is not there)")
            kind = self.kind or _kind(self.path)
            if kind not in SUFFIXES:
                raise ValueError(f"edl::corpus: a file must be one of {known_suffixes()} (got {self.path})")
            return [self._shard(kind, self.path, None)]
        shards: dict[str, list[Shard]] = collections.defaultdict(list)
        for label, path, state in _files(self.path):
            kind = "text" if self.kind == "text" else _kind(path)
            if kind == "text":
                self._add_text(shards[kind], label, state)
            elif kind and self.kind in (None, kind):
                shards[kind].append(self._shard(kind, path, label))
        if self.kind:
            return shards[self.kind]
        if len(shards) > 1:
            examples = ", ".join(f"{kind} in {some[0].source}" for kind, some in sorted(shards.items()))
            raise ValueError(f"edl::corpus: a folder must hold one kind of input, or --kind choose it (got {examples})")
        return [shard for some in shards.values() for shard in some]

    def _add_text(self, shards: list[Shard], label: str | None, state: os.stat_result | None) -> None:
        """Counts a file of text in the shard of its folder, which comes last: files come folder by folder."""
        if not shards or shards[-1].label != label:
            name = self.path.resolve().name if label is None else label
            source = self.path if label is None else self.path / label
            depth = 0 if label is None else None
            shards.append(FolderShard(self.prefix + name, source, 0, 0, label, depth))
        if state:
            shards[-1].num_bytes += state.st_size
            shards[-1].changed = max(shards[-1].changed, state.st_mtime_ns)

    def _shard(self, kind: str, path: pathlib.Path, label: str | None) -> Shard:
        state = check_regular(path)
        below = path.name if path == self.path else str(path.relative_to(self.path))
        suffix = next((suffix for suffix in SUFFIXES[kind] if below.endswith(suffix)), path.suffix)
        found = self.prefix + below.removesuffix(suffix), path, state.st_size, state.st_mtime_ns, label
        if kind == "megatron":
            return MegatronShard(*found)
        of_rows: dict[str, Callable[..., Shard]] = {"jsonl": JsonlShard, "parquet": ParquetShard, "arrow": ArrowShard}
        return of_rows[kind](*found, self.text_column, self.label_column, self.group_column)


def _files(folder: pathlib.Path) -> Iterator[tuple[str | None, pathlib.Path, os.stat_result | None]]:
    """(label, path, state) of the files of a folder, then of those of its sub-folders, which may be links."""
    for path, state in walk(folder, depth=0):
        yield None, path, state
    for name in sorted(os.listdir(folder)):
        if not name.startswith(".") and (folder / name).is_dir():
            for path, state in walk(folder / name):
                yield name, path, state


def _kind(path: pathlib.Path) -> str | None:
    """The kind of a file; None where it goes with another one."""
    if path.name in _OF_DATASETS and any(any(path.parent.glob(files)) for files in ("*.arrow", "*/*.arrow")):
        return None
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        return None
    return next((kind for kind, suffixes in SUFFIXES.items() if path.name.endswith(suffixes)), "text")


def known_suffixes() -> str:
    """The suffixes of files that are known, for a person to read."""
    return ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
