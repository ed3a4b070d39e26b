"""A CUDA device for a few minutes: builds, checks and measures edl in stages, what matters most first.

    make gpu [STAGES=build,correctness] [BUDGET=400] [PYTHON=python3]

Takes the given Python and its torch as they are, no network and no root. Every stage has a time limit, and one that
does not fit into what is left of the budget is left out. Results are written as soon as there are any, into the folder
that OUT names, else into benchmarks/results: gpu-DEVICE.json says how each stage went, pages say what was found.
`--rehearse` runs the same sequence without a device, with the emulated kernels in its place.
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypedDict

import cases
import prebuilt
import torch

ROOT = Path(__file__).resolve().parent.parent
machine = runpy.run_path(str(ROOT / "edl" / "machine.py"))  # edl itself may not be built yet

SECONDS_OF_A_CASE = 45  # a kernel that takes longer hangs
SECONDS_OF_A_COMPILATION = 120
# The files with cases marked `cuda`, what matters most first.
CORRECTNESS = [
    "tests/test_cuda.py",
    "tests/test_reference.py",
    "tests/ops",
    "tests/test_masked_experts.py",
    "tests/test_edge_cases.py",
    "tests/test_near_equal_domains.py",
    "tests/test_gradcheck.py",
]
GRAPHS = ["tests/test_cuda_graphs.py", "tests/test_compile.py", "tests/test_opcheck.py"]
EMULATION = "tests/test_cuda_emulation.py"
BENCHMARKS = {"moe": "layer", "loss_graph": "loss-graph", "loss": "loss", "objectives": "loss"}  # and their pages
SHARED_PAGES = {"no-rows": "correctness", "races": "sanitizer"}  # of stages without one of their own


@dataclasses.dataclass(frozen=True)
class Target:
    """What is checked: a device, or the CPU where the sequence is rehearsed."""

    name: str  # in the names of files
    device: torch.device
    output: Path
    sections: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # of each page, by stage

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def page(self, name: str) -> Path:
        return self.output / f"gpu-{self.name}-{name}.md"

    def write(self, stage: str, text: str) -> None:
        """Puts what a stage found on its page, beside what other stages of this run put there."""
        page = SHARED_PAGES.get(stage, stage)
        sections = self.sections.setdefault(page, {})
        sections[stage] = text
        self.page(page).write_text("\n".join(sections.values()))


class Stage(NamedTuple):
    """A part of the sequence."""

    name: str
    estimate: float  # seconds that it is expected to take
    limit: float  # seconds that it may take
    run: Callable[[Target, float], str]  # (target, seconds) → how it ended


PASSED = "passed"


# ---- commands ----


def run(command: list[str], seconds: float, log: Path, environment: dict[str, str], watch: Callable[[], None]) -> str:
    """Runs a command, and everything that it starts no longer than `seconds`; says how it ended.

    Its output goes to `log` and to ours; `watch` is called again and again, and once afterwards.
    """
    print(f"$ {' '.join(command)}", flush=True)
    deadline = time.monotonic() + seconds
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment
    with log.open("ab") as write, log.open("rb") as read:
        read.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=write,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_us,  # noqa: PLW1509 (there are no threads)
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                pass_on(read)
                watch()
                time.sleep(0.5)
        finally:
            status = process.poll()
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            pass_on(read)
            watch()
    if status is None:
        return f"stopped after {seconds:.0f} s"
    return PASSED if status == 0 else f"failed (exit status {status})"


def end_with_us() -> None:
    """Called in a new process: makes it a group, which can be ended as one, and which the system ends when we end."""
    os.setpgrp()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def pass_on(file: BinaryIO) -> None:
    """Prints what a command wrote since the last time."""
    sys.stdout.write(file.read().decode(errors="replace"))
    sys.stdout.flush()


# ---- build ----


def architecture_of(target: Target) -> str | None:
    """Compute capability, such as "9.0"; of a rehearsal none."""
    if target.is_rehearsal:
        return None
    return ".".join(map(str, torch.cuda.get_device_capability(target.device)))


def build(target: Target, seconds: float) -> str:
    """In place, with kernels for the device at hand alone; a library that was built before is taken where it fits.

    A rehearsal leaves alone what is in place, which other tests run, and compiles the small module beside it.
    """
    architecture = architecture_of(target)
    problem = prebuilt.problem(prebuilt.FOLDER, architecture)
    note = "The prebuilt library fits." if problem is None else f"No prebuilt library is taken: {problem}."
    variables = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))}
    if problem is None or target.is_rehearsal:
        variables["EDL_PREBUILT_LIBRARY"] = "1"
    command = [sys.executable, "setup.py", "build_ext"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        if target.is_rehearsal:
            variables["EDL_BUILD_CUDA"] = "0"
            command += ["--build-lib", folder, "--build-temp", folder]
        else:
            variables |= {"EDL_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": str(architecture)}
            command += ["--inplace"]
            if problem is None:
                prebuilt.take(prebuilt.FOLDER)

        def write(outcome: str) -> None:
            last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
            target.write("build", f"# Build, {target.name}\n\n{outcome}. {note}\n\n```\n{last_lines}\n```\n")

        outcome = run(command, seconds, log, variables, functools.partial(write, "running"))
        write(outcome)
    return outcome


# ---- tests ----


def pytest_command(*arguments: str, workers: int = 1, seconds: int = SECONDS_OF_A_CASE) -> list[str]:
    """pytest with our plugin; pytest-timeout and pytest-xdist end a case alone that hangs or crashes."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "case_report"]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={seconds}", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--max-worker-restart=100"]
    return [*command, *arguments]


def run_cases(
    target: Target,
    stage: str,
    commands: list[list[str]],
    seconds: float,
    variables: dict[str, str] | None = None,
) -> str:
    """Runs pytest commands and keeps their page up to date; cases that time did not suffice for have not failed."""
    deadline = time.monotonic() + seconds
    others = []
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "cases", Path(folder) / "log"

        def write(outcome: str) -> None:
            title = f"{stage.capitalize()}, {target.name}"
            target.write(stage, cases.page(title, cases.read(file), outcome))

        for command in commands:
            left = max(1.0, deadline - time.monotonic())
            watch = functools.partial(write, "running")
            outcome = run(command, left, log, {"EDL_CASE_REPORT": str(file)} | (variables or {}), watch)
            others += [outcome] if outcome != PASSED else []
        found = cases.read(file)
        failed = sum(case["outcome"] == "failed" for case in found)
        if failed or (not found and not any("stopped" in other for other in others)):
            outcome = ", ".join([f"failed: {failed} of {len(found)} cases", *others])
        elif any("failed" in other for other in others):  # a finding of the sanitizer, say
            outcome = f"failed: {', '.join(others)}, no case by itself"
        else:
            outcome = ", ".join(others) or PASSED
        write(outcome)
    return outcome


def side_by_side() -> int:
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def no_rows(target: Target, seconds: float) -> str:
    """Grouped products without any row, the likeliest to hang: before all else, in a process of their own."""
    if target.is_rehearsal:
        commands = [pytest_command("-k", "sanitized and check_rows", EMULATION, seconds=SECONDS_OF_A_COMPILATION)]
    else:
        commands = [pytest_command("-m", "cuda", "-k", "without_any_row", CORRECTNESS[0], seconds=20)]
    return run_cases(target, "no-rows", commands, seconds)


def correctness(target: Target, seconds: float) -> str:
    """What only a device can show, then every operator against its reference, then every other case marked `cuda`."""
    if target.is_rehearsal:
        commands = [pytest_command("-m", "not cuda", "--cases-of-each=2", "-k", "values", CORRECTNESS[1])]
    else:
        commands = [pytest_command("-m", "cuda", *CORRECTNESS, workers=side_by_side())]
    return run_cases(target, "correctness", commands, seconds)


def graphs(target: Target, seconds: float) -> str:
    """CUDA graphs, then compiled operators."""
    if target.is_rehearsal:
        commands = [pytest_command("-m", "not cuda", "-k", "every and sort_by_expert", GRAPHS[1])]
    else:
        commands = [pytest_command("-m", "cuda", *GRAPHS, workers=side_by_side(), seconds=SECONDS_OF_A_COMPILATION)]
    return run_cases(target, "graphs", commands, seconds)


def under_sanitizer(target: Target, stage: str, seconds: float, tool: str, *arguments: str) -> str:
    """compute-sanitizer on the first cases of every operator."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return "left out: compute-sanitizer is not installed"
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99"]
    pytest = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "case_report", "-m", "cuda"]
    command = [program, *options, sys.executable, *pytest, "--cases-of-each=2", CORRECTNESS[1], *arguments]
    # Allocations of their own: torch's cache would hide what lies beyond one.
    return run_cases(target, stage, [command], seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def races(target: Target, seconds: float) -> str:
    """Races in the shared memory of the kernels that share most."""
    if target.is_rehearsal:
        commands = [pytest_command("-k", "races and gather", EMULATION, seconds=SECONDS_OF_A_COMPILATION)]
        return run_cases(target, "races", commands, seconds)
    return under_sanitizer(target, "races", seconds, "racecheck", "-k", "sort_by_expert or route_tokens")


def sanitizer(target: Target, seconds: float) -> str:
    """Accesses beyond an allocation, of every operator."""
    if target.is_rehearsal:
        commands = [pytest_command("-k", "sanitized and gather", EMULATION, seconds=SECONDS_OF_A_COMPILATION)]
        return run_cases(target, "sanitizer", commands, seconds)
    return under_sanitizer(target, "sanitizer", seconds, "memcheck")


# ---- speed ----


def speed(target: Target, seconds: float) -> str:
    """The layer and the loss beside their peers, the loss inside a CUDA graph beside its floor, and objectives beside
    their layer."""
    deadline = time.monotonic() + seconds
    others = []
    begun: set[Path] = set()
    with tempfile.TemporaryDirectory() as folder:
        for benchmark, page in BENCHMARKS.items():
            command = [sys.executable, f"benchmarks/{benchmark}.py", "--device", target.device.type, "--quick"]
            page_so_far, begins = target.page(page), target.page(page) not in begun
            saved = page_so_far if begins else Path(folder) / f"{benchmark}.md"
            begun.add(page_so_far)
            command += ["--save", str(saved)]
            if target.is_rehearsal:
                if benchmark != "loss":
                    continue
                command += ["--seconds", "0.01"]
            outcome = run(command, max(1.0, deadline - time.monotonic()), Path(folder) / "log", {}, lambda: None)
            others += [f"{benchmark} {outcome}"] if outcome != PASSED else []
            if not begins and saved.exists():
                page_so_far.write_text(f"{page_so_far.read_text()}\n{saved.read_text()}")
    if any("failed" in other for other in others):
        return f"failed: {', '.join(others)}"
    return ", ".join(others) or PASSED


# ---- all stages ----


def stages(target: Target) -> list[Stage]:
    """What matters most first. Estimates: for a device with 16 processors beside it, none of which has run them yet."""
    fits = target.is_rehearsal or prebuilt.problem(prebuilt.FOLDER, architecture_of(target)) is None
    return [
        Stage("build", 15 if fits else 20 + 600 / (os.cpu_count() or 1), 300, build),
        Stage("no-rows", 20, 60, no_rows),
        Stage("correctness", 100, 240, correctness),
        Stage("races", 40, 60, races),
        Stage("speed", 100, 180, speed),
        Stage("sanitizer", 60, 90, sanitizer),
        Stage("graphs", 80, 120, graphs),
    ]


class Ended(TypedDict):
    """How a stage went."""

    outcome: str
    seconds: float


def run_stages(target: Target, chosen: list[Stage], budget: float) -> dict[str, Ended]:
    """Runs stages in order while they fit into the budget, in seconds; how each went is on disk all the time."""
    deadline = time.monotonic() + budget
    results: dict[str, Ended] = {stage.name: {"outcome": "not reached", "seconds": 0} for stage in chosen}
    facts = machine["facts"](target.device)

    def note(stage: Stage, outcome: str, seconds: float = 0) -> None:
        results[stage.name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        text = json.dumps({"facts": facts, "stages": results}, indent=2) + "\n"
        unfinished = target.output / f".gpu-{target.name}.json"
        unfinished.write_text(text)
        unfinished.replace(target.output / f"gpu-{target.name}.json")

    for stage in chosen:
        left = deadline - time.monotonic()
        if "build" in results and results["build"]["outcome"] not in ("not reached", PASSED):
            note(stage, "left out: the build did not pass")
        elif stage.estimate > left:
            note(stage, f"left out: takes about {stage.estimate:.0f} s, {max(left, 0):.0f} s are left")
        else:
            seconds = left if target.is_rehearsal else min(stage.limit, left)  # a slow machine may rehearse
            print(f"\n== {stage.name}: about {stage.estimate:.0f} s, {seconds:.0f} s at most", flush=True)
            note(stage, "running")
            start = time.monotonic()
            outcome = stage.run(target, seconds)
            note(stage, outcome, time.monotonic() - start)
        print(f"== {stage.name}: {results[stage.name]['outcome']}", flush=True)
    return results


def find_target(output: Path, rehearse: bool) -> Target:
    """The device at hand, or the CPU for a rehearsal; ends with a sentence where there is none."""
    if rehearse:
        return Target("rehearsal", torch.device("cpu"), output)
    if not torch.cuda.is_available():
        sys.exit(
            "make gpu needs a CUDA device that torch can see; without one, `make check-cuda` compiles the kernels "
            f"(got torch {torch.__version__}, CUDA {torch.version.cuda})"
        )
    device = torch.device("cuda")
    return Target(re.sub(r"[^a-z0-9]+", "-", machine["name"](device).lower()).strip("-"), device, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--stages", help="what is run: names, separated by commas (default: all)")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default: 570)")
    parser.add_argument("--rehearse", action="store_true", help="run the sequence without a device")
    arguments = parser.parse_args()
    output = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    target = find_target(output, arguments.rehearse)
    known = {stage.name: stage for stage in stages(target)}
    names = arguments.stages.split(",") if arguments.stages else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--stages takes {', '.join(known)} (got {', '.join(sorted(unknown))})")
    output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("make gpu: stopped"))  # what it started ends with it
    chosen = [stage for stage in known.values() if stage.name in names]
    expected = ", ".join(f"{stage.name} {stage.estimate:.0f} s" for stage in chosen)
    print(f"{target.name}: about {expected}; {arguments.budget:.0f} s at most in all. Results: {output}", flush=True)
    results = run_stages(target, chosen, arguments.budget)
    print("\n" + "\n".join(f"{name}: {ended['outcome']}, {ended['seconds']:.0f} s" for name, ended in results.items()))
    return 1 if any(ended["outcome"].startswith("failed") for ended in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
