"""Objectives of the routing of a transformers model, which hooks capture."""

import functools
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edl.diagnostics.layers import numbers_of
from edl.integrations.transformers.routers import (
    are_distributions,
    choices_of_arguments,
    find_experts,
    find_routers,
    frozen_routers,
    rows_of,
)
from edl.labels.batch import Batch
from edl.moe.router_weights import gram_of
from edl.objectives.base import Objective
from edl.objectives.expert_divergence import ExpertDivergence
from edl.objectives.needs import refuse_unobserved
from edl.objectives.objectives import Objectives
from edl.objectives.schedules import Weight
from edl.objectives.statistics import Statistics
from edl.ops import checks
from edl.reduction.micro_batches import DomainMemory
from edl.reduction.ranks import Group
from edl.routing import Choice, Observation

OBSERVED = frozenset({"logits", "scores", "experts", "weights", "router_gram"})  # what is captured


class _Record:
    """The hook of a router. In a deep copy, as PEFT makes of a router inside a model, it records as before; pickled it
    does nothing."""

    def __init__(self, capture: "_Capture | None" = None, name: str = "", index: int = 0) -> None:
        self.capture = (lambda: None) if capture is None else weakref.ref(capture)
        self.name, self.index = name, index

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Record":
        return self

    def __reduce__(self) -> tuple[type["_Record"], tuple[()]]:
        return (type(self), ())

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        capture = self.capture()
        if capture is not None:
            capture.record(self.name, output if isinstance(output, Tensor) else output[self.index])
            if isinstance(output, Choice):  # of a layer of edl
                capture.record_choices(self.name, output.experts, output.weights)
            capture.record_rows(self.name, router)


class _RecordArguments(_Record):
    """The hook before experts, which get what their router chose."""

    def __call__(self, experts: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        capture = self.capture()
        if capture is not None:
            found = choices_of_arguments(args, kwargs)
            if found is not None:
                capture.record_choices(self.name, *found[0])


class _Capture:
    """What the routers of one model did in its last training forward, in the order in which they ran.

    A training forward is one in train mode with gradients enabled, or inside `memory.collect()`. Evaluation, generation
    and the replays of activation checkpointing, which run routers during the backward pass and outside a forward of the
    model, leave no trace. With `evaluates` it is the other way round: the last forward in evaluation mode counts. In a
    copy of the model the hooks do nothing; in a copy of a router that PEFT puts in its place they record as before.
    Choices are captured where an objective needs them, or statistics.
    """

    def __init__(
        self,
        part: nn.Module | None = None,
        routers: Sequence[tuple[str, nn.Module, int]] = (),
        objectives: Objectives | None = None,
        evaluates: bool = False,
    ) -> None:
        self.part = part
        self.objectives = objectives
        self.evaluates = evaluates
        self.names = [name for name, _, _ in routers]
        names = list(dict.fromkeys(self.names))  # PEFT's copies have one
        self.numbers = dict(zip(names, numbers_of(names)))
        self.warned_of_frozen = False
        self.gives_probabilities: bool | None = None  # until the routers told
        needs = frozenset() if objectives is None else objectives.needs
        self.needs_rows = "router_gram" in needs and not evaluates
        self.clear()
        self.hooks: list[RemovableHandle] = []
        if part is None or objectives is None:
            return
        for name, router, _ in routers if self.needs_rows else ():
            rows_of(name, router)  # refuses one without
        self.hooks.append(part.register_forward_pre_hook(self.begin, with_kwargs=True))
        self.hooks.append(part.register_forward_hook(self.end, always_call=True))
        for name, router, index in routers:
            self.hooks.append(router.register_forward_hook(_Record(self, name, index)))
        if needs & {"experts", "weights"}:
            for name, experts in find_experts(part, self.names):
                self.hooks.append(experts.register_forward_pre_hook(_RecordArguments(self, name), with_kwargs=True))

    def __reduce__(self) -> tuple[type["_Capture"], tuple[()]]:
        return (_Capture, ())  # copied or pickled along with the hooks of a model

    @property
    def has_loss(self) -> bool:
        """Whether somebody teaches the routers, and does not only look."""
        return self.objectives is not None and bool(self.objectives.objectives) and not self.evaluates

    def clear(self) -> None:
        self.is_recording = False
        self.needs_gradient = True
        self.lacks_gradient = False
        self.batch_shape: list[int] = [0]
        self.captured: list[tuple[str, Tensor]] = []
        self.chosen: dict[int, tuple[Tensor, Tensor]] = {}  # by place in `captured`
        self.grams: dict[int, Tensor] = {}  # likewise

    def begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if part is not self.part or part.training == self.evaluates:
            return
        memory = None if self.objectives is None else self.objectives.memory
        is_collecting = not torch.is_grad_enabled() and memory is not None and memory.in_use
        if not torch.is_grad_enabled() and not is_collecting and not self.evaluates:
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a replay of the whole model
        self.clear()
        if not torch.compiler.is_compiling():
            self.warn_of_frozen()
        self.is_recording, self.needs_gradient = True, self.has_loss and not is_collecting
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        self.batch_shape = next((list(x.shape[:2]) for x in inputs if isinstance(x, Tensor) and x.dim() >= 2), [0])

    def record(self, name: str, routing: Tensor) -> None:
        if self.is_recording:
            self.captured.append((name, routing))
            if self.needs_gradient and not torch.is_grad_enabled():
                self.lacks_gradient = True  # the first pass of reentrant checkpointing

    def last_run(self, name: str) -> int | None:
        """Where the last run of a router stands in `captured`."""
        places = [place for place, (ran, _) in enumerate(self.captured) if ran == name] if self.is_recording else []
        return places[-1] if places else None

    def record_choices(self, name: str, experts: Tensor, weights: Tensor) -> None:
        place = self.last_run(name)
        if place is not None:
            self.chosen[place] = (experts.flatten(0, -2), weights.flatten(0, -2))

    def record_rows(self, name: str, router: nn.Module) -> None:
        """Keeps the Gram matrix of a router's rows, which only here are whole under FSDP.

        A replay computes it too, for activation checkpointing saves in both passes what a hook saves in one.
        """
        is_training = self.part is not None and self.part.training and torch.is_grad_enabled()
        if not self.needs_rows or not (self.is_recording or is_training):
            return
        gram = gram_of(rows_of(name, router))
        place = self.last_run(name)
        if place is not None:
            self.grams[place] = gram

    def end(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.is_recording = False

    def warn_of_frozen(self) -> None:
        if self.part is None or self.warned_of_frozen or not self.has_loss:
            return
        self.warned_of_frozen = True
        frozen = frozen_routers(self.part, self.names)
        if frozen:
            warnings.warn(
                "edl::attach: a router without trainable parameters, as under LoRA of PEFT, feels the loss only "
                "through what feeds it; modules_to_save or requires_grad_() trains it "
                f"(got no trainable parameter in {', '.join(frozen)})",
                stacklevel=2,
            )

    def take(self) -> list[Observation]:
        """What each layer did; it is given once."""
        self.warn_of_frozen()  # of a compiled model
        captured, chosen, grams, shape = self.captured, self.chosen, self.grams, self.batch_shape
        needs_gradient, lacks_gradient = self.needs_gradient, self.lacks_gradient
        self.clear()
        missing = [name for name in self.names if name not in {ran for ran, _ in captured}]
        if not captured:
            of_mode = "observe() takes the router logits of the last forward in evaluation mode"
            if not self.evaluates:
                of_mode = "loss() takes the router logits of the last training forward"
            raise ValueError(
                f"edl::attach: {of_mode}, and takes them once; attach before the model is compiled or copied (got no "
                "router logits since)"
            )
        if missing:
            of_mode = "forward in evaluation mode" if self.evaluates else "training forward"
            raise ValueError(
                f"edl::attach: every router must run in the {of_mode}, as a module "
                f"(got no logits of {', '.join(missing)})"
            )
        if lacks_gradient:
            raise ValueError(
                "edl::attach: activation checkpointing must be non-reentrant, with use_reentrant=False "
                "(got router logits computed without gradient)"
            )
        if needs_gradient and not any(logits.requires_grad for _, logits in captured):
            raise ValueError(
                "edl::attach: at least one router must be trainable, or something before it (got router logits that "
                "require no gradient)"
            )
        if self.gives_probabilities is None:
            self.gives_probabilities = are_distributions(captured[0][1])
        if self.gives_probabilities:
            self.refuse_probabilities()
        return [
            self.observation(routing, chosen.get(place), shape)._replace(
                router_gram=grams.get(place), layer=self.numbers[name], router=name
            )
            for place, (name, routing) in enumerate(captured)
        ]

    def refuse_probabilities(self) -> None:
        assert self.objectives is not None
        if self.evaluates:
            return
        for name, objective in self.objectives.objectives.items():
            if "logits" in objective.needs:
                raise ValueError(
                    f"edl::attach: routing must be logits for {name!r}; for probabilities pass input='probs' to "
                    "ExpertDivergence (got a router that gives probabilities)"
                )

    def observation(self, routing: Tensor, chosen: tuple[Tensor, Tensor] | None, shape: list[int]) -> Observation:
        rows = routing.flatten(0, -2)
        # With the number of sequences, so that labels of another batch are refused.
        batch_size = routing.shape[0] if routing.dim() == 3 else shape[0] if len(rows) == math.prod(shape) else -1
        experts, weights = chosen or (None, None)
        if self.gives_probabilities:
            return Observation(scores=rows, weights=weights, experts=experts, batch_size=batch_size)
        return Observation(logits=rows, weights=weights, experts=experts, batch_size=batch_size)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.part, self.names, self.hooks = None, [], []
        self.clear()


class ObjectivesHandle:
    """What `attach` returns: the objectives of an attached model.

    Attributes:
        objectives (Objectives): what is computed; its `step()` belongs after each optimizer step.
        model (nn.Module): the attached model.
        values (dict): name → the last value of each objective without its weight, detached, for logs; empty before the
            first.
    """

    def __init__(self, model: nn.Module, objectives: Objectives) -> None:
        self.objectives = objectives
        self.values: dict[str, Tensor] = {}
        self._factor = 1  # of a sum over layers, in beta and value
        self._frees_memory = False
        self._capture, self._evaluation = _Capture(), _Capture(evaluates=True)
        refuse_unobserved("attach", objectives.objectives, OBSERVED)
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        """Attaches to this model, and no longer to another."""
        part, routers = find_routers(model)
        self._capture.remove()
        self._capture = _Capture(part, routers, self.objectives)
        self._evaluation.remove()
        if self.objectives.evaluation_statistics is not None:
            self._evaluation = _Capture(part, routers, self.objectives, evaluates=True)
        self.model = model

    def _only(self, name: str) -> str:
        names = list(self.objectives.objectives)
        if len(names) > 1:
            raise ValueError(
                f"edl::attach: {name} must be that of a single objective, for several there are values and "
                f"objectives.weights (got {names})"
            )
        return names[0]

    @property
    def beta(self) -> float:
        """The weight of a single objective, in the short form of the loss; may be changed at any time."""
        return float(self.objectives.weights[self._only("beta")]) / self._factor

    @beta.setter
    def beta(self, beta: float) -> None:
        _check_beta(beta)
        self.objectives.set_weight(self._only("beta"), beta * self._factor)

    @property
    def value(self) -> Tensor | None:
        """The last value of a single objective without its weight, detached; None before the first."""
        value = self.values.get(self._only("value"))
        return None if value is None else value * self._factor

    def loss(
        self,
        domain_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **labels: Tensor,
    ) -> Tensor:
        """The objectives of the model's last training forward, with their weights, to be added to the model's own loss.

        Call it once after each training forward: what was captured is released. Forwards in eval mode or without
        gradients (evaluation, generation) do not count, but those inside `collect()` of the objectives' memory do.

        Args:
            domain_ids (Tensor, optional): the set of labels that `ExpertDivergence` takes by default: [B] one label per
                sequence, [B, S_len] one per token, int32 or int64 in [-1, D), -1 = not counted; floating [B, D]
                weights; with cu_seqlens also [N] per document.
            attention_mask (Tensor[B, S_len], optional): 1 = keep, 0 = padding.
            padding_mask (Tensor[B, S_len], optional): True = padding.
            cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents in the flattened batch.
            **labels (Tensor): further sets of labels, by the names that objectives have for them.

        Returns:
            The total, a scalar.

        Raises:
            ValueError: no training forward since the last call, a router that did not run, router logits without
                gradient (reentrant checkpointing, or all of it frozen), a model that does not offer what an objective
                needs, and what `edl.objectives.Objectives` raises.
        """
        if domain_ids is not None:
            labels["domain_ids"] = domain_ids
        batch_of = functools.partial(_batch_of, attention_mask, padding_mask, cu_seqlens, labels)
        total, self.values = self.objectives.begin_batch(self._capture.take, batch_of)()
        return total

    def observe(
        self,
        domain_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **labels: Tensor,
    ) -> None:
        """Lets `evaluation_statistics` of the objectives count the model's last forward in evaluation mode.

        Call it once after each such forward: what was captured is released.

        Args:
            domain_ids, attention_mask, padding_mask, cu_seqlens, **labels: as `loss` takes them.

        Raises:
            ValueError: no such forward since the last call, objectives that had no `evaluation_statistics` when they
                were attached, and what `edl.RoutingStatistics` raises.
        """
        if domain_ids is not None:
            labels["domain_ids"] = domain_ids
        batch_of = functools.partial(_batch_of, attention_mask, padding_mask, cu_seqlens, labels)
        self.objectives.look(self._evaluation.take, batch_of, training=False)

    def remove(self) -> None:
        """Takes the hooks off the model and releases what they captured; the memory of the short form is free for
        another loss."""
        self._capture.remove()
        self._evaluation.remove()
        memory = self.objectives.memory
        if self._frees_memory and memory is not None:
            memory.release(self.objectives)
            self.objectives.memory = None


def _batch_of(
    attention_mask: Tensor | None,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    labels: Mapping[str, Tensor],
    layers: list[Observation],
) -> Batch:
    """What is known of the tokens that layers saw."""
    rows = next(x for x in layers[0] if isinstance(x, Tensor))
    return Batch(rows.shape[0], rows.device, layers[0].batch_size, attention_mask, padding_mask, cu_seqlens, labels)


def _check_beta(beta: float) -> None:
    checks.check_numbers("attach", beta=beta)
    if not math.isfinite(beta):
        raise ValueError(f"edl::attach: beta must be finite (got {beta})")


def _attach_divergence(
    model: nn.Module,
    num_domains: int,
    beta: float,
    layer_reduction: str = "mean",
    group: Group | None = None,
    sequence_group: Group | None = None,
    averaging_ranks: int | None = None,
    memory: DomainMemory | None = None,
    statistics: Statistics | None = None,
    evaluation_statistics: Statistics | None = None,
    **options: Any,
) -> ObjectivesHandle:
    """The short form of `attach`: a single objective."""
    _check_beta(beta)
    if layer_reduction not in ["mean", "sum"]:  # a list also takes what has no hash
        raise ValueError(f"edl::attach: layer_reduction must be 'mean' or 'sum' (got {layer_reduction!r})")
    objective = ExpertDivergence(num_domains, **options)
    routers = {name for name, _, _ in find_routers(model)[1]}
    factor = len(routers) if layer_reduction == "sum" else 1
    bound = {"expert_divergence": (objective, beta * factor)}
    objectives = Objectives(bound, group, sequence_group, averaging_ranks, memory, statistics, evaluation_statistics)
    handle = ObjectivesHandle(model, objectives)
    handle._factor, handle._frees_memory = factor, True
    return handle


def unbound_objectives(objectives: Objectives | Mapping[str, tuple[Objective, Weight]]) -> Objectives:
    return objectives if isinstance(objectives, Objectives) else Objectives(objectives)


@overload
def attach(model: nn.Module, objectives: Objectives | Mapping[str, tuple[Objective, Weight]]) -> ObjectivesHandle: ...


@overload
def attach(
    model: nn.Module, objectives: int, beta: float, num_domains: None = None, **options: Any
) -> ObjectivesHandle: ...


@overload
def attach(
    model: nn.Module, objectives: None = None, *, beta: float, num_domains: int, **options: Any
) -> ObjectivesHandle: ...


def attach(model: nn.Module, objectives: Any = None, beta: Any = None, num_domains: Any = None, **options: Any) -> Any:
    """Captures what the routers of a model do in its training forwards, for objectives of the routing.

        handle = attach(model, {
            "expert_divergence": (ExpertDivergence(num_domains=3), 1e-2),
            "load_balancing": (LoadBalancing(), 1e-2),
        })
        loss = model(**batch).loss + handle.loss(domain_ids, batch["attention_mask"])

    For the Expert Divergence loss alone `attach(model, num_domains=3, beta=1e-2)` is enough. To see the routing of a
    model that is trained without any, `Objectives({}, statistics=RoutingStatistics(3))`.

    Forward hooks read what each router computes: the model's configuration, outputs and its own auxiliary loss stay as
    they are. The routers are those whose logits transformers records (`output_router_logits`), and those of
    `edl.MoELayer` in the place of a block. What they chose, experts and weights, is read where an objective needs it:
    from the arguments of the experts beside the router, which Llama 4 and encoder-decoder models do not have. A router
    that gives probabilities offers scores instead of logits. Attach before or after wrapping (DDP, FSDP, PEFT), before
    the first call of a compiled model. A copy of the model is not attached. Several handles on one model are
    independent of each other.

    Args:
        model (nn.Module): a model of transformers, or something around one.
        objectives (Objectives, or a mapping of names to (objective, weight)): what to compute. Bind them to ranks and a
            memory where there are any.
        num_domains (int): D, at least 2; instead of objectives, as the second argument.
        beta (float): weight of the loss, finite and not negative.
        options: with num_domains: as for `edl.ExpertDivergenceLoss`: `scores="sigmoid"` for DeepSeek-V3 and other
            routers with sigmoid scores, `input="probs"` for routers that give probabilities (Gemma 4);
            `layer_reduction="sum"` multiplies beta by the number of routers.

    Returns:
        `ObjectivesHandle`, with `.loss(domain_ids, attention_mask)` and `.remove()`.

    Raises:
        ValueError: a model without routers, or with routers in several parts (attach to one of the parts); options
            outside their range.
    """
    if isinstance(objectives, (Objectives, Mapping)):
        also = [name for name, given in {"num_domains": num_domains, "beta": beta}.items() if given is not None]
        if also or options:
            raise ValueError(
                "edl::attach: objectives must be given alone, as they have options and weights of their own "
                f"(got {', '.join([*also, *options])} beside them)"
            )
        return ObjectivesHandle(model, unbound_objectives(objectives))
    if num_domains is None:
        num_domains = objectives
    if num_domains is None or beta is None:
        raise ValueError(
            "edl::attach: objectives, or num_domains and beta, must be given (got "
            f"{'no num_domains' if num_domains is None else 'no beta'})"
        )
    return _attach_divergence(model, num_domains, beta, **options)
