"""The two regimes of memory in which the CPU is measured: *kept* and *fresh*.

Kept: malloc keeps what is freed, as the allocators do that are advised for training on CPUs (docs/performance.md).
Fresh: malloc as it comes, which hands large tensors back to the system, so that every call gets new pages, which the
system clears: that can take as long as the products, and differs most between machines. A process cannot go back once
it has changed malloc, so fresh memory is measured in another one.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import torch
from peak import multiply_adds
from watch import Watch

Result = TypeVar("Result")


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed, and tells whether it does: only glibc knows these switches.

    Its heap may still grow in the first calls, up to nine times, until holes are left that fit: the watch sees that.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all((set_option(mmap_max, 0), set_option(trim_threshold, 2**31 - 1), set_option(top_pad, 2**28)))


def hand_back_freed_memory() -> None:
    """What is kept by now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cpu_watch(threads: int, keeps_memory: bool, best: float, repeat_seconds: float) -> Watch:
    """A watch whose probe runs on so many threads."""
    probe = functools.partial(multiply_adds, threads)
    return Watch(torch.device("cpu"), probe, keeps_memory, best, repeat_seconds)


class Request(NamedTuple):
    """What the other process is to do: function(watch, *arguments)."""

    function: Callable
    arguments: tuple
    threads: int
    best: float
    repeat_seconds: float


def _serve(request: Request) -> tuple[object, Watch]:
    torch.set_num_threads(request.threads)
    torch.manual_seed(0)
    watch = cpu_watch(request.threads, False, request.best, request.repeat_seconds)
    return request.function(watch, *request.arguments), watch


class FreshMemory:
    """The process whose malloc is as it comes. It starts with the first call, and ends with this one."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[..., Result], watch: Watch, *arguments: object) -> Result:
        """function(watch, *arguments) there, with a watch that knows what this one knows, and teaches it the rest."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        hand_back_freed_memory()  # the other process needs as much
        request = Request(function, arguments, self.threads, watch.best, watch.repeat_seconds)
        result, other = self._pool.submit(_serve, request).result()
        watch.take_over(other)
        return result
