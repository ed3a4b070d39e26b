"""Compiles every CUDA source without a GPU: `python tools/check_cuda.py [--arch 80 90 100]`.

Kernels (csrc/cuda/kernels/*.cu) go through nvcc for each architecture, with registers, spills, shared memory and, where
cuobjdump is installed, the loads and stores of 16 bytes of each in a table; check_symbols.py reads their objects. The
host side (csrc/cuda/*.cpp) is checked for syntax and types against the headers of the running torch, which may be a
build without CUDA. Needs nvcc, torch and binutils, nothing else.
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

import cuda_toolkit
from check_symbols import check_objects
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc/cuda/kernels").glob("*.cu"))
HOST_SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cpp"))


def find_cuobjdump(nvcc: str) -> str | None:
    """The disassembler beside nvcc, or of PATH."""
    return shutil.which("cuobjdump", path=os.path.dirname(nvcc)) or shutil.which("cuobjdump")


def compile_source(nvcc: str, folder: Path, source: Path, flags: list[str]) -> tuple[Path, int, str, str]:
    """(source, exit status, everything that the compiler said, disassembly of a kernel where it can be had); the object
    goes below the folder."""
    target = (folder / source.relative_to(ROOT)).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [
        nvcc,
        "-std=c++20",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc/include'}",
        *flags,
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assembly = ""
    cuobjdump = find_cuobjdump(nvcc)
    if result.returncode == 0 and source.suffix == ".cu" and cuobjdump:
        assembly = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True).stdout
    return source, result.returncode, result.stdout + result.stderr, assembly


def kernel_flags(architectures: list[str]) -> list[str]:
    """Those of setup.py, for real architectures, with the report of ptxas."""
    targets = [flag for arch in architectures for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    return [*cpp_extension.COMMON_NVCC_FLAGS, "-O3", "-Xptxas", "-v", *targets]


def host_flags() -> list[str]:
    """Torch's own flag for a missing generated header, which torch built without CUDA does not have."""
    flags = ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-Xcompiler", "-fsyntax-only,-Wall,-Wextra,-Wno-unused-parameter"]
    return flags + [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]


def demangled(names: list[str]) -> list[str]:
    filter_command = shutil.which("c++filt")
    if not filter_command:
        return names
    output = subprocess.run([filter_command], input="\n".join(names), capture_output=True, text=True).stdout
    short = re.sub(r"edl::(cuda::)?|\(anonymous namespace\)::|^void ", "", output, flags=re.MULTILINE)
    return [name.split("(")[0] for name in short.splitlines()]


def wide_accesses(assembly: str) -> dict[tuple[str, str], list[int]]:
    """Loads and stores of 16 bytes from and to global memory, for each (kernel, architecture)."""
    counts: dict[tuple[str, str], list[int]] = {}
    arch, count = "", [0, 0]
    for line in assembly.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            count = counts[found[1], arch] = [0, 0]
        elif found := re.search(r"\b(LDG|STG)\.\S*128", line):
            count[found[1] == "STG"] += 1
    return counts


def resources(source: Path, log: str, assembly: str) -> list[tuple[str, ...]]:
    """(source, architecture, kernel, registers, bytes spilled, bytes of static shared memory, loads and stores of 16
    bytes) of each kernel."""
    rows = []
    kernel = arch = spills = ""
    wide = wide_accesses(assembly)
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(.*)' for '(sm_\w+)'", line):
            kernel, arch = found[1], found[2]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = f"{found[1]}/{found[2]}"
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            loads, stores = wide.get((kernel, arch), ("?", "?"))
            rows.append((kernel, arch, found[1], spills, shared[1] if shared else "0", f"{loads}/{stores}"))
    names = demangled([row[0] for row in rows])
    return [(source.stem, row[1], name, *row[2:]) for name, row in zip(names, rows)]


def print_table(rows: list[tuple[str, ...]]) -> None:
    table = [("source", "arch", "kernel", "registers", "spills", "shared", "16-byte loads/stores"), *sorted(rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", help="compute capabilities (default: 80 90 100, of these what nvcc knows)")
    arguments = parser.parse_args()
    nvcc = cuda_toolkit.find().nvcc
    if nvcc is None:
        print("edl: nvcc is needed to compile the CUDA sources: install the CUDA toolkit or set CUDA_HOME (none found)")
        return 1
    numbers = arguments.arch or [name.replace(".", "") for name in cuda_toolkit.architectures(nvcc)]
    jobs = [(source, kernel_flags(numbers)) for source in KERNELS] + [(source, host_flags()) for source in HOST_SOURCES]
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda job: compile_source(str(nvcc), Path(folder), *job), jobs))
        objects, count, offences = check_objects(Path(folder))
    failed = [(source, log) for source, status, log, _ in results if status != 0]
    kernels = [(source, log, assembly) for source, _, log, assembly in results if source.suffix == ".cu"]
    print_table([row for kernel in kernels for row in resources(*kernel)])
    for source, log in failed:
        print(f"\n{source.relative_to(ROOT)} does not compile:\n{log}", file=sys.stderr)
    for offence in offences:
        print(offence, file=sys.stderr)
    print(f"\n{count} symbols of {objects} objects, {len(offences)} offences")
    architectures = ", ".join(f"sm_{arch}" for arch in numbers)
    print(f"{len(results) - len(failed)} of {len(results)} CUDA sources compile ({architectures}); none was run")
    return 1 if failed or offences else 0


if __name__ == "__main__":
    sys.exit(main())
