"""Several processes that label a shard each, one bar for all of them, and an end together."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from edl.corpus.documents import Shard
from edl.corpus.extras import require

Label = Callable[[Shard, Callable[[int], None]], None]

# Of a worker: bytes that all of them have read, and whether to stop.
_shared: Any = None


class _Stopped(Exception):
    """Another shard has failed, or the user has had enough."""


def label_all(label: Label, shards: Sequence[Shard], processes: int, quiet: bool) -> None:
    """Calls `label(shard, advance)` for every shard; `advance(bytes)` moves the bar.

    Raises:
        ValueError: what `label` raises, or a process was killed.
    """
    processes = min(processes, len(shards))
    tqdm = require("tqdm")
    total = sum(shard.num_bytes for shard in shards)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=True if quiet else None, leave=False) as bar:
        if processes == 1:
            for shard in shards:
                label(shard, bar.update)
        else:
            _label_in_processes(label, shards, processes, bar)


def _label_in_processes(label: Label, shards: Sequence[Shard], processes: int, bar: Any) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    shared = context.Value("q", 0), context.Event()
    with concurrent.futures.ProcessPoolExecutor(processes, context, _begin, (shared,)) as pool:
        # The longest first, so that at the end none is left alone with it.
        largest_first = sorted(shards, key=lambda shard: -shard.num_bytes)
        waiting = {pool.submit(_label, label, shard) for shard in largest_first}
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when="FIRST_EXCEPTION")
                bar.update(shared[0].value - bar.n)
                for future in done:
                    future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(
                f"edl::label: processes must not be killed, fewer need less memory (got {error})"
            ) from error
        finally:
            shared[1].set()
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(shared: Any) -> None:
    """In a worker: takes what is shared, and sees to it that it does not outlive the process that wants its labels."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _label(label: Label, shard: Shard) -> None:
    label(shard, _advance)


def _advance(num_bytes: int) -> None:
    value, stop = _shared
    if stop.is_set():
        raise _Stopped
    with value.get_lock():
        value.value += num_bytes
