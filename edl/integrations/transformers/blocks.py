"""Mixture-of-Experts blocks of transformers v5 as `edl.MoELayer`, and back; the parameters are shared, not copied."""

import copy
import functools
import importlib
import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from edl.moe import MoELayer
from edl.moe.routers import TopK

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def _modeling(family: _Family) -> ModuleType:
    return importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")


@functools.cache
def _router_class(name: str) -> type[nn.Module]:
    """edl's router as one of a family of transformers too, which records the logits of its routers by their class."""
    family = _FAMILIES[name]
    bases = (TopK, getattr(_modeling(family), f"{family.prefix}TopKRouter"))
    return type(f"{family.prefix}Router", bases, {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """Finds the classes of `_router_class` for pickle."""
    for key, family in _FAMILIES.items():
        if name == f"{family.prefix}Router":
            return _router_class(key)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _keep_recorded(source: nn.Module, target: nn.Module) -> None:
    """Gives a router the hooks with which transformers records the one before it: it puts them on a model once."""
    for hook in source._forward_hooks.values():
        if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
            target.register_forward_hook(hook)


def _family_of(block: nn.Module) -> str | None:
    names = {kind.__name__ for kind in type(block).__mro__}
    return next((name for name, family in _FAMILIES.items() if f"{family.prefix}SparseMoeBlock" in names), None)


def _check_activation(module: nn.Module) -> None:
    name = type(module.act_fn).__name__
    if name not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"edl::MoELayer.from_transformers: the activation must be SiLU (got {name})")


def _check_parameters(op: str, module: nn.Module, names: list[str]) -> None:
    """Refuses a block or layer with parameters that would not be taken over, as those of adapters."""
    found = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    different = sorted(set(found) ^ set(names))
    if different:
        raise ValueError(
            f"edl::MoELayer.{op}: only the parameters of the family can be taken over, merge adapters of PEFT first or "
            f"add them afterwards (got {'' if different[0] in found else 'no '}{different[0]})"
        )


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
    block: nn.Module,
    return_routing: bool = True,
    router_dtype: torch.dtype = torch.float32,
    recompute_activations: bool = False,
) -> MoELayer:
    """See `edl.MoELayer.from_transformers`."""
    name = _family_of(block)
    if name is None:
        raise ValueError(
            "edl::MoELayer.from_transformers: block must be the Mixture-of-Experts block of a Mixtral, Qwen2-MoE, "
            f"Qwen3-MoE or OLMoE model (got {type(block).__name__})"
        )
    family = _FAMILIES[name]
    names = _ROUTED + (_SHARED if family.has_shared_expert else [])
    _check_parameters("from_transformers", block, [theirs for theirs, _ in names])
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
        recompute_activations=recompute_activations,
        return_routing=return_routing,
        device="meta",
        **shared,
    )
    _share(block, layer, names)
    layer.transformers_family = name
    layer.router.__class__ = _router_class(name)  # type: ignore[assignment]  # one of TopK's
    _keep_recorded(parts.gate, layer.router)
    return layer.train(block.training)


def _is_top_k(router: nn.Module) -> bool:
    """Whether a router decides as `TopK` does; one derived from it may do otherwise."""
    names = ("forward", "choice_of", "logits_of")
    return all(getattr(type(router), name, None) is getattr(TopK, name) for name in names)


def _check_expressible(layer: MoELayer, name: str) -> None:
    family = _FAMILIES[name]
    has_gated_shared = layer.shared_expert is not None and layer.shared_expert_gate is not None
    if not _is_top_k(layer.router):
        raise ValueError(
            f"edl::MoELayer.to_transformers: a {name} block cannot express the layer (got a router of one's own, "
            f"{type(layer.router).__name__})"
        )
    obstacles = {
        f"scores={layer.scores!r}": layer.scores != "softmax",
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
    name = family
    if name is None:
        name = layer.transformers_family or ("qwen3_moe" if layer.shared_expert is None else "qwen2_moe")
    if name not in list(_FAMILIES):  # a list also takes what has no hash
        raise ValueError(f"edl::MoELayer.to_transformers: family must be one of {list(_FAMILIES)} (got '{name}')")
    _check_expressible(layer, name)
    kind = _FAMILIES[name]
    names = _ROUTED + (_SHARED if kind.has_shared_expert else [])
    _check_parameters("to_transformers", layer, [ours for _, ours in names])
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
    config = getattr(_modeling(kind), f"{kind.prefix}Config")(**options)
    with torch.device("meta"):
        block = getattr(_modeling(kind), f"{kind.prefix}SparseMoeBlock")(config)
    _share(layer, block, [(to_name, from_name) for from_name, to_name in names])
    _keep_recorded(layer.router, block.gate)
    return block.train(layer.training)


_SETTINGS = [
    "hidden_size",
    "intermediate_size",
    "num_experts",
    "top_k",
    "scores",
    "normalize_top_k",
    "routed_scaling_factor",
    "expert_mesh",
]


def _difference(layer: MoELayer, expected: MoELayer) -> str | None:
    """What a layer is or has that the block in its place cannot say; None for nothing."""
    if not _is_top_k(layer.router):
        return f"router={type(layer.router).__name__}"
    for name in _SETTINGS:
        if getattr(layer, name) != getattr(expected, name):
            return f"{name}={getattr(layer, name)!r}"
    for part in ("expert_bias", "shared_expert", "shared_expert_gate"):
        if (getattr(layer, part) is None) != (getattr(expected, part) is None):
            return f"{part}={'None' if getattr(layer, part) is None else 'present'}"
    if layer.shared_expert is not None and expected.shared_expert is not None:
        width = layer.shared_expert.gate_proj.out_features
        if width != expected.shared_expert.gate_proj.out_features:
            return f"a shared expert of {width}"
    return None


def _takes_configuration_alone(kind: type) -> bool:
    try:
        inspect.signature(kind).bind(None)
    except TypeError:
        return False
    return True


def names_in_blocks(model: nn.Module) -> dict[str, str]:
    """The names in a model's state_dict that a model without edl, made from the same configuration, has otherwise.

    Args:
        model (nn.Module): a model of transformers; holds `MoELayer`s, in the place of blocks or of its own accord.

    Returns:
        The names of the parameters of layers in the place of blocks, and those of the blocks; nothing for models of
        other kinds, and for models with adapters, of which the adapters alone are saved.

    Raises:
        ValueError: a layer that the block in its place cannot express, or with no block in its place; one made from a
            block in a model that needs more than its configuration.
    """
    from transformers import PreTrainedModel

    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers or not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return {}
    plain_modules: dict[str, nn.Module] | None = None
    if _takes_configuration_alone(type(model)):
        with torch.device("meta"):  # as from_pretrained makes it
            plain_modules = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    names: dict[str, str] = {}
    for name, layer in layers.items():
        if plain_modules is None:
            if layer.transformers_family is None:
                continue  # taken for one of its own
            raise ValueError(
                "edl::save_pretrained: a model with layers in the place of blocks must be made from its configuration "
                "alone, which tells the names of the blocks; make them blocks again with to_transformers first (got "
                f"{type(model).__name__}, whose constructor needs more)"
            )
        block = plain_modules.get(name)
        if isinstance(block, MoELayer):
            continue
        difference: str | None = "a layer where the model has no block"
        if block is not None and _family_of(block) is not None:
            difference = _difference(layer, layer_from_block(block))
        if difference:
            raise ValueError(
                "edl::save_pretrained: a layer in the place of a block must be one that to_transformers makes a block "
                "of the model's configuration; state_dict() saves others under names of their own "
                f"(got {difference} in {name})"
            )
        names |= {f"{name}.{ours}": f"{name}.{theirs}" for theirs, ours in _ROUTED}
    return names


@functools.cache  # once
def write_names_of_families() -> None:
    """Lets `save_pretrained` write layers in the place of blocks under the names that `from_pretrained` reads. It asks
    no part of a model for its names but the whole model for its state_dict, which keeps those of the layers."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def save_pretrained(
        self: "PreTrainedModel",
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        names = {} if kwargs.get("distributed_checkpoint", False) else names_in_blocks(self)
        if names:
            state = self.state_dict() if state_dict is None else state_dict
            state_dict = {names.get(name, name): value for name, value in state.items()}
        save(self, save_directory, is_main_process, state_dict, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained
