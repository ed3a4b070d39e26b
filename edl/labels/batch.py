"""Which tokens of a batch count, and for which sequence or domain: where objectives ask for masks and labels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from edl.labels.segments import Segments, make_segments, mask_segments, weighted_tokens, whole_segments
from edl.ops import checks

Arguments = ParamSpec("Arguments")
Of = TypeVar("Of", bound="Batch")


def once(method: Callable[Concatenate[Of, Arguments], Segments]) -> Callable[Concatenate[Of, Arguments], Segments]:
    """A method of a batch that makes segments, which it does once for the same arguments: objectives that ask for the
    same segments get the very same, and share what they compute of them."""

    @functools.wraps(method)
    def made(batch: Of, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Segments:
        asked = (method.__name__, *arguments, *options.items())
        if asked not in batch._made:
            batch._made[asked] = method(batch, *arguments, **options)
        return batch._made[asked]

    return made


@dataclasses.dataclass(frozen=True)
class Batch:
    """What is known of the T tokens of one call. Integrations whose tokens come in another order derive from it.

    Args:
        num_tokens (int): T, of this rank.
        device (torch.device): of what was observed.
        batch_size (int): B where it is known, else -1 (default).
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
        cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents.
        labels (mapping): name → Tensor, sets of labels in the forms that `edl.segments.make_segments` takes.
        op (str): in whose name it refuses. Default: "Objectives".
    """

    num_tokens: int
    device: torch.device
    batch_size: int = -1
    attention_mask: Tensor | None = None
    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    labels: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    op: str = "Objectives"
    _made: dict[Any, Segments] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @once
    def counted(self) -> Segments:
        """All tokens that count, as one segment.

        Raises:
            ValueError: a mask of a wrong shape, both masks.
        """
        checks.check_given(self.op, attention_mask=self.attention_mask, padding_mask=self.padding_mask)
        ids = torch.zeros(self.num_tokens, dtype=torch.int32, device=self.device)
        ids = mask_segments(ids, 1, self.batch_size, self.attention_mask, self.padding_mask, self.op)
        return Segments(ids, 1, torch.zeros(1, dtype=torch.int64, device=self.device))

    @once
    def sequences(self) -> Segments:
        """Every sequence or packed document as a segment, whatever its label.

        Raises:
            ValueError: nothing tells the sequences apart, a mask or boundaries of a wrong shape, both masks.
        """
        masks = {"attention_mask": self.attention_mask, "padding_mask": self.padding_mask}
        checks.check_given(self.op, **masks, cu_seqlens=self.cu_seqlens)
        told = [mask.shape[0] for mask in masks.values() if mask is not None and mask.dim() == 2]
        num_sequences = self.batch_size if self.batch_size >= 0 or not told else told[0]
        if self.cu_seqlens is None and num_sequences < 0:
            raise ValueError(
                f"edl::{self.op}: what is summed by sequence must be told the sequences, by cu_seqlens, a mask "
                f"[B, S_len] or router logits [B, S_len, E] (got {self.num_tokens} tokens without)"
            )
        ids, num_segments, labels = whole_segments(
            self.num_tokens, num_sequences, self.device, self.cu_seqlens, "Objectives"
        )
        rows = num_sequences if self.cu_seqlens is None else self.batch_size
        ids = mask_segments(ids, num_segments, rows, self.attention_mask, self.padding_mask, self.op)
        return Segments(ids, num_segments, labels)

    @once
    def segments(self, labels: str, num_domains: int, sequence_reduction: str = "sequence") -> Segments:
        """The sequences or documents with their labels, or with `sequence_reduction="token"` the domains.

        Args:
            labels (str): the name of a set of labels.
            num_domains (int): D.
            sequence_reduction (str): "sequence" (default) or "token".

        Raises:
            ValueError: no such labels, wrong shapes or dtypes, both masks.
        """
        given = self._labels(labels)
        return make_segments(
            self.num_tokens,
            given,
            num_domains,
            sequence_reduction,
            self.attention_mask,
            self.padding_mask,
            self.cu_seqlens,
            self.batch_size,
            self.op,
        )

    @once
    def tokens(self, labels: str, num_domains: int) -> Segments:
        """The domains as segments, where labels name one for each token; else all tokens that count as one segment,
        whose labels are their weights [T, D].

        Args:
            labels (str): the name of a set of labels, in the forms that `segments` takes, or weights per token [T, D]
                or [B, S_len, D], per sequence [B, D], or per document [N, D].
            num_domains (int): D.

        Raises:
            ValueError: no such labels, wrong shapes or dtypes, both masks.
        """
        given = self._labels(labels)
        if not given.is_floating_point():
            return self.segments(labels, num_domains, "token")
        return weighted_tokens(
            self.num_tokens,
            given,
            num_domains,
            self.attention_mask,
            self.padding_mask,
            self.cu_seqlens,
            self.batch_size,
            self.op,
        )

    def _labels(self, labels: str) -> Tensor:
        given = self.labels.get(labels)
        if given is None:
            raise ValueError(f"edl::{self.op}: {labels} must be given (got labels {sorted(self.labels)})")
        checks.check_tensors(self.op, **{labels: given})
        if given.device != self.device:
            raise ValueError(
                f"edl::{self.op}: {labels} must be on the device of the observations "
                f"(got {given.device} and {self.device})"
            )
        return given
