"""What the routers of a model do in a forward pass, by hooks, without gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edl.diagnostics.layers import LayerFacts, numbers_of
from edl.integrations.transformers.routers import are_distributions, choices_of_arguments, find_experts, find_routers
from edl.moe.routers import Router
from edl.routing import Choice, Observation


class Watch:
    """The routers of a model and what they do: those that transformers records, and those of `edl.MoELayer`.

        watch = Watch(model)
        with watch.watching():
            model(input_ids)
        for layer, observation in watch.take():

    Args:
        model (nn.Module): of transformers, or with `edl.MoELayer`.

    Attributes:
        routers (list): name, router, index of the logits in its output.
        experts (list): name of the router, experts that are told of its choices.

    Raises:
        ValueError: a model without such routers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = _routers_of(model)
        self.experts = _experts_of(model, [name for name, _, _ in self.routers])
        self._top_k = _top_k_of(model)
        self._seen: dict[str, tuple[Tensor, Tensor | None, Tensor | None]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps what routers do from here on; of a router that runs twice, the last."""
        self._seen = {}
        hooks = [router.register_forward_hook(self._keep(name, index)) for name, router, index in self.routers]
        hooks += [
            experts.register_forward_pre_hook(self._keep_choices(name), with_kwargs=True)
            for name, experts in self.experts
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str, index: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            routing = output if isinstance(output, Tensor) else output[index]
            is_ours = isinstance(output, Choice)
            experts, weights = (output.experts, output.weights) if is_ours else (None, None)
            self._seen[name] = (routing.flatten(0, -2), experts, weights)

        return keep

    def _keep_choices(self, name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            found = choices_of_arguments(args, kwargs)
            if name in self._seen and found is not None:
                experts, weights = (x.flatten(0, -2) for x in found[0])
                self._seen[name] = (self._seen[name][0], experts, weights)

        return keep

    def take(self) -> list[tuple[LayerFacts, Observation]]:
        """The layers in their order, and what each did with the tokens of the last forward pass.

        Raises:
            ValueError: a router did not run, or choices that nobody tells.
        """
        missing = [name for name, _, _ in self.routers if name not in self._seen]
        if missing:
            raise ValueError(
                "edl::observe: every router must run as a module (got no logits of "
                f"{', '.join(missing[:4])}{' and others' if len(missing) > 4 else ''}; experts in MXFP4 pass their "
                "router by: load the model with --dtype bfloat16)"
            )
        names = [name for name, _, _ in self.routers]
        numbers = numbers_of(names)
        return [_layer(number, name, *self._seen[name], self._top_k) for number, name in zip(numbers, names)]


def _layer(
    number: int, name: str, routing: Tensor, experts: Tensor | None, weights: Tensor | None, top_k: int
) -> tuple[LayerFacts, Observation]:
    if experts is None:  # of routers whose experts are not told of choices: those of the highest logits
        if not 0 < top_k <= routing.shape[-1]:
            raise ValueError(
                f"edl::observe: choices must be told to the experts, or their number be num_experts_per_tok (got "
                f"neither from {name})"
            )
        weights, experts = routing.topk(top_k, dim=-1)
    facts = LayerFacts(number, name, routing.shape[-1], experts.shape[-1])
    seen = Observation(experts=experts, weights=weights, layer=number, router=name)
    return facts, seen._replace(scores=routing) if are_distributions(routing) else seen._replace(logits=routing)


def _routers_of(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Name, router, index of the logits in its output."""
    try:
        return find_routers(model)[1]
    except ImportError:  # no transformers
        pass
    except ValueError:
        if not any(isinstance(module, Router) for module in model.modules()):
            raise
    found: list[tuple[str, nn.Module, int]] = [
        (name, module, 0) for name, module in model.named_modules() if isinstance(module, Router)
    ]
    if not found:
        raise ValueError(f"edl::observe: model must hold edl.MoELayer (got {type(model).__name__} without)")
    return found


def _experts_of(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    try:
        return find_experts(find_routers(model)[0], names)
    except (ImportError, ValueError):  # routers of our own tell what they chose
        return []


def _top_k_of(model: nn.Module) -> int:
    """How many experts a token takes by the model's configuration; 0 where it does not say."""
    configuration = getattr(model, "config", None)
    for part in (getattr(configuration, "text_config", None), configuration):
        top_k = getattr(part, "num_experts_per_tok", None)
        if isinstance(top_k, int):
            return top_k
    return 0


@torch.no_grad()
def observe_batch(
    model: nn.Module, watch: Watch, input_ids: Tensor, attention_mask: Tensor
) -> list[tuple[LayerFacts, Observation]]:
    """Runs a batch through a model, without logits where it is one of transformers.

    Args:
        model (nn.Module): called with `input_ids` and, where it is of transformers, `attention_mask`.
        watch (Watch): of it.
        input_ids (Tensor[B, S_len]): int64.
        attention_mask (Tensor[B, S_len]): int64, 1 = keep, 0 = padding.
    """
    with watch.watching(), _in_sentences(input_ids):
        base: Any = getattr(model, "base_model", None)
        if base is not None:
            base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        else:
            model(input_ids)  # padding is behind: causal models do not see it
    return watch.take()


@contextmanager
def _in_sentences(input_ids: Tensor) -> Iterator[None]:
    """What goes wrong in a forward pass because of the options."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"edl::observe: a batch of {list(input_ids.shape)} tokens must fit into memory, --batch-size and "
            f"--sequence-length make it smaller (got {str(error).partition(chr(10))[0]})"
        ) from error
    except IndexError as error:
        raise ValueError(
            f"edl::observe: the model must know all tokens of its tokenizer, here up to {int(input_ids.max())} (got "
            f"IndexError: {error})"
        ) from error
