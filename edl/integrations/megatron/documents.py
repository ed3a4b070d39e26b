"""Domain labels of documents: Megatron's samples are cut from them anywhere, so each token has the label of its own."""

from typing import Any

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor

from edl.labels.files import LabelFiles

KEY = "domain_ids"


def label_documents(dataset: type[GPTDataset], labels: LabelFiles) -> type[GPTDataset]:
    """A class of Megatron's data sets whose samples hold the domain of each token as well, that of its document.

    Give it to `BlendedMegatronDatasetBuilder` in the place of `GPTDataset`, and tell `with_domain_ids` the length of
    its samples.

    Args:
        dataset (type): `GPTDataset`, or a class that is derived from it.
        labels (LabelFiles): of `edl.labels.read`, with a shard for each data path: the one whose name the path ends in,
            with as many documents as the path has.

    Returns:
        The class. Its samples have `domain_ids`, int64 [S_len], -1 = unlabelled, or padding, beside what they have.

    Raises:
        ValueError: no class of data sets, no labels; where it is made, a data path without a shard, or with another
            number of documents.
    """
    if not isinstance(dataset, type) or not issubclass(dataset, GPTDataset):
        raise ValueError(f"edl::megatron.label_documents: dataset must be Megatron's GPTDataset (got {dataset!r})")
    if not isinstance(labels, LabelFiles):
        raise ValueError(
            f"edl::megatron.label_documents: labels must be those of edl.labels.read (got {type(labels).__name__})"
        )

    class LabelledGPTDataset(dataset):
        """Samples with `domain_ids`."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            ends = self.dataset.document_indices
            of_documents = _labels_of(self.dataset_path, len(ends) - 1, labels)
            self._labels = numpy.repeat(of_documents.numpy(), numpy.diff(ends))  # of sequences

        def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
            sample = super().__getitem__(idx)  # also opens the indices
            length = self.config.sequence_length
            sample[KEY] = torch.full([length], -1) if idx is None else self._domain_ids(idx, length)
            return sample

        def _domain_ids(self, idx: int, length: int) -> Tensor:
            number = self.shuffle_index[idx]
            (first, begin), (last, end) = self.sample_index[number].tolist(), self.sample_index[number + 1].tolist()
            sequences = self.document_index[first : last + 1]
            lengths = self.dataset.sequence_lengths[sequences].astype(numpy.int64)
            lengths[-1] = end + self.config.add_extra_token_to_sequence
            lengths[0] -= begin
            ids = numpy.repeat(self._labels[sequences], lengths)[:length]
            return torch.from_numpy(numpy.pad(ids, (0, length - len(ids)), constant_values=-1))

    return LabelledGPTDataset


def _labels_of(path: str, num_documents: int, labels: LabelFiles) -> Tensor:
    """The labels of a data path's documents, int64."""
    fitting = [name for name in labels.shards if f"/{path}".endswith(f"/{name}")]
    if not fitting:
        raise ValueError(
            f"edl::megatron.label_documents: a data path must end in the name of a shard (got {path} for "
            f"{len(labels.shards)} shards, such as {labels.shards[0] if labels.shards else None!r})"
        )
    found = labels[max(fitting, key=len)]
    if len(found) != num_documents:
        raise ValueError(
            f"edl::megatron.label_documents: a shard must have a label for each document of its data path (got "
            f"{len(found)} for {num_documents} of {path})"
        )
    return found.long()
