"""Objectives with their weights, bound to the ranks and micro-batches that share a batch."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edl.labels.batch import Batch
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.batches import batch_of
from edl.objectives.exchange import Exchange, Part, Parts
from edl.objectives.log import EffectWatch, ObjectiveLog, warn_of_no_effect
from edl.objectives.schedules import Weight, weight_at
from edl.objectives.statistics import Statistics, Watching, look
from edl.ops import checks
from edl.reduction.micro_batches import DomainMemory
from edl.reduction.ranks import Group, Ranks
from edl.routing import Observation, observations_of

_GRAMS = (
    "output_gram",
    "activation_gram",
)  # [T, K, K] in observations; all else that objectives read has two dimensions
Losses = tuple[Tensor, dict[str, Tensor]]


class _Warned(set[str]):
    """What was warned of: copies of objectives, one for each router, share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Warned":
        return self


class Objectives(nn.Module):
    """Several objectives of the routing of all layers, with one all-reduce for all of them.

    Add the total to the language model's loss. **With groups, after the framework's own averaging, the gradients of the
    parameters are those of one process that saw the whole batch.** All ranks must call with the same layers and
    objectives; the first call compares them. A rank that finds an error takes part with NaN and raises afterwards; on
    the CPU, or with EDL_CHECK=1, all ranks raise and name it.

        objectives = Objectives({
            "expert_divergence": (ExpertDivergence(num_domains=3), 1e-2),
            "load_balancing": (LoadBalancing(), 1e-2),
        }, group)
        total, values = objectives(routings, attention_mask, domain_ids=domain_ids)
        (lm_loss + total).backward()
        optimizer.step()
        objectives.step()

    Layers that lack what an objective needs are skipped by it, and named once. Without a token that counts, or with
    fewer than two domains for a divergence, a value is 0, which logs leave out; after 100 such steps it warns. In
    evaluation mode, or without gradients, values are shared over the ranks, and memory and logs stay untouched.

    Args:
        objectives (mapping): name → (objective, weight). The objective's part of the total is its weight times the mean
            over layers. A weight is a number of at least 0, or a function of the optimizer step that returns one, as
            `linear_warmup`, `linear_decay` and `off_after` make them. One of 0 adds nothing, whatever the objective is.
            It may be empty where there are statistics, and the total is 0.
        group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that share the batch, one of each
            `sequence_group`.
        sequence_group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that hold parts of the same
            sequences (context parallel; tensor parallel with sequence parallel).
        averaging_ranks (int, optional): the number of ranks over which the framework averages gradients, as
            `edl.ExpertDivergenceLoss` takes it.
        memory (DomainMemory, optional): carries the sums over the micro-batches of a step; of these objectives alone.
        statistics (RoutingStatistics, optional): counts what passes in training mode routed, each once: neither replays
            of activation checkpointing nor the first of two passes. It may be set at any time, with a model of
            transformers before `attach`.
        evaluation_statistics (RoutingStatistics, optional): the same of passes in evaluation mode.

    Raises:
        ValueError: no objective and no statistics, something that is none, a weight that is negative or not finite; no
            such groups.
    """

    def __init__(
        self,
        objectives: Mapping[str, tuple[Objective, Weight]],
        group: Group | None = None,
        sequence_group: Group | None = None,
        averaging_ranks: int | None = None,
        memory: DomainMemory | None = None,
        statistics: Statistics | None = None,
        evaluation_statistics: Statistics | None = None,
    ) -> None:
        super().__init__()
        self._watching = Watching(statistics, evaluation_statistics)
        if not isinstance(objectives, Mapping) or not (objectives or self._watching.all()):
            raise ValueError(
                f"edl::Objectives: objectives must be a mapping of names to (objective, weight) (got {objectives!r})"
            )
        for name, bound in objectives.items():
            is_pair = isinstance(bound, tuple) and len(bound) == 2 and isinstance(bound[0], Objective)
            if not isinstance(name, str) or not is_pair:
                raise ValueError(
                    f"edl::Objectives: objectives must map names to (objective, weight) (got {name!r}: {bound!r})"
                )
            if unknown := sorted(bound[0].needs - set(Observation._fields)):
                raise ValueError(
                    f"edl::Objectives: an objective needs fields of an edl.routing.Observation (got {unknown[0]!r} of "
                    f"{name!r})"
                )
        if memory is not None and not isinstance(memory, DomainMemory):
            raise ValueError(f"edl::Objectives: memory must be a DomainMemory (got {type(memory).__name__})")
        self.objectives = {name: objective for name, (objective, _) in objectives.items()}
        self._given_weights = {name: weight for name, (_, weight) in objectives.items()}
        self.is_bound = any(given is not None for given in (group, sequence_group, averaging_ranks, memory))
        self._ranks = Ranks(sequence_group, group, averaging_ranks)
        self._exchange = Exchange("Objectives", self._ranks)
        if memory is not None:
            memory.serve(self)
        self.memory = memory
        self._step = 0
        self.weights = self._weights_now(self._given_weights)
        self.has_effect: dict[str, Tensor] = {}  # whether the latest training losses had something to act on
        self._logs: dict[str, ObjectiveLog] = {}
        self._watches = {name: EffectWatch() for name in self.objectives}
        self._counts_replays = True
        self._warned = _Warned()

    @property
    def statistics(self) -> Statistics | None:
        """What counts passes in training mode."""
        return self._watching.training

    @statistics.setter
    def statistics(self, statistics: Statistics | None) -> None:
        self._watching.set(True, statistics)

    @property
    def evaluation_statistics(self) -> Statistics | None:
        """What counts passes in evaluation mode."""
        return self._watching.evaluation

    @evaluation_statistics.setter
    def evaluation_statistics(self, statistics: Statistics | None) -> None:
        self._watching.set(False, statistics)

    @property
    def needs(self) -> frozenset[str]:
        """The fields of an `edl.routing.Observation` that objectives and statistics read."""
        of_objectives = (objective.needs for objective in self.objectives.values())
        return frozenset[str]().union(*of_objectives, *(each.needs for each in self._watching.all()))

    @property
    def label_sets(self) -> frozenset[str]:
        """The names of the sets of labels that objectives and statistics need."""
        named = (objective.labels for objective in self.objectives.values())
        of_objectives = {name for name in named if name is not None}
        return frozenset(of_objectives).union(*(each.label_sets for each in self._watching.all()))

    @property
    def has_schedule(self) -> bool:
        """Whether a weight depends on the number of steps."""
        return any(callable(weight) for weight in self._given_weights.values())

    def bind(
        self,
        group: Group | None = None,
        sequence_group: Group | None = None,
        averaging_ranks: int | None = None,
        memory: DomainMemory | None = None,
    ) -> "Objectives":
        """The same objectives and weights, bound to ranks and a memory; for integrations, which know them.

        What one copy has warned of no other warns of again, and all share their statistics.

        Args:
            group, sequence_group, averaging_ranks, memory: as the constructor takes them.

        Raises:
            ValueError: they are bound already.
        """
        if self.is_bound:
            raise ValueError(
                "edl::Objectives: an integration binds objectives to ranks and memory itself, pass them without group, "
                "sequence_group, averaging_ranks and memory (got some that are bound)"
            )
        objectives = {name: (self.objectives[name], weight) for name, weight in self._given_weights.items()}
        watching = self._watching
        bound = Objectives(
            objectives, group, sequence_group, averaging_ranks, memory, watching.training, watching.evaluation
        )
        bound._warned = self._warned
        return bound

    def set_weight(self, name: str, weight: Weight) -> None:
        """Gives an objective another weight, from now on.

        Raises:
            ValueError: no such objective, a weight that is negative or not finite.
        """
        if name not in self.objectives:
            raise ValueError(f"edl::Objectives: name must be one of {list(self.objectives)} (got {name!r})")
        given = {**self._given_weights, name: weight}
        self.weights = self._weights_now(given)
        self._given_weights = given

    def _weights_now(self, weights_given: Mapping[str, Weight]) -> dict[str, Tensor]:
        """Scalars on the CPU, which a multiplication on any device takes without a copy that waits."""
        weights = {}
        for name, given in weights_given.items():
            weight = weight_at(given, self._step)
            if not 0.0 <= weight < math.inf:
                raise ValueError(
                    f"edl::Objectives: a weight must be finite and not negative (got {weight} of {name!r})"
                )
            weights[name] = torch.tensor(float(weight), dtype=torch.float64, device="cpu")  # also where models are meta
        return weights

    def step(self) -> None:
        """Ends a training step: weights that depend on it move on, and the memory's step ends.

        Raises:
            RuntimeError: what `DomainMemory.step` raises.
        """
        self._step += 1
        self.weights = self._weights_now(self._given_weights)
        self._counts_replays = True
        for name, watch in self._watches.items():
            if watch.end_step() and name not in self._warned:
                self._warned.add(name)
                warn_of_no_effect(name)
        if self.memory is not None:
            self.memory.step()

    def get_extra_state(self) -> Tensor:
        """What `state_dict` saves beside the memory: the number of steps."""
        return torch.tensor(self._step, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """What `load_state_dict` restores.

        Raises:
            ValueError: something that is no number of steps.
        """
        self._step = checks.as_integer("Objectives", "a state's steps", state)
        self.weights = self._weights_now(self._given_weights)

    def log(self) -> dict[str, Tensor]:
        """What to log of the training losses since it was last called; nothing waits for a device.

        Returns:
            For each objective scalars, means over the losses that had something to act on, NaN where none had:
            `<name>_loss`, without its weight, `<name>/layer_<i>`, and what it measures (`<name>/nats`, the divergence
            itself, and `<name>/pairs` of `ExpertDivergence`); `<name>/steps_without_effect`, how many had nothing; and
            `<name>/weight`. Losses of compiled code are not counted.
        """
        entries: dict[str, Tensor] = {}
        for name, log in self._logs.items():
            for entry, mean in log.means().items():
                entries[f"{name}_loss" if entry == "loss" else f"{name}/{entry}"] = mean
            steps = self._watches[name].take()
            if steps is not None:
                entries[f"{name}/steps_without_effect"] = steps
            entries[f"{name}/weight"] = self.weights[name]
            log.clear()
        return entries

    def take_sums(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """`log` for integrations, which add up further: of each objective "loss", "layer_<i>" and its measures, the sum
        of the values that count and their number; nothing where there was no loss."""
        taken = {name: log.sums() for name, log in self._logs.items()}
        for log in self._logs.values():
            log.clear()
        return taken

    def forward(
        self,
        observations: Any,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **labels: Tensor,
    ) -> Losses:
        """Computes the losses of a batch.

        Args:
            observations (Routing, Observation or Tensor, or a list or tuple of them): one per layer, as `MoELayer`
                returns them; a tensor is router logits [T, E] or [B, S_len, E].
            attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
            padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
            cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents, starting at 0.
            **labels (Tensor): sets of labels by name, of which an objective takes the one it names (`domain_ids`), in
                the forms that `edl.ExpertDivergenceLoss` takes.

        Returns:
            total, a scalar to add to the loss (float32; float64 for float64 routing), and values: name → the
            objective's mean over layers, without its weight and without gradient.

        Raises:
            ValueError: no layer with what an objective needs, labels that it needs and did not get, wrong shapes or
                types, both masks.
            IndexError: a label outside [-1, D) or a mask value other than 0 and 1 (on the CPU; elsewhere the losses are
                NaN).
        """
        return self.begin(observations, attention_mask, padding_mask, cu_seqlens, **labels)()

    def begin(
        self,
        observations: Any,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **labels: Tensor,
    ) -> Callable[[], Losses]:
        """Begins the losses of a batch: the all-reduce over `group` runs while the caller goes on.

        Args:
            observations, attention_mask, padding_mask, cu_seqlens, **labels: as `forward` takes them.

        Returns:
            A function that waits for the other ranks and returns what `forward` does. Every rank must call it, also
            after an error of its own.

        Raises:
            ValueError, IndexError: as `forward`; from here at the first call and without groups, else from the
                function.
        """

        return self.begin_batch(
            lambda: observations_of(observations),
            lambda layers: batch_of("Objectives", layers, attention_mask, padding_mask, cu_seqlens, labels),
        )

    def begin_batch(
        self, observations_of: Callable[[], list[Observation]], batch_of: Callable[[list[Observation]], Batch]
    ) -> Callable[[], Losses]:
        """`begin` for integrations, whose tokens may have an order of their own.

        Args:
            observations_of (Callable): gives one observation per layer; made here, so that an error keeps no other rank
                waiting.
            batch_of (Callable): what is known of these tokens.

        Returns:
            A function, as `begin` does.

        Raises:
            ValueError, IndexError: as `begin`.
        """
        memory = self.memory if self.memory is not None and self.memory.in_use else None
        if memory is not None:
            memory.serve(self)  # a copy's memory, or a copy of the objectives, comes here without an assignment

        def parts() -> Parts:
            layers = observations_of()
            batch = batch_of(layers)
            made = self._parts(layers, batch)
            self._look(layers, batch, self.training)
            return made

        if not self.objectives:
            batch = self.look(observations_of, batch_of, self.training)
            nothing = torch.zeros((), device=batch.device)
            return lambda: (nothing, {})
        wait = self._exchange.begin(parts, memory)
        return lambda: self._losses(*wait())

    def look(
        self,
        observations_of: Callable[[], list[Observation]],
        batch_of: Callable[[list[Observation]], Batch],
        training: bool,
    ) -> Batch:
        """Lets the statistics of a mode count a batch, without losses; for integrations.

        Args:
            observations_of, batch_of: as `begin_batch` takes them.
            training (bool): whether the model is in training mode.

        Returns:
            The batch.

        Raises:
            ValueError, IndexError: what the statistics raise.
        """
        layers = observations_of()
        batch = batch_of(layers)
        self._look(layers, batch, training)
        return batch

    def _look(self, layers: list[Observation], batch: Batch, training: bool) -> None:
        statistics = self._watching.of_mode(training)
        comes_again = self.memory is not None and self.memory.is_collecting
        if statistics is not None and not comes_again:
            look(statistics, layers, batch)

    def allocate_memory(self, observations: Any, **arguments: Tensor) -> None:
        """Fixes the size of the memory's state before the first micro-batch does, for what loads a state into the
        tensors of a new model, as torch.distributed.checkpoint.

        Args:
            observations, **arguments: of any batch, as `forward` takes them; of one token, for instance.

        Raises:
            ValueError: no memory, other sums than are known already, and what `forward` raises.
        """
        if self.memory is None:
            raise ValueError("edl::Objectives: allocate_memory() needs a memory (got none)")
        attention_mask, padding_mask = arguments.pop("attention_mask", None), arguments.pop("padding_mask", None)
        cu_seqlens = arguments.pop("cu_seqlens", None)
        layers = observations_of(observations)
        batch = batch_of("Objectives", layers, attention_mask, padding_mask, cu_seqlens, arguments)
        self._exchange.reserve(self._parts(layers, batch), self.memory)

    def _parts(self, layers: list[Observation], batch: Batch) -> list[Part]:
        """Each objective with the layers it can see, those of one size together, or all of them."""
        parts = []
        shared: dict[tuple[int, ...], Layers] = {}
        for name, objective in self.objectives.items():
            needs = sorted(objective.needs)
            by_size: dict[Any, list[int]] = {}
            for place, layer in enumerate(layers):
                needed = [getattr(layer, field) for field in needs]
                if all(tensor is not None for tensor in needed):
                    for field, tensor in zip(needs, needed):
                        _check_tensor(field, tensor)
                    size = None if objective.takes_all_layers else tuple((x.shape, x.dtype, x.device) for x in needed)
                    by_size.setdefault(size, []).append(place)
            seen = [place for places in by_size.values() for place in places]
            self._tell_of_layers(name, needs, layers, seen)
            segments = objective.segments(batch)
            for places in by_size.values():
                of_part = shared.setdefault(tuple(places), Layers([layers[place] for place in places]))
                parts.append(Part(name, objective, of_part, segments, tuple(places)))
        return parts

    def _tell_of_layers(self, name: str, needs: list[str], layers: list[Observation], seen: list[int]) -> None:
        if not seen:
            raise ValueError(
                f"edl::Objectives: a layer must offer what {name!r} needs, {', '.join(needs)} "
                f"(got {len(layers)} without)"
            )
        if torch.compiler.is_compiling():
            return
        skipped = [place for place in range(len(layers)) if place not in seen]
        if skipped and f"{name} skips" not in self._warned:
            self._warned.add(f"{name} skips")
            warnings.warn(
                f"edl::Objectives: {name!r} skips layers that do not offer what it needs, {', '.join(needs)} "
                f"(got {', '.join(map(str, skipped))} of {len(layers)} layers)",
                stacklevel=2,
            )
        if self.training and torch.is_grad_enabled() and f"{name} has no gradient" not in self._warned:
            observed = [getattr(layers[place], field) for place in seen for field in needs]
            if not any(x.requires_grad for x in observed):
                self._warned.add(f"{name} has no gradient")
                warnings.warn(
                    f"edl::Objectives: what {name!r} reads must have a gradient while training, or it teaches nothing "
                    f"(got {', '.join(needs)} without)",
                    stacklevel=2,
                )

    def _losses(self, parts: list[Part], sums: list[Sums]) -> Losses:
        losses: dict[str, list[Tensor]] = {name: [] for name in self.objectives}
        for part, shared in zip(parts, sums):
            loss = part.objective.formula(shared)
            if loss.dim() != 1:
                raise ValueError(
                    f"edl::Objectives: formula must give a loss for each layer, [L] (got {list(loss.shape)} of "
                    f"{part.name!r})"
                )
            losses[part.name].append(loss)
        of_layers = {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in losses.items()}
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            sizes = {name: [len(loss) for loss in each] for name, each in losses.items()}
            self._add_to_logs(parts, sums, of_layers, sizes)
        means = {name: each.mean() for name, each in of_layers.items()}
        total = torch.stack([self._weighted(name, mean, parts) for name, mean in means.items()]).sum()
        if not any(x.dtype == torch.float64 for part in parts for layer in part.layers for x in _observed(part, layer)):
            total = total.float()
        return total, {name: mean.detach() for name, mean in means.items()}

    def _weighted(self, name: str, mean: Tensor, parts: list[Part]) -> Tensor:
        """An objective's part of the total. One of weight 0 has none, and gradients of 0, also where it is not finite;
        compiled code, which holds for all weights, multiplies."""
        weight = self.weights[name]
        if torch.compiler.is_compiling() or weight != 0:  # on the CPU
            return weight * mean
        read = [x for part in parts if part.name == name for layer in part.layers for x in _observed(part, layer)]
        nothing = [x[:0].sum().to(mean) for x in read if x.requires_grad]
        return torch.stack([torch.zeros_like(mean), *nothing]).sum()

    def _add_to_logs(
        self, parts: list[Part], sums: list[Sums], of_layers: dict[str, Tensor], sizes: dict[str, list[int]]
    ) -> None:
        if torch._C._current_autograd_node() is None:
            self._counts_replays = False
        elif not self._counts_replays:
            return  # a replay of a pass that was counted; under reentrant checkpointing replays alone are
        for name, losses in of_layers.items():
            own = [(part, shared) for part, shared in zip(parts, sums) if part.name == name]
            if name not in self._logs:
                places = [place for part, _ in own for place in part.places]
                self._logs[name] = ObjectiveLog(self.objectives[name], places)
            self.has_effect[name] = self._logs[name].add(losses, [shared for _, shared in own], sizes[name])
            self._watches[name].see(self.has_effect[name])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={objective!r}" for name, objective in self.objectives.items())


def _observed(part: Part, layer: Observation) -> list[Tensor]:
    return [getattr(layer, field) for field in part.objective.needs]


def _check_tensor(field: str, tensor: Tensor) -> None:
    checks.check_tensors("Objectives", **{field: tensor})
    if tensor.dim() != (3 if field in _GRAMS else 2):
        wanted = "the shape [T, K, K]" if field in _GRAMS else "two dimensions"
        raise ValueError(f"edl::Objectives: {field} must have {wanted} (got {list(tensor.shape)})")
