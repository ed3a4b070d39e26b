"""What all benchmarks share: interleaved timing, facts about the machine, and tables."""

import platform
import statistics
import time
from pathlib import Path
from typing import Callable

import torch

import edl


def interleaved(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each function, called in turn so that a slow moment of the machine meets all of them."""
    for _ in range(3):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(_cuda_milliseconds(function) if device.type == "cuda" else _cpu_milliseconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def _cpu_milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _cuda_milliseconds(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def machine(device: torch.device) -> dict[str, str]:
    """What a reader needs to compare figures: processor, instruction sets, threads, versions."""
    facts = {"torch": torch.__version__, "edl": edl.__version__, "Python": platform.python_version()}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = str(torch.version.cuda)
        return facts
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "fma", "amx", "f16c"))]
    model = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    facts["processor"] = f"{fields.get('model name', platform.processor())}, {model}"
    facts["flags"] = " ".join(flags)
    facts["threads"] = str(torch.get_num_threads())
    facts["edl instruction set"] = torch.ops.edl._cpu_instruction_set()
    facts["torch capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads well in a terminal and in Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def report(title: str, device: torch.device, tables: list[str], save: str | None) -> None:
    """Prints machine facts and tables, and writes them to a file where `save` names one."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine(device).items())
    text = f"# {title}\n\n{facts}\n\n" + "\n\n".join(tables) + "\n"
    print(text)
    if save:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        Path(save).write_text(text)
