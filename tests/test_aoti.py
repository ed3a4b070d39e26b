"""AOTInductor: one package with every operator in it, compiled, loaded and run."""

import pytest
import torch
from samples import operator
from support import as_tuple, first_samples


class EveryOperator(torch.nn.Module):
    """Calls each operator once; tensors come in one list, the other arguments are constants."""

    def __init__(self, samples):
        super().__init__()
        self.calls = [(operator(sample.op), sample.arguments()) for sample in samples]

    def example(self):
        return [x for _, arguments in self.calls for x in arguments if isinstance(x, torch.Tensor)]

    def forward(self, tensors: list[torch.Tensor]):
        rest = iter(tensors)
        outputs = []
        for op, arguments in self.calls:
            outputs += as_tuple(op(*(next(rest) if isinstance(x, torch.Tensor) else x for x in arguments)))
        return outputs


@pytest.fixture
def plain_memory(poisoned_memory):
    """Inductor would compile the filling of fresh memory into the package."""
    torch.use_deterministic_algorithms(False)


def test_package_with_every_operator(tmp_path, plain_memory):
    module = EveryOperator(first_samples())
    package = str(tmp_path / "operators.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(torch.export.export(module, (module.example(),)), package_path=package)
        loaded = torch._inductor.aoti_load_package(package)
        for expected, actual in zip(module(module.example()), loaded(module.example()), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
