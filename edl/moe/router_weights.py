"""What a router's rows say of its experts: small statistics for objectives, as rows never leave their layer."""

import torch
from torch import Tensor, nn

from edl.ops import checks


def _check_rows(weight: Tensor) -> None:
    """Raises where a weight is not that of a router, or not whole."""
    if isinstance(weight, Tensor) and checks.is_dtensor(weight):
        raise ValueError(
            "edl::router_weights: a router's weight must be whole where it is looked at, so shard the layer and not "
            "its router alone (got a DTensor)"
        )
    checks.check_tensors("router_weights", weight=weight)
    checks.check_memory("router_weights", weight=weight)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            "edl::router_weights: a router's weight must be floating-point and have the shape [E, H] (got "
            f"{weight.dtype} {list(weight.shape)})"
        )


def has_rows(router: nn.Module, num_experts: int, hidden_size: int) -> bool:
    """Whether a router has a row for each expert, as `weight [E, H]`."""
    weight = getattr(router, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (num_experts, hidden_size)


def gram_of(weight: Tensor) -> Tensor:
    """W Wᵀ: the inner products of a router's rows, differentiable.

    Args:
        weight (Tensor[E, H]): of the router; float32, float64, bfloat16 or float16.

    Returns:
        Tensor[E, E], float32, or float64 for float64 weights; neither autocast nor TF32 touches it.

    Raises:
        ValueError: another shape or type, a DTensor.
    """
    if not torch.jit.is_scripting():
        _check_rows(weight)
    gram: Tensor = torch.ops.edl._router_logits(weight, weight, torch.float32)
    return gram


def _mix(bits: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits, in int64, in which neighbours have nothing in common any more."""
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def uniform_of(rows: Tensor) -> Tensor:
    """Numbers uniform in [-1, 1), a function of the digits of a weight and of the place in it.

    They are the same wherever the weight is, on every rank and in replays, and others after each step that changes it;
    there is no state, and no generator that a rank could have used more often than another.

    Args:
        rows (Tensor[E, H]): float32 or float64.

    Returns:
        Tensor[E, H] in its type.
    """
    digits = 53 if rows.dtype == torch.float64 else 24
    digest = (torch.frexp(rows.detach())[0] * 2.0**digits).to(torch.int64).sum()
    key = _mix((digest ^ (digest >> 32)) & 0xFFFFFFFF)
    places = torch.arange(rows.numel(), device=rows.device, dtype=torch.int64).view(rows.shape)
    # 24 bits, which float32 holds exactly.
    return (_mix(_mix(places) ^ key) >> 8).to(rows.dtype) * 2.0**-23 - 1.0


def spread_of(rows: Tensor) -> Tensor:
    """min_{j≠i} ‖R_i - R_j‖ / (2 ‖R_i‖): how far rows can be moved, relative to their size, and stay nearest to
    themselves; 0 for a row of zeros, and for a single one.

    Args:
        rows (Tensor[E, H]): float32 or float64, without gradient.

    Returns:
        Tensor[E].
    """
    is_itself = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # differences, so near rows too
    nearest = distances.masked_fill(is_itself, float("inf")).amin(1)
    spread: Tensor = nearest / (2.0 * torch.linalg.vector_norm(rows, dim=1))
    return spread.masked_fill(~torch.isfinite(spread), 0.0)


def responses_of(weight: Tensor, gate_up: Tensor) -> Tensor:
    """M_ij = ‖R~_i W_g^jᵀ‖: how strongly the gate of expert j answers to the router's row of expert i, perturbed.

    R~ = R · δ elementwise, δ_i ~ U(1 - ε_i, 1 + ε_i)^H with ε_i of `spread_of`, by the numbers of `uniform_of`; δ is a
    constant of the gradient. The product is computed in the type of the experts, under autocast in its type, its norm
    in float32 or float64. It keeps E · E_local · I numbers until the backward pass.

    Args:
        weight (Tensor[E, H]): of the router.
        gate_up (Tensor[E_local, 2I, H]): of the experts at hand, the gate's rows first.

    Returns:
        Tensor[E, E_local], float32, or float64 for float64 experts.

    Raises:
        ValueError: a weight of another shape or type, a DTensor.
    """
    if not torch.jit.is_scripting():
        _check_rows(weight)
    rows = weight if weight.dtype == torch.float64 else weight.float()
    fixed = rows.detach()
    perturbed = rows * (1.0 + spread_of(fixed).unsqueeze(1) * uniform_of(fixed))
    gates = gate_up[:, : gate_up.shape[1] // 2]
    answers = torch.bmm(perturbed.to(gate_up.dtype).expand(gate_up.shape[0], -1, -1), gates.transpose(1, 2))
    wide = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    responses: Tensor = torch.linalg.vector_norm(answers, dim=2, dtype=wide)
    return responses.t()
