"""What all benchmarks share around their measurements: the command line, tables, and the file of results."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from memory import FreshMemory, Result, cpu_watch, keep_freed_memory
from peak import Peaks, peaks
from watch import QUIET_SHARE, Watch

import edl
from edl import machine

REPEATED_SHARE = 300  # times the seconds of a function: what a run may spend on calls that were disturbed


@dataclass
class Run:
    """How to measure."""

    device: torch.device
    threads: int
    seconds: float  # that each function is timed for, at most
    quick: bool  # the smaller half of the cases
    plot: Path | None = None  # where curves are drawn
    first_peaks: Peaks = field(init=False)
    watch: Watch = field(init=False)
    fresh: FreshMemory = field(init=False)

    def __post_init__(self) -> None:
        keeps_memory = keep_freed_memory()
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        self.first_peaks = peaks(self.device, self.threads)
        if self.device.type == "cpu":
            best, repeat_seconds = self.first_peaks.multiply_adds or 0.0, REPEATED_SHARE * self.seconds
            self.watch = cpu_watch(self.threads, keeps_memory, best, repeat_seconds)
        else:
            self.watch = Watch(self.device, None)
        self.fresh = FreshMemory(self.threads)

    @property
    def peaks(self) -> Peaks:
        """Those measured first, and the best probe since."""
        speed = self.first_peaks.multiply_adds
        return self.first_peaks._replace(multiply_adds=speed and max(speed, self.watch.best))

    @property
    def memory(self) -> str:
        """The regime, for the titles of tables."""
        return ", memory kept" if self.watch.keeps_memory else ""

    def in_both_regimes(self, function: Callable[..., Result], *arguments: object) -> dict[str, Result]:
        """function(watch, *arguments) with freed memory kept, and in a process that gets fresh memory; on CUDA once."""
        if self.device.type != "cpu":
            return {"torch's": function(self.watch, *arguments)}
        return {
            "kept": function(self.watch, *arguments),
            "fresh": self.fresh.call(function, self.watch, *arguments),
        }

    def share_of_peak(self, speed: float, dtype: torch.dtype) -> str:
        """Of the tiles' rate for bfloat16 where there are tiles, else of that of multiply-adds."""
        peak = self.peaks.of(dtype)
        return f"{speed / peak:.0%}" if peak else "-"


class Section(NamedTuple):
    """A part of the results; a summary is what a reader should see first."""

    title: str
    text: str
    summary: bool = False

    def __str__(self) -> str:
        return f"### {self.title}\n\n{self.text}\n"


Sections = Callable[[Run], Iterator[Section]]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads well in a terminal and in Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def table_of(rows: list[dict[str, str]]) -> str:
    """A table whose rows name their columns."""
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def facts(device: torch.device) -> str:
    """The machine and what runs there, as a list."""
    found = machine.facts(device) | {"edl": edl.__version__}
    if device.type == "cpu":
        found["edl uses"] = torch.ops.edl._cpu_instruction_set()
    return "\n".join(f"- {name}: {value}" for name, value in found.items()) + "\n"


def conditions(run: Run) -> str:
    where = "CUDA" if run.device.type == "cuda" else f"{run.threads} thread{'s' if run.threads > 1 else ''}"
    return f"{where}, peak {run.peaks.note}"


def closing(run: Run) -> Iterator[Section]:
    """What the CPU reached in this run, and how quiet it was."""
    watch, lines = run.watch, {"best probe": run.peaks.note} | run.peaks.lines()
    if run.device.type != "cpu":
        return
    lines["disturbed calls"] = (
        f"{watch.disturbed} of {watch.timed}: a probe before or after them was below {QUIET_SHARE:.0%} of the best, or "
        "they faulted pages that should have been kept. They were made again and left out; ~ marks times for which too "
        "few others were left"
    )
    text = "\n".join(f"- {name}: {value}" for name, value in lines.items())
    yield Section("Peaks of this run", text, summary=True)


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description.split("\n", maxsplit=1)[0])
    result.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    result.add_argument("--seconds", type=float, default=0.4, help="that each function is timed for (default: 0.4)")
    result.add_argument("--quick", action="store_true", help="the smaller half of the cases")
    result.add_argument("--save", type=Path, help="also write the report to this file")
    return result


def main(description: str, sections: Sections) -> None:
    """One benchmark as a command."""
    arguments = parser(description).parse_args()
    run = Run(arguments.device, arguments.threads, arguments.seconds, arguments.quick)
    run.plot = arguments.save and arguments.save.with_suffix(".svg")
    parts = [f"# {description.split('.', maxsplit=1)[0]}\n", facts(run.device), f"{conditions(run)}\n"]
    print("\n".join(parts), flush=True)
    for section in itertools.chain(sections(run), closing(run)):
        print(section, flush=True)
        parts.append(str(section))
        if arguments.save:  # after each section: what was measured stays, whatever comes
            arguments.save.parent.mkdir(parents=True, exist_ok=True)
            arguments.save.write_text("\n".join(parts))


def save(title: str, device: torch.device, tables: list[str], path: str | None) -> None:
    """Prints facts about the machine and tables, and writes them to a file where `path` names one."""
    text = f"# {title}\n\n{facts(device)}\n\n" + "\n\n".join(tables) + "\n"
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
