"""Where routers and experts are in a model of transformers, and what their outputs and arguments mean."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edl.moe.routers import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import OutputRecorder


def _recorders(part: "PreTrainedModel") -> list["OutputRecorder"]:
    """What transformers itself records as router logits in this part of a model: the routers' classes, and where in
    their output the logits stand."""
    from transformers.utils.output_capturing import OutputRecorder

    recorders = (part._can_record_outputs or {}).get("router_logits", [])
    return [
        # transformers' convention for a bare class: the second output.
        recorder if isinstance(recorder, OutputRecorder) else OutputRecorder(recorder, index=1)
        for recorder in (recorders if isinstance(recorders, list) else [recorders])
    ]


# What PEFT puts around a module: the module as it was and a copy per adapter, of which one runs; or the module alone.
_WRAPPERS = re.compile(r"\.(original_module|modules_to_save\.[^.]+|base_layer)(?=\.|$)")


def find_routers(model: nn.Module) -> tuple[nn.Module, list[tuple[str, nn.Module, int]]]:
    """The smallest model of transformers around all routers; and name, router, index of the logits in its output.
    Several of one name: PEFT has copied a router."""
    from transformers import PreTrainedModel

    found: dict[nn.Module, tuple[nn.Module, str, int]] = {}
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):  # outer ones first
        recorders = _recorders(part)
        for path, module in part.named_modules():
            name = _WRAPPERS.sub("", path)
            if isinstance(module, Router):
                found[module] = (part, name, 0)
            for recorder in recorders:
                in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
                is_target = isinstance(recorder.target_class, type) and isinstance(module, recorder.target_class)
                if is_target and in_layer:
                    found[module] = (part, name, recorder.index)
    parts = {part for part, _, _ in found.values()}
    if not parts:
        raise ValueError(
            "edl::attach: model must hold routers whose logits transformers records, or edl.MoELayer, inside a model "
            f"of transformers (got {type(model).__name__}, which has none)"
        )
    if len(parts) > 1:
        names = ", ".join(sorted(type(part).__name__ for part in parts))
        raise ValueError(
            "edl::attach: model must be a model of transformers with Mixture-of-Experts routers in exactly one of its "
            f"parts (got {len(parts)} parts with routers: {names})"
        )
    return parts.pop(), [(name, router, index) for router, (_, name, index) in found.items()]


# The second and third argument of the experts of transformers: what their router chose.
_CHOICES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))


def find_experts(part: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The experts of transformers, which are told of choices, by the name of the router beside them."""
    by_block = {name.rpartition(".")[0]: name for name in names}
    found: list[tuple[str, nn.Module]] = []
    for path, module in part.named_modules():
        name = _WRAPPERS.sub("", path)
        block, _, leaf = name.rpartition(".")
        if leaf == "experts" and block in by_block:
            arguments = tuple(inspect.signature(type(module).forward).parameters)
            if arguments[2:4] in _CHOICES:  # after the module itself and the tokens
                found.append((by_block[block], module))
    return found


def frozen_routers(part: nn.Module, names: Sequence[str]) -> list[str]:
    """The routers without a trainable parameter, in themselves or in what PEFT put around them."""
    parameters = [(_WRAPPERS.sub("", path), parameter.requires_grad) for path, parameter in part.named_parameters()]
    trainable = {
        name: [requires_grad for path, requires_grad in parameters if path.startswith(f"{name}.")] for name in names
    }
    return [name for name, flags in trainable.items() if flags and not any(flags)]


def rows_of(name: str, router: nn.Module) -> Tensor:
    """The weight [E, H] of a router."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"edl::attach: objectives on the router's rows need a router with a weight [E, H] (got {name}, a "
            f"{type(router).__name__} without)"
        )
    return weight


def are_distributions(routing: Tensor) -> bool | None:
    """Whether a router gives probabilities; None where its output does not tell. Waits for the device."""
    if torch.compiler.is_compiling() or type(routing) is not Tensor or routing.is_meta or routing.shape[-1] == 1:
        return None
    if routing.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    rows = routing.detach().flatten(0, -2).double()
    is_finite = rows.isfinite().all(1)
    is_distribution = (rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-2)
    enough, all_are = torch.stack([is_finite.sum() > 1, (is_distribution | ~is_finite).all()]).tolist()
    return all_are if enough else None


Put = Callable[[Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


def choices_of_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Tensor, Tensor], Put] | None:
    """Chosen experts and weights among the arguments of experts of transformers, and what puts others in their place;
    None where they are not there."""
    names = next((pair for pair in _CHOICES if any(name in kwargs for name in pair)), None)
    chosen = [*args[1:3], *(kwargs[name] for name in names or () if name in kwargs)]
    if len(chosen) != 2 or not all(isinstance(x, Tensor) for x in chosen):
        return None
    positional = len(args[1:3])

    def put(experts: Tensor, weights: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        others = [experts, weights]
        named = dict(zip((names or ())[positional:], others[positional:]))
        return (*args[:1], *others[:positional], *args[3:]), {**kwargs, **named}

    return (chosen[0], chosen[1]), put
