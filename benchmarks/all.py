"""Every benchmark on this machine, on all threads and then on one, into one file: benchmarks/results/MACHINE.md.

    python benchmarks/all.py [--device cuda] [--output FOLDER]

On one thread only the smaller half of the cases runs. Summaries come first in the file. It takes about twenty minutes;
what has not begun by then is left out, and the file says so. What decides comes first: the experts, a training step,
the loss; every other peer of the layer, which takes longest, comes last.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import layer
import loss
import moe
import objectives
import router
import scaling
import torch
import train_step
from report import Run, Section, closing, conditions, facts

from edl import machine

BENCHMARKS = [layer, train_step, loss, router, objectives, scaling, moe]
LAST_START = 20 * 60  # seconds
RESULTS = Path(__file__).with_name("results")


def slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.name(device).lower()).strip("-")


def measure(run: Run, begin: float) -> Iterator[Section]:
    for benchmark in BENCHMARKS:
        if (run.quick and benchmark in (train_step, scaling)) or (run.device.type != "cpu" and benchmark is layer):
            continue
        start = time.monotonic()
        if start - begin > LAST_START:
            yield Section(f"{benchmark.__name__}.py", "Left out: no time left.")
            continue
        for section in benchmark.sections(run):
            print(section, flush=True)
            yield section
        print(f"{benchmark.__name__}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def chapter(run: Run, sections: list[Section]) -> str:
    """What the machine reached, the summaries, then everything else."""
    ordered = sorted([*closing(run), *sections], key=lambda section: not section.summary)
    return "\n".join([f"## {conditions(run)}\n", *map(str, ordered)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=0.4, help="that each function is timed for (default: 0.4)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    arguments = parser.parse_args()
    device, file = arguments.device, arguments.output / f"{slug(arguments.device)}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    threads, begin = torch.get_num_threads(), time.monotonic()
    parts = [f"# {machine.name(device)}\n", facts(device)]
    print("\n".join(parts), flush=True)
    for count in [threads] if device.type == "cuda" or threads == 1 else [threads, 1]:
        run = Run(device, count, arguments.seconds, quick=count < threads)
        run.plot = file.with_suffix(".svg")
        print(f"## {conditions(run)}\n", flush=True)
        parts.append(chapter(run, list(measure(run, begin))))
        file.write_text("\n".join(parts))
    print(f"Results after {time.monotonic() - begin:.0f} s: {file}")


if __name__ == "__main__":
    main()
