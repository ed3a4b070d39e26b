"""Objectives beside the layer whose routing they push: what each adds to its forward and backward pass.

    python benchmarks/objectives.py [--device cuda] [--threads N] [--quick] [--save FILE]

Objectives on router scores are timed on the logits, weights and choices of several layers, from these to their
gradients, and compared with the forward and backward pass of as many layers. Those on experts' outputs and activations
are timed with their layer, as what they read is made in it. On every device the operators that a call launches are
counted, forward and backward, without views, which launch nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Timing, interleaved
from report import Run, Section, main, table_of
from shapes import CUDA, LAYER, Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import edl
from edl import objectives
from edl.objectives import Objective, Objectives

LAYERS = 4
MANY_LAYERS = 24
SEQUENCES, DOMAINS, MODALITIES = 16, 4, 2
ON_SCORES: dict[str, Objective] = {
    "ExpertDivergence": objectives.ExpertDivergence(DOMAINS),
    "MutualInformation": objectives.MutualInformation(DOMAINS),
    "RouterEntropy": objectives.RouterEntropy(),
    "LoadBalancing": objectives.LoadBalancing(),
    "RouterZ": objectives.RouterZ(),
    "RoutingVariance": objectives.RoutingVariance(),
    "CrossLayerCoupling": objectives.CrossLayerCoupling(),
    "ModalityDivergence": objectives.ModalityDivergence(MODALITIES),
    "ModalityMutualInformation": objectives.ModalityMutualInformation(MODALITIES),
}
with contextlib.suppress(ImportError):  # SciPy may be missing
    ON_SCORES["DirichletPrior"] = objectives.DirichletPrior()
ALL = "all on scores"
Function = Callable[[], object]


class Launches(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        launches_nothing = function.is_view or function.__name__.split(".")[0] in ("detach", "empty", "empty_strided")
        self.number += not launches_nothing
        return function(*arguments, **(options or {}))


def routings_of(shape: Shape, num_layers: int, device: torch.device) -> list[edl.Routing]:
    """What routers of as many layers decided, each a leaf of autograd."""
    routings = []
    for _ in range(num_layers):
        logits = torch.randn(shape.tokens, shape.experts, device=device).requires_grad_()
        weights, experts = edl.ops.route_tokens(logits.detach(), shape.top_k, "softmax")
        tokens_per_expert = experts.flatten().bincount(minlength=shape.experts)
        routings.append(edl.Routing(logits, weights.requires_grad_(), experts, tokens_per_expert))
    return routings


def labels_of(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    sequences = torch.arange(SEQUENCES, device=device)
    modalities = torch.arange(shape.tokens, device=device) // 32 % MODALITIES
    return {"domain_ids": sequences % DOMAINS, "modality_ids": modalities.view(SEQUENCES, -1)}


def steps_on_scores(shape: Shape, num_layers: int, device: torch.device) -> dict[str, tuple[Function, Function]]:
    """Of each objective, and of all of them: its loss, and the loss with its gradients."""
    routings, labels = routings_of(shape, num_layers, device), labels_of(shape, device)
    leaves = [x for routing in routings for x in (routing.logits, routing.weights)]

    def of(bound: Objectives) -> tuple[Function, Function]:
        def loss() -> Tensor:
            return bound(routings, **labels)[0]

        return loss, lambda: torch.autograd.grad(loss(), leaves, allow_unused=True)

    alone = {name: of(Objectives({name: (objective, 1.0)})) for name, objective in ON_SCORES.items()}
    return alone | {ALL: of(Objectives({name: (objective, 1.0) for name, objective in ON_SCORES.items()}))}


def layer_step(shape: Shape, device: torch.device, name: str = "") -> Function:
    """The forward and backward pass of a layer, with an objective on what its experts do where one is named."""
    flags = {"ExpertOrthogonality": "output_gram", "ActivationCosine": "activation_gram"}
    options = {flags[name]: True} if name else {}
    layer = edl.MoELayer(shape.hidden, shape.intermediate, shape.experts, shape.top_k, device=device, **options)
    tokens, upstream = (torch.randn(shape.tokens, shape.hidden, device=device) for _ in range(2))
    bound = Objectives({name: (getattr(objectives, name)(), 1.0)}) if name else None
    leaves = [tokens.requires_grad_(), *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        output, observed = layer(tokens)
        if bound is None:
            return torch.autograd.grad(output, leaves, upstream)
        return torch.autograd.grad([output, bound(observed)[0]], leaves, [upstream, torch.ones((), device=device)])

    return step


def count(steps: tuple[Function, Function]) -> tuple[int, int]:
    """The operators that a forward, and a backward pass launch."""
    numbers = []
    for function in steps:
        function()
        with Launches() as launches:
            function()
        numbers.append(launches.number)
    return numbers[0], numbers[1] - numbers[0]


def cells(time: Timing, layers: Timing) -> dict[str, str]:
    return {"ms": str(time), "of the layers": f"{time.median / layers.median:.2%}"}


def sections(run: Run) -> Iterator[Section]:
    """Shares of the layer's time, then operators."""
    shape = CUDA[0] if run.device.type == "cuda" else LAYER
    layer, steps = layer_step(shape, run.device), steps_on_scores(shape, LAYERS, run.device)
    functions = {name: step for name, (_, step) in steps.items()}
    for function in [layer, *functions.values()]:
        function()
    # The layer by itself, as in training: between small functions its memory would be cold, and they look cheaper.
    one = interleaved({"layer": layer}, run.watch, 4 * run.seconds)["layer"]
    times = interleaved(functions, run.watch, run.seconds)
    whole = one.times(LAYERS)
    rows = [{"objective": name, **cells(times[name], whole)} for name in steps]
    title = f"Objectives on router scores, forward and backward, {LAYERS} layers of {shape}{run.memory}"
    yield Section(title, f"The layers take {whole} ms.\n\n{table_of(rows)}", summary=True)

    names = [name for name in ("ExpertOrthogonality", "ActivationCosine") if hasattr(objectives, name)]
    functions = {"layer": layer} | {name: layer_step(shape, run.device, name) for name in names}
    for function in functions.values():
        function()
    times = interleaved(functions, run.watch, 4 * run.seconds)
    rows = [
        {"with": name, "ms": str(time), "x": f"{time.median / times['layer'].median:.3f}"}
        for name, time in times.items()
    ]
    yield Section(f"Objectives on experts, with their layer, {shape}{run.memory}", table_of(rows), summary=True)

    rows = []
    small = Shape(256, 64, 32, shape.experts, shape.top_k)
    of_one, of_many = (steps_on_scores(small, number, run.device) for number in (2, MANY_LAYERS))
    for name in of_one:
        few, many = count(of_one[name]), count(of_many[name])
        added = [(more - less) / (MANY_LAYERS - 2) for less, more in zip(few, many)]
        rows.append(
            {
                "objective": name,
                "forward": str(many[0]),
                "a layer": f"{many[0] / MANY_LAYERS:.1f}",
                "each further layer": f"{added[0]:.1f}",
                "backward": str(many[1]),
                "a layer ": f"{many[1] / MANY_LAYERS:.1f}",
                "each further layer ": f"{added[1]:.1f}",
            }
        )
    yield Section(f"Operators that a call launches, {MANY_LAYERS} layers", table_of(rows))


if __name__ == "__main__":
    main(__doc__, sections)
