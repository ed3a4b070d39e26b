"""The objectives of one router, bound at its first pass to the ranks of torchtitan's mesh."""

import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.distributed.spmd_types import current_spmd_mesh

from edl.diagnostics.layers import numbers_of
from edl.labels.scope import Labels, current_labels
from edl.objectives import ExpertDivergence, Objective, Objectives
from edl.objectives.batches import batch_of
from edl.objectives.needs import refuse_unobserved
from edl.ops import checks
from edl.reduction.micro_batches import DomainMemory
from edl.routing import Observation

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


class RouterObjectives:
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
        self.objectives = for_routers(objectives)
        self.passes_of_step = passes_of_step
        self.needs = self.objectives.needs
        self._label_sets = self.objectives.label_sets
        self._all_need_labels = None not in [objective.labels for objective in self.objectives.objectives.values()]
        self.layer: tuple[int, str] | None = None  # its number and name, which statistics need
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
        self,
        scores: Tensor,
        weights: Tensor | None,
        experts: Tensor | None,
        padding_mask: Tensor | None = None,
        training: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The losses of the forward pass in which it is called.

        Args:
            scores (Tensor[T, E] or Tensor[B, S_len, E]): of all experts, not negative: softmax, sigmoid or else.
            weights (Tensor[T, K] or Tensor[B, S_len, K], optional): of the chosen experts; needed if an objective is.
            experts (Tensor[T, K] or Tensor[B, S_len, K], optional): the chosen experts.
            padding_mask (Tensor[T], optional): True = padding; a mask of the scope comes first.
            training (bool): whether the model is in training mode. Default: True.

        Returns:
            total and values, as `Objectives` gives them, of this layer; None where the pass keeps no gradient, or has
            no labels and every objective needs them. Where some do without, such a pass has no labelled tokens.
            Statistics count it all the same.
        """
        labels = current_labels()
        acts = bool(self.objectives.objectives) and not (labels is None and self._all_need_labels)
        has_loss = acts and training and torch.is_grad_enabled()
        statistics = self.objectives.statistics if training else self.objectives.evaluation_statistics
        if not has_loss and statistics is None:
            return None
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "edl::torchtitan: a CUDA graph would replay the labels of its capture, training.disable_cuda_graphs "
                "must be set (got a capture)"
            )
        if not self._is_bound:
            self._bind()
        self._refuse_cut_sequences(labels, scores)
        given = self._given(labels, scores, padding_mask)
        observation = self._observation(scores, weights, experts, statistics is not None)
        if not has_loss:
            self._count(observation, given, training)
            return None
        repeats = is_replay()
        if self.passes == self.passes_of_step and not repeats:
            self.end_step()
        total, values = self.objectives(observation, **given)
        values = {name: value.to(total.dtype) for name, value in values.items()}
        if not repeats:
            self.passes += 1
            for name, value in values.items():
                self.values[name] = value.where(self.has_effect(name), self.values.get(name, torch.nan))
        return total, values

    def _observation(self, scores: Tensor, weights: Tensor | None, experts: Tensor | None, counts: bool) -> Observation:
        if counts and self.layer is None:
            raise ValueError(
                "edl::torchtitan: statistics need the numbers of the layers, number_layers(model) after it was built "
                "(got none)"
            )
        number, name = self.layer or (-1, "")
        return Observation(
            # Every score function becomes a distribution over experts, as in torchtitan's own balancing losses.
            scores=F.normalize(scores, p=1, dim=-1).flatten(0, -2),
            weights=None if weights is None else weights.flatten(0, -2),
            experts=None if experts is None else experts.flatten(0, -2),
            batch_size=scores.shape[0] if scores.dim() == 3 else -1,
            layer=number,
            router=name,
        )

    def _count(self, observation: Observation, given: dict[str, Tensor | None], training: bool) -> None:
        """Lets statistics count a pass without losses."""
        attention_mask, padding_mask, cu_seqlens = (
            given.pop(name, None) for name in ("attention_mask", "padding_mask", "cu_seqlens")
        )
        labels = {name: each for name, each in given.items() if each is not None}
        self.objectives.look(
            lambda: [observation],
            lambda layers: batch_of("torchtitan", layers, attention_mask, padding_mask, cu_seqlens, labels),
            training,
        )

    def _given(self, labels: Labels | None, scores: Tensor, padding_mask: Tensor | None) -> dict[str, Tensor | None]:
        """What is known of the tokens, by the names that objectives have for it."""
        if labels is None:
            rows = scores.shape[:-1] if scores.dim() == 3 else (1, scores.shape[0])
            none = {name: torch.full(rows, -1, device=scores.device) for name in self._label_sets}
            return {"padding_mask": padding_mask, **none}
        has_mask = labels.attention_mask is not None or labels.padding_mask is not None
        return {
            "attention_mask": labels.attention_mask,
            "padding_mask": labels.padding_mask if has_mask else padding_mask,
            "cu_seqlens": labels.cu_seqlens,
            **labels.label_sets,
        }

    def _watches_sequences(self, labels: Labels, num_tokens: int) -> bool:
        """Whether statistics would count by labels of sequences."""
        watching = (self.objectives.statistics, self.objectives.evaluation_statistics)
        names = [name for each in watching if each is not None for name in each.label_sets]
        return any(name in labels.label_sets and labels.label_sets[name].numel() != num_tokens for name in names)

    def _refuse_cut_sequences(self, labels: Labels | None, scores: Tensor) -> None:
        if scores.dim() == 3 or self.ranks.context is None:
            return
        if labels is not None and self._watches_sequences(labels, scores.shape[0]):
            raise ValueError(
                "edl::torchtitan: context parallelism cuts the token stream anywhere, and statistics need the labels "
                "per token of the slice (got others)"
            )
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


def is_replay() -> bool:
    """Whether a forward pass runs within a backward pass, as checkpointing has it."""
    return torch._C._current_autograd_node() is not None


def for_routers(objectives: Objectives) -> Objectives:
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
    return objective


def objectives_of_routers(model: nn.Module) -> dict[str, RouterObjectives]:
    found = {name: getattr(module, "objectives", None) for name, module in model.named_modules()}
    return {name: each for name, each in found.items() if isinstance(each, RouterObjectives)}


def number_layers(model: nn.Module) -> None:
    """Tells each router which layer it is in, from the names of its modules; statistics of objectives need it.

    Args:
        model (Module): a model that was built, or a part of one, whose layers keep their numbers (`layers.3`).
    """
    found = objectives_of_routers(model)
    for (name, each), number in zip(found.items(), numbers_of(list(found))):
        each.layer = number, name


def set_step(model: nn.Module, step: int) -> None:
    """Lets weights that depend on the step go on from that of a checkpoint, which torchtitan's Trainer restores.

    Args:
        model (Module): a model, or a part of one.
        step (int): the optimizer steps that were made.

    Raises:
        ValueError: a step that is no number of steps.
    """
    step = checks.as_integer("torchtitan", "step", step)
    for each in objectives_of_routers(model).values():
        each.objectives.set_extra_state(step)
