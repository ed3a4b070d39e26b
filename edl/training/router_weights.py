"""A step of the router's weights towards an objective of their own, beside the optimizer."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edl.moe import MoELayer
from edl.moe.router_weights import gram_of, has_rows
from edl.objectives.router_weights import OfRouterGram, RouterOrthogonality, RouterSimilarity
from edl.ops import checks
from edl.reduction.ranks import reads_values

_WIDE = (torch.float32, torch.float64)
_OP = "decoupled_router_step"


def decoupled_router_step(
    weights: nn.Module | Iterable[Tensor], objective: RouterOrthogonality | RouterSimilarity, rate: float
) -> None:
    """W ← W - rate · ∂L/∂W for each router's weight, after the optimizer's step, as decoupled weight decay is.

    Verified: the code of ERNIE 4.5, which does so after each step in the place of its orthogonality in the loss. The
    step is that of each layer's own loss, not of a mean over layers; it is neither multiplied by the learning rate nor
    scaled by an optimizer, whose state it leaves alone. It is the same on all ranks; all ranks of a sharded weight call
    it together.

    Steps are made in float32 (or float64), as most are below what 16 bits resolve. A weight in 16 bits with a float32
    master in its attribute `main_param`, as Megatron's optimizer keeps it, is stepped there and rounded from it; other
    weights in 16 bits, and masters that are sharded (Megatron's distributed optimizer), are refused. Weights sharded by
    FSDP2 are gathered for the gradient, and each rank steps its shard.

    Args:
        weights (nn.Module, or iterable of Tensor[E, H]): a model, of which it takes the router of every `MoELayer` that
            has a weight [E, H], but for frozen ones; or routers' weights. They are changed in place.
        objective (RouterOrthogonality or RouterSimilarity): L.
        rate (float): finite and not negative. ERNIE's is the weight of its loss, in a configuration 1e-2.

    Raises:
        ValueError: something else, no such router, a weight of another shape or type, or one with NaN or infinity (on
            CUDA with EDL_CHECK=1 only); no weight is changed then.

    Source: github.com/PaddlePaddle/ERNIE, `OrthogonalCallback`.
    """
    if not isinstance(objective, OfRouterGram):
        raise ValueError(
            f"edl::{_OP}: objective must be a RouterOrthogonality or a RouterSimilarity (got "
            f"{type(objective).__name__})"
        )
    checks.check_numbers(_OP, rate=rate)
    if not 0.0 <= rate < math.inf:
        raise ValueError(f"edl::{_OP}: rate must be finite and not negative (got {rate})")
    masters = [(weight, _master_of(weight)) for weight in _router_weights(weights)]
    gradients = [_gradient(master, objective) for _, master in masters]
    for gradient in gradients:
        if reads_values(gradient) and not bool(gradient.isfinite().all()):
            raise ValueError(f"edl::{_OP}: a router's weight must be finite (got NaN or infinity)")
    with torch.no_grad():
        for (weight, master), gradient in zip(masters, gradients):
            _step(master, gradient, float(rate))
            if master is not weight:
                weight.copy_(master)


def _router_weights(given: Any) -> list[Tensor]:
    """The trainable weights of a model's routers, or those that were given, each once."""
    if isinstance(given, nn.Module):
        layers = [module for module in given.modules() if isinstance(module, MoELayer)]
        routers = [each.router for each in layers if has_rows(each.router, each.num_experts, each.hidden_size)]
        if not routers:
            raise ValueError(
                f"edl::{_OP}: a model must have an edl.MoELayer whose router has a weight [E, H], give the weights of "
                f"others (got {type(given).__name__} with {len(layers)} layers)"
            )
        weights: list[Any] = [router.weight for router in routers]
        weights = [weight for weight in weights if weight.requires_grad]
    else:
        try:
            weights = [given] if isinstance(given, Tensor) else list(given)
        except TypeError:
            raise ValueError(
                f"edl::{_OP}: weights must be a model or routers' weights (got {type(given).__name__})"
            ) from None
    for weight in weights:
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(
                f"edl::{_OP}: a router's weight must be floating-point and have the shape [E, H] (got {got})"
            )
    return list(dict.fromkeys(weights))


def _master_of(weight: Tensor) -> Tensor:
    """The weight itself, or the whole float32 master of one in 16 bits."""
    if weight.dtype in _WIDE:
        return weight
    master = getattr(weight, "main_param", None)
    if not isinstance(master, Tensor) or master.shape != weight.shape or master.dtype not in _WIDE:
        is_sharded = isinstance(master, Tensor) or hasattr(weight, "main_param_sharded")
        raise ValueError(
            f"edl::{_OP}: a router's weight must be float32 or float64, or have a whole float32 master as main_param, "
            f"as its type loses small steps (got {weight.dtype} {'with a sharded master' if is_sharded else 'without'})"
        )
    return master


def _gradient(master: Tensor, objective: OfRouterGram) -> Tensor:
    """∂L/∂W [E, H], of a whole weight also where the ranks hold parts of it."""
    with torch.inference_mode(False), torch.enable_grad():
        whole = master.full_tensor() if checks.is_dtensor(master) else master
        checks.check_memory(_OP, weight=whole.detach())
        rows = whole.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective.losses_of(gram_of(rows).unsqueeze(0)), rows)
    return gradient


def _step(master: Tensor, gradient: Tensor, rate: float) -> None:
    """Subtracts the gradient of a whole weight from what this rank holds of it."""
    if checks.is_dtensor(master):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = master.device_mesh
        whole = DTensor.from_local(gradient, mesh, [Replicate()] * mesh.ndim, run_check=False)
        gradient = whole.redistribute(mesh, master.placements).to_local()
        master = master.to_local()
    master.sub_(gradient, alpha=rate)
