"""Domain labels for routers that no argument reaches, bound to the forward pass they belong to.

A router asks `current_labels()`. In a forward pass the answer is the open `domain_scope`; when activation checkpointing
replays a forward pass in the backward pass, it is the scope in which that pass first ran. autograd numbers its nodes in
the order of their creation, so the number of the node that asks for the replay tells the scope: exactly, for reentrant
and other checkpointing, whatever order the backward passes come in, and with any number of micro-batches in flight.

Labels are kept as long as a replay may ask for them. Who asks in a replay asked in the forward pass, from inside what
will replay it: the hooks or the autograd function of the checkpointing, and these live as long as their part of the
graph.
"""

import collections
import contextlib
import contextvars
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from edl.ops import checks

# Forward passes that a replay can be told from: far above the micro-batches in flight of any pipeline schedule.
REMEMBERED_SCOPES = 512


class Labels(NamedTuple):
    """What a scope says of the tokens of one forward pass; the arguments of `domain_scope`, `further` its other sets of
    labels by name."""

    domain_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    further: dict[str, Tensor] | None = None

    @property
    def label_sets(self) -> dict[str, Tensor]:
        """All sets of labels by name, `domain_ids` first where it was given."""
        return {**({} if self.domain_ids is None else {"domain_ids": self.domain_ids}), **(self.further or {})}


def _current_replay() -> tuple[int, int] | None:
    """The backward pass and its node that the calling code runs in; None in no backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else (torch._C._current_graph_task_id(), node._sequence_nr())


def _replayer() -> object | None:
    """What will run the calling code again in the backward pass, and lives until then; None where nothing does."""
    if torch.is_grad_enabled():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return None if hooks is None else hooks[1]  # saved tensors hold it
    frame = sys._getframe(1).f_back
    while frame is not None:  # reentrant checkpointing: the autograd function whose forward pass is running
        if frame.f_code.co_varnames[:1] == ("ctx",) and isinstance(frame.f_locals["ctx"], torch._C._FunctionBase):
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None


class Scope:
    """One forward pass: its labels, and the numbers of the autograd nodes made in it, from `first` up to `last`."""

    def __init__(self, labels: Labels) -> None:
        self._labels: Labels | None = labels
        self._is_known = False  # who will ask again
        self._replayers: dict[int, weakref.ref[Any]] = {}
        self.opened_in = _current_replay()
        self.thread = threading.get_ident()
        self.first = torch._C._autograd._get_sequence_nr()
        self.last: int | None = None  # open

    @property
    def labels(self) -> Labels:
        if self._labels is None:
            raise RuntimeError(
                "edl::domain_scope: who asks for labels in a replay must ask in its forward pass too, also where that "
                "records no gradient (got a replay whose labels were released with the graph of those that asked)"
            )
        return self._labels

    def ask(self) -> None:
        """Notes that the forward pass asks, and what will repeat the question."""
        replayer = _replayer()
        if replayer is not None:
            key = id(replayer)
            self._replayers[key] = weakref.ref(replayer, lambda _: self._forget(key))
        self._is_known = self._is_known or replayer is not None or torch.is_grad_enabled()

    def _forget(self, key: int) -> None:
        self._replayers.pop(key, None)
        self.release_unless_needed()

    def release_unless_needed(self) -> None:
        if self.last is not None and not self._replayers:
            self._labels = None

    def close(self) -> None:
        self.last = torch._C._autograd._get_sequence_nr()
        # Where nobody asked, one may ask in replays alone: the labels stay until an optimizer step.
        if self._is_known or self.last == self.first:
            self.release_unless_needed()

    def made(self, number: int) -> bool:
        return self.first <= number and (self.last is None or number < self.last)


class _Scopes:
    """The latest scopes of all threads, newest first."""

    def __init__(self) -> None:
        self._scopes: collections.deque[Scope] = collections.deque(maxlen=REMEMBERED_SCOPES)
        self._lock = threading.Lock()
        self._forgotten_up_to = -1

    def add(self, scope: Scope) -> None:
        with self._lock:
            if len(self._scopes) == REMEMBERED_SCOPES:
                oldest = self._scopes[-1]
                self._forgotten_up_to = max(self._forgotten_up_to, oldest.last or oldest.first)
            self._scopes.appendleft(scope)

    def find(self, number: int) -> Scope | None:
        """The scope in which the node of this number was made; None = in no scope."""
        with self._lock:
            found = [scope for scope in self._scopes if scope.made(number)]
        if not found:
            if number < self._forgotten_up_to:
                raise RuntimeError(
                    f"edl::domain_scope: at most {REMEMBERED_SCOPES} forward passes may wait for their backward pass "
                    "(got a replay of an older one)"
                )
            return None
        # Scopes of one thread only overlap where they are nested: the newest is the innermost. Numbers are counted per
        # thread.
        if len({scope.thread for scope in found}) > 1:
            raise RuntimeError(
                "edl::domain_scope: replays need forward passes in one thread (got a node that two threads may have "
                "made)"
            )
        return found[0]

    def end_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After an optimizer step no backward pass of an earlier forward pass is to come."""
        with self._lock:
            for scope in self._scopes:
                scope.release_unless_needed()


_SCOPES = _Scopes()
register_optimizer_step_post_hook(_SCOPES.end_step)
_OPEN: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("edl_domain_scope", default=None)


@contextlib.contextmanager
def domain_scope(
    domain_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **labels: Tensor,
) -> Iterator[Labels]:
    """Binds labels to the forward passes run inside: `with edl.domain_scope(domain_ids): output = model(tokens)`.

    The backward pass may run inside or outside, in any order with those of other scopes; activation checkpointing gets
    the labels of the pass it replays, or those of a scope that it opens itself. A forward pass outside any scope has no
    labels, and so no divergence loss; nothing is left set. Not for code under `torch.compile` or TorchScript: pass the
    labels as arguments there. Reentrant checkpointing must be neither inside other checkpointing nor around it.

    Args:
        domain_ids (Tensor, optional): labels in any form that `ExpertDivergenceLoss` takes.
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
        cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents.
        **labels (Tensor): further sets of labels by the names that objectives have for them (`modality_ids`), in the
            forms that these take: weights of each token too.

    Returns:
        A context manager that yields the `Labels`.

    Raises:
        ValueError: labels, masks or boundaries that are no tensors, or DTensors; none of them.
    """
    scope = Scope(_checked(Labels(domain_ids, attention_mask, padding_mask, cu_seqlens, labels)))
    _SCOPES.add(scope)
    before = _OPEN.set(scope)
    try:
        yield scope.labels
    finally:
        _OPEN.reset(before)
        scope.close()


def _checked(labels: Labels) -> Labels:
    """The labels; raises where they hold something else than tensors, or nothing."""
    optional = (name for name in labels._fields[:-1] if getattr(labels, name) is not None)
    given: dict[str, Any] = {**{name: getattr(labels, name) for name in optional}, **(labels.further or {})}
    if not given:
        raise ValueError("edl::domain_scope: labels, a mask or boundaries must be given (got none of them)")
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"edl::domain_scope: {name} must be a tensor (got {type(tensor).__name__})")
    checks.refuse_dtensor("domain_scope", *given.values())
    return labels


def current_scope() -> Scope | None:
    """The scope of the forward pass that the caller belongs to; see `current_labels`."""
    replay, scope = _current_replay(), _OPEN.get()
    if replay is None:
        if scope is not None:
            scope.ask()
        return scope
    if scope is None or scope.opened_in != replay:  # else what is replayed opens its scope itself
        scope = _SCOPES.find(replay[1])
    if scope is not None and not torch.is_grad_enabled():
        # The inner replay would come from a node made here, in no scope, and its loss would be missing without a word.
        raise RuntimeError(
            "edl::domain_scope: reentrant checkpointing cannot be nested, use use_reentrant=False "
            "(got a replay that keeps no gradient)"
        )
    return scope


def current_labels() -> Labels | None:
    """The labels of the forward pass that the calling code belongs to, replayed or not; None outside any scope.

    A router asks in every forward pass while it trains, and computes its loss where the answer is not None and
    gradients are recorded (the first pass of reentrant checkpointing records none, its replay does). Who asks only
    where gradients are recorded finds no labels any more once others' part of the graph is gone.

    Returns:
        `Labels` (domain_ids, attention_mask, padding_mask, cu_seqlens, and all label_sets by name), or None.

    Raises:
        RuntimeError: a replay whose scope cannot be told: nested reentrant checkpointing, forward passes of several
            threads, or more passes in flight than are remembered; one that asks where its forward pass did not.
    """
    scope = current_scope()
    return None if scope is None else scope.labels


if not TYPE_CHECKING:  # torch's decorator is untyped and would hide the types
    current_labels = torch.compiler.disable(current_labels)
