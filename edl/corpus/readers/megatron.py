"""Megatron's tokenised data, .bin and .idx: documents of token ids, which have boundaries and no text."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from edl.corpus.documents import EMPTY, Document, Shard


@dataclasses.dataclass
class MegatronShard(Shard):
    """The documents of a `megatron.core` IndexedDataset, by its boundaries of documents."""

    def __post_init__(self) -> None:
        self.has_text = False

    def documents(self, start: int = 0) -> Iterator[Document]:
        lengths, documents = self._index()
        for number in range(start, len(documents) - 1):
            num_tokens = lengths[documents[number] : documents[number + 1]].sum()
            yield Document(None, self.label, None if num_tokens else EMPTY)
            self.position = self.num_bytes * (number + 1) // (len(documents) - 1)

    def _index(self) -> tuple[Any, Any]:
        """(tokens of each sequence, first sequence of each document and the end of the last)."""
        try:
            from megatron.core.datasets.indexed_dataset import IndexedDataset
        except ImportError as error:
            raise ImportError(
                "edl::label: megatron-core must be installed to read .idx files, pip install "
                f"'expert-divergence[megatron]' (got {error})"
            ) from error
        try:
            data = IndexedDataset(str(self.source.with_suffix("")), multimodal=False, mmap=True)
            lengths, documents = data.sequence_lengths, data.document_indices
        except Exception as error:  # it asserts, and reads whatever the file says
            raise ValueError(f"edl::label: Megatron's files must be whole (got {self.source}: {error})") from error
        num_tokens = self.source.with_suffix(".bin").stat().st_size // data.index.dtype_size
        ascending = len(documents) and documents[0] == 0 and (documents[1:] >= documents[:-1]).all()
        if not ascending or documents[-1] != len(lengths) or (lengths < 0).any() or lengths.sum() != num_tokens:
            raise ValueError(
                f"edl::label: Megatron's index must tell where the documents of its .bin are (got {self.source}: "
                f"{len(documents) - 1} documents, {len(lengths)} sequences, {lengths.sum()} tokens of {num_tokens})"
            )
        return lengths, documents
