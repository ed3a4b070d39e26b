"""Which rows of a router count, and for which sequence: token s of sequence b is row s·B + b, and ranks may hold slices
of the sequences."""

import dataclasses

import torch
from torch import Tensor

from edl.labels.batch import Batch, once
from edl.labels.scope import Labels
from edl.labels.segments import Segments


@dataclasses.dataclass(frozen=True)
class RouterBatch(Batch):
    """What is known of the rows of one router call. The fields of `Batch` are those of this rank's context-parallel
    slice of the sequences, which the tensor-parallel ranks share with sequence parallelism.

    Args:
        num_slices (int): of the tensor-parallel ranks; 1 without sequence parallelism.
        slice_index (int): this rank's.
        row_padding (Tensor, optional): True = padding, of this rank's rows: `padding_mask` of Megatron's model.
        has_scope (bool): False outside of any `edl.domain_scope`, where no token has a label.
    """

    num_slices: int = 1
    slice_index: int = 0
    row_padding: Tensor | None = None
    has_scope: bool = True

    @classmethod
    def of(
        cls,
        logits: Tensor,
        row_padding: Tensor | None,
        scope: Labels | None,
        num_slices: int,
        slice_index: int,
        context_ranks: int,
    ) -> "RouterBatch":
        """Of logits [S_len, B, E] or [T, E], and of what their `edl.domain_scope` says, None outside of any.

        Raises:
            ValueError: logits of other dimensions.
        """
        check_dimensions(logits)
        num_rows = logits.shape[:-1].numel()
        batch_size = logits.shape[1] if logits.dim() == 3 else _told_batch_size(num_rows, row_padding, scope)
        return cls(
            num_tokens=num_rows * num_slices,
            device=logits.device,
            batch_size=batch_size,
            attention_mask=None if scope is None else scope.attention_mask,
            padding_mask=None if scope is None else scope.padding_mask,
            cu_seqlens=None if scope is None else _context_parallel_boundaries(scope.cu_seqlens, context_ranks),
            labels={} if scope is None else scope.label_sets,
            num_slices=num_slices,
            slice_index=slice_index,
            row_padding=row_padding,
            has_scope=scope is not None,
        )

    @once
    def counted(self) -> Segments:
        if self.attention_mask is None and self.padding_mask is None:
            ids = torch.zeros(self._num_rows, dtype=torch.int32, device=self.device)
            return Segments(self._without_padding(ids), 1, torch.zeros(1, dtype=torch.int64, device=self.device))
        return self._of_rows(self._in_order().counted())

    @once
    def sequences(self) -> Segments:
        return self._of_rows(self._in_order().sequences())

    @once
    def segments(self, labels: str, num_domains: int, sequence_reduction: str = "sequence") -> Segments:
        if not self.has_scope:  # of which the router warns
            none = torch.full([self._num_rows], -1, dtype=torch.int32, device=self.device)
            num_segments = num_domains if sequence_reduction == "token" else 0
            return Segments(none, num_segments, torch.arange(num_segments, device=self.device))
        return self._of_rows(self._in_order().segments(labels, num_domains, sequence_reduction))

    @once
    def tokens(self, labels: str, num_domains: int) -> Segments:
        given = self.labels.get(labels)
        if given is None or not given.is_floating_point():
            return self.segments(labels, num_domains, "token")
        segments = self._in_order().tokens(labels, num_domains)
        return self._of_rows(segments)._replace(labels=self._rows_of(segments.labels))

    @property
    def _num_rows(self) -> int:
        return self.num_tokens // self.num_slices

    def _in_order(self) -> Batch:
        """The tokens of all slices, in the order of labels and masks: whole sequences [B, S_len], or one stream."""
        batch_size, num_rows = self.batch_size, self._num_rows
        if batch_size < 1 or num_rows % batch_size != 0:
            labels = ", ".join(f"{name} {list(given.shape)}" for name, given in self.labels.items())
            raise ValueError(
                "edl::EDTopKRouter: with router logits [T, E], token s of sequence b in row s·B + b, labels must tell "
                "a B that divides T: [B] (B below T), [B, S_len] or weights [B, D] or [B, S_len, D], with cu_seqlens "
                "[B, S_len] or [B, S_len, D]; else pass logits [S_len, B, E] "
                f"(got {num_rows} rows, {labels or 'no labels'}"
                f"{'' if self.cu_seqlens is None else ' and cu_seqlens'})"
            )
        return Batch(
            self.num_tokens,
            self.device,
            batch_size if self.cu_seqlens is None else -1,
            self.attention_mask,
            self.padding_mask,
            self.cu_seqlens,
            self.labels,
        )

    def _of_rows(self, segments: Segments) -> Segments:
        """The segments of this rank's rows."""
        return segments._replace(segment_ids=self._without_padding(self._rows_of(segments.segment_ids)))

    def _rows_of(self, tokens: Tensor) -> Tensor:
        """This rank's rows of what is given for all tokens [T, ...], in the order of the router."""
        batch_size = self.batch_size
        length = self._num_rows // batch_size
        if self.cu_seqlens is None:  # [B, S_len] in whole sequences, of which this rank holds a slice
            mine = tokens.unflatten(0, (batch_size, self.num_slices, length))[:, self.slice_index]
        else:  # one stream of documents, of which this rank holds a slice; newer versions then cut it into samples
            mine = tokens.unflatten(0, (self.num_slices, batch_size, length))[self.slice_index]
        return mine.transpose(0, 1).flatten(0, 1)

    def _without_padding(self, ids: Tensor) -> Tensor:
        return ids if self.row_padding is None else ids.masked_fill(self.row_padding.reshape(-1), -1)


def check_dimensions(logits: Tensor) -> None:
    if logits.dim() != 2 and logits.dim() != 3:
        raise ValueError(f"edl::EDTopKRouter: router logits must be [S_len, B, E] or [T, E] (got {list(logits.shape)})")


def _told_batch_size(num_rows: int, row_padding: Tensor | None, scope: Labels | None) -> int:
    """B where logits [T, E] leave it open; 0 where it cannot be told."""
    if row_padding is not None and row_padding.dim() == 2:  # [S_len, B]
        return row_padding.shape[1]
    if scope is None:
        return 0
    for mask in (scope.attention_mask, scope.padding_mask):
        if mask is not None and mask.dim() == 2:
            return mask.shape[0]
    for labels in scope.label_sets.values():
        is_per_token = labels.dim() == (3 if labels.is_floating_point() else 2)
        is_per_sequence = scope.cu_seqlens is None and labels.dim() > 0 and labels.shape[0] < max(num_rows, 2)
        if is_per_token or is_per_sequence:
            return labels.shape[0]
    return 0  # one label per token or per sequence of one token; or a stream that may be cut into samples


def _context_parallel_boundaries(cu_seqlens: Tensor | None, slices: int) -> Tensor | None:
    """Boundaries of the documents in this rank's slice: Megatron gives every rank the same share of every (padded)
    document."""
    if cu_seqlens is None or slices == 1:
        return cu_seqlens
    # Boundaries that cannot be cut so become no boundaries, which `make_segments` refuses.
    return torch.where((cu_seqlens % slices != 0).any(), torch.full_like(cu_seqlens, -1), cu_seqlens // slices)
