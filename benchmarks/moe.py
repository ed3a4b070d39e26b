"""A layer of experts: edl beside every peer that this machine can run.

    python benchmarks/moe.py [--device cuda] [--threads N] [--quick] [--save FILE]

Each way is checked against float64 on its first call, output and all gradients, and that call's memory is watched; then
all are timed in turn: median (minimum). GF are GFLOP/s of the experts' products, forward and backward: 18·N·H·I with
N = T·K rows. The peak is that of tiles for bfloat16 where the processor has them, else of float32. On the CPU freed
memory is kept, and layer.py has more shapes and both regimes of memory, beside the fastest peer. "Saved" is what the
forward pass keeps for the backward pass, parameters excluded; "peak MB" the most memory that both take beside the
inputs, gradients included. The floor of what is saved: the tokens and the pre-activation, T·H + 2·N·I elements; the
last table is without the pre-activation.

On CUDA the six products alone come first, `torch._grouped_mm` on rows that stand in order already, with either of
torch's libraries behind it: what edl takes beside their sum is its own kernels.
"""

import contextlib
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from measure import Timing, Witness, error, interleaved, witness
from peers import EDL, GROUPED_MM, Peer, absent, by_edl, compiled, present
from report import Run, Section, main, markdown_table, table_of
from shapes import CPU, CUDA, LAYER, ROUTINGS, Inputs, Shape, in_type, make_inputs
from torch import Tensor

from edl import ops

ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
WARM_UP = Shape(64, 64, 32, 4, 2)
LONGEST_STEP = 2.0  # seconds; a peer that would take longer is left out
HALVES = ("output", "gradient of activation", "gradient of down")  # products with down, half of those with gate_up
LONGEST_STEP_OF_REFERENCE = 30.0  # the same of the peer that ratios name


def reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output and gradients in float64, one expert after the other."""
    results = [torch.zeros_like(x, dtype=torch.float64) for x in [inputs.tokens, *inputs.leaves]]
    output, grad_tokens, grad_weights, grad_gate_up, grad_down = results
    for expert in range(inputs.down.shape[0]):
        token, choice = torch.where(inputs.experts == expert)
        parts = inputs.tokens[token], inputs.weights[token, choice], inputs.gate_up[expert], inputs.down[expert]
        x, weights, gate_up, down = leaves = [part.detach().double().requires_grad_() for part in parts]
        gate, up = (x @ gate_up.T).chunk(2, dim=1)
        rows = weights.unsqueeze(1) * ((torch.nn.functional.silu(gate) * up) @ down.T)
        gradients = torch.autograd.grad(rows, leaves, inputs.upstream[token].double())
        output.index_add_(0, token, rows.detach())
        grad_tokens.index_add_(0, token, gradients[0])
        grad_weights[token, choice] = gradients[1]
        grad_gate_up[expert], grad_down[expert] = gradients[2:]
    return tuple(results)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Case:
    """Every way on one shape, routing and type."""

    shape: Shape
    routing: str
    dtype: torch.dtype
    witnesses: dict[str, Witness] = field(default_factory=dict)  # without results
    errors: dict[str, float] = field(default_factory=dict)
    forward: dict[str, Timing] = field(default_factory=dict)
    step: dict[str, Timing] = field(default_factory=dict)  # forward and backward
    notes: list[str] = field(default_factory=list)

    def speed(self, name: str) -> float:
        """GFLOP/s of forward and backward."""
        return 3 * self.shape.forward_operations / self.step[name].median * 1e-6

    def ratio(self, name: str, times: dict[str, Timing]) -> float | None:
        """How many times longer than edl a way takes."""
        return times[name].median / times[EDL].median if name in times and EDL in times else None

    def fastest_peer(self) -> str | None:
        return min((name for name in self.step if name != EDL), key=lambda name: self.step[name].median, default=None)

    @property
    def saved_share(self) -> float:
        """What edl saves, relative to the least that needs no product again."""
        return self.witnesses[EDL].saved_bytes / (self.shape.saved_floor * self.dtype.itemsize)


class Measurer:
    """Runs cases, and learns from each how long the next would take."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.peers = present(run.device)
        self.longest = {EDL: math.inf, GROUPED_MM: LONGEST_STEP_OF_REFERENCE}
        self.speeds: dict[tuple[str, torch.dtype], float] = {}  # GFLOP/s of forward and backward
        for peer in self.peers.values():  # imports and first-use costs are nobody's time
            with contextlib.suppress(Exception):  # said where it is measured
                forward_backward(peer, in_type(make_inputs(WARM_UP, device=run.device), torch.float32))()

    def obstacle(self, name: str, peer: Peer, inputs: Inputs, case: Case) -> str | None:
        """Why a way is left out."""
        longest = self.longest.get(name, LONGEST_STEP)
        speed = self.speeds.get((name, case.dtype), self.speeds.get((name, torch.float32), math.inf))
        seconds = 3 * case.shape.forward_operations / speed * 1e-9
        return f"would take about {seconds:.0f} s" if seconds > longest else peer.obstacle(inputs)

    def first_call(self, name: str, peer: Peer, inputs: Inputs, expected: tuple[Tensor, ...], case: Case) -> None:
        """Checks a way and watches its memory; what fails is noted and not timed."""
        step = forward_backward(peer, inputs)
        if peer.compiled:
            start = time.perf_counter()
            settle(step, forward_alone(peer, inputs))
            case.notes.append(f"{name}: compiled in {time.perf_counter() - start:.0f} s")
        outcome = witness(step, [inputs.gate_up, inputs.down], self.run.device)
        case.errors[name] = error(outcome.result, expected)
        if not case.errors[name] < ALLOWED_ERROR[case.dtype]:
            raise ArithmeticError(f"wrong by {case.errors[name]:.1e} of the float64 result")
        case.witnesses[name] = outcome._replace(result=None)

    def measure(self, case: Case, peers: dict[str, Peer], originals: Inputs, expected: tuple[Tensor, ...]) -> Case:
        inputs = in_type(originals, case.dtype)
        for name, peer in peers.items():
            reason = self.obstacle(name, peer, inputs, case)
            if reason is None:
                try:
                    self.first_call(name, peer, inputs, expected, case)
                    continue
                except Exception as failure:  # a peer's, of whatever kind; edl's must be seen
                    if name == EDL:
                        raise
                    reason = cause(failure)
            case.notes.append(f"{name}: not run, {reason}")
        steps = {name: forward_backward(peers[name], inputs) for name in case.witnesses}
        forwards = {name: forward_alone(peers[name], inputs) for name in case.witnesses}
        for name in case.witnesses:
            if peers[name].compiled:  # watching may have made it compile again
                settle(steps[name], forwards[name])
        known = {name: outcome.milliseconds for name, outcome in case.witnesses.items()}
        case.step = interleaved(steps, self.run.watch, self.run.seconds, known)
        self.speeds |= {(name, case.dtype): case.speed(name) for name in case.step}
        with torch.no_grad():
            case.forward = interleaved(forwards, self.run.watch, self.run.seconds)
        return case


def settle(step: Callable[[], object], forward: Callable[[], object]) -> None:
    """Compiles what is not compiled yet."""
    step()
    with torch.no_grad():
        forward()


def cause(failure: Exception) -> str:
    """What went wrong, in a line: torch.compile quotes the error behind its own."""
    quoted = re.search(r"\w+Error\(['\"](.*)['\"]\)", str(failure))
    return quoted[1] if quoted else f"{type(failure).__name__}: {failure}".strip().splitlines()[0][:160]


def forward_backward(peer: Peer, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        output = peer.function(*inputs[:5])
        return output, *torch.autograd.grad(output, inputs.leaves, inputs.upstream)

    return step


def forward_alone(peer: Peer, inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: peer.function(*inputs[:5])


def table(case: Case, run: Run) -> str:
    """One row per way."""
    rows = [
        {
            "way": name,
            "forward ms": str(case.forward[name]),
            "of edl's": f"{case.ratio(name, case.forward):.2f}x",
            "forward + backward ms": str(case.step[name]),
            "of edl's ": f"{case.ratio(name, case.step):.2f}x",
            "GF": f"{case.speed(name):.0f}",
            "of peak": run.share_of_peak(case.speed(name), case.dtype),
            "saved MB": f"{outcome.saved_bytes / 1e6:.1f}",
            "peak MB": f"{outcome.peak_bytes / 1e6:.0f}" if outcome.peak_bytes is not None else "-",
            "error": f"{case.errors[name]:.0e}",
        }
        for name, outcome in case.witnesses.items()
    ]
    return with_notes(table_of(rows), case.notes)


def with_notes(text: str, notes: list[str]) -> str:
    return "\n\n".join([text, "\n".join(f"- {note}" for note in notes)]) if notes else text


def title(case: Case, run: Run) -> str:
    rows = f"{case.shape.rows_per_expert} rows per expert"
    return f"{case.shape}, {name_of(case.dtype)}, {case.routing} routing, {rows}{run.memory}"


def summary(cases: list[Case], run: Run) -> str:
    """One row per case: edl against transformers' default, and against the fastest other way."""

    def times(value: float | None) -> str:
        return f"{value:.2f}x" if value else "-"

    rows = []
    for case in cases:
        best = case.fastest_peer()
        rows.append(
            {
                "T, H, I, E, K": ", ".join(map(str, case.shape)),
                "type": name_of(case.dtype),
                "rows / expert": str(case.shape.rows_per_expert),
                "edl ms, forward + backward": str(case.step[EDL]),
                "GF": f"{case.speed(EDL):.0f}",
                "of peak": run.share_of_peak(case.speed(EDL), case.dtype),
                "grouped_mm forward": times(case.ratio(GROUPED_MM, case.forward)),
                "grouped_mm forward + backward": times(case.ratio(GROUPED_MM, case.step)),
                "fastest peer": f"{times(case.ratio(best, case.step))} {best}" if best else "-",
                "saved / floor": f"{case.saved_share:.2f}",
            }
        )
    return table_of(rows)


def routing_table(cases: list[Case]) -> str:
    """Time under each routing, and relative to uniform routing."""
    first = cases[0]
    names = [name for name in first.step if all(name in case.step for case in cases)]
    header = ["routing", *[f"{name} ms" for name in names]]
    rows = []
    for case in cases:
        cells = [f"{case.step[name]} {case.step[name].median / first.step[name].median:.2f}x" for name in names]
        rows.append([f"{case.routing}, {name_of(case.dtype)}", *cells])
    notes = [f"{case.routing}: {note}" for case in cases for note in case.notes]
    return with_notes(markdown_table(header, rows), notes)


def bare_products(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The experts' products by the name of what they give, on equally many rows for each expert."""
    rows_of_expert = shape.rows_per_expert
    num_rows = rows_of_expert * shape.experts
    offsets = rows_of_expert * torch.arange(1, shape.experts + 1, device=device, dtype=torch.int32)

    def matrix(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype)

    tokens, grad_rows = matrix(num_rows, shape.hidden), matrix(num_rows, shape.hidden)
    pre_activation, activation = matrix(num_rows, 2 * shape.intermediate), matrix(num_rows, shape.intermediate)
    gate_up = matrix(shape.experts, 2 * shape.intermediate, shape.hidden)
    down = matrix(shape.experts, shape.hidden, shape.intermediate)
    products = {
        "pre-activation": (tokens, gate_up.transpose(1, 2)),
        "output": (activation, down.transpose(1, 2)),
        "gradient of activation": (grad_rows, down),
        "gradient of down": (grad_rows.t(), activation),
        "gradient of gate_up": (pre_activation.t(), tokens),
        "gradient of tokens": (pre_activation, gate_up),
    }
    return {name: partial(torch._grouped_mm, *factors, offs=offsets) for name, factors in products.items()}


def table_of_products(shape: Shape, run: Run, dtype: torch.dtype) -> str:
    """Time of each product, by each library that torch can be asked to prefer."""
    products = bare_products(shape, run.device, dtype)
    switch = "prefer_cublaslt_grouped_gemm"
    matmul = torch.backends.cuda.matmul
    has_switch = hasattr(matmul, switch)
    times: dict[str, dict[str, Timing]] = {}
    choices = {"as torch chooses": False} | ({"cuBLASLt preferred": True} if has_switch else {})
    for name, preferred in choices.items():
        before = getattr(matmul, switch, False)
        try:
            if has_switch:
                setattr(matmul, switch, preferred)
            for product in products.values():
                product()
            times[name] = interleaved(products, run.watch, run.seconds)
        finally:
            if has_switch:
                setattr(matmul, switch, before)
    rows = []
    for product in products:
        operations = shape.forward_operations / 3 * (1 if product in HALVES else 2)
        cells = {name: f"{of[product]}, {operations / of[product].median * 1e-9:.0f} TF" for name, of in times.items()}
        rows.append({"product": product} | {f"{name}, ms": cell for name, cell in cells.items()})
    sums = {f"{name}, ms": f"{sum(time.median for time in of.values()):.3g}" for name, of in times.items()}
    rows.append({"product": "all, forward and backward"} | sums)
    return with_notes(table_of(rows), [] if has_switch else [f"this torch has no `{switch}`"])


def measure_shapes(measurer: Measurer, shapes: list[Shape], dtypes: list[torch.dtype]) -> Iterator[Case]:
    for shape in shapes:
        inputs = make_inputs(shape, device=measurer.run.device)
        expected = reference(inputs)
        for dtype in dtypes:
            peers = dict(measurer.peers)
            if shape == shapes[0] and not measurer.run.quick:
                torch._dynamo.reset()
                peers |= compiled(peers)
            yield measurer.measure(Case(shape, "uniform", dtype), peers, inputs, expected)


def compare_routings(measurer: Measurer, shape: Shape, dtype: torch.dtype) -> Section:
    """edl and transformers' default under every routing, on equally many rows."""
    peers = {name: peer for name, peer in measurer.peers.items() if name in (EDL, GROUPED_MM)}
    measurer.longest[GROUPED_MM] = LONGEST_STEP  # four times a slow one would be too long
    cases = []
    for routing in ROUTINGS:
        inputs = make_inputs(shape, routing, measurer.run.device)
        cases.append(measurer.measure(Case(shape, routing, dtype), peers, inputs, reference(inputs)))
    title = f"Routings, {shape}, {name_of(dtype)}, forward + backward{measurer.run.memory}"
    return Section(title, routing_table(cases), summary=True)


def gram_steps(inputs: Inputs) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of the layer, and with how alike a token's experts answer: by edl, and by torch, which needs
    their rows."""
    top_k, num_experts = inputs.weights.shape[1], inputs.down.shape[0]
    row_order, offsets = ops.sort_by_expert(inputs.experts, num_experts)
    of_gram = torch.randn(len(inputs.tokens), top_k, top_k, device=inputs.tokens.device)
    arguments = inputs.tokens, inputs.weights, row_order, offsets, inputs.gate_up, inputs.down

    def step(outputs: Callable[[], tuple[Tensor, ...]], gradients: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(outputs(), inputs.leaves, gradients)

    def with_gram(**asked: bool) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(x for x in ops.expert_mlp_with_gram(*arguments, **asked) if x.numel() > 0)

    def by_torch() -> tuple[Tensor, Tensor]:
        rows = ops.dispatch_tokens(inputs.tokens, row_order, top_k)
        order = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        rows = ops.expert_mlp(rows, torch.ones_like(rows[:, :1]), order, offsets, inputs.gate_up, inputs.down)
        rows = torch.empty_like(rows).index_copy(0, row_order.long(), rows).view(-1, top_k, rows.shape[1])
        output = (rows * inputs.weights.unsqueeze(-1)).sum(dim=1)
        return output, (rows @ rows.mT).float()

    return {
        "the layer": step(lambda: (ops.expert_mlp(*arguments),), [inputs.upstream]),
        "with output_gram": step(with_gram(output_gram=True), [inputs.upstream, of_gram]),
        "with activation_gram": step(with_gram(activation_gram=True), [inputs.upstream, of_gram]),
        "outputs by torch": step(by_torch, [inputs.upstream, of_gram]),
    }


def gram_table(run: Run, shape: Shape, dtype: torch.dtype) -> Section:
    """What it costs to see how alike experts answer, in times of the layer."""
    inputs = in_type(make_inputs(shape, device=run.device), dtype)
    timings = interleaved(gram_steps(inputs), run.watch, 3 * run.seconds)
    plain = timings["the layer"].median
    rows = [
        {"way": name, "ms": str(timing), "times": f"{timing.median / plain:.3f}x"} for name, timing in timings.items()
    ]
    return Section(
        f"How alike a token's experts answer, {shape}, {name_of(dtype)}, forward + backward{run.memory}",
        table_of(rows),
        summary=True,
    )


def recompute_table(run: Run, shape: Shape, dtypes: list[torch.dtype]) -> Section:
    """What it costs to compute activations again in place of keeping them, in times of the layer that keeps them."""
    rows = []
    for dtype in dtypes:
        inputs = in_type(make_inputs(shape, device=run.device), dtype)
        steps = {
            "kept": forward_backward(Peer(by_edl), inputs),
            "recomputed": forward_backward(Peer(partial(by_edl, recompute_activations=True)), inputs),
        }
        seen = {name: witness(step, [inputs.gate_up, inputs.down], run.device) for name, step in steps.items()}
        assert all(map(torch.equal, *(outcome.result for outcome in seen.values())))
        timings = interleaved(steps, run.watch, 3 * run.seconds)
        fastest = timings["kept"].minimum
        rows += [
            {
                "activations": name,
                "type": name_of(dtype),
                "ms": str(timing),
                "fastest": f"{timing.minimum / fastest:.3f}x",
                "operations": f"{1 + (name == 'recomputed') * 2 / 9:.3f}x",
                "saved MB": f"{seen[name].saved_bytes / 1e6:.1f}",
                "peak MB": f"{seen[name].peak_bytes / 1e6:.0f}" if seen[name].peak_bytes is not None else "-",
            }
            for name, timing in timings.items()
        ]
    return Section(f"Activations computed again, {shape}, forward + backward{run.memory}", table_of(rows), summary=True)


def sections(run: Run) -> Iterator[Section]:
    """Every case, the routings, and the summary."""
    torch._inductor.config.cpp.threads = run.threads  # else its cache may hold code for another number of threads
    torch._logging.set_logs(all=logging.CRITICAL)  # what a peer cannot do is said in the table
    warnings.filterwarnings("ignore", module="torch._dynamo")
    on_cuda = run.device.type == "cuda"
    dtypes = [torch.bfloat16] if on_cuda else [torch.float32, torch.bfloat16]
    shapes = CUDA if on_cuda else CPU[:2]  # layer.py has the others
    if run.quick:
        shapes = shapes[: 2 if on_cuda else 1]
    if on_cuda:
        for shape in CUDA[1:3]:
            yield Section(
                f"Products alone, {shape}, bfloat16", table_of_products(shape, run, torch.bfloat16), summary=True
            )
    measurer = Measurer(run)
    cases = []
    for case in measure_shapes(measurer, shapes, dtypes):
        cases.append(case)
        yield Section(title(case, run), table(case, run))
    text = f"{summary(cases, run)}\n\nNot on this machine: {absent(run.device)}."
    yield Section(f"Experts: how many times as long as edl every peer takes{run.memory}", text, summary=True)
    for dtype in dtypes[:1] if run.quick else dtypes:
        yield compare_routings(measurer, CUDA[1] if on_cuda else LAYER, dtype)
        yield gram_table(run, CUDA[1] if on_cuda else LAYER, dtype)
    yield recompute_table(run, CUDA[1] if on_cuda else LAYER, dtypes)


if __name__ == "__main__":
    main(__doc__, sections)
