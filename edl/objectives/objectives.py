"""Objectives with their weights, bound to the ranks that share a batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edl import ops
from edl.objectives.base import Objective, Sums
from edl.reduction.ranks import Group, Ranks
from edl.reduction.share import share
from edl.routing import Observation, observations_of
from edl.segments import mask_segments

Weight = float | Callable[[int], float]


def linear_warmup(weight: float, steps: int) -> Callable[[int], float]:
    """A weight that rises from 0 to `weight` over so many optimizer steps, and stays.

    Raises:
        ValueError: a weight that is negative or not finite, steps below 1.
    """
    ops._check_numbers("linear_warmup", weight=weight)
    steps = ops._as_integer("linear_warmup", "steps", steps, lowest=1)
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"edl::linear_warmup: weight must be finite and not negative (got {weight})")
    return lambda step: weight * min(1.0, step / steps)


class Layout(NamedTuple):
    """What all ranks must agree on."""

    objectives: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]  # of the sums of each part
    device: str
    averaging_ranks: int


class _Part(NamedTuple):
    """An objective on those of the layers that have what it needs, and are of one size."""

    name: str
    objective: Objective
    layers: list[Observation]


class Objectives(nn.Module):
    """Several objectives of the routing of all layers, with one all-reduce for all of them.

    Add the total to the language model's loss. **With groups, after the framework's own averaging, the gradients of the
    parameters are those of one process that saw the whole batch.** All ranks must call with the same layers and
    objectives; the first call compares them. A rank that finds an error takes part with NaN and raises afterwards; on
    the CPU, or with EDL_CHECK=1, all ranks raise and name it.

        objectives = Objectives({"load_balancing": (LoadBalancing(), 1e-2), "router_z": (RouterZ(), 1e-3)}, group)
        total, values = objectives(routings, attention_mask=mask)
        (lm_loss + total).backward()
        optimizer.step()
        objectives.step()

    Args:
        objectives (mapping): name → (objective, weight). The objective's part of the total is its weight times the mean
            over layers. A weight is a number of at least 0, or a function of the optimizer step that returns one, as
            `linear_warmup` makes them.
        group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that share the batch, one of each
            `sequence_group`.
        sequence_group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that hold parts of the same
            sequences (context parallel; tensor parallel with sequence parallel).
        averaging_ranks (int, optional): the number of ranks over which the framework averages gradients, as
            `edl.ExpertDivergenceLoss` takes it.

    Raises:
        ValueError: no objective, something that is none, a weight that is negative or not finite; no such groups.
    """

    def __init__(
        self,
        objectives: Mapping[str, tuple[Objective, Weight]],
        group: Group | None = None,
        sequence_group: Group | None = None,
        averaging_ranks: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(objectives, Mapping) or not objectives:
            raise ValueError(
                f"edl::Objectives: objectives must be a mapping of names to (objective, weight) (got {objectives!r})"
            )
        for name, bound in objectives.items():
            is_pair = isinstance(bound, tuple) and len(bound) == 2 and isinstance(bound[0], Objective)
            if not isinstance(name, str) or not is_pair:
                raise ValueError(
                    f"edl::Objectives: objectives must map names to (objective, weight) (got {name!r}: {bound!r})"
                )
        self._objectives = {name: objective for name, (objective, _) in objectives.items()}
        self._given_weights = {name: weight for name, (_, weight) in objectives.items()}
        self._ranks = Ranks(sequence_group, group, averaging_ranks)
        self._step = 0
        self.weights = self._weights_now()

    def _weights_now(self) -> dict[str, Tensor]:
        """Scalars on the CPU, which a multiplication on any device takes without a copy that waits."""
        weights = {}
        for name, given in self._given_weights.items():
            weight = given(self._step) if callable(given) else given
            ops._check_numbers("Objectives", weight=weight)
            if not 0.0 <= weight < math.inf:
                raise ValueError(
                    f"edl::Objectives: a weight must be finite and not negative (got {weight} of {name!r})"
                )
            weights[name] = torch.tensor(float(weight), dtype=torch.float64)
        return weights

    def step(self) -> None:
        """Ends a training step: weights that depend on it move on."""
        self._step += 1
        self.weights = self._weights_now()

    def get_extra_state(self) -> Tensor:
        """What `state_dict` saves: the number of steps."""
        return torch.tensor(self._step)

    def set_extra_state(self, state: Any) -> None:
        """What `load_state_dict` restores.

        Raises:
            ValueError: something that is no number of steps.
        """
        self._step = ops._as_integer("Objectives", "a state's steps", state)
        self.weights = self._weights_now()

    def forward(
        self,
        observations: Any,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of a batch.

        Args:
            observations (Routing, Observation or Tensor, or a list or tuple of them): one per layer, as `MoELayer`
                returns them; a tensor is router logits [T, E] or [B, S_len, E].
            attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
            padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).

        Returns:
            total, a scalar to add to the loss, and values: name → the objective's mean over layers, without its weight
            and without gradient.

        Raises:
            ValueError: no layer with what an objective needs, wrong shapes or types, both masks.
            IndexError: a mask value other than 0 and 1 (on the CPU; elsewhere the losses are NaN).
        """
        return self.begin(observations, attention_mask, padding_mask)()

    def begin(
        self,
        observations: Any,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
        """Begins the losses of a batch: the all-reduce over `group` runs while the caller goes on.

        Args:
            observations, attention_mask, padding_mask: as `forward` takes them.

        Returns:
            A function that waits for the other ranks and returns what `forward` does. Every rank must call it, also
            after an error of its own.

        Raises:
            ValueError, IndexError: as `forward`; from here at the first call and without groups, else from the
                function.
        """
        ranks = self._ranks
        parts: list[_Part] = []
        sums: list[Sums] = []
        layout, problem = None, None
        try:
            parts = self._parts(observations_of(observations))
            sums = [
                part.objective.of_tokens(part.layers, _counted(part, attention_mask, padding_mask)) for part in parts
            ]
            layout = None if torch.compiler.is_compiling() else self._layout(sums)
        except Exception as error:  # other ranks wait for this one's part: it is raised once they have it
            problem = error
        problem = ranks.agree(layout, lambda: "nothing", problem)
        own = self._stand_in() if problem is not None else _packed(sums)
        with torch.no_grad():
            total, problem = ranks.start_sum(ranks.sequence_group, [own], problem)()
        wait = ranks.start_sum(ranks.group, [total], problem)

        def finish() -> tuple[Tensor, dict[str, Tensor]]:
            total, problem = wait()
            if problem is not None:
                raise problem
            shared = share(own, total, float(ranks.averaging_ranks))
            return self._losses(parts, _unpacked(shared, sums))

        return finish

    def _parts(self, layers: list[Observation]) -> list[_Part]:
        """Each objective with the layers it can see, those of one size together."""
        parts = []
        for name, objective in self._objectives.items():
            by_size: dict[Any, list[Observation]] = {}
            for layer in layers:
                needed = [getattr(layer, field) for field in sorted(objective.needs)]
                if all(tensor is not None for tensor in needed):
                    for field, tensor in zip(sorted(objective.needs), needed):
                        _check_tensor(field, tensor)
                    by_size.setdefault(tuple((tensor.shape, tensor.device) for tensor in needed), []).append(layer)
            if not by_size:
                raise ValueError(
                    f"edl::Objectives: a layer must offer what {name!r} needs, {', '.join(sorted(objective.needs))} "
                    f"(got {len(layers)} without)"
                )
            parts += [_Part(name, objective, alike) for alike in by_size.values()]
        return parts

    def _layout(self, sums: list[Sums]) -> Layout:
        objectives = tuple((name, repr(objective)) for name, objective in self._objectives.items())
        shapes = tuple(tuple((name, tuple(x.shape)) for name, x in part.items()) for part in sums)
        device = next(iter(sums[0].values())).device.type
        return Layout(objectives, shapes, device, self._ranks.averaging_ranks)

    def _stand_in(self) -> Tensor:
        """The row of a rank that has none to give, as long as that of its last call."""
        layout = self._ranks.layout
        assert isinstance(layout, Layout)
        length = sum(math.prod(shape) for part in layout.shapes for _, shape in part)
        return torch.zeros(length, dtype=torch.float64, device=layout.device)

    def _losses(self, parts: list[_Part], sums: list[Sums]) -> tuple[Tensor, dict[str, Tensor]]:
        of_layers: dict[str, list[Tensor]] = {name: [] for name in self._objectives}
        for part, shared in zip(parts, sums):
            of_layers[part.name].append(part.objective.formula(shared))
        means = {name: torch.cat(losses).mean() for name, losses in of_layers.items()}
        total = torch.stack([self.weights[name] * mean for name, mean in means.items()]).sum()
        return total, {name: mean.detach() for name, mean in means.items()}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={objective!r}" for name, objective in self._objectives.items())


def _check_tensor(field: str, tensor: Tensor) -> None:
    ops._check_tensors("Objectives", **{field: tensor})
    if tensor.dim() != 2:
        raise ValueError(f"edl::Objectives: {field} must have two dimensions (got {list(tensor.shape)})")


def _counted(part: _Part, attention_mask: Tensor | None, padding_mask: Tensor | None) -> Tensor:
    """Which tokens count, as `Objective.of_tokens` takes it."""
    ops._check_given("Objectives", attention_mask=attention_mask, padding_mask=padding_mask)
    seen = next(tensor for tensor in part.layers[0] if tensor is not None)
    ids = torch.zeros(seen.shape[0], dtype=torch.int32, device=seen.device)
    return mask_segments(ids, 1, -1, attention_mask, padding_mask)


def _packed(sums: Sequence[Sums]) -> Tensor:
    return torch.cat([x.reshape(-1).double() for part in sums for x in part.values()])


def _unpacked(row: Tensor, sums: Sequence[Sums]) -> list[Sums]:
    """Views of the row, named and shaped as the sums that were packed."""
    pieces = iter(row.split([x.numel() for part in sums for x in part.values()]))
    return [{name: next(pieces).view(x.shape) for name, x in part.items()} for part in sums]
