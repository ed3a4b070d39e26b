"""Compiles every CUDA source without a GPU: `python tools/check_cuda.py [--arch 80 90 100]`.

Kernels (csrc/cuda/kernels/*.cu) go through nvcc for each architecture, with registers, spills and shared memory of each in
a table; the host side (csrc/cuda/*.cpp) is checked for syntax and types against the headers of the running torch, which
may be a build without CUDA. Needs nvcc and torch, nothing else.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc/cuda/kernels").glob("*.cu"))
HOST_SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cpp"))


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or where the toolkit installs itself."""
    candidates = [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("nvcc", path=candidates[0]) or shutil.which("nvcc") or shutil.which("nvcc", path=candidates[-1])


def compile_source(nvcc: str, source: Path, flags: list[str]) -> tuple[Path, int, str]:
    """(source, exit status, everything that the compiler said)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", f"-I{ROOT / 'csrc'}", *flags, "-c", str(source), "-o", f"{folder}/object"]
        result = subprocess.run(command, capture_output=True, text=True)
    return source, result.returncode, result.stdout + result.stderr


def kernel_flags(architectures: list[str]) -> list[str]:
    """Those of setup.py, for real architectures, with the report of ptxas."""
    targets = [flag for arch in architectures for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    return [*cpp_extension.COMMON_NVCC_FLAGS, "-O3", "-Xptxas", "-v", *targets]


def host_flags() -> list[str]:
    """Torch's own flag for a missing generated header, which torch built without CUDA does not have."""
    flags = ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-Xcompiler", "-fsyntax-only,-Wall,-Wextra,-Wno-unused-parameter"]
    return flags + [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]


def demangled(text: str) -> str:
    filter_command = shutil.which("c++filt")
    return (
        subprocess.run([filter_command], input=text, capture_output=True, text=True).stdout if filter_command else text
    )


def resources(source: Path, log: str) -> list[tuple[str, ...]]:
    """(source, architecture, kernel, registers, bytes spilled, bytes of static shared memory) of each kernel."""
    rows = []
    kernel = arch = spills = ""
    for line in demangled(log).splitlines():
        if found := re.search(r"Compiling entry function '(.*)' for '(sm_\w+)'", line):
            kernel = re.sub(r"edl::|\(anonymous namespace\)::|^void ", "", found[1]).split("(")[0]
            arch = found[2]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = f"{found[1]}/{found[2]}"
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append((source.stem, arch, kernel, found[1], spills, shared[1] if shared else "0"))
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    table = [("source", "arch", "kernel", "registers", "spills", "shared"), *sorted(rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch", nargs="+", default=["80", "90", "100"], help="compute capabilities (default: 80 90 100)"
    )
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("edl: nvcc is needed to compile the CUDA sources: install the CUDA toolkit or set CUDA_HOME (none found)")
        return 1
    jobs = [(source, kernel_flags(arguments.arch)) for source in KERNELS] + [
        (source, host_flags()) for source in HOST_SOURCES
    ]
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda job: compile_source(nvcc, *job), jobs))
    failed = [(source, log) for source, status, log in results if status != 0]
    print_table([row for source, status, log in results if source.suffix == ".cu" for row in resources(source, log)])
    for source, log in failed:
        print(f"\n{source.relative_to(ROOT)} does not compile:\n{log}", file=sys.stderr)
    architectures = ", ".join(f"sm_{arch}" for arch in arguments.arch)
    print(f"\n{len(results) - len(failed)} of {len(results)} CUDA sources compile ({architectures}); none was run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
