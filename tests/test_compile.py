"""torch.compile: one graph without breaks, forward and backward, and no second compilation for new sizes."""

import pytest
import torch
from samples import operator
from support import first_samples, gradients

import edl


@pytest.mark.parametrize("sample", first_samples(2), ids=str)
def test_every_operator_compiles_into_one_graph(sample, device):
    compiled = torch.compile(operator(sample.op), fullgraph=True, dynamic=True)
    arguments = sample.arguments(device)
    outputs, grads = gradients(sample, compiled, arguments)
    expected, expected_grads = gradients(sample, operator(sample.op), arguments)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


def check_module_over_sizes(module, batches):
    """Equal to eager for every batch; after the first two (torch makes sizes dynamic at the second) nothing compiles
    again."""
    compiled = torch.compile(module, fullgraph=True)
    for number, (arguments, leaves) in enumerate(batches):
        results = []
        for function in (module, compiled):
            with torch._dynamo.config.patch(error_on_recompile=function is compiled and number >= 2):
                loss = function(*arguments)
            results.append((loss.detach(), torch.autograd.grad(loss, leaves)))
        (expected, expected_grads), (actual, grads) = results
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grads, expected_grads)


LABELLINGS = {
    "sequence": lambda batch, length: {"domain_ids": torch.arange(batch) % 3},
    "token": lambda batch, length: {"domain_ids": torch.arange(batch * length).reshape(batch, length) % 3},
    "soft": lambda batch, length: {"domain_ids": torch.rand(batch, 3)},
    "padded": lambda batch, length: {
        "domain_ids": torch.arange(batch) % 3,
        "attention_mask": (torch.arange(length) < torch.arange(batch).unsqueeze(-1) + 2).long(),
    },
}


@pytest.mark.parametrize("labelling", LABELLINGS)
def test_loss_compiles_once_for_all_sizes(labelling):
    loss = edl.ExpertDivergenceLoss(3, bias_correction=labelling == "sequence")

    def run(layers, arguments):
        return loss(layers, **arguments)

    batches = []
    for batch, length in ((6, 5), (7, 9), (9, 4), (12, 17)):
        layers = [torch.randn(batch, length, 8, requires_grad=True) for _ in range(2)]
        batches.append(((layers, LABELLINGS[labelling](batch, length)), layers))
    check_module_over_sizes(run, batches)
