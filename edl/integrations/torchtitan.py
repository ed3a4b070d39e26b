"""Objectives of the routing in torchtitan: each router gets a copy, whose gradient enters through the top-k scores.

torchtitan has two interfaces, told apart by what is there. Its development version has `AuxLoss`, a module that the
configuration of a router names: `ObjectivesAuxLoss` is one. Up to 0.3.0 there is none, and `ObjectivesRouter` takes the
router's place. Either way `add_objectives(model_config, ...)` sets it up, or `add_expert_divergence(model_config, ...)`
for the divergence alone, and labels come from `edl.domain_scope`. The router is tested on torchtitan 0.3.0 itself, the
auxiliary loss on a stand-in for its interface.

Which factor makes the gradient right. torchtitan adds gradients up, over data and context ranks and over micro-batches,
and averages nothing; its losses are sums over tokens, divided by N, the tokens of the step. A micro-batch m, of T_m
tokens over all ranks, therefore counts T_m / N, and a step has the gradient Σ_m (T_m / N) ∇L_m: that of the mean loss
of its micro-batches, where L_m is the total of all ranks' tokens, the mean over layers of each objective times its
weight. Rank r contributes ∇_r L_m, its own part of it (`edl.objectives.Objectives`), and these add up to ∇L_m.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from spmd_types import no_typecheck
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torchtitan.distributed.spmd_types import current_spmd_mesh
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from edl.labels.scope import current_labels
from edl.objectives import ExpertDivergence, Objective, Objectives
from edl.objectives.needs import refuse_unobserved
from edl.ops import checks, inject
from edl.reduction.micro_batches import DomainMemory
from edl.routing import Observation

try:
    from torchtitan.models.common.aux_loss import AuxLoss
except ModuleNotFoundError:  # up to 0.3.0
    AuxLoss = None

LABELS = "domain_ids"  # the set that a scope has
OBSERVED = frozenset({"scores", "weights", "experts"})  # what routers hand over


class _Ranks:
    """Groups of torchtitan's mesh: ranks that share a batch (`data`), ranks with slices of it (`context`), or None."""

    def __init__(self) -> None:
        mesh = current_spmd_mesh()
        if mesh is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "edl::torchtitan: with several ranks the model must run in torchtitan's training context, with "
                "parallelism.spmd_backend='spmd_types' (got no mesh)"
            )
        sizes = {} if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape))
        if sizes.get("tp", 1) > 1:
            raise ValueError(f"edl::torchtitan: tensor parallelism is not supported (got a degree of {sizes['tp']})")
        self.data = mesh.get_group("dp") if sizes.get("dp", 1) > 1 else None
        self.context = mesh.get_group("cp") if sizes.get("cp", 1) > 1 else None
        self.data_size, self.context_size = sizes.get("dp", 1), sizes.get("cp", 1)


class _RouterObjectives:
    """The objectives of one router. No module, so that checkpoints and parallelisation do not see it.

    Args:
        objectives (Objectives): of which it makes a copy.
        memory (bool): carry sums over the micro-batches of a step.
        shares_tokens (bool): whether the caller multiplies the total by T_m / R, the share of one of R data ranks,
            which the gradient then makes up for.
        passes_of_step (int, optional): the passes after which a step ends; None where somebody calls `end_step`.
    """

    def __init__(
        self, objectives: Objectives, memory: bool, shares_tokens: bool, passes_of_step: int | None = None
    ) -> None:
        self.objectives = _for_routers(objectives)
        self.passes_of_step = passes_of_step
        self.needs = frozenset().union(*(objective.needs for objective in self.objectives.objectives.values()))
        needs_labels = [_labels_of(objective) is not None for objective in self.objectives.objectives.values()]
        self._some_need_labels, self._all_need_labels = any(needs_labels), all(needs_labels)
        self._has_memory = memory
        self._shares_tokens = shares_tokens
        self._is_bound = False
        self.ranks: _Ranks  # from the first pass on
        self.values: dict[str, Tensor] = {}  # of the latest pass with an effect, NaN before
        self.passes = 0

    def _bind(self) -> None:
        """At the first pass: the mesh is known in training only; models are copied and split before."""
        self.ranks = _Ranks()
        steps = self.objectives.get_extra_state()
        self.objectives = self.objectives.bind(
            group=self.ranks.data,
            sequence_group=self.ranks.context,
            averaging_ranks=self.ranks.data_size if self._shares_tokens else 1,
            memory=DomainMemory() if self._has_memory else None,
        )
        self.objectives.set_extra_state(steps)
        self._is_bound = True

    def __call__(
        self, scores: Tensor, weights: Tensor | None, experts: Tensor | None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The losses of the forward pass in which it is called.

        Args:
            scores (Tensor[T, E] or Tensor[B, S_len, E]): of all experts, not negative: softmax, sigmoid or else.
            weights (Tensor[T, K] or Tensor[B, S_len, K], optional): of the chosen experts; needed if an objective is.
            experts (Tensor[T, K] or Tensor[B, S_len, K], optional): the chosen experts.
            padding_mask (Tensor[T], optional): True = padding; a mask of the scope comes first.

        Returns:
            total and values, as `Objectives` gives them, of this layer; None where the pass keeps no gradient, or has
            no labels and every objective needs them. Where some do without, such a pass has no labelled tokens.
        """
        labels = current_labels()
        if not torch.is_grad_enabled() or (labels is None and self._all_need_labels):
            return None
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "edl::torchtitan: a CUDA graph would replay the labels of its capture, training.disable_cuda_graphs "
                "must be set (got a capture)"
            )
        if not self._is_bound:
            self._bind()
        self._refuse_cut_sequences(scores)
        given = {} if labels is None else labels._asdict()
        if given.get("attention_mask") is None and given.get("padding_mask") is None:
            given["padding_mask"] = padding_mask
        if labels is None and self._some_need_labels:
            rows = scores.shape[:-1] if scores.dim() == 3 else (1, scores.shape[0])
            given[LABELS] = torch.full(rows, -1, device=scores.device)
        is_replay = _is_replay()
        if self.passes == self.passes_of_step and not is_replay:
            self.end_step()
        observation = Observation(
            # Every score function becomes a distribution over experts, as in torchtitan's own balancing losses.
            scores=F.normalize(scores, p=1, dim=-1).flatten(0, -2),
            weights=None if weights is None else weights.flatten(0, -2),
            experts=None if experts is None else experts.flatten(0, -2),
            batch_size=scores.shape[0] if scores.dim() == 3 else -1,
        )
        total, values = self.objectives(observation, **given)
        values = {name: value.to(total.dtype) for name, value in values.items()}
        if not is_replay:
            self.passes += 1
            for name, value in values.items():
                self.values[name] = value.where(self.has_effect(name), self.values.get(name, torch.nan))
        return total, values

    def _refuse_cut_sequences(self, scores: Tensor) -> None:
        if scores.dim() == 3 or self.ranks.context is None:
            return
        for name, objective in self.objectives.objectives.items():
            if objective.by_unit:
                raise ValueError(
                    "edl::torchtitan: context parallelism cuts the token stream anywhere and needs objectives of "
                    "tokens, as the divergence is with sequence_reduction='token' and the labels of the slice "
                    f"(got {name!r}, which is one of sequences)"
                )

    def has_effect(self, name: str) -> Tensor:
        """Whether an objective had something to act on in the latest pass that was no replay, a bool scalar."""
        return self.objectives.has_effect[name]

    def end_step(self) -> None:
        """Ends a step of the optimizer."""
        self.passes = 0
        self.objectives.step()


def _is_replay() -> bool:
    """Whether a forward pass runs within a backward pass, as checkpointing has it."""
    return torch._C._current_autograd_node() is not None


class _LoggedMean:
    """Makes torchtitan, which adds up the losses of a step's passes, log the mean of those that had an effect.

    A pass without, as one without a pair of domains, has the loss 0, which would look perfect: it counts as the mean of
    the others of the step, or of the latest step that had one; 0 before there was any.
    """

    _loss: Tensor | float
    _logged: Tensor | float
    _share: Tensor | float
    _share_with_effect: Tensor | float

    def __init__(self) -> None:
        self._mean: Tensor | float = 0.0
        self.end_step()

    def add(self, loss: Tensor, share: Tensor | int, has_effect: Tensor) -> Tensor:
        """What is to be added for a pass, whose loss is multiplied by its share already."""
        self._loss, self._share = self._loss + loss.where(has_effect, 0.0), self._share + share
        self._share_with_effect = self._share_with_effect + has_effect.to(loss.dtype) * share
        self._mean = torch.where(self._share_with_effect > 0, self._loss / self._share_with_effect, self._mean)
        before, self._logged = self._logged, self._mean * self._share
        return self._logged - before

    def end_step(self) -> None:
        self._loss = self._logged = self._share = self._share_with_effect = 0.0


if AuxLoss is not None:

    class _ObjectiveMetric(AuxLoss):
        """Lets torchtitan log one more objective of an `ObjectivesAuxLoss`; it has no gradient."""

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(AuxLoss.Config):
            objective: str

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self._objective = config.objective

        @property
        def metric_name(self) -> str:
            return f"{self._objective}_loss"

    class ObjectivesAuxLoss(AuxLoss):
        """Objectives as an auxiliary loss of torchtitan's routers.

        On each of R data ranks the value is L_m · T_m / R. Divided by the tokens of the step and added over ranks and
        micro-batches, as torchtitan does, each objective is logged as `<name>_loss/mean`, without its weight: the mean
        of the L_m, over layers too, of the passes in which it had an effect. The gradient is multiplied by R, once.
        Tokens are those that `padding_mask_T` leaves. A forward pass outside any `edl.domain_scope` has no labels.

        Args:
            config (Config): coeff, the factor of this router's total: 1 by the number of layers; objectives and
                memory, as `add_objectives` takes them; also, the configuration of another auxiliary loss of the router,
                or None; the rest as `AuxLoss.Config`.
        """

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(AuxLoss.Config):
            objectives: Objectives
            memory: bool = False
            also: AuxLoss.Config | None = None

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.objectives = _RouterObjectives(config.objectives, config.memory, shares_tokens=True)
            self._logged_means = {name: _LoggedMean() for name in config.objectives.objectives}
            self._first, *others = self._logged_means
            same = {field.name: getattr(config, field.name) for field in dataclasses.fields(AuxLoss.Config)}
            for place, name in enumerate(others, start=1):
                metric = _ObjectiveMetric(_ObjectiveMetric.Config(**same, objective=name))
                self.add_module(f"metric_{place}", metric)
            self.also = None if config.also is None else config.also.build()

        @property
        def metric_name(self) -> str:
            return f"{self._first}_loss"

        def _share_of_tokens(self, num_tokens: int, padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | int:
            """T_m / R: the tokens of this pass over all ranks, per data rank."""
            ranks = self.objectives.ranks
            if padding_mask is None:
                return num_tokens * ranks.context_size  # the same on all ranks
            tokens = (~padding_mask).sum().to(dtype)
            for group in (ranks.context, ranks.data):
                if group is not None:
                    tokens = all_reduce(tokens, "sum", group)
            return tokens / ranks.data_size

        def _logged(self, values: dict[str, Tensor], share: Tensor | int) -> list[Tensor]:
            """What to log of each objective."""
            if _is_replay():
                return [value * share for value in values.values()]
            return [
                self._logged_means[name].add(value * share, share, self.objectives.has_effect(name))
                for name, value in values.items()
            ]

        def forward(
            self,
            scores_TE: Tensor,
            routing_map_TE: Tensor,
            *,
            carrier: Tensor,
            padding_mask_T: Tensor | None = None,
            denominator: Tensor,
        ) -> Tensor:
            """Injects the gradient.

            Args:
                scores_TE (Tensor[T, E]): scores of all experts.
                routing_map_TE (Tensor[T, E]): not 0 where an expert was chosen.
                carrier (Tensor[T, K]): top-k scores.
                padding_mask_T (Tensor[T], optional): True = padding.
                denominator (Tensor): a scalar, the tokens of the step over all ranks.

            Returns:
                The carrier.
            """
            if self.also is not None:
                carrier = self.also(
                    scores_TE, routing_map_TE, carrier=carrier, padding_mask_T=padding_mask_T, denominator=denominator
                )
            with no_typecheck():
                weights, experts = None, None
                if self.objectives.needs & {"weights", "experts"}:
                    weights, experts = _choices(scores_TE, routing_map_TE, carrier)
                losses = self.objectives(scores_TE, weights, experts, padding_mask_T)
                if losses is None:
                    return carrier
                total, values = losses
                share = self._share_of_tokens(scores_TE.shape[0], padding_mask_T, total.dtype)
                total = total * share
                first, *others = self._logged(values, share)
                first = first + (total - total.detach())  # the value that is logged, the gradient of the total
            carrier = self.inject(first, carrier=carrier, denominator=denominator)
            for place, logged in enumerate(others, start=1):
                metric = self.get_submodule(f"metric_{place}")
                carrier = metric.inject(logged, carrier=carrier, denominator=denominator)
            return carrier

        def _reset_accumulators(self) -> None:
            super()._reset_accumulators()
            self.objectives.end_step()
            for mean in self._logged_means.values():
                mean.end_step()

    def _choices(scores: Tensor, routing_map: Tensor, top_scores: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, experts), [T, K] each, best first: the more an expert scores, the more it weighs."""
        chosen = scores.detach().masked_fill(routing_map == 0, -torch.inf)
        experts = chosen.topk(top_scores.shape[-1], dim=-1).indices
        return top_scores.sort(dim=-1, descending=True).values, experts

else:

    class ObjectivesRouter(TokenChoiceTopKRouter):
        """torchtitan's router up to 0.3.0, with objectives.

        Args:
            config (Config): coeff, the factor of this router's total: 1 by the number of layers; objectives, memory
                and micro_batches, as `add_objectives` takes them; the rest as `TokenChoiceTopKRouter.Config`.
        """

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(TokenChoiceTopKRouter.Config):
            coeff: float
            objectives: Objectives
            memory: bool = False
            micro_batches: int = 1

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.micro_batches = checks.as_integer("torchtitan", "micro_batches", config.micro_batches, lowest=1)
            self.coeff = config.coeff
            self.objectives = _RouterObjectives(
                config.objectives, config.memory, shares_tokens=False, passes_of_step=self.micro_batches
            )

        def forward(
            self,
            x_BLD: Tensor,
            expert_bias_E: Tensor | None = None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            """As `TokenChoiceTopKRouter.forward`; the top-k scores carry the gradient of the total."""
            topk_scores, topk_expert_ids, scores = super().forward(x_BLD, expert_bias_E)
            if self.training:
                with no_typecheck():
                    losses = self.objectives(scores, topk_scores, topk_expert_ids)
                    if losses is not None:
                        topk_scores = inject(topk_scores, losses[0] * (self.coeff / self.micro_batches))
            return topk_scores, topk_expert_ids, scores

    def register_step_hook(
        optimizers: torch.optim.Optimizer, model_parts: list[nn.Module], parallel_dims: Any = None
    ) -> None:
        """Ends the step of all routers after each optimizer step: a `post_optimizer_build_fn` of `ModelSpec`.

        Without it a step ends when the first of `micro_batches` further passes begins. It also makes every step check
        that it had `micro_batches` of them.

        Args:
            optimizers (Optimizer): torchtitan's container, or any optimizer.
            model_parts (list[Module]): the parts of the model on this rank.
            parallel_dims: not used.
        """
        for router in _routers(model_parts):
            router.objectives.passes_of_step = None
        optimizers.register_step_post_hook(lambda *arguments: _end_step(model_parts))

    def _routers(model_parts: list[nn.Module]) -> list[ObjectivesRouter]:
        modules = [module for part in model_parts for module in part.modules()]
        return [module for module in modules if isinstance(module, ObjectivesRouter)]

    def _end_step(model_parts: list[nn.Module]) -> None:
        routers = _routers(model_parts)
        passes = [(router.objectives.passes, router.micro_batches) for router in routers]
        for router in routers:
            router.objectives.end_step()
        for counted, micro_batches in passes:
            if counted not in (0, micro_batches):
                raise ValueError(
                    "edl::torchtitan: micro_batches must be the number of labelled forward passes of a step, "
                    f"{counted} (got {micro_batches})"
                )


def add_objectives(model_config: Any, objectives: Objectives, *, micro_batches: int = 1, memory: bool = False) -> None:
    """Gives every router of a model objectives; what else its configuration says stays.

    Call it before the model is built. A step then has the total of `edl.objectives.Objectives`: for each objective its
    weight times the mean over layers, of the tokens of all data and context ranks, averaged over micro-batches. Each
    router has a copy of the objectives, and one all-reduce for all of them. Not for tensor parallelism, torch.compile
    or CUDA graphs.

    Routers hand over scores, as distributions over experts, and the chosen experts with their weights, but no logits.
    `ExpertDivergence` therefore reads the scores of the router's own function, whatever its `input` and `scores` say.
    Labels, called "domain_ids", come from an `edl.domain_scope` around each forward pass; under context parallelism
    labels per token are those of the rank's slice. Outside any scope objectives that name labels do nothing, and the
    others act.

    Args:
        model_config (Configurable.Config): of a torchtitan model; changed in place.
        objectives (Objectives): not bound to ranks or a memory.
        micro_batches (int): forward passes of a step on one rank: gradient accumulation steps times micro-batches of
            the pipeline. Up to torchtitan 0.3.0; later versions count tokens and it is not looked at. Default: 1.
        memory (bool): carry the sums over the micro-batches of a step (`edl.DomainMemory`), which under activation
            checkpointing needs a scope around every pass. Default: False.

    Raises:
        ValueError: objectives that are bound, need logits, or labels that a scope does not have; no router, a router of
            another class (up to 0.3.0), or one that has objectives already.
    """
    checks.check_flags("torchtitan", memory=memory)
    micro_batches = checks.as_integer("torchtitan", "micro_batches", micro_batches, lowest=1)
    objectives = _for_routers(objectives)
    found = list(model_config.traverse(TokenChoiceTopKRouter.Config))
    if not found:
        raise ValueError(f"edl::torchtitan: a model must have routers (got {type(model_config).__qualname__})")
    if any(_has_objectives(router) for _, router, _, _ in found):
        raise ValueError(
            "edl::torchtitan: add_objectives or add_expert_divergence must be called once for a model (got a router "
            "that has the loss)"
        )
    if AuxLoss is None:
        for name, router, _, _ in found:
            if type(router) is not TokenChoiceTopKRouter.Config:
                raise ValueError(
                    f"edl::torchtitan: {name} must be a TokenChoiceTopKRouter, derive from ObjectivesRouter for others "
                    f"(got {type(router).__qualname__})"
                )
    added: dict[str, Any] = {"coeff": 1.0 / len(found), "objectives": objectives, "memory": memory}
    for _, router, parent, field in found:
        if AuxLoss is None:
            same = {entry.name: getattr(router, entry.name) for entry in dataclasses.fields(router)}
            setattr(parent, field, ObjectivesRouter.Config(**same, **added, micro_batches=micro_batches))
        elif not _has_objectives(router):  # layers may share one configuration
            router.aux_loss = ObjectivesAuxLoss.Config(**added, also=router.aux_loss)


def add_expert_divergence(
    model_config: Any, *, num_domains: int, coeff: float, micro_batches: int = 1, memory: bool = False, **options: Any
) -> None:
    """`add_objectives` of the Expert Divergence loss (arXiv 2603.00054) alone, under the name "expert_divergence".

    Args:
        model_config (Configurable.Config): of a torchtitan model; changed in place.
        num_domains (int): D, at least 2.
        coeff (float): weight of the loss (beta of the paper).
        micro_batches, memory: as `add_objectives` takes them.
        **options: eps, sequence_reduction, pair_reduction, bias_correction of `edl.objectives.ExpertDivergence`.

    Raises:
        ValueError: options outside their range or unknown, and what `add_objectives` raises.
    """
    known = [field.name for field in dataclasses.fields(ExpertDivergence)]
    for option in options:
        if option not in known:
            raise ValueError(f"edl::torchtitan: the options of ExpertDivergence must be among {known} (got {option!r})")
    divergence = ExpertDivergence(num_domains=num_domains, **options)
    objectives = Objectives({"expert_divergence": (divergence, coeff)})
    add_objectives(model_config, objectives, micro_batches=micro_batches, memory=memory)


def _for_routers(objectives: Objectives) -> Objectives:
    """A copy, of objectives that read what routers hand over.

    Raises:
        ValueError: no objectives, or some that cannot.
    """
    if not isinstance(objectives, Objectives):
        raise ValueError(
            f"edl::torchtitan: objectives must be edl.objectives.Objectives (got {type(objectives).__name__})"
        )
    own = objectives.bind()
    own.objectives = {name: _observing(name, objective) for name, objective in own.objectives.items()}
    return own


def _observing(name: str, objective: Objective) -> Objective:
    """The objective, reading what routers hand over."""
    if isinstance(objective, ExpertDivergence):
        objective = dataclasses.replace(objective, input="probs")
    refuse_unobserved("torchtitan", {name: objective}, OBSERVED)
    if _labels_of(objective) not in (None, LABELS):
        raise ValueError(
            f"edl::torchtitan: labels come from edl.domain_scope, so that objectives must name {LABELS!r} "
            f"(got {_labels_of(objective)!r} of {name!r})"
        )
    return objective


def _labels_of(objective: Objective) -> str | None:
    """The set of labels that an objective names, if it needs one."""
    return getattr(objective, "labels", None)


def _has_objectives(router: Any) -> bool:
    if AuxLoss is None:
        return isinstance(router, ObjectivesRouter.Config)
    return isinstance(router.aux_loss, ObjectivesAuxLoss.Config)


def layer_losses(model: nn.Module, objective: str = "expert_divergence") -> dict[str, Tensor]:
    """The latest value of an objective in each layer, for logging.

    Args:
        model (Module): a model, or a part of one.
        objective (str): its name. Default: that of `add_expert_divergence`.

    Returns:
        Name of the router or auxiliary loss → a scalar without weight, the loss of all ranks' tokens in its latest pass
        that had an effect, for the divergence one that held a pair of domains; NaN where none did.

    Raises:
        ValueError: no such objective.
    """
    found = _objectives_of_routers(model)
    for each in found.values():
        if objective not in each.objectives.objectives:
            raise ValueError(
                f"edl::torchtitan: objective must be one of {list(each.objectives.objectives)} (got {objective!r})"
            )
    return {name: each.values[objective] for name, each in found.items() if objective in each.values}


def objective_metrics(model: nn.Module) -> dict[str, Tensor]:
    """What to log of the losses of all layers since the last call; nothing waits for the device.

    Args:
        model (Module): a model, or a part of one.

    Returns:
        Float64 scalars, means over layers and passes with an effect, NaN where none had one: for each objective
        `<name>_loss`, without its weight; what it measures, of `add_expert_divergence` `expert_divergence/nats`, the
        Jensen-Shannon divergence itself (higher is better), and `expert_divergence/pairs`, the number of pairs of
        domains, of all passes; `<name>/<name of the router or auxiliary loss>`, the loss of one layer;
        `<name>/steps_without_effect` since the last call, and `<name>/weight`. Nothing before the first pass.
    """
    entries: dict[str, list[Tensor]] = {}
    for router, each in _objectives_of_routers(model).items():
        of_layer = {f"{name}/layer_0": f"{name}/{router}" for name in each.objectives.objectives}
        for entry, value in each.objectives.log().items():
            entries.setdefault(of_layer.get(entry, entry), []).append(value.double())
    return {entry: torch.stack(values).nanmean() for entry, values in entries.items()}


def _objectives_of_routers(model: nn.Module) -> dict[str, _RouterObjectives]:
    found = {name: getattr(module, "objectives", None) for name, module in model.named_modules()}
    return {name: each for name, each in found.items() if isinstance(each, _RouterObjectives)}


def set_step(model: nn.Module, step: int) -> None:
    """Lets weights that depend on the step go on from that of a checkpoint, which torchtitan's Trainer restores.

    Args:
        model (Module): a model, or a part of one.
        step (int): the optimizer steps that were made.

    Raises:
        ValueError: a step that is no number of steps.
    """
    step = checks.as_integer("torchtitan", "step", step)
    for each in _objectives_of_routers(model).values():
        each.objectives.set_extra_state(step)
