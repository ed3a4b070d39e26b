"""Megatron's tokenised data, .bin and .idx: documents of token ids, which have boundaries and no text."""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

from edl.corpus.documents import EMPTY, Document, Shard
from edl.corpus.readers.streams import check_regular

# Magic, version, type of the tokens, sequences, documents and one.
_HEADER = struct.Struct("<9sQBQQ")


@dataclasses.dataclass
class MegatronShard(Shard):
    """The documents of a `megatron.core` IndexedDataset, by its boundaries of documents."""

    def __post_init__(self) -> None:
        self.has_text = False

    def documents(self, start: int = 0) -> Iterator[Document]:
        data = self._open()  # with it, its arrays end
        lengths, documents = data.index.sequence_lengths, data.index.document_indices
        for number in range(start, len(documents) - 1):
            num_tokens = lengths[documents[number] : documents[number + 1]].sum()
            yield Document(None, self.label, None if num_tokens else EMPTY)
            self.position = self.num_bytes * (number + 1) // (len(documents) - 1)

    def _open(self) -> Any:
        """The dataset, whose index is checked."""
        try:
            from megatron.core.datasets.indexed_dataset import IndexedDataset
        except ImportError as error:
            raise ImportError(
                "edl::corpus: megatron-core must be installed to read .idx files, pip install "
                f"'expert-divergence[megatron]' (got {error})"
            ) from error
        self._check_size()
        try:
            data = IndexedDataset(str(self.source.with_suffix("")), multimodal=False, mmap=True)
            lengths, documents = data.index.sequence_lengths, data.index.document_indices
        except Exception as error:  # it asserts, and reads whatever the file says
            raise ValueError(f"edl::corpus: Megatron's files must be whole (got {self.source}: {error})") from error
        num_tokens = self.source.with_suffix(".bin").stat().st_size // data.index.dtype_size
        ascending = len(documents) and documents[0] == 0 and (documents[1:] >= documents[:-1]).all()
        if not ascending or documents[-1] != len(lengths) or (lengths < 0).any() or lengths.sum() != num_tokens:
            raise ValueError(
                f"edl::corpus: Megatron's index must tell where the documents of its .bin are (got {self.source}: "
                f"{len(documents) - 1} documents, {len(lengths)} sequences, {lengths.sum()} tokens of {num_tokens})"
            )
        return data

    def _check_size(self) -> None:
        """megatron-core prints a traceback of its own where a file ends before its header says."""
        has_tokens = check_regular(self.source.with_suffix(".bin")).st_size > 0
        with open(self.source, "rb") as file:
            header = file.read(_HEADER.size)
        if len(header) == _HEADER.size:
            magic, version, kind, num_sequences, num_documents = _HEADER.unpack(header)
            size = _HEADER.size + 12 * num_sequences + 8 * num_documents
            # One byte more for each sequence where there are modes.
            is_whole = self.num_bytes in (size, size + num_sequences)
            if (magic, version) == (b"MMIDIDX\0\0", 1) and 1 <= kind <= 8 and is_whole and has_tokens:
                return
        raise ValueError(f"edl::corpus: Megatron's files must be whole (got {self.source}, {self.num_bytes} bytes)")
