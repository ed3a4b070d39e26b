"""MoELayer with experts spread over ranks: equal to one process, under FSDP2, DistributedDataParallel and
checkpoints."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tolerances import assert_close, tolerance
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import edl
from edl import expert_parallel

LAYERS = {
    "softmax": {},
    "deepseek": {"scores": "sigmoid", "expert_bias": True, "routed_scaling_factor": 2.5, "num_shared_experts": 2},
    "qwen2": {
        "num_shared_experts": 1,
        "shared_intermediate_size": 40,
        "shared_expert_gate": True,
        "recompute_activations": True,
    },
}
H, I = 16, 24  # noqa: E741


def make_layers(num_experts, top_k, group, **options):
    """A layer in one process, and the same with its experts spread over a group."""
    layers = []
    for where in ({}, {"expert_group": group}):
        torch.manual_seed(1)
        layers.append(edl.MoELayer(H, I, num_experts, top_k, **options, **where))
    return layers


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def assert_same_as_one_process(one, spread, tokens, rank, roundings=1):
    """Output, routing and all gradients of `spread`, where every rank has its `tokens[rank]`, against `one` with all of
    them."""
    dtype = spread.gate_up_proj.dtype
    one = copy.deepcopy(one).double()
    counts = [len(x) for x in tokens]
    everything = torch.cat(tokens).double().requires_grad_()
    cotangent = torch.randn(everything.shape, dtype=torch.float64).to(dtype)
    expected, expected_routing = one(everything)
    expected.backward(cotangent.double())

    own = tokens[rank].clone().requires_grad_()
    output, routing = spread(own)
    output.backward(cotangent.split(counts)[rank])
    allowed = tolerance(dtype, H * I, roundings)
    assert routing.experts.equal(expected_routing.experts.split(counts)[rank])
    assert routing.tokens_per_expert.equal(torch.bincount(routing.experts.flatten(), minlength=one.num_experts))
    assert_close(output, expected.split(counts)[rank], allowed, expected.abs().max().item() if len(everything) else 0)
    assert_close(
        own.grad,
        everything.grad.split(counts)[rank],
        allowed,
        everything.grad.abs().max().item() if len(everything) else 0,
    )
    for (name, parameter), reference in zip(spread.named_parameters(), one.parameters(), strict=True):
        is_expert = isinstance(parameter, DTensor)
        assert is_expert == (name in ("gate_up_proj", "down_proj"))
        assert parameter.grad.dtype == dtype
        gradient = whole(parameter.grad) if is_expert else sum_over_ranks(parameter.grad)
        assert_close(gradient, reference.grad, allowed)
    spread.zero_grad()


# ---- on two ranks ----


def forward_and_gradients(rank, folder):
    for options in LAYERS.values():
        one, spread = make_layers(6, 2, dist.group.WORLD, dtype=torch.float64, **options)
        if one.expert_bias is not None:
            for layer in (one, spread):
                layer.expert_bias.copy_(torch.linspace(-0.2, 0.2, 6))
        for counts in ((5, 9), (0, 4), (1, 0), (0, 0)):
            tokens = [torch.randn(count, H, dtype=torch.float64) for count in counts]
            assert_same_as_one_process(one, spread, tokens, rank)


def how_alike_the_outputs_of_a_token_are(rank, folder):
    one, spread = make_layers(6, 3, dist.group.WORLD, dtype=torch.float64, output_gram=True)
    for counts in ((5, 9), (0, 4)):
        tokens = [torch.randn(count, H, dtype=torch.float64) for count in counts]
        cotangent = torch.randn(sum(counts), 3, 3, dtype=torch.float64)
        one.zero_grad()
        everything = torch.cat(tokens).requires_grad_()
        expected = one(everything)[1].output_gram
        (expected * cotangent).sum().backward()
        own = tokens[rank].clone().requires_grad_()
        gram = spread(own)[1].output_gram
        (gram * cotangent.split(counts)[rank]).sum().backward()
        torch.testing.assert_close(gram, expected.split(counts)[rank])
        torch.testing.assert_close(own.grad, everything.grad.split(counts)[rank])
        for name in ("gate_up_proj", "down_proj"):
            torch.testing.assert_close(whole(getattr(spread, name).grad), getattr(one, name).grad)
        spread.zero_grad()


def any_number_of_experts(rank, folder):
    for num_experts, top_k in ((2, 1), (2, 2), (8, 8), (512, 8)):
        one, spread = make_layers(num_experts, top_k, dist.group.WORLD, dtype=torch.float64)
        assert spread.gate_up_proj.to_local().shape == (num_experts // 2, 2 * I, H)
        assert_same_as_one_process(one, spread, [torch.randn(n, H, dtype=torch.float64) for n in (7, 3)], rank)


def all_tokens_to_one_expert(rank, folder):
    for favourite in (0, 5):
        one, spread = make_layers(6, 1, dist.group.WORLD, dtype=torch.float64)
        with torch.no_grad():
            for layer in (one, spread):
                layer.router.weight.fill_(-1)
                layer.router.weight[favourite] = 1
        tokens = [torch.rand(n, H, dtype=torch.float64) for n in (20, 1)]
        assert spread(tokens[rank])[1].tokens_per_expert.tolist() == [
            len(tokens[rank]) * (e == favourite) for e in range(6)
        ]
        assert_same_as_one_process(one, spread, tokens, rank)
        spread(tokens[rank])[0].sum().backward()
        own = spread.gate_up_proj.grad.to_local()
        idle = [e for e in range(3) if rank * 3 + e != favourite]
        assert (own[idle] == 0).all() and own.isfinite().all()


def a_token_of_nan_touches_no_other_token(rank, folder):
    _, spread = make_layers(6, 2, dist.group.WORLD)
    tokens = torch.randn(5, H)
    expected = spread(tokens)[0]
    if rank == 0:
        tokens[2] = float("nan")
    output = spread(tokens)[0]
    is_nan = output.isnan().any(dim=1)
    assert is_nan.tolist() == [rank == 0 and t == 2 for t in range(5)]
    torch.testing.assert_close(output[~is_nan], expected[~is_nan])


def bfloat16(rank, folder):
    one, spread = make_layers(6, 2, dist.group.WORLD, dtype=torch.bfloat16)
    tokens = [torch.randn(n, H).bfloat16() for n in (30, 11)]
    # Pre-activation, activation, output of the expert, sum; and as many on the way back, with the weighted gradient
    # that travels.
    assert_same_as_one_process(one, spread, tokens, rank, roundings=9)


def autocast(rank, folder):
    one, spread = make_layers(6, 2, dist.group.WORLD, num_shared_experts=1)
    tokens = torch.randn(30, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, routing = spread(tokens)
        expected, expected_routing = one(tokens)
    assert output.dtype == torch.bfloat16 and routing.weights.dtype == torch.float32
    assert routing.logits.equal(expected_routing.logits)
    assert_close(output, expected, tolerance(torch.bfloat16, H * I, 4))
    output.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in spread.parameters())


def start_is_that_of_one_process(rank, folder):
    torch.manual_seed(1)
    one = edl.MoELayer(H, I, 6, 2, num_shared_experts=1)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    spread = edl.MoELayer(H, I, 6, 2, num_shared_experts=1, expert_group=dist.group.WORLD)
    assert torch.get_rng_state().equal(state)
    for _ in range(2):
        for expected, parameter in zip(one.parameters(), spread.parameters(), strict=True):
            assert whole(parameter).equal(expected)
        assert spread.gate_up_proj.to_local().equal(one.gate_up_proj[3 * rank : 3 * rank + 3])
        for layer in (one, spread):
            torch.manual_seed(2)
            layer.reset_parameters()
    with torch.device("meta"):
        late = edl.MoELayer(H, I, 6, 2, num_shared_experts=1, expert_group=dist.group.WORLD)
    torch.manual_seed(2)
    late.to_empty(device="cpu").reset_parameters()
    assert all(whole(a).equal(b) for a, b in zip(late.parameters(), one.parameters(), strict=True))


def checkpointing_gives_the_same_gradients(rank, folder):
    _, spread = make_layers(6, 2, dist.group.WORLD, dtype=torch.float64)
    tokens = torch.randn(4 + rank, H, dtype=torch.float64, requires_grad=True)
    inputs = [tokens, *spread.parameters()]
    expected = torch.autograd.grad(spread(tokens)[0].square().sum(), inputs)
    output, _ = torch.utils.checkpoint.checkpoint(spread, tokens, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(output.square().sum(), inputs), expected, strict=True):
        assert whole(actual).equal(whole(wanted))


def takes_the_state_of_one_process_and_gives_it_back(rank, folder):
    torch.manual_seed(7)
    one = edl.MoELayer(H, I, 6, 2, expert_bias=True)
    _, spread = make_layers(6, 2, dist.group.WORLD, expert_bias=True)
    gathered = StateDictOptions(full_state_dict=True)
    set_model_state_dict(spread, one.state_dict(), options=gathered)
    assert spread.gate_up_proj.to_local().equal(one.gate_up_proj[3 * rank : 3 * rank + 3])
    state = get_model_state_dict(spread, options=gathered)
    assert set(state) == set(one.state_dict())
    assert all(type(state[name]) is torch.Tensor and state[name].equal(x) for name, x in one.state_dict().items())
    other = make_layers(6, 2, dist.group.WORLD, expert_bias=True)[1]
    other.load_state_dict(spread.state_dict())
    tokens = torch.randn(5, H)
    assert other(tokens)[0].equal(spread(tokens)[0]) and copy.deepcopy(spread)(tokens)[0].equal(spread(tokens)[0])
    assert spread.double().gate_up_proj.to_local().dtype == torch.float64


def refusals(rank, folder):
    mesh = init_device_mesh("cpu", (1, 2))
    alone = [dist.new_group([r]) for r in range(2)]
    spread = edl.MoELayer(H, I, 6, 2, expert_group=dist.group.WORLD)
    one = edl.MoELayer(H, I, 6, 2)
    fits = (
        "edl::MoELayer: expert_group must be a process group or a one-dimensional DeviceMesh that holds this process "
        "(got {})"
    )
    calls = {
        fits.format("int"): lambda: edl.MoELayer(H, I, 6, 2, expert_group=2),
        fits.format("a mesh of 2 dimensions"): lambda: edl.MoELayer(H, I, 6, 2, expert_group=mesh),
        fits.format(type(alone[1 - rank]).__name__): lambda: edl.MoELayer(H, I, 6, 2, expert_group=alone[1 - rank]),
        "edl::MoELayer: activation_gram needs all activations of a token in one process, which no expert_group has "
        "(got an expert_group)": (
            lambda: edl.MoELayer(H, I, 6, 2, activation_gram=True, expert_group=dist.group.WORLD)
        ),
        "edl::MoELayer: num_experts must be a multiple of the number of ranks in expert_group (got 5 for 2)": (
            lambda: edl.MoELayer(H, I, 5, 2, expert_group=dist.group.WORLD)
        ),
        "edl::MoELayer: hidden must end in 16, the hidden size (got 15)": lambda: spread(torch.randn(3, 15)),
        "edl::MoELayer: hidden must have the type of the experts, torch.float32 (got torch.bfloat16)": (
            lambda: spread(torch.randn(3, H).bfloat16())
        ),
        "edl::MoELayer: takes plain tensors, call to_local() on the shards first (got a DTensor)": (
            lambda: spread(DTensor.from_local(torch.randn(3, H), spread.expert_mesh, [Replicate()]))
        ),
        "edl::MoELayer: a layer with expert_group cannot be scripted (got a call of torch.jit.script)": (
            lambda: torch.jit.script(nn.Sequential(spread))
        ),
        "edl::MoELayer: a layer with expert_group cannot be exported, nor compiled on torch 2.11 "
        "(got a call under torch.export or torch.compile)": (lambda: torch.export.export(spread, (torch.randn(3, H),))),
        "edl::MoELayer.to_transformers: a qwen3_moe block cannot express the layer "
        "(got experts spread over an expert_group)": (spread.to_transformers),
        "edl::fully_shard_layer: layer must be made with expert_group (got one without)": (
            lambda: expert_parallel.fully_shard_layer(one, mesh, mesh)
        ),
        "edl::fully_shard_layer: mesh must hold as many ranks as expert_group times replica_mesh "
        "(got 2 for 2 times 2)": (lambda: expert_parallel.fully_shard_layer(spread, mesh, mesh)),
    }
    for sentence, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == sentence
    assert "expert_group of 2 ranks" in repr(spread) and "expert_group" not in repr(one)


def others_hear_of_a_failure(rank, folder):
    one, spread = make_layers(6, 2, dist.group.WORLD, dtype=torch.float64)
    tokens = torch.randn(4, H, dtype=torch.float64)
    dist.broadcast(tokens, 0)
    wrong = {
        "hidden must end in 16, the hidden size (got 15)": tokens[:, 1:],
        "hidden must have the type of the experts, torch.float64 (got torch.float32)": tokens.float(),
    }
    for failing in (0, 1):
        for sentence, given in wrong.items():
            kind, prefix = (
                (ValueError, "") if rank == failing else (RuntimeError, f"edl::MoELayer: rank {failing} failed: ")
            )
            with pytest.raises(kind) as error:
                spread(given if rank == failing else tokens)
            assert str(error.value) == f"{prefix}edl::MoELayer: {sentence}"
    with pytest.raises(RuntimeError, match="out of memory" if rank == 0 else "rank 0 failed: out of memory"):
        with expert_parallel.reporting_failures(spread.gate_up_proj, spread.expert_mesh):
            if rank == 0:
                raise RuntimeError("out of memory")
        spread(tokens)
    # and all go on together
    assert_close(spread(tokens)[0], one(tokens)[0], tolerance(torch.float64, H * I))


# ---- on four ranks ----


class Model(nn.Module):
    def __init__(self, num_experts, expert_group=None, dtype=torch.float64):
        super().__init__()
        options = {"num_shared_experts": 1, "shared_expert_gate": True, "expert_bias": True}
        self.first = nn.Linear(H, H, dtype=dtype)
        self.layer = edl.MoELayer(H, I, num_experts, 2, **options, expert_group=expert_group, dtype=dtype)
        self.last = nn.Linear(H, 3, dtype=dtype)

    def forward(self, tokens):
        return self.last(self.layer(self.first(tokens))[0])


def make_models(num_experts, replicas, dtype=torch.float64):
    """A model in one process, the same with experts over 4 / replicas ranks, and their mesh."""
    mesh = init_device_mesh("cpu", (replicas, 4 // replicas), mesh_dim_names=("replicas", "experts"))
    models = []
    for group in (None, mesh["experts"]):
        torch.manual_seed(1)
        models.append(Model(num_experts, group, dtype))
    return *models, mesh


def train_on_all_ranks(one, model, rank):
    """Backward of each rank's mean loss; of `one`, backward of the mean of them. Two micro-batches, one rank without
    tokens."""
    dtype = one.last.weight.dtype
    for counts in ((5, 3, 0, 7), (1, 2, 8, 0)):
        batches = [torch.randn(count, H, dtype=dtype) for count in counts]
        model(batches[rank]).square().sum().backward()
        (sum(one(batch).square().sum() for batch in batches) / 4).backward()


def assert_same_gradients(one, model):
    for (name, reference), parameter in zip(one.named_parameters(), model.parameters(), strict=True):
        assert_close(whole(parameter.grad), reference.grad.double(), tolerance(reference.dtype, 2 * H * I, 4)), name


def fsdp2(rank, folder):
    data = init_device_mesh("cpu", (4,))
    cases = [  # experts, replicas, dimension that FSDP2 shards, type
        (8, 2, 0, torch.float32),
        (2, 2, 1, torch.float64),
        (8, 1, 0, torch.float64),
        (2, 4, 1, torch.float32),
    ]
    for num_experts, replicas, dimension, dtype in cases:
        one, model, mesh = make_models(num_experts, replicas, dtype)
        expert_parallel.fully_shard_layer(model.layer, data, mesh["replicas"])
        fully_shard(model, mesh=data)
        local = [num_experts * replicas // 4, 2 * I, H]
        local[dimension] //= replicas
        assert list(model.layer.gate_up_proj.to_local().shape) == local
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*returned a view")
            train_on_all_ranks(one, model, rank)
        assert_same_gradients(one, model)
        expected = nn.utils.clip_grad_norm_(one.parameters(), 0.1).double()
        assert_close(expert_parallel.clip_grad_norm_(model, 0.1), expected, tolerance(dtype, 2 * H * I, 4))
        assert_same_gradients(one, model)
        torch.optim.AdamW(model.parameters(), foreach=True).step()


def fsdp2_by_hand(rank, folder):
    one, model, mesh = make_models(8, replicas=2)
    data = init_device_mesh("cpu", (4,))
    layer = model.layer
    fully_shard([layer.router, layer.shared_expert, layer.shared_expert_gate], mesh=data)
    fully_shard(layer, mesh=mesh["replicas"])
    layer.set_gradient_divide_factor(4.0)
    fully_shard(model, mesh=data)
    train_on_all_ranks(one, model, rank)
    assert_same_gradients(one, model)
    with pytest.raises(ValueError, match="edl::MoELayer: this rank must hold 4 experts, .* not its forward .got 2."):
        layer.forward(torch.randn(3, H, dtype=torch.float64))
    for module in (one.layer, layer):
        torch.manual_seed(5)
        module._reset_experts()
    assert whole(layer.gate_up_proj).equal(one.layer.gate_up_proj) and whole(layer.down_proj).equal(one.layer.down_proj)


def ddp(rank, folder):
    for num_experts, replicas in ((8, 2), (8, 1), (2, 4)):
        one, model, mesh = make_models(num_experts, replicas)
        assert set(expert_parallel.expert_parameters(model)) == {"layer.gate_up_proj", "layer.down_proj"}
        expert_parallel.exclude_from_ddp(model)
        wrapped = DistributedDataParallel(model)
        train_on_all_ranks(one, wrapped, rank)
        expert_parallel.average_expert_gradients(wrapped, mesh["replicas"].get_group())
        assert_same_gradients(one, model)
        expected = nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        assert_close(expert_parallel.clip_grad_norm_(wrapped, 0.1), expected, tolerance(torch.float64, 2 * H * I))
        assert_same_gradients(one, model)


def divergence_over_all_ranks(rank, folder):
    """The divergence loss over the tokens of all ranks, beside experts that pairs of them share, under DDP and
    FSDP2."""
    labels = torch.tensor([[0, 1], [1, 2], [0, -1], [2, 2]])  # of two sequences a rank: some ranks have one domain
    for framework in ("DDP", "FSDP2"):
        one, model, mesh = make_models(8, replicas=2)
        routing = {}
        for name, layer in (("one", one.layer), ("model", model.layer)):
            layer.register_forward_hook(lambda _, __, result, name=name: routing.update({name: result[1].logits}))
        if framework == "DDP":
            expert_parallel.exclude_from_ddp(model)
            wrapped = DistributedDataParallel(model)
        else:
            data = init_device_mesh("cpu", (4,))
            expert_parallel.fully_shard_layer(model.layer, data, mesh["replicas"])
            wrapped = fully_shard(model, mesh=data)
        tokens = torch.randn(4, 2 * 5, H, dtype=torch.float64)
        own = wrapped(tokens[rank]).square().sum()
        divergence = edl.ExpertDivergenceLoss(3, group=dist.group.WORLD)
        (own + divergence(routing["model"], labels[rank])).backward()
        if framework == "DDP":
            expert_parallel.average_expert_gradients(wrapped, mesh["replicas"].get_group())
        everything = one(tokens.flatten(0, 1)).square().sum() / 4
        (everything + edl.ExpertDivergenceLoss(3)(routing["one"], labels.flatten())).backward()
        assert_same_gradients(one, model)


def ddp_around_the_layer_alone(rank, folder):
    one, spread = make_layers(8, 2, dist.group.WORLD, dtype=torch.float64)
    expert_parallel.exclude_from_ddp(spread)
    wrapped = DistributedDataParallel(spread)
    batches = [torch.randn(5, H, dtype=torch.float64) for _ in range(4)]
    wrapped(batches[rank])[0].square().sum().backward()
    (sum(one(batch)[0].square().sum() for batch in batches) / 4).backward()
    expert_parallel.average_expert_gradients(wrapped)
    assert_same_gradients(one, spread)


def checkpoints(rank, folder):
    _, model, mesh = make_models(8, replicas=2)
    expert_parallel.exclude_from_ddp(model)
    wrapped = DistributedDataParallel(model)
    wrapped(torch.randn(5 + rank, H, dtype=torch.float64)).square().sum().backward()
    expert_parallel.average_expert_gradients(model, mesh["replicas"].get_group())
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    checkpoint.save(
        dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=folder / "checkpoint"
    )
    for replicas, is_sharded in ((1, False), (4, False), (2, True), (None, False)):
        alone, other, mesh = make_models(8, replicas or 1)
        other = alone if replicas is None else other
        if is_sharded:
            expert_parallel.fully_shard_layer(other.layer, mesh, mesh["replicas"])
            fully_shard(other, mesh=mesh)
        other_optimizer = torch.optim.AdamW(other.parameters())
        state = dict(zip(("model", "optimizer"), get_state_dict(other, other_optimizer)))
        checkpoint.load(state, checkpoint_id=folder / "checkpoint")
        set_state_dict(other, other_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for expected, parameter in zip(model.parameters(), other.parameters(), strict=True):
            assert whole(parameter).equal(whole(expected))
            for moment in ("exp_avg", "exp_avg_sq"):
                loaded = whole(other_optimizer.state[parameter][moment])
                assert loaded.equal(whole(optimizer.state[expected][moment])) and loaded.any()


ON_TWO = [
    forward_and_gradients,
    how_alike_the_outputs_of_a_token_are,
    any_number_of_experts,
    all_tokens_to_one_expert,
    a_token_of_nan_touches_no_other_token,
    bfloat16,
    autocast,
    start_is_that_of_one_process,
    checkpointing_gives_the_same_gradients,
    takes_the_state_of_one_process_and_gives_it_back,
    refusals,
    others_hear_of_a_failure,
]
ON_FOUR = [fsdp2, fsdp2_by_hand, ddp, divergence_over_all_ranks, ddp_around_the_layer_alone, checkpoints]


def run_check(check, folder):
    check(dist.get_rank(), folder)


@pytest.mark.parametrize("check", ON_TWO, ids=lambda check: check.__name__)
def test_on_two_ranks(check, tmp_path):
    on_ranks(2, run_check, check, tmp_path)


@pytest.mark.parametrize("check", ON_FOUR, ids=lambda check: check.__name__)
def test_on_four_ranks(check, tmp_path):
    on_ranks(4, run_check, check, tmp_path)


def test_compiles_in_one_graph(group_of_one):
    _, spread = make_layers(6, 2, group_of_one, dtype=torch.float64, num_shared_experts=1)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(copy.deepcopy(spread), fullgraph=True, dynamic=True, backend="aot_eager")
        if torch.__version__ < (2, 12):  # its graph would lose what the exchange receives
            with pytest.raises(torch._dynamo.exc.Unsupported, match="nor compiled on torch 2.11"):
                compiled(torch.randn(5, H, dtype=torch.float64))
            return
        for count in (5, 3):
            tokens = torch.randn(count, H, dtype=torch.float64, requires_grad=True)
            results = []
            for layer in (compiled, spread):
                output, _ = layer(tokens)
                results.append([output, *torch.autograd.grad(output.square().sum(), [tokens, *layer.parameters()])])
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(whole(actual), whole(expected), rtol=1e-12, atol=1e-12)
