"""CUDA graphs: capture, replay with other inputs, and what cannot be captured."""

import pytest
import torch
from cuda_support import CUDA, experts_arguments, forward_and_backward, needs_grouped_kernel
from samples import operator
from support import as_tuple, cotangents, first_samples, with_gradients
from tolerances import assert_close, tolerance

import edl
from edl import ops

pytestmark = pytest.mark.cuda


def capture(function):
    """A graph of `function`, and the outputs that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def assert_replays_follow_inputs(function, leaves):
    """The graph of forward and backward, replayed on rolled inputs, gives the bits of eager calls."""
    grads = [g.to(CUDA) for g in cotangents(as_tuple(function(*leaves)))]
    graph, captured = capture(lambda: forward_and_backward(function, leaves, grads))
    for _ in range(3):
        with torch.no_grad():
            for x in leaves:
                if isinstance(x, torch.Tensor) and x.dim() > 0:
                    x.copy_(x.roll(1, 0))
        graph.replay()
        for replayed, eager in zip(captured, forward_and_backward(function, leaves, grads), strict=True):
            assert torch.equal(replayed.nan_to_num(), eager.nan_to_num()) and replayed.isnan().equal(eager.isnan())


@pytest.mark.parametrize("sample", [s for s in first_samples(2) if s.op != "expert_mlp"], ids=str)
def test_graphs_replay_with_changed_inputs(sample):
    arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in sample.arguments(CUDA)]
    assert_replays_follow_inputs(operator(sample.op), with_gradients(sample, arguments))


@needs_grouped_kernel
def test_graph_of_the_experts():
    arguments = experts_arguments()
    moved = {0, 1}  # the index space and the experts stay
    function = lambda tokens, weights: ops.expert_mlp(tokens, weights, *arguments[2:])
    assert_replays_follow_inputs(function, [arguments[i] for i in moved])


def test_experts_without_a_grouped_kernel_refuse_a_graph():
    arguments = experts_arguments(dtype=torch.float32)
    with pytest.raises(
        (ValueError, RuntimeError), match="edl::expert_mlp: a CUDA graph can capture the experts only where"
    ):
        capture(lambda: ops.expert_mlp(*arguments))
    torch.cuda.synchronize()


def test_reduce_overhead_splits_where_the_experts_wait():
    layer = edl.MoELayer(16, 16, 4, 2, device=CUDA)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _step in range(4):
        hidden = torch.randn(12, 16, device=CUDA)
        eager, graphed = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = compiled(graphed)[0], layer(eager)[0]
        actual.sum().backward()
        expected.sum().backward()
        assert_close(actual, expected.double(), tolerance(torch.float32, 16))
        assert_close(graphed.grad, eager.grad.double(), tolerance(torch.float32, 64))


def test_graph_of_a_loss_whose_scale_is_on_the_cpu():
    carrier, loss = torch.ones(3, device=CUDA, requires_grad=True), torch.ones((), device=CUDA, requires_grad=True)
    scale = torch.tensor(2.0)
    function = lambda x, y: edl.inject(x, y, scale)
    graph, captured = capture(lambda: forward_and_backward(function, [carrier, loss], [torch.ones_like(carrier)]))
    graph.replay()
    assert [x.tolist() for x in captured] == [[1, 1, 1], [1, 1, 1], 2]


def test_reduce_overhead_of_the_loss():
    module = edl.ExpertDivergenceLoss(num_domains=3)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    labels = torch.arange(12, device=CUDA) % 3
    for _step in range(4):
        logits = torch.randn(12 * 16, 8, device=CUDA)
        eager, graphed = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = compiled(graphed, labels), module(eager, labels)
        actual.backward()
        expected.backward()
        assert_close(actual, expected.double(), tolerance(torch.float32, 16))
        assert_close(graphed.grad, eager.grad.double(), tolerance(torch.float32, 16))


def test_checking_is_refused_while_a_graph_is_captured(monkeypatch):
    routing, ids = torch.randn(8, 4, device=CUDA), torch.zeros(8, dtype=torch.int64, device=CUDA)
    ops.aggregate_routing(routing, ids, 1)
    monkeypatch.setenv("EDL_CHECK", "1")
    with (
        pytest.raises((ValueError, RuntimeError), match="edl::aggregate_routing: EDL_CHECK=1 reads values on the host"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.aggregate_routing(routing, ids, 1)
    torch.cuda.synchronize()
