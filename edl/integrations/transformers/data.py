"""Domain labels on the way from a dataset to the batch: through collators and packing."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def label_of(op: str, domain_ids: Any) -> Tensor:
    """The label, or labels, of one example, in whatever form a dataset gives them."""
    try:
        return torch.as_tensor(domain_ids)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"edl::{op}: domain_ids must be a number, -1 = unknown, or a list of numbers (got {domain_ids!r})"
        ) from None


def _token_labels(labels: list[Tensor], lengths: list[int], batch: dict[str, Any]) -> Tensor:
    """Labels [B, S_len], one per token and -1 at padding, of examples that were padded, or flattened into one row."""
    for label, n in zip(labels, lengths):
        if label.dim() > 0 and label.shape != (n,):
            raise ValueError(
                "edl::DomainCollator: domain_ids must be one label per example or per token "
                f"(got {len(label)} for {n} tokens)"
            )
    per_token = [label.expand(n) for label, n in zip(labels, lengths)]
    shape = batch["input_ids"].shape
    if shape == (1, sum(lengths)):
        return torch.cat(per_token).unsqueeze(0)
    kept = torch.ones(shape, dtype=torch.bool)
    if any(n != shape[1] for n in lengths) and "attention_mask" in batch:
        kept = batch["attention_mask"].bool()
    if kept.sum(dim=1).tolist() != lengths:
        raise ValueError(
            "edl::DomainCollator: the collator must pad each example to a row with an attention_mask, or flatten all "
            f"into one row (got {shape[0]} rows of {shape[1]} for examples of {lengths} tokens)"
        )
    padded = torch.full(shape, -1)
    padded[kept] = torch.cat(per_token).long()
    return padded


class DomainCollator:
    """Lets another collator make the batch and gives it the labels of the examples.

    One label per example becomes `domain_ids [B]`, one per token `[B, S_len]` with -1 at padding, whichever side is
    padded, and floating weights [D] become `[B, D]`. Where the collator flattens all examples into one row
    (`DataCollatorWithFlattening`), labels become one per token. Batches without labels, such as those of an evaluation
    set, pass as they are.

    Args:
        collator (Callable): makes a batch of tensors of a list of examples, without their `domain_ids`.

    Raises:
        ValueError: only some examples have `domain_ids`, or have what is no number; or the tokens of the batch are not
            those of the examples.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{k: v for k, v in example.items() if k != "domain_ids"} for example in examples])
        labels = [label_of("DomainCollator", example["domain_ids"]) for example in examples if "domain_ids" in example]
        if not labels:
            return batch
        if len(labels) != len(examples):
            raise ValueError(
                "edl::DomainCollator: every example must have domain_ids "
                f"(got {len(labels)} in {len(examples)} examples)"
            )
        is_soft = labels[0].is_floating_point()
        if len(batch["input_ids"]) == len(examples) and (is_soft or all(label.dim() == 0 for label in labels)):
            batch["domain_ids"] = torch.stack(labels)
        elif is_soft:
            raise ValueError(
                "edl::DomainCollator: soft labels need one row per example (got examples flattened into one row)"
            )
        else:
            batch["domain_ids"] = _token_labels(labels, [len(example["input_ids"]) for example in examples], batch)
        return batch


def pack_documents(examples: dict[str, list[Any]], length: int) -> dict[str, list[list[int]]]:
    """Concatenates documents and cuts them into rows of `length` tokens; every token keeps the label of its document.

    For `dataset.map(pack_documents, batched=True, fn_kwargs={"length": length}, remove_columns=dataset.column_names)`.
    What is left over at the end of each call is dropped. Positions restart at every document, which keeps attention
    inside documents (transformers v5, batches without attention_mask) and tells `EDTrainerMixin` their boundaries.

    Args:
        examples (dict): columns `input_ids`, a list of tokens per document; `domain_ids`, a label per document or a
            list of labels per token; `labels` (optional), a list per document. Default of `labels`: the tokens.
        length (int): tokens per row, at least 1.

    Returns:
        Columns `input_ids`, `labels` (-100 for the first token of a document, which no token precedes), `position_ids`
        and `domain_ids`, all lists of rows of `length`.

    Raises:
        ValueError: a length below 1, a label that is no number, or a list of labels with another length than its
            document.
    """
    if length < 1:
        raise ValueError(f"edl::pack_documents: length must be at least 1 (got {length})")
    documents = examples["input_ids"]
    lengths = torch.tensor([len(tokens) for tokens in documents], dtype=torch.int64)
    labels = [label_of("pack_documents", domain) for domain in examples["domain_ids"]]
    domain_ids = [
        (label.expand(len(tokens)) if label.dim() == 0 else label).tolist() for label, tokens in zip(labels, documents)
    ]
    targets = examples.get("labels", documents)
    for name, column in (("domain_ids", domain_ids), ("labels", targets)):
        for row, tokens in zip(column, documents):
            if len(row) != len(tokens):
                raise ValueError(
                    f"edl::pack_documents: {name} must have one entry per token (got {len(row)} for {len(tokens)})"
                )
    places = torch.arange(int(lengths.sum()))
    document_starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    positions = places - torch.maximum(document_starts, places // length * length)
    flat_targets = torch.tensor(list(chain.from_iterable(targets)), dtype=torch.int64)
    columns = {
        "input_ids": list(chain.from_iterable(documents)),
        "labels": flat_targets.masked_fill(places == document_starts, -100).tolist(),
        "position_ids": positions.tolist(),
        "domain_ids": list(chain.from_iterable(domain_ids)),
    }
    rows = range(0, len(places) // length * length, length)
    return {name: [column[row : row + length] for row in rows] for name, column in columns.items()}
