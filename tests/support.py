"""What the tests of all operators do with a sample: run it, differentiate it, lay results side by side."""

import torch
from samples import SAMPLES, Sample, operator
from torch import Tensor

import edl


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def divergence_arguments(sums, squares, counts, eps=1e-6, reduction="mean_of_logs", corrected=False) -> tuple:
    """Moments as domain_moments gives them, in the order of expert_divergence."""
    return sums, counts, eps, reduction, squares if corrected else None


def first_samples(count: int = 1) -> list[Sample]:
    """The first samples of every operator, for tests that take seconds each."""
    taken: dict[str, int] = {}
    chosen = []
    for sample in SAMPLES:
        taken[sample.op] = taken.get(sample.op, 0) + 1
        if taken[sample.op] <= count:
            chosen.append(sample)
    return chosen


def with_gradients(sample: Sample, arguments: tuple) -> tuple:
    """The arguments, with fresh leaves where there is a gradient."""
    return tuple(
        x.detach().clone().requires_grad_(True) if position in sample.differentiable else x
        for position, x in enumerate(arguments)
    )


def cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same random gradient of an output whatever its dtype, device and process: numbers that every dtype has."""
    generator = torch.Generator().manual_seed(17)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x) for x in outputs]


def gradients(sample: Sample, function, arguments: tuple) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of `function`, and the gradients of its differentiable arguments for random gradients of its outputs."""
    leaves = with_gradients(sample, arguments)
    outputs = as_tuple(function(*leaves))
    differentiable = [(y, g) for y, g in zip(outputs, cotangents(outputs), strict=True) if y.requires_grad]
    if not differentiable:
        return outputs, ()
    ys, gs = zip(*differentiable, strict=True)
    inputs = [leaves[position] for position in sample.differentiable]
    return tuple(y.detach() for y in outputs), torch.autograd.grad(ys, inputs, gs)


def to_double(arguments: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def kernel_and_reference(sample: Sample, device="cpu"):
    """(outputs, gradients) of the operator, and of its definition fed the same numbers in float64."""
    arguments = sample.arguments(device)
    definition = getattr(edl.reference, sample.op)
    return (
        gradients(sample, operator(sample.op), arguments),
        gradients(sample, definition, to_double(arguments)),
    )


def all_operators() -> list[str]:
    """Names of the public operators that the library registers."""
    names = {
        name.removeprefix("edl::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("edl::")
    }
    return sorted(name for name in names if not name.startswith("_"))
