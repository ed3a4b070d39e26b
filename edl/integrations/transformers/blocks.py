"""Mixture-of-Experts blocks of transformers v5 as `edl.MoELayer`, and back; the parameters are shared, not copied."""

import importlib
from typing import Any, NamedTuple

import torch
from torch import nn

from edl.moe import MoELayer


class _Family(NamedTuple):
    module: str  # in transformers.models
    prefix: str  # of the class names
    intermediate_size: str  # the name of I in the configuration
    num_experts: str  # the name of E
    always_normalizes: bool
    has_shared_expert: bool


_FAMILIES = {
    "mixtral": _Family("mixtral", "Mixtral", "intermediate_size", "num_local_experts", True, False),
    "qwen2_moe": _Family("qwen2_moe", "Qwen2Moe", "moe_intermediate_size", "num_experts", False, True),
    "qwen3_moe": _Family("qwen3_moe", "Qwen3Moe", "moe_intermediate_size", "num_experts", False, False),
    "olmoe": _Family("olmoe", "Olmoe", "intermediate_size", "num_experts", False, False),
}


def _family_of(block: nn.Module) -> str:
    names = {kind.__name__ for kind in type(block).__mro__}
    for name, family in _FAMILIES.items():
        if f"{family.prefix}SparseMoeBlock" in names:
            return name
    raise ValueError(
        "edl::MoELayer.from_transformers: block must be the Mixture-of-Experts block of a Mixtral, Qwen2-MoE, "
        f"Qwen3-MoE or OLMoE model (got {type(block).__name__})"
    )


def _check_activation(module: nn.Module) -> None:
    name = type(module.act_fn).__name__
    if name not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"edl::MoELayer.from_transformers: the activation must be SiLU (got {name})")


def _share(source: nn.Module, target: nn.Module, names: list[tuple[str, str]]) -> None:
    """Gives the parameters `names` (in source, in target) of source to target."""
    for from_name, to_name in names:
        owner, _, leaf = to_name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, source.get_parameter(from_name))


_ROUTED = [
    ("gate.weight", "router.weight"),
    ("experts.gate_up_proj", "gate_up_proj"),
    ("experts.down_proj", "down_proj"),
]
_SHARED = [
    (f"{name}.weight", f"{name}.weight")
    for name in ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate")
]


def layer_from_block(
    block: nn.Module, return_routing: bool = True, router_dtype: torch.dtype = torch.float32
) -> MoELayer:
    """See `edl.MoELayer.from_transformers`."""
    name = _family_of(block)
    family = _FAMILIES[name]
    parts: Any = block  # whose types nn.Module does not know
    _check_activation(parts.experts)
    if getattr(block, "jitter_noise", 0.0):
        raise ValueError(
            f"edl::MoELayer.from_transformers: router_jitter_noise must be 0, edl has none (got {block.jitter_noise})"
        )
    num_experts, hidden_size, intermediate_size = parts.experts.down_proj.shape
    shared: dict[str, Any] = {}
    if family.has_shared_expert:
        _check_activation(parts.shared_expert)
        shared = {
            "num_shared_experts": 1,
            "shared_intermediate_size": parts.shared_expert.gate_proj.out_features,
            "shared_expert_gate": True,
        }
    layer = MoELayer(
        hidden_size,
        intermediate_size,
        num_experts,
        parts.gate.top_k,
        normalize_top_k=family.always_normalizes or parts.gate.norm_topk_prob,
        router_dtype=router_dtype,
        return_routing=return_routing,
        device="meta",
        **shared,
    )
    _share(block, layer, _ROUTED + (_SHARED if family.has_shared_expert else []))
    layer.transformers_family = name
    return layer.train(block.training)


def _check_expressible(layer: MoELayer, name: str) -> None:
    family = _FAMILIES[name]
    has_gated_shared = layer.shared_expert is not None and layer.shared_expert_gate is not None
    obstacles = {
        "scores='sigmoid'": layer.scores != "softmax",
        "an expert bias": layer.expert_bias is not None,
        "a routed_scaling_factor other than 1": layer.routed_scaling_factor != 1.0,
        "weights that are not normalised": family.always_normalizes and not layer.normalize_top_k,
        "a shared expert": layer.shared_expert is not None and not family.has_shared_expert,
        "experts spread over an expert_group": layer.expert_mesh is not None,
        "no gated shared expert": family.has_shared_expert and not has_gated_shared,
    }
    for obstacle, present in obstacles.items():
        if present:
            raise ValueError(f"edl::MoELayer.to_transformers: a {name} block cannot express the layer (got {obstacle})")


def block_from_layer(layer: MoELayer, family: str | None = None) -> nn.Module:
    """See `edl.MoELayer.to_transformers`."""
    name = family or layer.transformers_family or ("qwen3_moe" if layer.shared_expert is None else "qwen2_moe")
    if name not in _FAMILIES:
        raise ValueError(f"edl::MoELayer.to_transformers: family must be one of {list(_FAMILIES)} (got '{name}')")
    _check_expressible(layer, name)
    kind = _FAMILIES[name]
    options = {
        "hidden_size": layer.hidden_size,
        kind.intermediate_size: layer.intermediate_size,
        kind.num_experts: layer.num_experts,
        "num_experts_per_tok": layer.top_k,
    }
    if not kind.always_normalizes:
        options["norm_topk_prob"] = layer.normalize_top_k
    if kind.has_shared_expert:
        assert layer.shared_expert is not None
        options["shared_expert_intermediate_size"] = layer.shared_expert.gate_proj.out_features
    package = f"transformers.models.{kind.module}"
    config = getattr(importlib.import_module(f"{package}.configuration_{kind.module}"), f"{kind.prefix}Config")(
        **options
    )
    with torch.device("meta"):
        block = getattr(importlib.import_module(f"{package}.modeling_{kind.module}"), f"{kind.prefix}SparseMoeBlock")(
            config
        )
    names = _ROUTED + (_SHARED if kind.has_shared_expert else [])
    _share(layer, block, [(to_name, from_name) for from_name, to_name in names])
    return block.train(layer.training)
