"""Sums carried over the micro-batches of a step, so that each knows of the others: one with a single domain still feels
the rest."""

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from edl.labels.scope import Scope, current_scope
from edl.ops import checks


class Carried(NamedTuple):
    """Sums over ranks and micro-batches, as one row of numbers."""

    numbers: Tensor  # [N] float64
    meaning: str  # which objectives they are of, and in which shapes
    worth: Tensor  # a float64 scalar: how many micro-batches they are of

    def described(self) -> str:
        return f"{self.numbers.numel()} numbers up to {self.numbers.abs().max().item()}"

    def plus(self, other: "Carried") -> "Carried":
        return self._replace(numbers=self.numbers + other.numbers, worth=self.worth + other.worth)

    def times(self, factor: float) -> "Carried":
        return self._replace(numbers=self.numbers * factor, worth=self.worth * factor)


# What reads the states of earlier versions: each returns what it finds, or None.
former_states: list[Callable[[Any], Carried | None]] = []
_optimizer_steps = 0


def _count_optimizer_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


class DomainMemory(nn.Module):
    """Carries detached sums, the domain moments above all, over the micro-batches of a step, and optionally over steps.

    Give it to one `ExpertDivergenceLoss` or `Objectives` (`memory=`) and call `step()` after each optimizer step
    (`Objectives.step()` does). The loss of a micro-batch is then that of its own sums plus those carried; its gradient
    passes the micro-batch's own part alone, and is multiplied by the number of micro-batches that the sums are worth,
    so that losses *averaged* over micro-batches (as gradient accumulation does) have the size of one batch's. In
    evaluation mode, or without gradients, the loss neither reads nor changes the memory.

    One pass over the micro-batches approximates the gradient of the whole batch: the first micro-batches do not know
    the last. Two passes give it exactly: `with memory.collect():` run all micro-batches once without gradients, then
    train on each as usual. The mean of their gradients is the gradient of the batch, and the value of every loss is the
    batch's.

    The state travels in `state_dict` as one tensor (between steps; collected sums do not), with the names of the
    objectives and the shapes of their sums, which are compared. Its size is known from the first micro-batch or from
    `allocate_memory()` of the loss on: what loads into tensors that are there, torch.distributed.checkpoint, needs one
    of them first. Not for code under `torch.compile`. With activation checkpointing labels must come from an
    `edl.domain_scope` around what is checkpointed.

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
        checks.check_numbers("DomainMemory", decay=decay)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"edl::DomainMemory: decay must be at least 0 and below 1 (got {decay!r})")
        self.decay = float(decay)
        self._carried: Carried | None = None
        self._known: tuple[str, int] | None = None  # meaning and size of the numbers, once known
        self._loss: weakref.ref[nn.Module] | None = None  # whose memory it is
        self._collecting = False
        self._collected = 0  # micro-batches of the first of two passes
        self._trained_on = 0  # micro-batches since the last step
        self._before_pass: dict[Scope, Carried | None] = {}  # what each forward pass found, for its replay
        self._optimizer_steps_seen = _optimizer_steps
        self._warned = False
        _watch_optimizers()

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no loss yet, and no backward pass will ask it for a replay.
        return {**self.__dict__, "_loss": None, "_before_pass": {}}

    def serve(self, loss: nn.Module) -> None:
        """Makes this the memory of a loss.

        Raises:
            ValueError: it is that of another loss, which is still there.
        """
        if self._loss is not None and self._loss() not in (None, loss):
            gc.collect()  # a model that was dropped may hang in a cycle
        owner = None if self._loss is None else self._loss()
        if owner is not None and owner is not loss:
            raise ValueError(
                "edl::DomainMemory: a memory must belong to one loss, whose sums others would mix with theirs; set "
                "the other's memory to None first (got one that another loss has)"
            )
        if owner is None:
            self._loss = weakref.ref(loss)

    def release(self, loss: nn.Module) -> None:
        """Frees it for another loss, if it is that of this one."""
        if self._loss is not None and self._loss() is loss:
            self._loss = None

    def reserve(self, meaning: str, size: int) -> None:
        """Fixes what the numbers are of, and how many there are, before the first micro-batch does.

        Raises:
            ValueError: other numbers than are known already.
        """
        if self._known not in (None, (meaning, size)):
            raise ValueError(
                f"edl::DomainMemory: what is carried is known already, {(self._known or ('',))[0]} (got {meaning})"
            )
        self._known = meaning, size

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """The first of two passes: the losses computed inside, without gradients, only collect their sums.

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
        """Ends a training step: forgets the sums, or multiplies them by `decay`.

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
            self._carried = carried.times(self.decay)
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
    def is_collecting(self) -> bool:
        """Whether this is the first of two passes, whose tokens come again."""
        return self._collecting

    @property
    def has_collected(self) -> bool:
        """Whether this is the second of two passes, in which the sums of the batch are known and nothing is summed
        over ranks."""
        return self._collected > 0 and not self._collecting

    def before_pass(self) -> Carried | None:
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

    def add(self, before: Carried | None, live: Carried) -> Carried:
        """The sums that a micro-batch's loss is computed from; remembers them for the next ones.

        Args:
            before (Carried, optional): what `before_pass` returned for this pass.
            live (Carried): of the micro-batch, over all ranks; in the second of two passes, of this rank alone.

        Returns:
            Those of all micro-batches, and how many they are worth.

        Raises:
            ValueError: sums of other objectives or shapes than those carried.
            RuntimeError: a second loss in one `domain_scope`.
        """
        self._check(before, live)
        self._known = live.meaning, live.numbers.numel()
        if before is not None:
            # A restored state may lie elsewhere.
            device = live.numbers.device
            before = before._replace(numbers=before.numbers.to(device), worth=before.worth.to(device))
            if self.has_collected:
                self._trained_on += not self._is_known_replay()
                # What is not finite here was left out of what was collected; the loss must not hide it.
                return before._replace(numbers=before.numbers + (live.numbers - live.numbers))
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

    def _remember(self, before: Carried | None, live: Carried) -> None:
        self._warn_where_step_was_forgotten()
        if self._collecting:
            self._collected += 1
        else:
            self._trained_on += 1
        # A micro-batch that overflowed is skipped by gradient scalers; it must not stay here, nor count.
        finite = live.numbers.isfinite().all()
        live = live._replace(numbers=live.numbers.where(finite, 0.0), worth=live.worth.where(finite, 0.0))
        self._carried = live if before is None else before.plus(live)

    def refuse_without_values(self, tensor: Tensor) -> None:
        """Raises where a loss is of tensors whose sums could not be carried."""
        if type(tensor) is not Tensor or tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise ValueError(
                "edl::DomainMemory: takes losses of tensors with values, not under torch.func, FakeTensorMode or on "
                f"the meta device (got {type(tensor).__name__} on {tensor.device})"
            )

    def _check(self, before: Carried | None, live: Carried) -> None:
        if before is not None and before.meaning != live.meaning:
            raise ValueError(
                "edl::DomainMemory: all micro-batches, and a state that was restored, must be of the same objectives, "
                f"layers and sizes, {before.meaning} (got {live.meaning})"
            )

    def _warn_where_step_was_forgotten(self) -> None:
        counted = self._trained_on + self._collected
        if counted and self._optimizer_steps_seen != _optimizer_steps and not self._warned:
            self._warned = True
            warnings.warn(
                "edl::DomainMemory: an optimizer stepped but memory.step() was not called: sums of several steps "
                "are added up",
                stacklevel=4,
            )
        if not counted:
            self._optimizer_steps_seen = _optimizer_steps

    def get_extra_state(self) -> Tensor:
        """What `state_dict` saves, float64 on the CPU: what the numbers are of, the numbers, and their worth. Without
        element while this is not known."""
        if self._known is None:
            return torch.empty(0, dtype=torch.float64)
        meaning, size = self._known
        text = list(meaning.encode())
        head = torch.tensor([-len(text), *text], dtype=torch.float64)  # no state of earlier versions is negative
        if self._carried is None:
            return torch.cat([head, head.new_zeros(size + 1)])
        return torch.cat([head, self._carried.numbers.cpu(), self._carried.worth.cpu().reshape(1)])

    def set_extra_state(self, state: Any) -> None:
        """What `load_state_dict` restores; also the states of earlier versions.

        Raises:
            ValueError: a state that `get_extra_state` did not give, or with numbers that are no sums.
        """
        restored = _restored(state)
        if restored is not None:
            self._known = restored.meaning, restored.numbers.numel()
        self._carried = restored if restored is not None and restored.worth > 0 else None
        # A state is that between steps, also where a step that failed is left for it.
        self._collected = self._trained_on = 0
        self._before_pass.clear()

    def extra_repr(self) -> str:
        return f"decay={self.decay:g}"


def _restored(state: Any) -> Carried | None:
    """What a state holds; None in that of a memory that was never used."""
    if (isinstance(state, Tensor) and state.numel() == 0) or (isinstance(state, tuple) and not state):
        return None
    found = next((found for found in (read(state) for read in [_read, *former_states]) if found is not None), None)
    if found is None:
        raise ValueError(
            "edl::DomainMemory: a state must be one that a memory gave, a row of float64 numbers that begins with what "
            f"they are of (got {_described(state)})"
        )
    if not (found.numbers.isfinite().all() and found.worth.isfinite() and found.worth >= 0):
        raise ValueError(
            "edl::DomainMemory: the sums in a state must be finite, and of at least 0 micro-batches (got "
            f"{found.described()} of {found.worth.item()})"
        )
    return found


def _read(state: Any) -> Carried | None:
    try:
        length = -int(state[0])
        if state.dtype != torch.float64 or state.dim() != 1 or length < 1 or state.numel() < length + 2:
            return None
        meaning = bytes(map(int, state[1 : length + 1].tolist())).decode()
        numbers = state[length + 1 :].detach().clone()
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RuntimeError):
        return None
    return Carried(numbers[:-1], meaning, numbers[-1])


def _described(state: Any) -> str:
    if isinstance(state, Tensor) and not state.is_nested:
        return f"{list(state.shape)} {state.dtype}"
    if not isinstance(state, (tuple, list)):
        return type(state).__name__
    return str([list(part.shape) if isinstance(part, Tensor) else part for part in state])


_watching = False


def _watch_optimizers() -> None:
    """Counts the steps of all optimizers, to tell a forgotten `step()`."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_count_optimizer_step)
        _watching = True
