"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators of edl that multiply matrices.

A multiplication and the addition after it count as two operations, as in torch's own formulas. Every slot of every
token counts, N = T·K, also one without an expert: formulas see shapes only. The router's product is an operator of
torch, which counts it itself, but for the one in float32 on CUDA.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _product(row_order: Sequence[int], down: Sequence[int]) -> int:
    """One product of N rows with a matrix [H, I] each."""
    _, hidden_size, intermediate_size = down
    return 2 * row_order[0] * hidden_size * intermediate_size


def _gram(rows: Sequence[int], top_k: int) -> int:
    """The inner products of each row [N, H] with the K of its token."""
    return 2 * rows[0] * rows[1] * top_k


@register_flop_formula(torch.ops.edl.expert_mlp)
def expert_mlp_flops(
    tokens: Sequence[int],
    weights: Sequence[int],
    row_order: Sequence[int],
    offsets: Sequence[int],
    gate_up: Sequence[int],
    down: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """The products with the gate, up and down matrices, from the shapes of the arguments."""
    return 3 * _product(row_order, down)


@register_flop_formula([torch.ops.edl.expert_mlp_with_gram, torch.ops.edl._expert_mlp_forward])
def expert_mlp_with_gram_flops(
    tokens: Sequence[int],
    weights: Sequence[int],
    row_order: Sequence[int],
    offsets: Sequence[int],
    gate_up: Sequence[int],
    down: Sequence[int],
    output_gram: bool,
    activation_gram: bool,
    *_: Any,
    **__: Any,
) -> int:
    """The same, and Gram matrices."""
    width = output_gram * down[1] + activation_gram * down[2]
    return 3 * _product(row_order, down) + _gram([row_order[0], width], weights[1])


@register_flop_formula(torch.ops.edl._expert_mlp_backward)
def expert_mlp_backward_flops(
    grad_output: Sequence[int],
    grad_output_gram: Sequence[int] | None,
    grad_activation_gram: Sequence[int] | None,
    tokens: Sequence[int],
    weights: Sequence[int],
    row_order: Sequence[int],
    offsets: Sequence[int],
    gate_up: Sequence[int],
    down: Sequence[int],
    pre_activation: Sequence[int] | None,
    rows: Sequence[int] | None,
    needed: Sequence[bool],
    **_: Any,
) -> int:
    """The gradient of the activation, and those of tokens (two products), gate_up (two) and down where needed; the
    gradients of Gram matrices; again the pre-activation (two) and the rows that were not kept."""
    of_tokens, _of_weights, of_gate_up, of_down = needed
    again = 0 if pre_activation is not None else 2 + (grad_output_gram is not None)
    products = (1 + 2 * of_tokens + 2 * of_gate_up + of_down + again) * _product(row_order, down)
    width = (grad_output_gram is not None) * down[1] + (grad_activation_gram is not None) * down[2]
    return products + _gram([row_order[0], width], weights[1])


@register_flop_formula(torch.ops.edl.token_gram)
def token_gram_flops(
    rows: Sequence[int], weights: Sequence[int] | None, row_order: Sequence[int], top_k: int, **_: Any
) -> int:
    """Each row times the K of its token."""
    return _gram(rows, top_k)


@register_flop_formula(torch.ops.edl._token_gram_backward)
def token_gram_backward_flops(
    grad_gram: Sequence[int],
    rows: Sequence[int],
    weights: Sequence[int] | None,
    row_order: Sequence[int],
    top_k: int,
    **_: Any,
) -> int:
    """As many again."""
    return _gram(rows, top_k)


@register_flop_formula(torch.ops.edl._router_product)
def router_product_flops(tokens: Sequence[int], weight: Sequence[int], **_: Any) -> int:
    """Tokens [T, H] times the router's weight [E, H]."""
    return 2 * tokens[0] * tokens[1] * weight[0]


@register_flop_formula(torch.ops.edl._router_product_backward)
def router_product_backward_flops(
    grad: Sequence[int], tokens: Sequence[int], weight: Sequence[int], needed: Sequence[bool], **_: Any
) -> int:
    """One product for each gradient; that the gradient has two parts in bfloat16 does not count."""
    return sum(needed) * router_product_flops(tokens, weight)
