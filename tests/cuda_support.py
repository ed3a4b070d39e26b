"""What the tests for CUDA devices share."""

import pytest
import torch
from support import as_tuple

from edl import ops

CUDA = torch.device("cuda")


def has_grouped_kernel() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


needs_grouped_kernel = pytest.mark.skipif(not has_grouped_kernel(), reason="needs compute capability 9 or 10")


def forward_and_backward(function, leaves, grads):
    """Outputs, and gradients of those leaves that have one."""
    outputs = as_tuple(function(*leaves))
    pairs = [(y, g) for y, g in zip(outputs, grads) if y.requires_grad]
    inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    found = torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs]) if pairs else ()
    return [x.detach() for x in (*outputs, *found)]


def experts_arguments(
    num_tokens=300, hidden_size=64, intermediate_size=40, num_experts=9, top_k=3, dtype=torch.bfloat16
):
    """Arguments of expert_mlp on CUDA: some experts have no tokens, some slots no expert."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(CUDA, dtype).requires_grad_()

    experts = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    experts[experts == 2] = num_experts  # nobody chooses expert 2
    weights = torch.rand(num_tokens, top_k, generator=generator).to(CUDA).requires_grad_()
    row_order, offsets = ops.sort_by_expert(experts.to(CUDA), num_experts)
    gate_up = normal(num_experts, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5)
    down = normal(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5)
    return [normal(num_tokens, hidden_size), weights, row_order, offsets, gate_up, down]
