"""What of CUDA shows without a device: which operators are called on tensors that only pretend to be there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import edl
from edl import ops
from edl.objectives import ExpertDivergence, LoadBalancing, Objectives, RouterZ
from edl.routing import Observation


class Calls(TorchDispatchMode):
    """The operators that are called inside, below autograd."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.prim.device.default:
            self.operators.append(function)
        return function(*args, **(kwargs or {}))

    def named(self, part):
        return [operator for operator in self.operators if part in str(operator)]


@pytest.fixture
def pretended():
    """Tensors made inside have shapes and devices, and no memory. (Those of CUDA have no gradients in a torch without
    CUDA.)"""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def experts_arguments(device, dtype=torch.bfloat16):
    def normal(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    row_order = torch.arange(12, device=device, dtype=torch.int32)
    offsets = torch.tensor([0, 3, 3, 12], device=device, dtype=torch.int32)
    return normal(6, 16), torch.rand(6, 2, device=device), row_order, offsets, normal(3, 16, 16), normal(3, 16, 8)


@pytest.mark.parametrize(
    "place, called", [("cuda", "edl._expert_mlp_forward.waiting"), ("cpu", "edl.expert_mlp.default")]
)
def test_experts_whose_products_wait_are_called_as_such(pretended, place, called):
    with Calls() as calls:
        ops.expert_mlp(*experts_arguments(place))
    assert [str(operator) for operator in calls.named("edl")] == [called]


@pytest.mark.parametrize("name", ["_expert_mlp_forward", "_expert_mlp_backward"])
def test_those_that_wait_stay_out_of_cuda_graphs_and_compute_the_same(name):
    operator = getattr(torch.ops.edl, name)
    assert torch.Tag.cudagraph_unsafe in operator.waiting.tags
    assert torch.Tag.cudagraph_unsafe not in operator.default.tags
    arguments = experts_arguments("cpu", torch.float32)
    if name == "_expert_mlp_backward":
        _, *saved = torch.ops.edl._expert_mlp_forward(*arguments, True, True)
        grams = torch.randn(2, 6, 2, 2).unbind()
        arguments = torch.randn(6, 16), *grams, *arguments, *saved[:2], [True] * 4
    else:
        arguments = *arguments, True, True
    for one, other in zip(operator.default(*arguments), operator.waiting(*arguments), strict=True):
        assert one.equal(other)
    on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    for one, other in zip(operator.default(*on_meta), operator.waiting(*on_meta), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_on_the_cpu_is_not_copied_to_the_device(pretended, dtype):
    carrier, loss = (torch.ones(shape, device="cuda", dtype=dtype) for shape in ([3], []))
    scale = torch.tensor(2.0)
    with Calls() as calls:
        edl.inject(carrier, loss, scale)
    assert calls.named("edl.inject")
    moved = calls.named("_to_copy")
    assert len(moved) == (dtype != torch.float32)  # a change of type, on the CPU
    assert len(calls.named("aten.mul")) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_router_of_cuda_is_one_operator_and_makes_no_copy_of_its_tokens(pretended, dtype):
    tokens, weight = (torch.randn(n, 64, device="cuda", dtype=dtype) for n in (40, 8))
    with Calls() as calls, FlopCounterMode(display=False) as counter:
        logits = torch.ops.edl._router_logits(tokens, weight, torch.float32)
    assert [str(operator) for operator in calls.operators] == ["edl._router_product.default"]
    assert (logits.dtype, logits.shape, logits.device.type) == (torch.float32, (40, 8), "cuda")
    assert counter.get_total_flops() == 2 * 40 * 64 * 8


@pytest.mark.parametrize("place, type_of_router", [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_the_other_routers_are_torchs_linear_layer(pretended, place, type_of_router):
    tokens, weight = (torch.randn(n, 64, device=place, dtype=torch.bfloat16) for n in (40, 8))
    with Calls() as calls:
        torch.ops.edl._router_logits(tokens, weight, type_of_router)
    assert calls.named("aten.mm") and not calls.named("edl")


def test_the_gradients_of_the_router_of_cuda_are_counted():
    tokens, weight = torch.randn(10, 64, dtype=torch.bfloat16), torch.randn(4, 64, dtype=torch.bfloat16)
    for needed in ([True, True], [False, True]):
        with FlopCounterMode(display=False) as counter:
            torch.ops.edl._router_product_backward(torch.randn(10, 4), tokens, weight, needed)
        assert counter.get_total_flops() == sum(needed) * 2 * 10 * 64 * 4


@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize("num_layers", [1, 2, 48])
def test_all_layers_of_a_loss_are_one_operator(pretended, place, num_layers):
    layers = [torch.randn(40, 8, device=place) for _ in range(num_layers)]
    ids = torch.zeros(40, dtype=torch.int64, device=place)
    with Calls() as calls:
        torch.ops.edl._segment_sums(layers, ids, 5, "softmax", "edl::ExpertDivergence")
    name = "edl.aggregate_routing.default" if num_layers == 1 else "edl._aggregate_layers.default"
    assert [str(operator) for operator in calls.named("edl")] == [name]


@pytest.mark.parametrize("averaging_ranks", [1, 2], ids=["alone", "shared"])
def test_layers_on_different_devices_have_one_loss(pretended, averaging_ranks):
    layers = [torch.randn(6, 4, device=device) for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1")]
    observations = [Observation(logits=x, experts=x.topk(2).indices) for x in layers]
    objectives = Objectives(
        {"apart": (ExpertDivergence(2), 1e-2), "balance": (LoadBalancing(), 1e-2), "z": (RouterZ(), 1e-3)},
        averaging_ranks=averaging_ranks,
    ).eval()
    total, values = objectives(
        observations,
        domain_ids=torch.tensor([0, 1], device="cuda:0"),
        attention_mask=torch.ones(2, 3, device="cuda:0"),
    )
    assert {x.device for x in (total, *values.values())} == {torch.device("cuda:0")}
