"""Puts `EDTopKRouter` in the place of the router in a model's spec."""

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter

from edl.integrations.megatron import metrics
from edl.integrations.megatron.arguments import refuse_both_forms
from edl.integrations.megatron.router import OBSERVED, EDTopKRouter
from edl.objectives import ExpertDivergence, Objectives
from edl.objectives.needs import refuse_unobserved


def _builder(router: Any, options: dict[str, Any]) -> Callable:
    """What builds the router that replaces `router`, a class."""
    if not (isinstance(router, type) and issubclass(router, TopKRouter)):
        raise ValueError(
            f"edl::megatron.patch_spec: a router to replace must be a class derived from TopKRouter (got {router})"
        )
    if router is TopKRouter:
        return functools.partial(EDTopKRouter, **options)
    # The user's own router keeps what it does.
    return functools.partial(type(f"ED{router.__name__}", (EDTopKRouter, router), {}), **options)


def _children(node: Any) -> dict[Any, Any]:
    """The parts of a spec in which a layer may hide, by field, index or key."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return dict(vars(node))
    if isinstance(node, functools.partial):
        return node.keywords
    if isinstance(node, dict):
        return node
    if isinstance(node, (list, tuple)):
        return dict(enumerate(node))
    return {}


def _with_children(node: Any, children: dict[Any, Any]) -> Any:
    if isinstance(node, functools.partial):
        return functools.partial(node.func, *node.args, **children)
    if isinstance(node, dict):
        return type(node)(children)
    if isinstance(node, (list, tuple)):
        return type(node)(children.values())
    node = copy.copy(node)
    vars(node).update(children)
    return node


def _patched(node: Any, options: dict[str, Any]) -> Any:
    """`node` itself where it holds no MoE layer, else a copy with the routers replaced: specs may be shared between
    models."""
    children = _children(node)
    if isinstance(node, MoESubmodules):
        return _with_children(node, {**children, "router": _builder(node.router, options)})
    patched = {key: _patched(child, options) for key, child in children.items()}
    if all(patched[key] is child for key, child in children.items()):
        return node
    return _with_children(node, patched)


def _is_pipelined() -> bool:
    """Whether pipeline stages share the model, of which some may hold no MoE layer."""
    return parallel_state.is_initialized() and parallel_state.get_pipeline_model_parallel_world_size() > 1


def patch_spec(
    spec: Any,
    num_domains: int | Objectives | None = None,
    coeff: float | None = None,
    *,
    objectives: Objectives | None = None,
    eps: float = 1e-6,
    bias_correction: bool = False,
    accumulate: bool = False,
    steps_taken: Callable[[], int] | None = None,
) -> Any:
    """Returns the spec with an `EDTopKRouter` in every MoE layer; the spec itself stays as it is.

    Two forms: `patch_spec(spec, objectives)`, and `patch_spec(spec, num_domains, coeff)` for the Expert Divergence loss
    alone.

    Args:
        spec (ModuleSpec, TransformerBlockSubmodules or what holds them; or a function that returns one): of a decoder
            layer, a block, a hybrid stack or multi-token prediction.
        num_domains (int or Objectives): D, at least 2; or the objectives.
        coeff (float): weight of the loss of each layer, as of Megatron's other auxiliary losses; at least 0. With 0 the
            spec is returned unchanged and num_domains may be None.
        objectives (Objectives): bound to no ranks; each router binds a copy. A weight is that of the mean over the MoE
            layers of the decoder. All count into the statistics of the objectives (`reduce_statistics`), if there are
            any, each with the number of its layer; `Objectives({}, statistics=...)` does nothing else.
        eps (float): see `edl.ExpertDivergenceLoss`; of the short form. Default: 1e-6.
        bias_correction (bool): see `edl.ExpertDivergenceLoss`; of the short form. Default: False.
        accumulate (bool): compute the objectives over the micro-batches of a step so far (`edl.DomainMemory`), not
            within each micro-batch. Default: False.
        steps_taken (function, optional): asked once, before the first loss: how many steps the model has been trained
            for already, where weights with a schedule go on. `options` passes Megatron-LM's `iteration`. Default: none.

    Returns:
        The patched spec (or function).

    Raises:
        ValueError: both forms at once, a negative or no finite coeff, no num_domains, objectives that are bound or need
            what no router tells, a spec without MoE layer (unless pipeline stages share the model), a megatron-core
            before 0.16, a router that is not derived from `TopKRouter`, or one patched already.
    """
    if isinstance(num_domains, Objectives):
        if objectives is not None:
            raise ValueError("edl::megatron.patch_spec: objectives must be given once (got two)")
        objectives, num_domains = num_domains, None
    if objectives is None:
        if coeff is None or not 0.0 <= coeff < float("inf"):
            raise ValueError(f"edl::megatron.patch_spec: coeff must be finite and not negative (got {coeff})")
        if coeff == 0.0:
            return spec
        if num_domains is None:
            raise ValueError(
                "edl::megatron.patch_spec: num_domains must be given, --expert-divergence-num-domains (got None)"
            )
        shown = Objectives(
            {"expert_divergence": (ExpertDivergence(num_domains, eps, bias_correction=bias_correction), coeff)}
        )
        options: dict[str, Any] = {
            "num_domains": num_domains,
            "coeff": coeff,
            "eps": eps,
            "bias_correction": bias_correction,
        }
    else:
        _check_objectives(objectives)
        refuse_both_forms("megatron.patch_spec", num_domains, coeff, eps, bias_correction)
        shown, options = objectives, {"objectives": objectives}
    options |= {"accumulate": accumulate, "steps_taken": steps_taken}
    if isinstance(
        spec, types.FunctionType
    ):  # Megatron-LM's model configuration takes a function of the configuration too
        return functools.wraps(spec)(lambda *args, **kwargs: patch_spec(spec(*args, **kwargs), **options))
    if "router" not in {field.name for field in dataclasses.fields(MoESubmodules)}:
        raise ValueError(
            "edl::megatron.patch_spec: MoESubmodules must have a field for the router, as from megatron-core 0.16 on "
            f"(got {[field.name for field in dataclasses.fields(MoESubmodules)]})"
        )
    patched = _patched(spec, options)
    if patched is spec and not _is_pipelined():
        raise ValueError(f"edl::megatron.patch_spec: the spec must hold a Mixture-of-Experts layer (got {spec})")
    metrics.report(shown)
    return patched


def _check_objectives(objectives: Any) -> None:
    if not isinstance(objectives, Objectives):
        raise ValueError(
            f"edl::megatron.patch_spec: objectives must be edl.objectives.Objectives (got {type(objectives).__name__})"
        )
    refuse_unobserved("megatron.patch_spec", objectives.objectives, OBSERVED)
