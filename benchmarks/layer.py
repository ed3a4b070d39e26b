"""The experts of a layer on the CPU beside transformers' grouped_mm and a plain loop of at::mm, memory kept and fresh.

    python benchmarks/layer.py [--threads N] [--quick] [--save FILE]

Forward is under `no_grad`; backward gives every gradient. GFLOP/s are of the experts' products, 6·N·H·I forward and
18·N·H·I with backward, N = T·K rows. They are held against the peak of the same run: tiles for bfloat16 where the
processor has them, else multiply-adds in float32. The loop multiplies each expert's rows, which stand ready in order:
no gather, no SwiGLU, no sum over a token's experts. memory.py says what *kept* and *fresh* are, watch.py which calls
count.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from measure import Timing, error, interleaved
from moe import ALLOWED_ERROR, cause, forward_alone, forward_backward, name_of, with_notes
from peers import EDL, GROUPED_MM, PEERS, present
from report import Run, Section, main, markdown_table
from shapes import CPU, FEW_ROWS, Inputs, Shape, in_type, make_inputs
from torch import Tensor
from watch import Function, Watch

from edl import ops

LOOP = "loop of at::mm"
OTHERS = [GROUPED_MM, LOOP]
SHAPES = CPU[:1] + FEW_ROWS + CPU[1:]
DTYPES = [torch.float32, torch.bfloat16]
LONGEST_STEP = 4.0  # seconds; a way that would take longer is left out
PARTS = {"forward": 1, "forward + backward": 3}  # and how many times the operations of forward they have
Times = dict[str, dict[str, Timing]]  # by part, then by way


class Measured(NamedTuple):
    """One shape and type in one regime of memory."""

    times: Times
    failures: dict[str, str]  # why a way could not run


def rows_of_experts(inputs: Inputs) -> list[Tensor]:
    """The tokens [n, H] of each expert."""
    order, offsets = ops.sort_by_expert(inputs.experts, inputs.down.shape[0])
    rows = ops.dispatch_tokens(inputs.tokens.detach(), order, inputs.experts.shape[1])
    return list(rows.split(offsets.diff().tolist()))


def products(rows: list[Tensor], gate_up: Tensor, down: Tensor, backward: bool) -> None:
    """The matrix products of each expert."""
    for expert, tokens in enumerate(rows):
        pre_activation = torch.mm(tokens, gate_up[expert].t())
        activation = pre_activation[:, : down.shape[2]]
        output = torch.mm(activation, down[expert].t())
        if backward:
            torch.mm(output, down[expert])
            torch.mm(output.t(), activation)
            torch.mm(pre_activation.t(), tokens)
            torch.mm(pre_activation, gate_up[expert])


def ways(inputs: Inputs, names: list[str]) -> dict[str, dict[str, Function]]:
    """Each part by each way that is named."""
    rows, parameters = rows_of_experts(inputs), (inputs.gate_up.detach(), inputs.down.detach())
    loops = [partial(products, rows, *parameters, backward=backward) for backward in (False, True)]
    functions = {
        name: loops if name == LOOP else [of(PEERS[name], inputs) for of in (forward_alone, forward_backward)]
        for name in names
    }
    return {part: {name: functions[name][i] for name in names} for i, part in enumerate(PARTS)}


def sample(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output and all gradients, those of the parameters of two experts alone."""
    *small, grad_gate_up, grad_down = (x.detach() for x in results)
    return *small, grad_gate_up[[0, -1]], grad_down[[0, -1]]


def check(name: str, step: Function, expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """A way's first call gives the output and the gradients."""
    results = step()
    if name != LOOP:
        distance = error(sample(results), expected)
        if not distance < ALLOWED_ERROR[dtype]:
            raise ArithmeticError(f"{distance:.1e} away from edl in float32")


def measure(
    watch: Watch, shape: Shape, asked: dict[torch.dtype, list[str]], seconds: float
) -> dict[torch.dtype, Measured]:
    """The ways that are named for each type."""
    originals = make_inputs(shape)
    expected = sample(forward_backward(PEERS[EDL], in_type(originals, torch.float32))())
    found = {}
    for dtype, names in asked.items():
        functions, failures = ways(in_type(originals, dtype), names), {}
        for name, step in functions["forward + backward"].items():
            try:
                check(name, step, expected, dtype)
            except Exception as failure:  # a peer's, of whatever kind; edl's must be seen
                if name == EDL:
                    raise
                failures[name] = cause(failure)
        times = {}
        for part, by_name in functions.items():
            able = {name: function for name, function in by_name.items() if name not in failures}
            with torch.set_grad_enabled(part != "forward"):
                times[part] = interleaved(able, watch, seconds)
        found[dtype] = Measured(times, failures)
    return found


def speed(shape: Shape, part: str, timing: Timing) -> float:
    """GFLOP/s."""
    return PARTS[part] * shape.forward_operations / timing.median * 1e-6


def beside(shape: Shape, part: str, own: Timing, other: Timing | None) -> str:
    """How many times as long as edl another way takes, and its GFLOP/s."""
    if other is None:
        return "-"
    return f"{own.mark or other.mark}{other.median / own.median:.2f}x ({speed(shape, part, other):.3g})"


class Table:
    """The rows of one type."""

    def __init__(self, dtype: torch.dtype, run: Run) -> None:
        self.dtype = dtype
        self.run = run
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self.speeds: dict[str, float] = {}  # GFLOP/s of forward and backward in the last shape

    def names(self, shape: Shape) -> list[str]:
        """The ways that are not too slow for a shape, edl first."""
        names = [EDL]
        for name in (name for name in OTHERS if name == LOOP or name in present(self.run.device)):
            seconds = 3 * shape.forward_operations / self.speeds.get(name, torch.inf) * 1e-9
            if seconds <= LONGEST_STEP:
                names.append(name)
            else:
                self.notes.append(f"{shape}: {name} not run, would take about {seconds:.0f} s")
        return names

    def add(self, shape: Shape, memory: str, measured: Measured) -> None:
        cells = [", ".join(map(str, shape)), str(shape.rows_per_expert), memory]
        for part, times in measured.times.items():
            own = times[EDL]
            achieved = speed(shape, part, own)
            cells += [str(own), f"{achieved:.3g}", self.run.share_of_peak(achieved, self.dtype)]
            cells += [beside(shape, part, own, times.get(name)) for name in OTHERS]
        self.rows.append(cells)
        self.notes += [f"{shape}, {memory}: {name} not run, {reason}" for name, reason in measured.failures.items()]
        step = measured.times["forward + backward"]
        self.speeds |= {name: speed(shape, "forward + backward", timing) for name, timing in step.items()}

    def section(self) -> Section:
        header = ["T, H, I, E, K", "rows / expert", "memory"]
        for part in PARTS:
            header += [f"{part} ms", "GF", "of peak", "grouped_mm", "at::mm"]
        title = f"Experts, {name_of(self.dtype)}: how many times as long as edl others take (their GFLOP/s)"
        return Section(title, with_notes(markdown_table(header, self.rows), self.notes), summary=True)


def sections(run: Run) -> Iterator[Section]:
    """A table for each type."""
    tables = {dtype: Table(dtype, run) for dtype in DTYPES}
    for shape in SHAPES[:1] if run.quick else SHAPES:
        asked = {dtype: table.names(shape) for dtype, table in tables.items()}
        for memory, found in run.in_both_regimes(measure, shape, asked, run.seconds / 2).items():
            for dtype, table in tables.items():
                table.add(shape, memory, found[dtype])
    for table in tables.values():
        yield table.section()


if __name__ == "__main__":
    main(__doc__, sections)
