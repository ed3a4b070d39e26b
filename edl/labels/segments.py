"""What a token counts for: masks, packing and labels become segment ids and segment labels.

A segment is whatever is averaged as one: a sequence, a packed document, or a (sequence, domain) pair where labels vary
inside a sequence. This is the only place that reads masks. All sizes are static, and no value is looked at on the host:
a token whose label or mask value is not allowed gets the id S, which `edl.ops.aggregate_routing` refuses. Who makes
segments for somebody else says in whose name they are refused: `op`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from edl import ops
from edl.ops import checks


class Segments(NamedTuple):
    """Segments of T tokens.

    Attributes:
        segment_ids (Tensor[T]): int32, in [-1, num_segments); -1 = the token is not counted.
        num_segments (int): S.
        labels (Tensor[S] or Tensor[S, D]): domain of each segment (-1 = not counted), or its weights.
    """

    segment_ids: Tensor
    num_segments: int
    labels: Tensor


@torch.jit.unused
def _check_integers(op: str, num_tokens: int, num_domains: int, batch_size: int) -> None:
    checks.check_integers(op, num_tokens=num_tokens, num_domains=num_domains, batch_size=batch_size)
    if num_tokens < 0:
        raise ValueError(f"edl::{op}: num_tokens must not be negative (got {num_tokens})")
    if num_domains < 1:
        raise ValueError(f"edl::{op}: num_domains must be at least 1 (got {num_domains})")


def _is_soft(domain_ids: Tensor) -> bool:
    return domain_ids.is_floating_point()


def _check_labels(op: str, domain_ids: Tensor, num_domains: int) -> None:
    if _is_soft(domain_ids):
        if domain_ids.dim() != 2 or domain_ids.shape[1] != num_domains:
            raise ValueError(
                f"edl::{op}: floating domain_ids are weights and must have the shape [B, {num_domains}] "
                f"(got {list(domain_ids.shape)})"
            )
    elif domain_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"edl::{op}: domain_ids must be int32, int64 or floating weights (got {domain_ids.dtype})")
    elif domain_ids.dim() != 1 and domain_ids.dim() != 2:
        raise ValueError(
            f"edl::{op}: domain_ids must have the shape [B], [B, S_len] or [T] (got {list(domain_ids.shape)})"
        )


def _check_rows(op: str, domain_ids: Tensor, batch_size: int) -> None:
    if batch_size >= 0 and domain_ids.shape[0] != batch_size:
        raise ValueError(
            f"edl::{op}: domain_ids must have one row per sequence, {batch_size} (got {list(domain_ids.shape)})"
        )


def _check_device(op: str, name: str, tensor: Tensor | None, domain_ids: Tensor) -> None:
    if tensor is not None and tensor.device != domain_ids.device:
        raise ValueError(
            f"edl::{op}: {name} must be on the device of domain_ids (got {tensor.device} and {domain_ids.device})"
        )


def _check_mask(op: str, name: str, mask: Tensor, num_tokens: int, batch_size: int) -> None:
    flat = mask.dim() == 1 and mask.shape[0] == num_tokens
    rows = mask.dim() == 2 and mask.numel() == num_tokens and (batch_size < 0 or mask.shape[0] == batch_size)
    if not (flat or rows):
        raise ValueError(
            f"edl::{op}: {name} must have the shape [B, S_len] or [T] of the {num_tokens} tokens (got "
            f"{list(mask.shape)})"
        )


def mask_segments(
    segment_ids: Tensor,
    num_segments: int,
    batch_size: int = -1,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    op: str = "segments",
) -> Tensor:
    """Takes the tokens that a mask calls padding out of their segments.

    Args:
        segment_ids (Tensor[T]): int32 or int64.
        num_segments (int): S.
        batch_size (int): B where the caller knows it, else -1 (default).
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
        op (str): in whose name it refuses. Default: "segments".

    Returns:
        Segment ids [T]: -1 where the mask says padding, and S, which `edl.ops.aggregate_routing` refuses, where it is
        neither 0 nor 1.

    Raises:
        ValueError: a wrong shape, both masks.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors(op, segment_ids=segment_ids)
        checks.check_given(op, attention_mask=attention_mask, padding_mask=padding_mask)
        checks.check_memory(op, attention_mask=attention_mask, padding_mask=padding_mask)
        checks.check_integers(op, num_segments=num_segments, batch_size=batch_size)
    if segment_ids.dim() != 1 or segment_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"edl::{op}: segment_ids must be int32 or int64 of the shape [T] "
            f"(got {segment_ids.dtype} {list(segment_ids.shape)})"
        )
    if attention_mask is not None and padding_mask is not None:
        raise ValueError(
            f"edl::{op}: give attention_mask (1 = keep) or padding_mask (True = padding), not both (got both)"
        )
    keep_value = 1
    mask = attention_mask
    if padding_mask is not None:
        keep_value = 0
        mask = padding_mask
    if mask is None:
        return segment_ids
    name = "attention_mask" if keep_value == 1 else "padding_mask"
    _check_mask(op, name, mask, segment_ids.shape[0], batch_size)
    mask = mask.reshape(-1)
    kept = torch.where(mask == keep_value, segment_ids, torch.full_like(segment_ids, -1))
    if mask.dtype == torch.bool:
        return kept
    return torch.where((mask == 0) | (mask == 1), kept, torch.full_like(segment_ids, num_segments))


def _unlabelled(labels: Tensor) -> Tensor:
    """Rows [N] of labels [N] or weights [N, D] that count for no domain: nothing of their tokens may reach the loss."""
    return (labels == 0).all(dim=1) if _is_soft(labels) else labels == -1


def _look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Entries [T] of a table [N] at rows [T]; -1 at rows of -1, which is the place of one more."""
    return torch.cat([table, torch.full([1], -1, dtype=table.dtype, device=table.device)])[rows.long()]


def _as_ids(labels: Tensor, num_domains: int) -> Tensor:
    """Labels as int32, D for those that are not allowed."""
    allowed = (labels >= -1) & (labels < num_domains)
    return torch.where(allowed, labels, torch.full_like(labels, num_domains)).to(torch.int32)


def _split_by_label(rows: Tensor, num_rows: int, token_labels: Tensor, num_domains: int) -> Segments:
    """Segments (row, domain) of tokens with a row [T] each (-1 = none) and a label [T] each."""
    num_segments = num_rows * num_domains
    ids = rows * num_domains + token_labels.to(torch.int32)
    ids = torch.where((token_labels == -1) | (rows < 0), torch.full_like(ids, -1), ids)
    # Looked at before the cast, which could bring a large label back into the range.
    ids = torch.where((token_labels < -1) | (token_labels >= num_domains), torch.full_like(ids, num_segments), ids)
    segment_labels = torch.arange(num_domains, device=ids.device).repeat(num_rows)
    return Segments(ids, num_segments, segment_labels)


def _rows_of_documents(op: str, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The document of each token [T], int32; -1 behind the last one; N where cu_seqlens [N + 1] is no list of
    boundaries."""
    is_integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or not is_integer:
        raise ValueError(
            f"edl::{op}: cu_seqlens must be int32 or int64 of the shape [N + 1] "
            f"(got {cu_seqlens.dtype} {list(cu_seqlens.shape)})"
        )
    num_documents = cu_seqlens.shape[0] - 1
    positions = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    rows = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True).to(torch.int32)
    rows = torch.where(rows >= num_documents, torch.full_like(rows, -1), rows)
    wrong = (cu_seqlens[1:] < cu_seqlens[:-1]).any() | (cu_seqlens[0] != 0) | (cu_seqlens[-1] > num_tokens)
    return torch.where(wrong, torch.full_like(rows, num_documents), rows)


def whole_segments(
    num_tokens: int, num_sequences: int, device: torch.device, cu_seqlens: Tensor | None, op: str = "segments"
) -> Segments:
    """Segments of all sequences or packed documents, whatever their labels.

    Args:
        num_tokens (int): T.
        num_sequences (int): B, which divides T; not looked at with cu_seqlens.
        device (torch.device): of the segments.
        cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents.

    Returns:
        Segments, S = B or N, whose labels are all 0.

    Raises:
        ValueError: wrong shapes or dtypes, T tokens that are not B sequences of one length.
    """
    if cu_seqlens is not None:
        ids = _rows_of_documents(op, cu_seqlens, num_tokens)
        num_documents = cu_seqlens.shape[0] - 1
        return Segments(ids, num_documents, torch.zeros(num_documents, dtype=torch.int64, device=device))
    labels = torch.zeros(num_sequences, dtype=torch.int64, device=device)
    return Segments(ops.sequence_segment_ids(labels, num_tokens), num_sequences, labels)


def document_segments(
    num_tokens: int, domain_ids: Tensor, num_domains: int, cu_seqlens: Tensor, op: str = "segments"
) -> Segments:
    """Segments of packed documents: one each, or one per domain that occurs in it.

    Args:
        num_tokens (int): T.
        domain_ids (Tensor[N], Tensor[N, D] or Tensor[T]): label of each document, its weights, or label of each token.
        num_domains (int): D.
        cu_seqlens (Tensor[N + 1]): boundaries of the documents, starting at 0; repeated entries are empty documents;
            tokens behind the last boundary are not counted.
        op (str): in whose name it refuses. Default: "segments".

    Returns:
        Segments, S = N, or N·D with labels per token.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors(op, domain_ids=domain_ids, cu_seqlens=cu_seqlens)
        _check_integers(op, num_tokens, num_domains, -1)
    _check_labels(op, domain_ids, num_domains)
    rows = _rows_of_documents(op, cu_seqlens, num_tokens)
    num_documents = cu_seqlens.shape[0] - 1
    if domain_ids.shape[0] == num_documents and (domain_ids.dim() == 1 or _is_soft(domain_ids)):
        documents = torch.arange(num_documents + 1, dtype=torch.int32, device=rows.device)
        documents[:-1].masked_fill_(_unlabelled(domain_ids), -1)  # the last one stands for wrong boundaries
        return Segments(_look_up(documents, rows), num_documents, domain_ids)
    if _is_soft(domain_ids) or domain_ids.numel() != num_tokens:
        raise ValueError(
            f"edl::{op}: with cu_seqlens domain_ids must have one label per document or per token, "
            f"{num_documents} or {num_tokens} (got {list(domain_ids.shape)})"
        )
    segments = _split_by_label(rows, num_documents, domain_ids.reshape(-1), num_domains)
    wrong = rows >= num_documents
    ids = torch.where(wrong, torch.full_like(rows, segments.num_segments), segments.segment_ids)
    return Segments(ids, segments.num_segments, segments.labels)


def sequence_segments(
    num_tokens: int, domain_ids: Tensor, num_domains: int, batch_size: int = -1, op: str = "segments"
) -> Segments:
    """Segments of a batch of sequences of one length: one each, or one per domain that occurs in it.

    Args:
        num_tokens (int): T = B·S_len; the token at position s of sequence b is row b·S_len + s.
        domain_ids (Tensor[B], Tensor[B, D] floating, or Tensor[B, S_len]): labels, weights, or labels per token.
        num_domains (int): D.
        batch_size (int): B where the caller knows it, else -1 (default), and T labels are refused: they could be one
            per sequence or one per token.
        op (str): in whose name it refuses. Default: "segments".

    Returns:
        Segments, S = B, or B·D with labels per token.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors(op, domain_ids=domain_ids)
        _check_integers(op, num_tokens, num_domains, batch_size)
    _check_labels(op, domain_ids, num_domains)
    rows = domain_ids.shape[0]
    per_token = domain_ids.dim() == 2 and not _is_soft(domain_ids)
    _check_rows(op, domain_ids, batch_size)
    if per_token and domain_ids.numel() != num_tokens:
        raise ValueError(
            f"edl::{op}: domain_ids [B, S_len] must have one label per token, {num_tokens} (got "
            f"{list(domain_ids.shape)})"
        )
    if (rows == 0 and num_tokens != 0) or (rows != 0 and num_tokens % rows != 0):
        raise ValueError(
            f"edl::{op}: the {num_tokens} tokens must be a whole number of sequences of one length (got {rows} labels)"
        )
    if batch_size < 0 and not per_token and num_tokens > 1 and rows == num_tokens:
        raise ValueError(
            f"edl::{op}: one label per token needs sequence_reduction='token', cu_seqlens, or the shape [B, S_len] "
            f"(got {rows} labels for {num_tokens} tokens)"
        )
    if per_token:
        every_row = torch.zeros([rows], dtype=torch.int32, device=domain_ids.device)
        ids = ops.sequence_segment_ids(every_row, num_tokens)
        return _split_by_label(ids, rows, domain_ids.reshape(-1), num_domains)
    labels = -_unlabelled(domain_ids).int() if _is_soft(domain_ids) else domain_ids
    return Segments(ops.sequence_segment_ids(labels, num_tokens), rows, domain_ids)


def domain_segments(
    num_tokens: int,
    domain_ids: Tensor,
    num_domains: int,
    cu_seqlens: Tensor | None = None,
    batch_size: int = -1,
    op: str = "segments",
) -> Segments:
    """The domains themselves as segments: every token weighs the same.

    Args:
        num_tokens (int): T.
        domain_ids (Tensor[T], Tensor[B, S_len], Tensor[B] or, with cu_seqlens, Tensor[N]): labels, int32 or int64.
        num_domains (int): D.
        cu_seqlens (Tensor[N + 1], optional): boundaries of documents.
        batch_size (int): B where the caller knows it, else -1 (default).
        op (str): in whose name it refuses. Default: "segments".

    Returns:
        Segments, S = D.

    Raises:
        ValueError: wrong shapes or dtypes, soft labels.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors(op, domain_ids=domain_ids)
        checks.check_given(op, cu_seqlens=cu_seqlens)
        _check_integers(op, num_tokens, num_domains, batch_size)
    _check_labels(op, domain_ids, num_domains)
    if _is_soft(domain_ids):
        raise ValueError(f"edl::{op}: soft labels need sequence_reduction='sequence' (got sequence_reduction='token')")
    if cu_seqlens is None and domain_ids.numel() == num_tokens:
        if domain_ids.dim() == 2:
            _check_rows(op, domain_ids, batch_size)
        ids = _as_ids(domain_ids.reshape(-1), num_domains)
    else:
        if cu_seqlens is not None:
            segments = document_segments(num_tokens, domain_ids, num_domains, cu_seqlens, op)
        else:
            segments = sequence_segments(num_tokens, domain_ids, num_domains, batch_size, op)
        # One more entry, no label, for the id that wrong boundaries give.
        wrong = torch.full([1], num_domains, dtype=torch.int32, device=domain_ids.device)
        ids = _look_up(torch.cat([_as_ids(segments.labels, num_domains), wrong]), segments.segment_ids)
    return Segments(ids, num_domains, torch.arange(num_domains, device=ids.device))


def weighted_tokens(
    num_tokens: int,
    weights: Tensor,
    num_domains: int,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    batch_size: int = -1,
    op: str = "segments",
) -> Segments:
    """All tokens that count with their weights per domain, from weights of tokens, sequences or documents.

    Args:
        num_tokens (int): T.
        weights (Tensor[T, D], Tensor[B, S_len, D], Tensor[B, D] or, with cu_seqlens, Tensor[N, D]): floating, at least
            0; a token whose weights are all 0 is not counted, and one that is not counted may hold NaN.
        num_domains (int): D.
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding.
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
        cu_seqlens (Tensor[N + 1], optional): boundaries of documents.
        batch_size (int): B where the caller knows it, else -1 (default).

    Returns:
        Segments, S = 1, whose labels are the weights [T, D]; a token whose weights are not allowed has the id 1.

    Raises:
        ValueError: wrong shapes, both masks.
    """
    checks.check_given(op, attention_mask=attention_mask, padding_mask=padding_mask, cu_seqlens=cu_seqlens)
    checks.check_memory(op, domain_ids=weights, cu_seqlens=cu_seqlens)
    _check_device(op, "attention_mask", attention_mask, weights)
    _check_device(op, "padding_mask", padding_mask, weights)
    _check_device(op, "cu_seqlens", cu_seqlens, weights)
    if weights.dim() == 3:
        _check_rows(op, weights, batch_size)
        weights = weights.flatten(0, 1)
    rows = weights.shape[0] if weights.dim() == 2 and weights.shape[1] == num_domains else -1
    documents = None if cu_seqlens is None else _rows_of_documents(op, cu_seqlens, num_tokens)
    ids = torch.zeros(num_tokens, dtype=torch.int32, device=weights.device)
    if cu_seqlens is not None and documents is not None and rows == cu_seqlens.shape[0] - 1:
        table = torch.cat([weights, weights.new_zeros(1, num_domains)])  # tokens behind the last one are in none
        weights = table[documents.where(documents >= 0, rows).long()]
        ids = ids.masked_fill(documents == rows, 1)  # wrong boundaries
    elif (
        cu_seqlens is None
        and rows > 0
        and num_tokens % rows == 0
        and (batch_size < 0 or rows in (num_tokens, batch_size))
    ):
        weights = weights.repeat_interleave(num_tokens // rows, 0, output_size=num_tokens)
    elif rows != num_tokens:
        raise ValueError(
            f"edl::{op}: weights must have the shape [T, {num_domains}] of the {num_tokens} tokens, [B, S_len, "
            f"{num_domains}], [B, {num_domains}] of sequences of one length, or [N, {num_domains}] with cu_seqlens "
            f"(got {list(weights.shape)})"
        )
    ids = ids.masked_fill((ids == 0) & (weights == 0).all(1), -1)
    ids = ids.masked_fill(~(weights.isfinite() & (weights >= 0)).all(1), 1)
    return Segments(mask_segments(ids, 1, batch_size, attention_mask, padding_mask, op), 1, weights)


def make_segments(
    num_tokens: int,
    domain_ids: Tensor,
    num_domains: int,
    sequence_reduction: str = "sequence",
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    batch_size: int = -1,
    op: str = "segments",
) -> Segments:
    """Decides what each token counts for, from every form that labels and masks come in.

    Args:
        num_tokens (int): T.
        domain_ids (Tensor): [B] one label per sequence, [B, S_len] or [T] per token, [N] per document with cu_seqlens,
            -1 = not counted; int32 or int64. Floating [B, D] or [N, D]: weights.
        num_domains (int): D.
        sequence_reduction (str): "sequence" (default): tokens are averaged per sequence or document, and these per
            domain, as in the paper. "token": tokens are averaged per domain.
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding.
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
        cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents.
        batch_size (int): B where the caller knows it, else -1 (default).
        op (str): in whose name it refuses. Default: "segments".

    Returns:
        Segments.

    Raises:
        ValueError: wrong shapes or dtypes, both masks.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors(op, domain_ids=domain_ids)
        checks.check_given(op, attention_mask=attention_mask, padding_mask=padding_mask, cu_seqlens=cu_seqlens)
        checks.check_texts(op, sequence_reduction=sequence_reduction)
        checks.check_memory(op, domain_ids=domain_ids, cu_seqlens=cu_seqlens)
        _check_integers(op, num_tokens, num_domains, batch_size)
    if sequence_reduction not in ["sequence", "token"]:
        raise ValueError(f"edl::{op}: sequence_reduction must be 'sequence' or 'token' (got '{sequence_reduction}')")
    _check_device(op, "attention_mask", attention_mask, domain_ids)
    _check_device(op, "padding_mask", padding_mask, domain_ids)
    _check_device(op, "cu_seqlens", cu_seqlens, domain_ids)
    if sequence_reduction == "token":
        segments = domain_segments(num_tokens, domain_ids, num_domains, cu_seqlens, batch_size, op)
    elif cu_seqlens is not None:
        segments = document_segments(num_tokens, domain_ids, num_domains, cu_seqlens, op)
    else:
        segments = sequence_segments(num_tokens, domain_ids, num_domains, batch_size, op)
    mask_rows = batch_size
    flat_labels = sequence_reduction == "token" and domain_ids.dim() == 1 and domain_ids.shape[0] == num_tokens
    if mask_rows < 0 and cu_seqlens is None and not flat_labels:
        mask_rows = domain_ids.shape[0]
    ids = mask_segments(segments.segment_ids, segments.num_segments, mask_rows, attention_mask, padding_mask, op)
    return Segments(ids, segments.num_segments, segments.labels)
