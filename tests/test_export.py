"""torch.export: saved, loaded, run, and trained after loading; the operators stay single nodes."""

import io

import pytest
import torch
from samples import operator
from support import as_tuple, first_samples, gradients

import edl


def saved_and_loaded(program):
    archive = io.BytesIO()
    torch.export.save(program, archive)
    archive.seek(0)
    return torch.export.load(archive)


class Call(torch.nn.Module):
    """An operator of tensors; the other arguments are constants."""

    def __init__(self, op, arguments):
        super().__init__()
        self.op = op
        self.constants = {i: x for i, x in enumerate(arguments) if not isinstance(x, torch.Tensor)}
        self.length = len(arguments)

    def forward(self, *tensors):
        rest = iter(tensors)
        return self.op(*(self.constants[i] if i in self.constants else next(rest) for i in range(self.length)))


def only_tensors(arguments):
    return tuple(x for x in arguments if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("sample", first_samples(2), ids=str)
def test_every_operator_runs_and_trains_after_loading(sample):
    arguments = sample.arguments()
    call = Call(operator(sample.op), arguments)
    program = saved_and_loaded(torch.export.export(call, only_tensors(arguments)))
    assert next(n.target for n in program.graph.nodes if n.op == "call_function") is operator(sample.op)
    loaded = program.module()
    outputs, grads = gradients(sample, lambda *x: as_tuple(loaded(*only_tensors(x))), arguments)
    expected, expected_grads = gradients(sample, operator(sample.op), arguments)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


@pytest.mark.parametrize("decomposed", [False, True])
def test_loss_takes_any_batch_after_loading(decomposed):
    loss = edl.ExpertDivergenceLoss(3)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    program = torch.export.export(
        loss,
        (torch.randn(4, 5, 8), torch.arange(4) % 3),
        dynamic_shapes={"router_logits": {0: batch, 1: length}, "domain_ids": {0: batch}},
    )
    if decomposed:
        program = program.run_decompositions()
    nodes = {str(node.target) for node in program.graph.nodes}
    if decomposed:
        assert {"edl.aggregate_routing.default", "edl.domain_moments.default", "edl.expert_divergence.default"} <= nodes
    else:
        assert {"edl.sequence_segment_ids.default", "edl.expert_divergence_loss.default"} <= nodes
    loaded = saved_and_loaded(program).module()
    logits = torch.randn(7, 11, 8, requires_grad=True)
    domains = torch.arange(7) % 3
    expected = loss(logits, domains)
    actual = loaded(logits, domains)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    if not decomposed:
        torch.testing.assert_close(*(torch.autograd.grad(y, logits)[0] for y in (actual, expected)), rtol=0, atol=0)
