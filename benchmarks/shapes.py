"""Sizes and routings that all benchmarks share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """A layer of experts: T tokens, H, I, E experts, K of them per token."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return "T={} H={} I={} E={} K={}".format(*self)

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def rows_per_expert(self) -> int:
        return self.rows // self.experts

    @property
    def forward_operations(self) -> int:
        """Multiplications and additions of the experts' products; the backward pass has twice as many."""
        return 6 * self.rows * self.hidden * self.intermediate

    @property
    def saved_floor(self) -> int:
        """Elements that a backward pass needs without repeating a product: the tokens and the pre-activation."""
        return self.tokens * self.hidden + 2 * self.rows * self.intermediate


FEW_ROWS = [Shape(512, 512, 256, 64, 2), Shape(1024, 512, 256, 64, 2)]
CPU = [
    Shape(512, 512, 256, 16, 2),
    Shape(2048, 512, 256, 64, 8),
    Shape(2048, 1024, 512, 32, 4),
    Shape(1024, 2048, 1024, 64, 8),
]
LAYER = CPU[1]  # where routings are compared, and the layer's parts

CUDA = [
    Shape(8192, 2048, 1024, 64, 8),  # OLMoE
    Shape(8192, 2048, 768, 128, 8),  # Qwen3-30B-A3B
    Shape(32768, 2048, 768, 128, 8),
    Shape(8192, 4096, 14336, 8, 2),  # Mixtral 8x7B
    Shape(8192, 7168, 2048, 64, 8),  # DeepSeek-V3, a quarter of its experts
]


def _uniform(num_experts: int) -> Tensor:
    return torch.zeros(num_experts)


def _zipf(num_experts: int) -> Tensor:
    return -torch.arange(1.0, num_experts + 1).log()


def _one_hot_expert(num_experts: int) -> Tensor:
    return torch.zeros(num_experts).index_fill(0, torch.tensor([0]), 100.0)


def _quarter_empty(num_experts: int) -> Tensor:
    return torch.zeros(num_experts).index_fill(0, torch.arange(num_experts - num_experts // 4, num_experts), -100.0)


# The logarithm of how popular each expert is.
ROUTINGS: dict[str, Callable[[int], Tensor]] = {
    "uniform": _uniform,
    "Zipf": _zipf,  # the n-th expert is drawn with weight 1 / n
    "one hot expert": _one_hot_expert,  # every token chooses it, and others beside it
    "a quarter empty": _quarter_empty,  # the last quarter of the experts gets no token
}


class Inputs(NamedTuple):
    """Arguments of a layer of experts, and the gradient of its output."""

    tokens: Tensor  # [T, H]
    weights: Tensor  # [T, K], in the type of tokens
    experts: Tensor  # [T, K] int64
    gate_up: Tensor  # [E, 2I, H]
    down: Tensor  # [E, H, I]
    upstream: Tensor  # [T, H]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.tokens, self.weights, self.gate_up, self.down]


def make_inputs(shape: Shape, routing: str = "uniform", device: str | torch.device = "cpu") -> Inputs:
    """Random numbers of a trained layer's size, float32, but exact in bfloat16 too; the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).bfloat16().float().to(device)

    num_tokens, hidden, intermediate, num_experts, top_k = shape
    noise = (
        -torch.empty(num_tokens, num_experts).exponential_(generator=generator).log()
    )  # Gumbel: its top k is a sample
    experts = (ROUTINGS[routing](num_experts) + noise).topk(top_k, dim=1).indices.to(device)
    weights = torch.rand(num_tokens, top_k, generator=generator).softmax(dim=1).bfloat16().float().to(device)
    gate_up = normal(num_experts, 2 * intermediate, hidden, scale=hidden**-0.5)
    down = normal(num_experts, hidden, intermediate, scale=intermediate**-0.5)
    return Inputs(normal(num_tokens, hidden), weights, experts, gate_up, down, normal(num_tokens, hidden))


def in_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Fresh leaves of the type."""
    tokens, weights, experts, gate_up, down, upstream = (x.to(dtype) if x.is_floating_point() else x for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (tokens, weights, gate_up, down)]
    return Inputs(leaves[0], leaves[1], experts, leaves[2], leaves[3], upstream)
