"""How the time of a layer of experts grows with tokens, experts, and experts per token.

    python benchmarks/scaling.py [--device cuda] [--threads N] [--quick] [--save FILE]

Forward and backward, float32 (bfloat16 on CUDA), uniform routing; one size varies, the others stay in the middle.
Checked and timed as in moe.py. With --save the plot is written beside the file.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from moe import Case, Measurer, reference
from peers import EDL, GROUPED_MM
from report import Run, Section, main, markdown_table
from shapes import Shape, make_inputs

WAYS = [EDL, GROUPED_MM, "transformers eager"]
MIDDLE = Shape(1024, 512, 256, 32, 4)
MIDDLE_ON_CUDA = Shape(8192, 2048, 768, 64, 8)
FACTORS = {
    "tokens": [1 / 8, 1 / 4, 1 / 2, 1, 2, 4],
    "experts": [1 / 8, 1 / 4, 1 / 2, 1, 2, 4],
    "top_k": [1 / 4, 1 / 2, 1, 2],
}
LETTERS = {"tokens": "T", "experts": "E", "top_k": "K"}
Curves = dict[str, list[Case]]  # by the size that varies


def measure(middle: Shape, run: Run) -> Curves:
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    measurer = Measurer(run)
    peers = {name: peer for name, peer in measurer.peers.items() if name in WAYS}
    curves: Curves = {}
    for size, factors in FACTORS.items():
        curves[size] = []
        for factor in factors[::2] if run.quick else factors:
            shape = middle._replace(**{size: int(getattr(middle, size) * factor)})
            inputs = make_inputs(shape, device=run.device)
            curves[size].append(measurer.measure(Case(shape, "uniform", dtype), peers, inputs, reference(inputs)))
    return curves


def table(curves: Curves) -> str:
    names = [name for name in WAYS if any(name in case.step for cases in curves.values() for case in cases)]
    rows = []
    for size, cases in curves.items():
        for case in cases:
            cells = [
                f"{case.step[name]} {case.ratio(name, case.step):.2f}x" if name in case.step else "-" for name in names
            ]
            rows.append([f"{LETTERS[size]} = {getattr(case.shape, size)}", str(case.shape.rows_per_expert), *cells])
    return markdown_table(["size", "rows / expert", *[f"{name} ms" for name in names]], rows)


def plot(curves: Curves, file: Path) -> None:
    """One panel per size, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for panel, (size, cases) in zip(panels, curves.items(), strict=True):
        for name in WAYS:
            points = [(getattr(case.shape, size), case.step[name].median) for case in cases if name in case.step]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=3, label=name)
        ticks = [getattr(case.shape, size) for case in cases]
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xlabel(f"{LETTERS[size]} ({size.replace('top_k', 'experts per token')})")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward, ms")
    panels[0].legend(fontsize="small", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def sections(run: Run) -> Iterator[Section]:
    """The table, and the plot where a place for it was given."""
    middle = MIDDLE_ON_CUDA if run.device.type == "cuda" else MIDDLE
    curves = measure(middle, run)
    text = table(curves)
    if run.plot:
        plot(curves, run.plot)
        text += f"\n\n![Time against T, E and K]({run.plot.name})"
    yield Section(f"Scaling around {middle}, forward + backward, ms{run.memory}", text)


if __name__ == "__main__":
    main(__doc__, sections)
