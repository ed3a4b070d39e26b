"""Knows which timed calls had the machine to themselves.

Cloud machines swing: within minutes the same two threads do 456 and 230 GFLOP/s. So a probe, 0.1 s of multiply-adds on
all threads, goes before and after every stretch of timed calls. A stretch is one call, or as many as 0.3 s hold: short
enough to be one moment of the machine, long enough that probes do not take most of the time. A call counts where both
probes around it reach 90 % of the run's best, and where it faulted no more than a few pages if memory is kept.
"""

import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

STRETCH_SECONDS = 0.3
SETTLE_SECONDS = 0.02  # OpenMP's threads spin for a while after their last work, and would slow the probe
QUIET_SHARE = 0.9  # of the best probe
FEW_FAULTS = 16  # pages; the interpreter's own
Function = Callable[[], object]


def milliseconds(function: Function, device: torch.device) -> float:
    """One call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


class Stretch:
    """Calls between two probes."""

    def __init__(self, before: float | None) -> None:
        self.before = before  # GFLOP/s of the probe
        self.after: float | None = None
        self.seconds = 0.0


class Call(NamedTuple):
    """One timed call."""

    milliseconds: float
    faults: int  # pages that the system had to hand out
    stretch: Stretch


class Watch:
    """Times calls of one process on one device.

    Args:
        device: where the calls run.
        probe: GFLOP/s of this moment, or None where it cannot be measured; None for CUDA, where every call counts.
        keeps_memory: whether freed memory is kept, so that a call that has run before should fault no pages.
        best: the best probe that is known.
        repeat_seconds: that may go into repeated calls in all.
    """

    def __init__(
        self,
        device: torch.device,
        probe: Callable[[], float | None] | None,
        keeps_memory: bool = False,
        best: float = 0.0,
        repeat_seconds: float = 0.0,
    ) -> None:
        self.device = device
        self.keeps_memory = keeps_memory
        self.best = best
        self.repeat_seconds = repeat_seconds
        self.timed, self.disturbed = 0, 0  # calls
        self._probe = probe if device.type == "cpu" else None
        self._stretch: Stretch | None = None

    def time(self, function: Function) -> Call:
        """Times one call. Which stretch it belongs to ends with a later call, or with `end`."""
        if self._stretch is None or self._stretch.seconds > STRETCH_SECONDS:
            self._stretch = Stretch(self.end() or self._measure())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        taken = milliseconds(function, self.device)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        self._stretch.seconds += taken * 1e-3
        return Call(taken, faults, self._stretch)

    def end(self) -> float | None:
        """Ends the stretch with a probe, which it returns."""
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            return None
        stretch.after = self._measure()
        return stretch.after

    def take_over(self, other: "Watch") -> None:
        """What the watch of another process found, which began with this one's best probe and seconds."""
        self.best, self.repeat_seconds = max(self.best, other.best), other.repeat_seconds
        self.timed += other.timed
        self.disturbed += other.disturbed

    def is_quiet(self, call: Call) -> bool:
        """Whether the call counts, by the best probe that is known by now."""
        probes = [probe for probe in (call.stretch.before, call.stretch.after) if probe is not None]
        is_kept = not self.keeps_memory or call.faults <= FEW_FAULTS
        return is_kept and all(probe >= QUIET_SHARE * self.best for probe in probes)

    def _measure(self) -> float | None:
        if self._probe is None:
            return None
        time.sleep(SETTLE_SECONDS)
        speed = self._probe()
        self.best = max(self.best, speed or 0.0)
        return speed
