"""Domain moments carried over the micro-batches of a step, so that a micro-batch with one domain still feels the
others."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from edl.scope import Scope, current_scope


class Moments(NamedTuple):
    """Domain moments of a loss over L layers, as one row of numbers whose last says how many micro-batches they are
    worth."""

    packed: Tensor  # [N] float64
    shape: tuple[int, int, int]  # L, D, E
    bias_correction: bool

    def plus(self, other: "Moments") -> "Moments":
        return self._replace(packed=self.packed + other.packed)


_optimizer_steps = 0


def _count_optimizer_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


class DomainMemory(nn.Module):
    """Carries detached domain moments over the micro-batches of a training step, and optionally over steps.

    Give it to one `ExpertDivergenceLoss` (`memory=`) and call `step()` after each optimizer step. The loss of a
    micro-batch is then that of its own moments plus those carried; its gradient passes the micro-batch's own part
    alone, and is multiplied by the number of micro-batches that the moments are worth, so that losses *averaged* over
    micro-batches (as gradient accumulation does) have the size of one batch's. In evaluation mode, or without
    gradients, the loss neither reads nor changes the memory.

    One pass over the micro-batches approximates the gradient of the whole batch: the first micro-batches do not know
    the last. Two passes give it exactly: `with memory.collect():` run all micro-batches once without gradients, then
    train on each as usual. The mean of their gradients is the gradient of the batch, and the value of every loss is the
    batch's.

    The state travels in `state_dict` (between steps; collected moments do not). Not for code under `torch.compile`.
    With activation checkpointing labels must come from an `edl.domain_scope` around what is checkpointed.

    Args:
        decay (float): factor of what is carried at each `step()`, in [0, 1): 0 (default) forgets, d > 0 keeps an
            exponential average over steps (1 / (1 - d) steps long).

    Raises:
        ValueError: `decay` outside its range.

    Source: the idea of balancing losses over the global batch (arXiv 2501.11873), for the moments of arXiv 2603.00054;
        ours.
    """

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"edl::DomainMemory: decay must be at least 0 and below 1 (got {decay})")
        self.decay = decay
        self._carried: Moments | None = None
        self._collecting = False
        self._collected = 0  # micro-batches of the first of two passes
        self._trained_on = 0  # micro-batches since the last step
        self._before_pass: dict[Scope, Moments | None] = {}  # what each forward pass found, for its replay
        self._optimizer_steps_seen = _optimizer_steps
        self._warned = False
        _watch_optimizers()

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """The first of two passes: the losses computed inside, without gradients, only collect their moments.

        Raises:
            RuntimeError: micro-batches of this step were trained on already, or `decay` is not 0.
        """
        if self._trained_on or self._collecting or self._collected:
            raise RuntimeError(
                "edl::DomainMemory: collect() must come first in a step, once (got a second pass; call step() after "
                "each step)"
            )
        if self.decay:
            raise RuntimeError(f"edl::DomainMemory: two passes are exact without decay only (got decay = {self.decay})")
        self._collecting = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._collecting = False

    def step(self) -> None:
        """Ends a training step: forgets the moments, or multiplies them by `decay`.

        Raises:
            RuntimeError: after `collect()`, another number of micro-batches was trained on than collected.
        """
        collected, trained_on = self._collected, self._trained_on
        carried = self._carried
        self._collected = self._trained_on = 0
        self._before_pass.clear()
        self._optimizer_steps_seen = _optimizer_steps
        if carried is None or self.decay == 0:
            self._carried = None
        else:
            self._carried = carried._replace(packed=carried.packed * self.decay)
        if collected and collected != trained_on:
            raise RuntimeError(
                "edl::DomainMemory: the second pass must train on every micro-batch that was collected (got "
                f"{trained_on} of {collected})"
            )

    @property
    def in_use(self) -> bool:
        """Whether a loss computed now belongs to the step."""
        return self._collecting or (self.training and torch.is_grad_enabled())

    @property
    def has_collected(self) -> bool:
        """Whether this is the second of two passes, in which the moments of the batch are known and nothing is summed
        over ranks."""
        return self._collected > 0 and not self._collecting

    def before_pass(self) -> Moments | None:
        """What the calling forward pass adds to; in a replay, what it found the first time."""
        if torch._C._current_autograd_node() is None:
            return self._carried
        scope = current_scope()
        # A scope that the replay opens anew is not that of the first time.
        if (scope is None and not self.has_collected) or (scope is not None and scope.opened_in is not None):
            raise RuntimeError(
                "edl::DomainMemory: under activation checkpointing labels must come from an edl.domain_scope around "
                f"what is checkpointed (got a replay {'in none' if scope is None else 'that opens its own'})"
            )
        if scope is None or self.has_collected:  # the first only together with the second
            return self._carried
        return self._before_pass.get(scope, self._carried)

    def add(self, before: Moments | None, live: Moments) -> Moments:
        """The moments that a micro-batch's loss is computed from; remembers them for the next ones.

        Args:
            before (Moments, optional): what `before_pass` returned for this pass.
            live (Moments): of the micro-batch, over all ranks; in the second of two passes, of this rank alone.

        Returns:
            The moments of all micro-batches, and how many they are worth.

        Raises:
            ValueError: moments of another shape than those carried, or without values.
            RuntimeError: a second loss in one `domain_scope`.
        """
        self._check(before, live)
        if before is not None:
            # A restored state may lie elsewhere.
            before = before._replace(packed=before.packed.to(live.packed.device))
            if self.has_collected:
                self._trained_on += not self._is_known_replay()
                # What is not finite here was left out of the collected moments; the loss must not hide it.
                return live._replace(packed=before.packed + (live.packed - live.packed))
        live.packed[-1] = 1.0
        if not self._is_known_replay():
            self._remember(before, live)
        return live if before is None else before.plus(live)

    def _is_known_replay(self) -> bool:
        """Whether the pass was counted already. (The replay of reentrant checkpointing is the first that knows
        gradients.)"""
        replays = torch._C._current_autograd_node() is not None
        scope = current_scope() if replays or not self._collecting else None
        if scope is None:
            return False
        if scope in self._before_pass:
            if not replays:
                raise RuntimeError(
                    "edl::DomainMemory: takes one loss per forward pass, give each router a memory of its own (got a "
                    "second loss in one domain_scope)"
                )
            return True
        self._before_pass[scope] = self._carried
        return False

    def _remember(self, before: Moments | None, live: Moments) -> None:
        self._warn_where_step_was_forgotten()
        if self._collecting:
            self._collected += 1
        else:
            self._trained_on += 1
        # A micro-batch that overflowed is skipped by gradient scalers; it must not stay here, nor count.
        finite = live.packed.isfinite().all()
        live = live._replace(packed=torch.where(finite, live.packed, torch.zeros_like(live.packed)))
        self._carried = live if before is None else before.plus(live)

    def _check(self, before: Moments | None, live: Moments) -> None:
        has_values = type(live.packed) is Tensor and not live.packed.is_meta
        if not has_values or torch._C._functorch.is_functorch_wrapped_tensor(live.packed):
            raise ValueError(
                "edl::DomainMemory: takes losses of tensors with values, not under torch.func, FakeTensorMode or on "
                f"the meta device (got {type(live.packed).__name__} on {live.packed.device})"
            )
        if before is None:
            return
        if before.shape != live.shape:
            raise ValueError(
                "edl::DomainMemory: all micro-batches, and a state that was restored, must have the same layers, "
                f"domains and experts, {list(before.shape)} (got {list(live.shape)})"
            )
        if before.bias_correction != live.bias_correction:
            raise ValueError(
                "edl::DomainMemory: all micro-batches, and a state that was restored, must have the same "
                f"bias_correction, {before.bias_correction} (got {live.bias_correction})"
            )

    def _warn_where_step_was_forgotten(self) -> None:
        counted = self._trained_on + self._collected
        if counted and self._optimizer_steps_seen != _optimizer_steps and not self._warned:
            self._warned = True
            warnings.warn(
                "edl::DomainMemory: an optimizer stepped but memory.step() was not called: moments of several steps "
                "are added up",
                stacklevel=4,
            )
        if not counted:
            self._optimizer_steps_seen = _optimizer_steps

    def get_extra_state(self) -> tuple[()] | tuple[Tensor, tuple[int, int, int], bool]:
        """What `state_dict` saves: the moments, their shape and bias correction, or nothing.

        A tuple, which torch.distributed.checkpoint takes as a whole: into the empty dict of a new memory it would load
        nothing.
        """
        carried = self._carried
        return () if carried is None else (carried.packed.cpu(), carried.shape, carried.bias_correction)

    def set_extra_state(self, state: tuple[Any, ...]) -> None:
        """What `load_state_dict` restores.

        Raises:
            ValueError: a state that `get_extra_state` did not give.
        """
        self._carried = _restored(state) if state else None
        # A state is that between steps, also where a step that failed is left for it.
        self._collected = self._trained_on = 0
        self._before_pass.clear()

    def extra_repr(self) -> str:
        return f"decay={self.decay:g}"


def _restored(state: tuple[Any, ...]) -> Moments:
    try:
        packed, (num_layers, num_domains, num_experts), bias_correction = state
        size = num_layers * num_domains * (num_experts * (2 if bias_correction else 1) + 1) + 1
        return Moments(packed.view(size), (num_layers, num_domains, num_experts), bias_correction)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        got = [list(part.shape) if isinstance(part, Tensor) else part for part in state]
        raise ValueError(
            f"edl::DomainMemory: a state must hold moments, their shape [L, D, E] and bias_correction (got {got})"
        ) from None


_watching = False


def _watch_optimizers() -> None:
    """Counts the steps of all optimizers, to tell a forgotten `step()`."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_count_optimizer_step)
        _watching = True
