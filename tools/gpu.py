"""Builds, tests, sanitises and measures edl on a CUDA machine in one call: `make gpu PYTHON=python3`.

Takes the given Python and its torch as they are, and no network. Every stage has a time limit, all together less than
ten minutes; one that fails or runs out of time does not keep the next from running, except the build. Results go to
benchmarks/results, or the folder given by --output: the tables of the benchmarks, and gpu-DEVICE.json with how each
stage ended.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ALL_SECONDS = 570  # for everything: a call of this script ends within ten minutes
SLOW_TESTS = [
    "aoti",
    "cmake_config",
    "cpp",
    "cuda_emulation",
    "examples",
    "packaging",
    "pretrain_example",
    "setup",
]  # they say little of the device


@dataclass
class Stage:
    name: str
    command: list[str]
    seconds: int  # at most
    environment: dict[str, str] = field(default_factory=dict)


def run(stage: Stage, seconds: int) -> dict[str, object]:
    """Runs one stage, and everything that it started no longer than `seconds`; says how it ended."""
    print(f"\n== {stage.name}, {seconds} s at most\n$ {' '.join(stage.command)}", flush=True)
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | stage.environment
    process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
        outcome = "passed" if status == 0 else f"failed (exit status {status})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome = "stopped at its time limit"
    return {"outcome": outcome, "seconds": round(time.monotonic() - start)}


def build() -> Stage:
    """In place, with kernels for the device at hand only, which keeps it short."""
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "EDL_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    }
    return Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240, environment)


def pytest(marks: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", *arguments]


def sanitizer_stages() -> list[Stage]:
    """Every kernel once under compute-sanitizer, on allocations of their own: torch's cache would hide what lies beyond
    one."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        return []
    tests = pytest("cuda", "tests/test_reference.py")

    def check(tool: str, seconds: int) -> Stage:
        command = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99", *tests]
        return Stage(f"compute-sanitizer {tool}", command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    return [check("memcheck", 90), check("racecheck", 60)]


def stages(output: Path, device: str) -> list[Stage]:
    """Everything after the build, what matters most first."""
    python = sys.executable
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    slow = [f"--ignore=tests/test_{name}.py" for name in SLOW_TESTS]

    def benchmark(name: str, seconds: int, *options: str) -> Stage:
        save = str(output / f"{name}-{device}.md")
        command = [python, f"benchmarks/{name}.py", "--device", "cuda", "--save", save, *options]
        return Stage(f"benchmark {name}", command, seconds)

    return [
        Stage("tests", pytest("cuda", *side_by_side), 150),
        benchmark("loss_graph", 40),
        benchmark("moe", 100, "--quick"),
        *sanitizer_stages(),
        Stage("quick tests without the device", pytest("not cuda and not network", *side_by_side, *slow), 60),
        benchmark("router", 40, "--quick"),
        benchmark("train_step", 40),
        benchmark("loss", 60, "--quick"),
    ]


def run_all(output: Path, device: str) -> dict[str, dict[str, object]]:
    deadline = time.monotonic() + ALL_SECONDS
    results = {"build": run(build(), 240)}
    if results["build"]["outcome"] != "passed":
        return results
    for stage in stages(output, device):
        seconds = min(stage.seconds, int(deadline - time.monotonic()))
        results[stage.name] = (
            run(stage, seconds) if seconds >= 10 else {"outcome": "left out: no time left", "seconds": 0}
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    output = parser.parse_args().output.resolve()
    if not torch.cuda.is_available():
        print(
            f"make gpu needs a CUDA device that torch can see (got torch {torch.__version__}, "
            f"CUDA {torch.version.cuda}); without one, `make check-cuda` compiles the kernels",
            file=sys.stderr,
        )
        return 1
    name = torch.cuda.get_device_name()
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    output.mkdir(parents=True, exist_ok=True)
    results = run_all(output, device)
    facts = {"device": name, "torch": torch.__version__, "CUDA": torch.version.cuda, "Python": sys.version.split()[0]}
    (output / f"gpu-{device}.json").write_text(json.dumps(facts | {"stages": results}, indent=2) + "\n")
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    for stage, result in results.items():
        print(f"  {stage}: {result['outcome']}, {result['seconds']} s")
    return 0 if all(result["outcome"] == "passed" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
