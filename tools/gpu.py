"""Builds, tests, sanitises and measures edl on a CUDA machine in one call: `make gpu PYTHON=python3`.

Takes the given Python and its torch as they are, and no network. Every stage has a time limit, all together less than ten
minutes; one that fails or runs out of time does not keep the next from running, except the build. Results go to
benchmarks/results, or the folder given by --output.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str], seconds: int, environment: dict[str, str]) -> str:
    """Runs one stage and says how it ended."""
    print(f"\n$ {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
        outcome = "passed" if status == 0 else f"failed (exit status {status})"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after its limit of {seconds} s"
    return f"{outcome}, {time.monotonic() - start:.0f} s"


def build_environment() -> dict[str, str]:
    """Kernels for the device at hand only, which keeps the build short."""
    major, minor = torch.cuda.get_device_capability()
    return os.environ | {
        "EDL_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        "PYTHONPATH": str(ROOT),
    }


def stages(output: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, limit in seconds) of everything after the build."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-m", "cuda", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    found = [
        ("tests", tests, 150),
        (
            "benchmark of the loss",
            [python, "benchmarks/loss.py", "--device", "cuda", "--save", str(output / f"loss-{name}.md")],
            90,
        ),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer:
        check = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99"]
        found.append(("memory check", [*check, *tests, "tests/test_reference.py"], 100))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        print(
            f"make gpu needs a CUDA device that torch can see (got torch {torch.__version__}, "
            f"CUDA {torch.version.cuda}); without one, `make check-cuda` compiles the kernels",
            file=sys.stderr,
        )
        return 1
    environment = build_environment()
    results = {"build": run([sys.executable, "setup.py", "build_ext", "--inplace"], 240, environment)}
    if results["build"].startswith("passed"):
        for name, command, seconds in stages(output):
            results[name] = run(command, seconds, environment)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name, outcome in results.items():
        print(f"  {name}: {outcome}")
    return 0 if all(outcome.startswith("passed") for outcome in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
