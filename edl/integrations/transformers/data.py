"""Domain labels on the way from a dataset to the batch: through collators and packing.

This runs in processes that are forked after torch has used its threads (`dataset.map(num_proc=2)`), where an operator
that wants threads never returns. Tensors are therefore read and made here, and everything between is plain Python.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def label_of(op: str, name: str, labels: Any) -> Tensor:
    """The label, or labels, of one example, in whatever form a dataset gives them."""
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"edl::{op}: {name} must be a number, -1 = unknown, or a list of numbers (got {labels!r})"
        ) from None


def _is_soft(label: Tensor) -> bool:
    return label.is_floating_point() and label.numel() > 0  # an empty list of labels is floating for torch


def _per_token(op: str, name: str, label: Tensor, n: int, dimensions: int = 1) -> list[Any]:
    """The label of each of an example's n tokens, or with two dimensions its weights."""
    if label.dim() > 0 and (label.dim() != dimensions or label.shape[0] != n):
        raise ValueError(
            f"edl::{op}: {name} must be one label per example or per token "
            f"(got {'x'.join(map(str, label.shape))} for {n} tokens)"
        )
    return [label.item()] * n if label.dim() == 0 else label.tolist()


def _token_labels(
    name: str, labels: list[Tensor], lengths: list[int], batch: Mapping[str, Any], none: Any, dtype: torch.dtype
) -> Tensor:
    """Labels [B, S_len], one per token and `none` at padding, of examples that were padded, or flattened into one row;
    weights [B, S_len, D] where `none` is a list of them."""
    dimensions = 2 if isinstance(none, list) else 1
    per_token = [_per_token("DomainCollator", name, label, n, dimensions) for label, n in zip(labels, lengths)]
    shape = batch["input_ids"].shape
    if shape == (1, sum(lengths)):
        return torch.tensor([list(chain.from_iterable(per_token))], dtype=dtype)
    if len(shape) == 2 and lengths == [shape[1]] * shape[0]:
        return torch.tensor(per_token, dtype=dtype)
    mask = batch.get("attention_mask")
    kept = mask.tolist() if mask is not None and mask.shape == shape and len(shape) == 2 else []
    if [sum(map(bool, row)) for row in kept] != lengths:
        raise ValueError(
            "edl::DomainCollator: the collator must pad each example to a row with an attention_mask, or flatten all "
            f"into one row (got {shape[0]} rows of {shape[1]} for examples of {lengths} tokens)"
        )
    return torch.tensor([list(_spread(row, iter(label), none)) for row, label in zip(kept, per_token)], dtype=dtype)


def _spread(kept: list[Any], labels: Iterator[Any], none: Any) -> Iterator[Any]:
    """The labels at the places that are kept, in their order, and `none` at the others."""
    return (next(labels) if keep else none for keep in kept)


class DomainCollator:
    """Lets another collator make the batch and gives it the labels of the examples.

    One label per example becomes `[B]`, one per token `[B, S_len]` with -1 at padding, whichever side is padded.
    Floating weights [D] of an example become `[B, D]`, those of its tokens [n, D] `[B, S_len, D]` with zeros at
    padding. Where the collator flattens all examples into one row (`DataCollatorWithFlattening`), labels become one per
    token. Batches without labels, such as those of an evaluation set, pass as they are.

    Args:
        collator (Callable): makes a batch of tensors of a list of examples, without their labels.
        label_sets (sequence of str): the columns that hold labels. Default: `domain_ids`.

    Raises:
        ValueError: only some examples have a set of labels, or have what is no number; soft labels of several lengths;
            the tokens of the batch are not those of the examples; or the batch has no tensor `input_ids`.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        label_sets: Sequence[str] = ("domain_ids",),
    ) -> None:
        if isinstance(label_sets, str) or not all(isinstance(name, str) for name in label_sets):
            raise ValueError(f"edl::DomainCollator: label_sets must be names of columns (got {label_sets!r})")
        self.collator = collator
        self.label_sets = tuple(label_sets)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{k: v for k, v in example.items() if k not in self.label_sets} for example in examples])
        for name in self.label_sets:
            labels = [label_of("DomainCollator", name, example[name]) for example in examples if name in example]
            if labels:
                batch[name] = _collated(name, labels, examples, batch)
        return batch


def _collated(name: str, labels: list[Tensor], examples: list[dict[str, Any]], batch: Any) -> Tensor:
    """One set of labels, as a tensor of the batch."""
    if len(labels) != len(examples):
        raise ValueError(
            f"edl::DomainCollator: every example must have {name} (got {len(labels)} in {len(examples)} examples)"
        )
    if not (isinstance(batch, Mapping) and hasattr(batch.get("input_ids"), "shape")):
        raise ValueError(
            "edl::DomainCollator: collator must make a batch with a tensor input_ids (got "
            f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__})"
        )
    is_soft = any(map(_is_soft, labels))
    if is_soft and len({(label.dim(), label.shape[-1:]) for label in labels}) > 1:
        raise ValueError(
            "edl::DomainCollator: soft labels must have as many weights in every example, one per domain "
            f"(got {' and '.join('x'.join(map(str, label.shape)) or '1' for label in labels)})"
        )
    are_weights_of_tokens = is_soft and labels[0].dim() == 2
    is_one_each = not are_weights_of_tokens and (is_soft or all(label.dim() == 0 for label in labels))
    dtype = reduce(torch.promote_types, (label.dtype for label in labels))
    if is_one_each and len(batch["input_ids"]) == len(examples):
        return torch.tensor([label.tolist() for label in labels], dtype=dtype)
    if is_one_each and is_soft:
        raise ValueError(
            "edl::DomainCollator: soft labels of examples need one row per example (got examples flattened into one "
            "row)"
        )
    if not all("input_ids" in example for example in examples):
        raise ValueError("edl::DomainCollator: examples with labels of tokens must have input_ids (got one without)")
    lengths = [len(example["input_ids"]) for example in examples]
    if are_weights_of_tokens:
        return _token_labels(name, labels, lengths, batch, [0.0] * labels[0].shape[1], dtype)
    return _token_labels(name, labels, lengths, batch, -1, torch.int64)


def pack_documents(
    examples: dict[str, list[Any]], length: int, label_sets: Sequence[str] = ("domain_ids",)
) -> dict[str, list[list[int]]]:
    """Concatenates documents and cuts them into rows of `length` tokens; every token keeps the label of its document.

    For `dataset.map(pack_documents, batched=True, fn_kwargs={"length": length}, remove_columns=dataset.column_names)`.
    What is left over at the end of each call is dropped. Positions restart at every document, which keeps attention
    inside documents (transformers v5, batches without attention_mask) and tells `EDTrainerMixin` their boundaries.

    Args:
        examples (dict): columns `input_ids`, a list of tokens per document; each set of labels, a label per document or
            a list of labels per token; `labels` (optional), a list per document. Default of `labels`: the tokens.
        length (int): tokens per row, at least 1.
        label_sets (sequence of str): the columns that hold labels. Default: `domain_ids`.

    Returns:
        Columns `input_ids`, `labels` (-100 for the first token of a document, which no token precedes), `position_ids`
        and the sets of labels, all lists of rows of `length`.

    Raises:
        ValueError: a length below 1, a missing column, a label that is no whole number, or a list of labels with
            another length than its document.
    """
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"edl::pack_documents: length must be at least 1, a whole number (got {length!r})")
    for name in ("input_ids", *label_sets):
        if name not in examples:
            raise ValueError(f"edl::pack_documents: documents must have a column {name} (got {sorted(examples)})")
    documents = list(map(_plain, examples["input_ids"]))
    targets = list(map(_plain, examples["labels"])) if "labels" in examples else documents
    labels = {name: [label_of("pack_documents", name, label) for label in examples[name]] for name in label_sets}
    for name, of_documents in labels.items():
        if soft := [label for label in of_documents if _is_soft(label)]:
            raise ValueError(f"edl::pack_documents: {name} must be whole numbers (got {soft[0].tolist()})")
    lengths = {"labels": len(targets), **{name: len(of_documents) for name, of_documents in labels.items()}}
    for name, count in lengths.items():
        if count != len(documents):
            raise ValueError(
                f"edl::pack_documents: every document must have {name} (got {count} for {len(documents)} documents)"
            )
    columns: dict[str, list[int]] = {name: [] for name in ("input_ids", "labels", "position_ids", *label_sets)}
    for place, (tokens, target) in enumerate(zip(documents, targets)):
        if len(target) != len(tokens):
            raise ValueError(
                f"edl::pack_documents: labels must have one entry per token (got {len(target)} for {len(tokens)})"
            )
        first = len(columns["input_ids"])
        last = first + len(tokens)
        for end in (*range(first - first % length + length, last, length), last):
            columns["position_ids"] += range(end - len(columns["position_ids"]))
        columns["input_ids"] += tokens
        columns["labels"] += [-100, *target[1:]] if target else []
        for name, of_documents in labels.items():
            columns[name] += _per_token("pack_documents", name, of_documents[place], len(tokens))
    rows = range(0, len(columns["input_ids"]) // length * length, length)
    return {name: [column[row : row + length] for row in rows] for name, column in columns.items()}


def _plain(row: Any) -> list[int]:
    """A list of numbers, of a data set that gives lists, arrays or tensors."""
    return row.tolist() if hasattr(row, "tolist") else list(row)
