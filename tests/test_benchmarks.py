"""What benchmarks rest on: which timed calls count, what keeps freed memory, and the functions of peak.cpp."""

import itertools
import math
import mmap
import subprocess
import sys
import time

import pytest
import torch
from commands import ENVIRONMENT, ROOT

BENCHMARKS = str(ROOT / "benchmarks")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def watch_of(probes, **options):
    from watch import Watch

    return Watch(CPU, iter(probes).__next__, **options)


def wait():
    time.sleep(1e-3)


def fault():
    """Writes to 64 pages that nobody has had."""
    with mmap.mmap(-1, 64 * mmap.PAGESIZE) as memory:
        for page in range(64):
            memory[page * mmap.PAGESIZE] = 1


@pytest.mark.parametrize(("before", "after", "counts"), [(100, 100, True), (100, 89, False), (89, 100, False)])
def test_a_call_counts_where_both_probes_reach_nine_tenths_of_the_best(before, after, counts):
    watch = watch_of([before, after], best=100)
    call = watch.time(wait)
    assert watch.end() == after
    assert watch.is_quiet(call) is counts
    watch.best = 90
    assert watch.is_quiet(call) is (min(before, after) >= 81)


def test_a_probe_stands_between_stretches():
    from watch import STRETCH_SECONDS

    watch = watch_of(range(1, 5))
    calls = [watch.time(lambda: time.sleep(seconds)) for seconds in (0, STRETCH_SECONDS, 0, 0)]
    watch.end()
    assert [(call.stretch.before, call.stretch.after) for call in calls] == [(1, 2), (1, 2), (2, 3), (2, 3)]
    assert watch.best == 3
    assert watch.end() is None


@pytest.mark.parametrize("keeps_memory", [True, False])
def test_a_call_that_faults_pages_counts_unless_memory_is_kept(keeps_memory):
    watch = watch_of(itertools.repeat(100), keeps_memory=keeps_memory)
    faulting, other = watch.time(fault), watch.time(wait)
    watch.end()
    assert faulting.faults >= 64
    assert watch.is_quiet(faulting) is not keeps_memory
    assert watch.is_quiet(other)


def test_disturbed_calls_are_made_again_and_left_out():
    from measure import interleaved

    watch = watch_of(itertools.chain([50] * 2, itertools.repeat(100)), best=100, repeat_seconds=60)
    lasts = itertools.chain([0.02] * 4, itertools.repeat(0.001))  # the disturbed calls take longer
    timing = interleaved({"way": lambda: time.sleep(next(lasts))}, watch, 1e-2)["way"]
    assert timing.is_quiet
    assert timing.runs == 3
    assert timing.median < 20
    assert not str(timing).startswith("~")
    assert (watch.timed, watch.disturbed) == (6, 3)


@pytest.mark.parametrize(("seconds", "passes"), [(60, 4), (0, 1)])
def test_what_cannot_be_measured_quietly_is_marked_after_few_repeats(seconds, passes):
    from measure import interleaved

    calls = []
    watch = watch_of(itertools.repeat(50), best=100, repeat_seconds=seconds)
    timing = interleaved({"way": lambda: calls.append(wait())}, watch, 1e-3)["way"]
    assert str(timing).startswith("~")
    assert len(calls) == 1 + 3 * passes  # the first told how long one takes


def test_a_long_call_counts_at_once_and_a_known_one_is_not_repeated():
    from measure import interleaved

    calls = []

    def call(name):
        calls.append(name)
        wait()

    functions = {name: lambda name=name: call(name) for name in ("long", "known", "very long")}
    watch = watch_of(itertools.repeat(100), best=100)
    times = interleaved(functions, watch, 1e-4, known={"known": 1.0, "very long": 3.0})
    assert sorted(calls) == ["known", "long"]
    assert [times[name].is_quiet for name in functions] == [True, True, False]
    watch = watch_of(itertools.chain([50] * 2, itertools.repeat(100)), best=100, repeat_seconds=60)
    assert interleaved({"long": wait}, watch, 1e-4)["long"].is_quiet  # the second time
    assert times["very long"].median == 3.0


FAULTS = """
import resource, torch
from memory import keep_freed_memory

def faults():
    counts = []
    for _ in range(16):  # the heap may grow a few times before holes of the right size are left
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(9 << 20)  # above 32 MiB glibc always hands back
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return counts[-1]

print(faults(), keep_freed_memory(), faults())
"""


def test_fresh_memory_faults_its_pages_and_kept_memory_none():
    environment = ENVIRONMENT | {"PYTHONPATH": BENCHMARKS}
    result = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    fresh, keeps, kept = result.stdout.split()
    assert int(fresh) > 16  # huge pages, or 512 times as many
    if keeps == "False":
        pytest.skip("this C library has no such switches")
    assert int(kept) <= 16


def test_peaks_are_measured():
    import peak

    functions = peak.library()
    assert not isinstance(functions, str), functions
    speeds = [functions.multiply_adds(2, 0.01), *(functions.memory(2, 0.01, kind, 1 << 20) for kind in range(3))]
    if functions.has_dots():
        speeds.append(functions.dots(2, 0.01))
    if functions.has_tiles():
        speeds += [functions.tiles(2, 0.01, size) for size in peak.WORKING_SETS.values()]
    assert all(0 < speed < math.inf for speed in speeds)


def test_shares_are_of_tiles_for_bfloat16_where_there_are_tiles():
    from peak import Peaks

    without = Peaks(100.0, None, {}, {}, "multiply-adds")
    with_tiles = without._replace(tiles={"registers": 3000.0, "L1": 2000.0, "L2": 1500.0})
    assert [without.of(dtype) for dtype in (torch.float32, torch.bfloat16)] == [100, 100]
    assert [with_tiles.of(dtype) for dtype in (torch.float32, torch.bfloat16)] == [100, 3000]
    assert "3000 from registers, 2000 from L1, 1500 from L2" in with_tiles.lines()["tiles of bfloat16"]
