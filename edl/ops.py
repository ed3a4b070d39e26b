"""Typed, documented, scriptable wrappers over the operators `torch.ops.edl.*`.

Shapes: T tokens, S segments, E experts, D domains, K experts per token, N = T·K, H hidden size, I intermediate size.
Softmax, sums and logarithms are computed in float32 (float64 for float64 input), whatever the storage type; only the
products of `expert_mlp` on CUDA follow torch's switches for TF32 and for reductions in 16 bits.
"""

import operator
from typing import Any

import torch
from torch import Tensor


def _refuse_dtensor(op: str, *tensors: Tensor | None) -> None:
    """Raises where an operator is given a DTensor, whose shards only the caller knows how to combine."""
    for tensor in tensors:
        if tensor is None or type(tensor) is Tensor or not torch.distributed.is_available():
            continue
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            raise ValueError(f"edl::{op}: takes plain tensors, call to_local() on the shards first (got a DTensor)")


def _shown(value: object) -> str:
    """An argument as one line of a sentence."""
    text = repr(value)
    return text if "\n" not in text else type(value).__name__


def _check_tensor(op: str, name: str, tensor: object) -> None:
    """Raises where an argument is no dense tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"edl::{op}: {name} must be a tensor (got {type(tensor).__name__})")
    if tensor.is_nested:
        raise ValueError(f"edl::{op}: {name} must be dense (got a nested tensor)")
    if tensor.layout != torch.strided:
        raise ValueError(f"edl::{op}: {name} must be dense (got layout {tensor.layout})")
    if tensor.is_quantized:
        raise ValueError(f"edl::{op}: {name} must not be quantised (got {tensor.dtype})")
    _refuse_dtensor(op, tensor)


def _check_tensors(op: str, **tensors: object) -> None:
    """Raises where one of several arguments is no dense tensor."""
    for name, tensor in tensors.items():
        _check_tensor(op, name, tensor)


def _check_given(op: str, **tensors: object) -> None:
    """The same for arguments that may be None."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_tensor(op, name, tensor)


def _check_memory(op: str, **tensors: Tensor | None) -> None:
    """Raises where the memory of a tensor was freed, for operators of torch, which crash; ours look themselves."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.numel() == 0:  # subclasses may keep their values elsewhere
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            continue
        if tensor.untyped_storage().nbytes() == 0:
            raise ValueError(f"edl::{op}: {name} must have memory (got a tensor whose storage was freed)")


def _is_scalar(tensor: Tensor) -> bool:
    """Whether a tensor is a number, such as a size that torch.jit.trace follows."""
    is_dense = not tensor.is_nested and tensor.layout == torch.strided and not tensor.is_quantized
    return is_dense and tensor.dim() == 0 and tensor.dtype != torch.bool and not (tensor.is_meta or tensor.is_complex())


def _is_integer(number: object) -> bool:
    if isinstance(number, Tensor):
        return _is_scalar(number) and not number.is_floating_point()
    try:
        operator.index(number)  # type: ignore[arg-type]  # a TypeError is the answer
    except TypeError:
        return False
    return not isinstance(number, bool)


def _is_number(number: object) -> bool:
    if isinstance(number, Tensor):
        return _is_scalar(number)
    try:
        float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(number, (bool, str, bytes))


def _check_integers(op: str, **numbers: object) -> None:
    """Raises where an argument is no integer; one that torch.compile or torch.jit.trace follows is."""
    for name, number in numbers.items():
        if type(number) is not int and not isinstance(number, torch.SymInt) and not _is_integer(number):
            raise ValueError(f"edl::{op}: {name} must be an integer (got {_shown(number)})")
        if type(number) is int and not torch.compiler.is_compiling() and not -(2**63) <= number < 2**63:
            raise ValueError(f"edl::{op}: {name} must be an integer of 64 bits (got {number})")


def _as_integer(op: str, name: str, number: Any, lowest: int = 0) -> int:
    """An argument as an int of at least `lowest`; what torch.compile follows stays what it is."""
    _check_integers(op, **{name: number})
    whole: Any = number if isinstance(number, (int, torch.SymInt)) else operator.index(number)
    if whole < lowest:
        rule = "not be negative" if lowest == 0 else f"be at least {lowest}"
        raise ValueError(f"edl::{op}: {name} must {rule} (got {whole})")
    result: int = whole
    return result


def _check_numbers(op: str, **numbers: object) -> None:
    """Raises where an argument is no number."""
    for name, number in numbers.items():
        if type(number) is not float and not isinstance(number, torch.SymFloat) and not _is_number(number):
            raise ValueError(f"edl::{op}: {name} must be a number (got {_shown(number)})")


def _check_texts(op: str, **texts: object) -> None:
    """Raises where an argument is no text."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"edl::{op}: {name} must be a string (got {_shown(text)})")


def _check_flags(op: str, **flags: object) -> None:
    """Raises where an argument is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"edl::{op}: {name} must be True or False (got {_shown(flag)})")


# ---- the loss: token → sequence → domain → pairs ----


def sequence_segment_ids(labels: Tensor, num_tokens: int) -> Tensor:
    """The segment of every token of a batch of sequences of one length, where each sequence is a segment.

    Args:
        labels (Tensor[B]): int32 or int64; -1 = the sequence is not counted; other values are not looked at.
        num_tokens (int): T, a multiple of B; the token at position s of sequence b is row b·T/B + s.

    Returns:
        Tensor[T], int32: b for a token of sequence b, -1 for one that is not counted. No gradient.

    Raises:
        ValueError: a wrong shape or dtype, a number of tokens that is no multiple of B.
    """
    if not torch.jit.is_scripting():
        _check_tensors("sequence_segment_ids", labels=labels)
        _check_integers("sequence_segment_ids", num_tokens=num_tokens)
    segment_ids: Tensor = torch.ops.edl.sequence_segment_ids(labels, num_tokens)
    return segment_ids


def aggregate_routing(
    routing: Tensor, segment_ids: Tensor, num_segments: int, scores: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Sums the router's distribution over the tokens of each segment (a sequence, a document, or a whole domain).

    Args:
        routing (Tensor[T, E]): logits, or probabilities with `scores="none"`; float32, float64, bfloat16 or float16,
            rows with any stride.
        segment_ids (Tensor[T]): int32 or int64, in [-1, num_segments); -1 = the token is not counted.
        num_segments (int): S, at least 0.
        scores (str): "softmax" (default), "sigmoid" (sigmoid(z) / (sum of sigmoid(z) + 1e-20), as in DeepSeek-V3), or
            "none".

    Returns:
        sums (Tensor[S, E]) and counts (Tensor[S], tokens per segment), float32, or float64 for float64 input.
        Differentiable in `routing`; rows that are not counted get a zero gradient. A row whose logits are all -inf has
        no distribution: where it is counted, its segment is NaN.

    Raises:
        ValueError: wrong shapes, dtypes or devices; on the CPU also logits passed as probabilities, or the reverse.
        IndexError: an id outside its range (on CUDA the sums become NaN, unless EDL_CHECK=1 is set).

    Source: the first level of the aggregation in arXiv 2603.00054.
    """
    if not torch.jit.is_scripting():
        _check_tensors("aggregate_routing", routing=routing, segment_ids=segment_ids)
        _check_integers("aggregate_routing", num_segments=num_segments)
        _check_texts("aggregate_routing", scores=scores)
    results: tuple[Tensor, Tensor] = torch.ops.edl.aggregate_routing(routing, segment_ids, num_segments, scores)
    return results


def domain_moments(
    segment_sums: Tensor, segment_counts: Tensor, labels: Tensor, num_domains: int, squares: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums the segments' mean distributions x = segment_sums / segment_counts, and their squares, over each domain.

    Sums of the results over ranks or micro-batches are the results of the union.

    Args:
        segment_sums (Tensor[..., S, E]): from `aggregate_routing`, layers stacked in front; float32 or float64.
        segment_counts (Tensor[..., S] or Tensor[S]): tokens per segment, shared by all layers if [S]; same dtype.
        labels (Tensor[S] or Tensor[S, D]): domain of each segment, int32 or int64 in [-1, num_domains), -1 = not
            counted; or weights per domain, floating, at least 0. A segment without tokens or without weight is skipped
            unread.
        num_domains (int): D, at least 1.
        squares (bool): also sum x², which bias correction needs. Default: False.

    Returns:
        sums (Tensor[..., D, E]), squares (the same shape, or no element) and counts (Tensor[..., D]: segments, or
        weight), float64. Differentiable in `segment_sums`.

    Raises:
        ValueError: wrong shapes, dtypes or devices, a negative weight.
        IndexError: a label outside its range (on CUDA the sums become NaN).

    Source: the second level of the aggregation in arXiv 2603.00054: every sequence weighs the same.
    """
    if not torch.jit.is_scripting():
        _check_tensors("domain_moments", segment_sums=segment_sums, segment_counts=segment_counts, labels=labels)
        _check_integers("domain_moments", num_domains=num_domains)
        _check_flags("domain_moments", squares=squares)
    moments: tuple[Tensor, Tensor, Tensor] = torch.ops.edl.domain_moments(
        segment_sums, segment_counts, labels, num_domains, squares
    )
    return moments


def expert_divergence(
    sums: Tensor,
    squares: Tensor,
    counts: Tensor,
    eps: float = 1e-6,
    reduction: str = "mean_of_logs",
    bias_correction: bool = False,
) -> Tensor:
    """The Expert Divergence loss of domain moments: mean over pairs of -log(JSD(p_j, p_k) + eps), p = sums / counts.

    Args:
        sums (Tensor[..., D, E]): float64, from `domain_moments`.
        squares (Tensor[..., D, E]): float64; read with `bias_correction` only.
        counts (Tensor[..., D]): float64; a domain whose count is 0 drops out.
        eps (float): at least 0; bounds the loss of equal domains at -log(eps). Default: 1e-6.
        reduction (str): "mean_of_logs" (the paper, default) or "log_of_mean": -log(mean over pairs of JSD + eps).
        bias_correction (bool): take the gradient of JSD less its expectation under equal domains; the value stays. Only
            domains of two segments or more count then. Default: False.

    Returns:
        The loss (Tensor[...]), float64, in nats; 0 with zero gradient where fewer than two domains are left.
        Differentiable in `sums` and `squares`.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an unknown reduction, a negative eps, bias correction of
            "log_of_mean".

    Source: arXiv 2603.00054. It gives neither eps nor the base of the logarithm; we chose 1e-6 and the natural one. The
        bias correction is ours.
    """
    if not torch.jit.is_scripting():
        _check_tensors("expert_divergence", sums=sums, squares=squares, counts=counts)
        _check_numbers("expert_divergence", eps=eps)
        _check_texts("expert_divergence", reduction=reduction)
        _check_flags("expert_divergence", bias_correction=bias_correction)
    loss: Tensor = torch.ops.edl.expert_divergence(sums, squares, counts, eps, reduction, bias_correction)
    return loss


def pairwise_divergence(sums: Tensor, squares: Tensor, counts: Tensor, bias_correction: bool = False) -> Tensor:
    """The Jensen-Shannon divergence of every pair of domains, in nats: a diagnostic without gradient.

    Args:
        sums (Tensor[..., D, E]): float64, from `domain_moments`.
        squares (Tensor[..., D, E]): float64; read with `bias_correction` only.
        counts (Tensor[..., D]): float64.
        bias_correction (bool): subtract what noise alone would give; the result may be negative. Default: False.

    Returns:
        Tensor[..., D, D], float64, between 0 and log 2 without correction; 0 on the diagonal, NaN where a domain has no
        segment (with correction: fewer than two).

    Raises:
        ValueError: wrong shapes, dtypes or devices.
    """
    if not torch.jit.is_scripting():
        _check_tensors("pairwise_divergence", sums=sums, squares=squares, counts=counts)
        _check_flags("pairwise_divergence", bias_correction=bias_correction)
    divergences: Tensor = torch.ops.edl.pairwise_divergence(sums, squares, counts, bias_correction)
    return divergences


# ---- the layer: token → expert → token ----


def route_tokens(
    logits: Tensor,
    top_k: int,
    scores: str,
    bias: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts for each token and gives them weights.

    Without `bias` the experts with the highest logits are chosen, which is the order of the scores without their
    rounding; with it, those with the highest score + bias. Ties go to the lowest expert; NaN counts as highest, so that
    it reaches the weights. Differentiable in `logits` through the chosen weights; with `top_k` 1 and `normalize` the
    weight is 1 and its gradient 0.

    An expert that is masked, by a logit of -inf, is never chosen while an open one is left, whatever the bias. Where
    fewer than `top_k` are open, the slots that are left go to masked experts, lowest first, and weigh 0. A token
    without any open expert has no distribution: its weights, and the gradient of its logits, are NaN.

    Args:
        logits (Tensor[T, E]): the router's output; float32, float64, bfloat16 or float16.
        top_k (int): K, experts per token, in [1, E].
        scores (str): "softmax" over all experts, or "sigmoid" of each logit.
        bias (Tensor[E], optional): shifts the choice and never enters a weight (DeepSeek-V3, arXiv 2412.19437, Eq. 16).
        normalize (bool): divide the weights by the sum of the token's chosen scores (sigmoid: sum + 1e-20). Default:
            True.
        scale (float): factor of the weights, after the division. Default: 1.

    Returns:
        weights (Tensor[T, K]), float32, or float64 for float64 logits, and experts (Tensor[T, K], int64), best first.

    Raises:
        ValueError: a wrong shape, type, device, `top_k` or name of scores.
    """
    if not torch.jit.is_scripting():
        _check_tensors("route_tokens", logits=logits)
        _check_given("route_tokens", bias=bias)
        _check_integers("route_tokens", top_k=top_k)
        _check_texts("route_tokens", scores=scores)
        _check_flags("route_tokens", normalize=normalize)
        _check_numbers("route_tokens", scale=scale)
    results: tuple[Tensor, Tensor] = torch.ops.edl.route_tokens(logits, top_k, scores, bias, normalize, scale)
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
        _check_tensors("sort_by_expert", experts=experts)
        _check_integers("sort_by_expert", num_experts=num_experts)
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
        _check_tensors("dispatch_tokens", tokens=tokens, row_order=row_order)
        _check_integers("dispatch_tokens", top_k=top_k)
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
        _check_tensors("combine_tokens", rows=rows, row_order=row_order)
        _check_given("combine_tokens", weights=weights)
        _check_integers("combine_tokens", top_k=top_k)
    tokens: Tensor = torch.ops.edl.combine_tokens(rows, weights, row_order, top_k)
    return tokens


def expert_mlp(
    tokens: Tensor, weights: Tensor, row_order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
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

    Returns:
        output (Tensor[T, H]) in the type of tokens.

    Raises:
        ValueError: a wrong shape, type or device.
        IndexError: `offsets` or `row_order` name rows that do not exist (on the CPU).
    """
    if not torch.jit.is_scripting():
        _check_tensors("expert_mlp", tokens=tokens, weights=weights, row_order=row_order, offsets=offsets)
        _check_tensors("expert_mlp", gate_up=gate_up, down=down)
    output: Tensor = torch.ops.edl.expert_mlp(tokens, weights, row_order, offsets, gate_up, down)
    return output


def inject(carrier: Tensor, loss: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns a copy of `carrier` that carries a loss which cannot be returned, for example from a pipeline stage.

    In the backward pass the carrier's gradient passes unchanged, and `loss` receives the gradient `scale`. Attach it to
    a small tensor that the final loss depends on, such as the routing weights.

    Args:
        carrier (Tensor): of any shape.
        loss (Tensor): a scalar.
        scale (Tensor, optional): a scalar, the factor of a gradient scaler. Default: 1.

    Returns:
        A copy of carrier.

    Raises:
        ValueError: `loss` or `scale` is no scalar.
    """
    if not torch.jit.is_scripting():
        _check_tensors("inject", carrier=carrier, loss=loss)
        _check_given("inject", scale=scale)
    copy: Tensor = torch.ops.edl.inject(carrier, loss, torch.ones_like(loss) if scale is None else scale)
    return copy
