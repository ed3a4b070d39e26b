"""The operators of the layer: token → expert → token."""

import torch
from torch import Tensor

from edl.ops import checks


def route_tokens(
    logits: Tensor,
    top_k: int,
    scores: str,
    bias: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    allowed: Tensor | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts for each token and gives them weights.

    Without `bias` the experts with the highest logits are chosen, which is the order of the scores without their
    rounding; with it, those with the highest score + bias. Ties go to the lowest expert; NaN counts as highest, so that
    it reaches the weights. Differentiable in `logits` through the chosen weights; with `top_k` 1 and `normalize` the
    weight is 1 and its gradient 0.

    An expert that is masked, by a logit of -inf, is never chosen while an open one is left, whatever the bias. Where
    fewer than `top_k` are open, the slots that are left go to masked experts, lowest first, and weigh 0. A token
    without any open expert has no distribution: its weights, and the gradient of its logits, are NaN.

    An expert that `allowed` forbids a token takes no part at all, whatever its logit, be it NaN, and its bias: it is
    never chosen, a softmax runs over the allowed experts alone, and the gradient of its logit is 0. Among the allowed
    ones a logit of -inf masks as it does without `allowed`.

    `experts` are weighed in the place of a choice, by the same formulas: a share of the softmax over all allowed
    experts, or a sigmoid, and `normalize` divides by the sum over the given ones. `bias` has no say. -1 is none: its
    weight is 0, no gradient comes from it, and it is returned as E, the sentinel of `sort_by_expert`; a token with
    nothing else has only weights and gradients of 0. A given expert that is not allowed is refused; `top_k` allowed
    ones are not asked for then.

    On CUDA, where no value can be refused, the weights of such a token and the gradient of its logits are NaN; an id
    outside [-1, E) is returned as -1, which `sort_by_expert` refuses or makes NaN.

    Args:
        logits (Tensor[T, E]): the router's output; float32, float64, bfloat16 or float16.
        top_k (int): K, experts per token, in [1, E].
        scores (str): "softmax" over all experts, or "sigmoid" of each logit (DeepSeek-V3).
        bias (Tensor[E], optional): shifts the choice and never enters a weight (DeepSeek-V3, arXiv 2412.19437, Eq. 16).
        normalize (bool): divide the weights by the sum of the token's chosen scores (sigmoid: sum + 1e-20). Default:
            True.
        scale (float): factor of the weights, after the division. Default: 1.
        allowed (Tensor[T, E], optional): bool, the experts that each token may take, `top_k` at least. It must stay as
            it is until the backward pass.
        experts (Tensor[T, K], optional): int32 or int64, the experts that each token takes, in [0, E) and different, or
            -1 for none; K must be `top_k`. They must stay as they are until the backward pass.

    Returns:
        weights (Tensor[T, K]), float32, or float64 for float64 logits, and experts (Tensor[T, K], int64), best first,
        or as they were given.

    Raises:
        ValueError: a wrong shape, type, device, `top_k` or name of scores.
        IndexError: a token with fewer than `top_k` allowed experts; given experts that are outside [-1, E), twice the
            same, or not allowed (on the CPU; elsewhere with EDL_CHECK=1).
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("route_tokens", logits=logits)
        checks.check_given("route_tokens", bias=bias, allowed=allowed, experts=experts)
        checks.check_integers("route_tokens", top_k=top_k)
        checks.check_texts("route_tokens", scores=scores)
        checks.check_flags("route_tokens", normalize=normalize)
        checks.check_numbers("route_tokens", scale=scale)
    results: tuple[Tensor, Tensor] = torch.ops.edl.route_tokens(
        logits, top_k, scores, bias, normalize, scale, allowed, experts
    )
    return results


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Groups the slots of all tokens by expert, stably. Slot t·K + k is token t's k-th choice.

    Args:
        experts (Tensor[T, K]): int32 or int64, in [0, E]; fewer than 2^31 entries. E itself is a sentinel, "no expert
            here": it sorts last and contributes zeros to `expert_mlp`.
        num_experts (int): E, at least 1.

    Returns:
        row_order (Tensor[N], int32), the slot that stands at each row, and offsets (Tensor[E + 1], int32): expert e
        owns the rows offsets[e] to offsets[e + 1]; offsets[E] is the number of rows without sentinels.

    Raises:
        ValueError: a wrong shape or type.
        IndexError: an id outside [0, E] (on the CPU; elsewhere with EDL_CHECK=1).
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("sort_by_expert", experts=experts)
        checks.check_integers("sort_by_expert", num_experts=num_experts)
    results: tuple[Tensor, Tensor] = torch.ops.edl.sort_by_expert(experts, num_experts)
    return results


def dispatch_tokens(tokens: Tensor, row_order: Tensor, top_k: int) -> Tensor:
    """Copies tokens into the order of the experts: row i is token `row_order[i] // top_k`.

    The slots of sentinels are copied like all others and stand last. Differentiable in `tokens`, to any order; the
    gradient is `combine_tokens` without weights, so rows of sentinels must get zero gradients.

    Args:
        tokens (Tensor[T, H]): float32, float64, bfloat16 or float16.
        row_order (Tensor[N]): int32, as `sort_by_expert` gives it: each slot once.
        top_k (int): K, at least 1.

    Returns:
        rows (Tensor[N, H]) in the type of tokens.

    Raises:
        ValueError: a wrong shape, type or device.
        IndexError: `row_order` does not name each slot once (on the CPU).
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("dispatch_tokens", tokens=tokens, row_order=row_order)
        checks.check_integers("dispatch_tokens", top_k=top_k)
    rows: Tensor = torch.ops.edl.dispatch_tokens(tokens, row_order, top_k)
    return rows


def combine_tokens(rows: Tensor, weights: Tensor | None, row_order: Tensor, top_k: int) -> Tensor:
    """Brings rows back to their tokens: the sum, weighted if weights are given, of each token's rows.

    A row whose weight is exactly 0 takes no part, even if it holds NaN: only the gradient of its weight reads it.
    Without weights, rows of sentinels must be zeros. Differentiable in `rows` and `weights`; without weights the
    gradient is `dispatch_tokens`, to any order.

    Args:
        rows (Tensor[N, H]): float32, float64, bfloat16 or float16.
        weights (Tensor[T, K], optional): in the type of rows, or float32 beside 16-bit rows; None: a plain sum.
        row_order (Tensor[N]): int32, as `sort_by_expert` gives it: each slot once.
        top_k (int): K, at least 1.

    Returns:
        tokens (Tensor[T, H]) in the type of rows, T = N / K.

    Raises:
        ValueError: a wrong shape, type or device.
        IndexError: `row_order` does not name each slot once (on the CPU).
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("combine_tokens", rows=rows, row_order=row_order)
        checks.check_given("combine_tokens", weights=weights)
        checks.check_integers("combine_tokens", top_k=top_k)
    tokens: Tensor = torch.ops.edl.combine_tokens(rows, weights, row_order, top_k)
    return tokens


def token_gram(rows: Tensor, weights: Tensor | None, row_order: Tensor, top_k: int) -> Tensor:
    """How alike each token's rows are: the matrix of their inner products.

    gram[t, j, k] = ⟨row of slot t·K + j, row of slot t·K + k⟩, whatever the weights are, but that a row whose weight is
    exactly 0 takes no part, even if it holds NaN: its entries are 0. Differentiable in `rows`.

    Args:
        rows (Tensor[N, H]): float32, float64, bfloat16 or float16.
        weights (Tensor[T, K], optional): in the type of rows, or float32 beside 16-bit rows; None: all take part.
        row_order (Tensor[N]): int32, as `sort_by_expert` gives it: each slot once.
        top_k (int): K, at least 1.

    Returns:
        gram (Tensor[T, K, K]), symmetric; float32, or float64 for float64 rows.

    Raises:
        ValueError: a wrong shape, type or device.
        IndexError: `row_order` does not name each slot once (on the CPU).
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("token_gram", rows=rows, row_order=row_order)
        checks.check_given("token_gram", weights=weights)
        checks.check_integers("token_gram", top_k=top_k)
    gram: Tensor = torch.ops.edl.token_gram(rows, weights, row_order, top_k)
    return gram


def expert_mlp(
    tokens: Tensor,
    weights: Tensor,
    row_order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    down: Tensor,
    recompute_activations: bool = False,
) -> Tensor:
    """Runs each expert's SwiGLU network on the tokens that chose it, and sums the weighted results per token.

    output[t] = sum over k of weights[t, k] · down[e] (silu(g) * u), with [g; u] = gate_up[e] tokens[t] and e the k-th
    choice of token t. Differentiable in tokens, weights, gate_up and down; an expert without tokens gets exact zeros.
    A choice whose weight is exactly 0 takes no part, even if its token or expert holds NaN, neither in the output nor
    in the gradients of tokens, gate_up and down: only the gradient of its weight reads it.
    Under autocast, tokens, gate_up and down are cast as `torch.nn.functional.linear` casts its arguments.

    Args:
        tokens (Tensor[T, H]): float32, float64, bfloat16 or float16.
        weights (Tensor[T, K]): in the type of tokens, or float32 beside 16-bit tokens.
        row_order (Tensor[N]): int32, from `sort_by_expert`.
        offsets (Tensor[E + 1]): int32, from `sort_by_expert`; slots behind offsets[E] contribute zeros.
        gate_up (Tensor[E, 2I, H]): in the type of tokens; each expert's first I rows are the gate's.
        down (Tensor[E, H, I]): in the type of tokens.
        recompute_activations (bool): keep the arguments alone for the backward pass, which then computes the
            pre-activation g, u `[N, 2I]` again: 4·N·H·I operations, 22 % of a step's. Gradients are the same bits on
            the CPU. Default: False.

    Returns:
        output (Tensor[T, H]) in the type of tokens.

    Raises:
        ValueError: a wrong shape, type or device.
        IndexError: `offsets` or `row_order` name rows that do not exist (on the CPU).
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("expert_mlp", tokens=tokens, weights=weights, row_order=row_order, offsets=offsets)
        checks.check_tensors("expert_mlp", gate_up=gate_up, down=down)
        checks.check_flags("expert_mlp", recompute_activations=recompute_activations)
    output: Tensor = torch.ops.edl.expert_mlp(tokens, weights, row_order, offsets, gate_up, down, recompute_activations)
    return output


def expert_mlp_with_gram(
    tokens: Tensor,
    weights: Tensor,
    row_order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    down: Tensor,
    output_gram: bool = False,
    activation_gram: bool = False,
    recompute_activations: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`expert_mlp`, and how alike the K experts of each token answer it, without their rows leaving the operator.

    With y[t, k] the output of the k-th expert of token t before its weight, and z[t, k] = silu(g) * u its activation
    before `down`: output_gram[t, j, k] = ⟨y[t, j], y[t, k]⟩ and activation_gram[t, j, k] = ⟨z[t, j], z[t, k]⟩. A choice
    whose weight is exactly 0 and a sentinel take no part: their entries are 0. Both are differentiable in tokens,
    gate_up and down. For backward passes the rows y [N, H] are kept with `output_gram`; `activation_gram` keeps nothing
    that `expert_mlp` does not. `edl.ops.mean_squared_cosine` makes one number per token of either.

    Args:
        tokens, weights, row_order, offsets, gate_up, down: as `expert_mlp` takes them.
        output_gram (bool): whether it is asked for. Default: False.
        activation_gram (bool): whether it is asked for. Default: False.
        recompute_activations (bool): as `expert_mlp` takes it. Backward passes through the matrices have all g, u
            `[N, 2I]` again at once, and through output_gram the rows y, at 2·N·H·I operations more. Default: False.

    Returns:
        output (Tensor[T, H]) in the type of tokens, output_gram and activation_gram (Tensor[T, K, K]), float32, or
        float64 for float64 tokens; what was not asked for has no element.

    Raises:
        ValueError: a wrong shape, type or device; neither matrix is asked for.
        IndexError: `offsets` or `row_order` name rows that do not exist (on the CPU).
    """
    if not torch.jit.is_scripting():
        op = "expert_mlp_with_gram"
        checks.check_tensors(op, tokens=tokens, weights=weights, row_order=row_order, offsets=offsets)
        checks.check_tensors(op, gate_up=gate_up, down=down)
        checks.check_flags(op, output_gram=output_gram, activation_gram=activation_gram)
        checks.check_flags(op, recompute_activations=recompute_activations)
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.edl.expert_mlp_with_gram(
        tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram, recompute_activations
    )
    return results


def mean_squared_cosine(gram: Tensor) -> Tensor:
    """The mean over a token's pairs of rows of the squared cosine between them: 0 where all are orthogonal, 1 where all
    are parallel.

    Rows without length, of choices that take no part, are in no pair; a token without any pair has 0. The value does
    not change with the lengths of the rows, nor is there a gradient along them.

    Args:
        gram (Tensor[T, K, K]): inner products, as `token_gram` and `expert_mlp_with_gram` give them; floating.

    Returns:
        Tensor[T], in the type of gram.

    Raises:
        ValueError: no such matrices.

    Source: the regulariser R_sp of arXiv 2602.14159 (second-hand), as a mean over pairs in the place of a sum.
    """
    if not torch.jit.is_scripting():
        checks.check_tensors("mean_squared_cosine", gram=gram)
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2] or not gram.is_floating_point():
        raise ValueError(
            "edl::mean_squared_cosine: gram must have the shape [T, K, K] and be floating (got "
            f"{list(gram.shape)} {gram.dtype})"
        )
    squares = gram.diagonal(dim1=1, dim2=2)
    has_length = squares != 0  # NaN too, which is no length to leave out
    lengths = torch.where(has_length, squares, torch.ones_like(squares)).rsqrt()
    cosines = gram * lengths.unsqueeze(1) * lengths.unsqueeze(2)
    is_pair = (has_length.unsqueeze(1) & has_length.unsqueeze(2)).triu(diagonal=1)
    pairs = is_pair.sum(dim=(1, 2)).clamp(min=1)
    return torch.where(is_pair, cosines.square(), torch.zeros_like(cosines)).sum(dim=(1, 2)) / pairs
