"""Layers that megatron-core leaves to Transformer Engine or Apex, in plain torch."""

import torch
from megatron.core import parallel_state
from torch import Tensor, nn


class Layout:
    """Where the tokens of this rank stand; the same in every micro-batch of the tests."""

    current: tuple[Tensor, Tensor | None]  # positions [S_len of this rank], boundaries of documents


class _Gather(torch.autograd.Function):
    """Slices of the sequence, dimension 0, of all context-parallel ranks."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=group)
        return grad.chunk(group.size())[group.rank()]


class GatheredAttention(nn.Module):
    """In place of `core_attention`: causal attention of query, key, value [S_len, B, heads, size] within documents.

    Keys and values are gathered over the context-parallel group.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs) -> None:
        super().__init__()

    def forward(self, query, key, value, attention_mask, **kwargs) -> Tensor:
        positions, cu_seqlens = Layout.current
        all_positions = _Gather.apply(positions.double()).long()
        key, value = _Gather.apply(key), _Gather.apply(value)
        allowed = all_positions <= positions.unsqueeze(1)
        if cu_seqlens is not None:
            documents = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
            all_documents = torch.searchsorted(cu_seqlens[1:].contiguous(), all_positions, right=True)
            allowed &= all_documents == documents.unsqueeze(1)
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


class SequenceParallelNorm(nn.LayerNorm):
    """Layer normalisation whose parameters tell Megatron to add their gradients over tensor-parallel ranks."""

    def __init__(self, config, hidden_size, eps=1e-5) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel
