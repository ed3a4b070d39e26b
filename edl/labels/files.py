"""Domain labels that `edl label` has written: one number per document, in the order of the corpus."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

VERSION = 1
INDEX = "domains.json"


class LabelFiles:
    """The labels of a corpus, which are read when they are asked for.

    Args:
        folder (path): where the files lie.
        index (mapping): what `domains.json` says, checked; `read` does it.

    Attributes:
        domains (tuple of str): the names, of which a label is the place; D.
        counts (dict): documents of each domain by its name.
        shards (tuple of str): the names of the shards, in the order of the corpus.
    """

    def __init__(self, folder: pathlib.Path, index: Mapping[str, Any]) -> None:
        self.domains = tuple(index["domains"])
        self.counts: dict[str, int] = {name: index["counts"].get(name, 0) for name in self.domains}
        self._folder = folder
        self._num_documents: dict[str, int] = {shard["name"]: shard["documents"] for shard in index["shards"]}
        self.shards = tuple(self._num_documents)

    def __len__(self) -> int:
        """N, the documents of all shards."""
        return sum(self._num_documents.values())

    def __getitem__(self, shard: str) -> Tensor:
        """The labels of a shard, a view of its file; what is written into it does not reach the file.

        Args:
            shard (str): one of `shards`.

        Returns:
            Tensor[n], int16, -1 = unlabelled.

        Raises:
            ValueError: no such shard, a file that is missing or broken, or of another number of documents.
            ImportError: no numpy.
        """
        if shard not in self._num_documents:
            raise ValueError(f"edl::labels: shard must be one of the {len(self.shards)} that were read (got {shard!r})")
        path = self._folder / f"{shard}.npy"
        labels = _int16_array(path)
        if len(labels) != self._num_documents[shard]:
            raise ValueError(
                f"edl::labels: {path} must have one label for each of the shard's {self._num_documents[shard]} "
                f"documents (got {len(labels)})"
            )
        lowest, highest = labels.aminmax() if len(labels) else (0, -1)
        if lowest < -1 or highest >= len(self.domains):
            raise ValueError(
                f"edl::labels: labels in {path} must be in [-1, {len(self.domains)}) (got {int(lowest)} to "
                f"{int(highest)})"
            )
        return labels

    def all(self) -> Tensor:
        """The labels of all documents, shard after shard.

        Returns:
            Tensor[N], int16, -1 = unlabelled.

        Raises:
            ValueError: as for a shard.
        """
        labels = torch.empty(len(self), dtype=torch.int16)
        for part, shard in zip(labels.split(list(self._num_documents.values())), self.shards):
            part.copy_(self[shard])
        return labels


def read(folder: str | os.PathLike[str]) -> LabelFiles:
    """The labels that `edl label` has written into a folder.

        labels = edl.labels.read("labels")
        labels.domains           # ("code", "news", "prose")
        labels["part/00"]        # of one shard
        labels.all()             # of the corpus

    Args:
        folder (path): with `domains.json` and an int16 `.npy` for each shard.

    Returns:
        LabelFiles.

    Raises:
        ValueError: no `domains.json`, or one that is broken or of another version.
    """
    if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str):
        raise ValueError(f"edl::labels: folder must be a path (got {folder!r})")
    path = pathlib.Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"edl::labels: {folder} must be a folder with labels, which has {INDEX} (got none there)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"edl::labels: {path} must be JSON that can be read (got {error})") from None
    version = index.get("version") if isinstance(index, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"edl::labels: {path} must be of version {VERSION} (got {version!r})")
    for name, is_right, rule in (
        ("domains", _are_names, "a list of names, each once"),
        ("counts", _are_counts, "numbers of documents by domain"),
        ("shards", _are_shards, "a list of shards, each once, with their 'name' and number of 'documents'"),
    ):
        if not is_right(index.get(name)):
            raise ValueError(f"edl::labels: {name} in {path} must be {rule} (got {_shortened(index.get(name))})")
    if not set(index["counts"]) <= set(index["domains"]):
        raise ValueError(
            f"edl::labels: counts in {path} must be of its {len(index['domains'])} domains "
            f"(got {_shortened(sorted(index['counts']))})"
        )
    return LabelFiles(path.parent, index)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _are_names(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63


def _are_counts(counts: object) -> bool:
    return isinstance(counts, dict) and all(map(_is_count, counts.values()))


def _are_shards(shards: object) -> bool:
    """Whether these are shards whose files lie in the folder and nowhere else."""
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return False
    names = [shard.get("name") for shard in shards]
    return (
        all(map(_is_count, (shard.get("documents") for shard in shards)))
        and _are_names(names)
        and not any(pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts for name in names)
    )


def _int16_array(path: pathlib.Path) -> Tensor:
    """The array of a `.npy` file, as a view of it."""
    try:
        import numpy
    except ImportError as error:
        raise ImportError(
            f"edl::labels: numpy must be installed, pip install 'expert-divergence[label]' (got {error})"
        ) from error
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"edl::labels: {path} must be a file with labels (got none there)")
    try:
        array = numpy.lib.format.open_memmap(path, mode="c")  # private pages: torch wants memory that can be written
    except (OSError, ValueError, OverflowError, SyntaxError) as error:
        raise ValueError(f"edl::labels: {path} must be an array in numpy's format (got {error})") from None
    if array.dtype != numpy.int16 or array.ndim != 1:
        raise ValueError(f"edl::labels: {path} must hold int16 [n] (got {array.dtype} {list(array.shape)})")
    return torch.from_numpy(array)
