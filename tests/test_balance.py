"""Load balancing, z-loss and the expert bias: their values, masks, forms of input, and effect."""

import pytest
import torch

import edl

# p of three tokens and four experts; K = 2. Loss and z-loss were computed from the papers' formulas in double
# precision.
PROBABILITIES = [[0.5, 0.3, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]]
BALANCE = 1.2222222222222222
LOGITS = [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
Z_LOSS = 6.409363684864748


def tolerance(dtype):
    return 1e-10 if dtype == torch.float64 else 1e-6


def random_routing(num_tokens=24, num_experts=6, top_k=2, dtype=torch.float64):
    logits = torch.randn(num_tokens, num_experts, dtype=dtype, requires_grad=True)
    weights, experts = edl.ops.route_tokens(logits, top_k, "softmax")
    return edl.Routing(logits, weights, experts, torch.bincount(experts.flatten(), minlength=num_experts))


def balance_by_definition(logits, experts, scores="softmax"):
    probabilities = edl.reference.routing_scores(logits, scores)
    num_experts = logits.shape[1]
    fractions = torch.stack([(experts == e).double().mean() for e in range(num_experts)])
    return num_experts * (fractions * probabilities.mean(0)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_the_papers_formulas(dtype):
    logits = torch.tensor(PROBABILITIES, dtype=dtype).log()
    assert abs(edl.load_balancing_loss(logits, top_k=2).item() - BALANCE) < tolerance(dtype)
    loss = edl.router_z_loss(torch.tensor(LOGITS, dtype=dtype))
    assert loss.dtype == dtype and abs(loss.item() - Z_LOSS) < tolerance(dtype) * Z_LOSS


def test_perfect_balance_is_1_and_collapse_is_the_number_of_experts():
    even = torch.eye(8).repeat(5, 1) * 30
    assert edl.load_balancing_loss(even, top_k=1).item() == pytest.approx(1, abs=1e-6)
    collapsed = torch.zeros(40, 8)
    collapsed[:, 3] = 30
    assert edl.load_balancing_loss(collapsed, top_k=1).item() == pytest.approx(8, abs=1e-5)


def test_transformers_value_is_top_k_times_ours():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(30, 6)
    theirs = modeling.load_balancing_loss_func((logits,), 6, 2)
    torch.testing.assert_close(2 * edl.load_balancing_loss(logits, top_k=2), theirs)
    mask = torch.randint(0, 2, (5, 6))
    theirs = modeling.load_balancing_loss_func((logits,), 6, 2, mask)
    torch.testing.assert_close(2 * edl.load_balancing_loss(logits, mask, top_k=2), theirs)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_value_and_gradient_are_those_of_the_definition(scores):
    routing = random_routing()
    loss = edl.load_balancing_loss(routing, scores=scores)
    expected = balance_by_definition(routing.logits, routing.experts, scores)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, routing.logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)
    assert torch.autograd.gradcheck(edl.router_z_loss, routing.logits)


def test_the_mean_over_layers_of_every_form_of_input():
    routings = [random_routing(dtype=torch.float32) for _ in range(3)]
    alone = torch.stack([edl.load_balancing_loss(routing) for routing in routings]).mean()
    logits = [routing.logits for routing in routings]
    for form in (routings, tuple(routings)):
        torch.testing.assert_close(edl.load_balancing_loss(form), alone)
    for form in (logits, tuple(logits), [z.view(4, 6, 6) for z in logits]):
        torch.testing.assert_close(edl.load_balancing_loss(form, top_k=2), alone)
    alone = torch.stack([edl.router_z_loss(z) for z in logits]).mean()
    for form in (logits, tuple(logits), routings, [z.view(4, 6, 6) for z in logits]):
        torch.testing.assert_close(edl.router_z_loss(form), alone)


def masked_losses(routing, **mask):
    return torch.stack([edl.load_balancing_loss(routing, **mask), edl.router_z_loss(routing, **mask)])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_padding_takes_no_part_whatever_it_holds(dtype):
    routing = random_routing()
    kept = torch.arange(24) % 3 != 1
    few = edl.Routing(routing.logits[kept], routing.weights[kept], routing.experts[kept], routing.tokens_per_expert)
    expected = masked_losses(few)
    poisoned = routing._replace(
        logits=routing.logits.detach().masked_fill(~kept[:, None], float("nan")).requires_grad_()
    )
    for attention_mask in (kept.to(dtype), kept.view(4, 6).to(dtype)):
        losses = masked_losses(poisoned, attention_mask=attention_mask)
        torch.testing.assert_close(losses, expected)
        (gradient,) = torch.autograd.grad(losses.sum(), poisoned.logits)
        assert (gradient[~kept] == 0).all() and (gradient[kept] != 0).any()
    torch.testing.assert_close(masked_losses(poisoned, padding_mask=~kept), expected)


def test_without_any_token_both_are_zero_with_zero_gradient():
    routing = random_routing()
    losses = masked_losses(routing, attention_mask=torch.zeros(24))
    assert losses.tolist() == [0, 0]
    assert (torch.autograd.grad(losses.sum(), routing.logits)[0] == 0).all()
    assert masked_losses(random_routing(num_tokens=0)).tolist() == [0, 0]


def test_16_bit_logits_give_float32_losses():
    routing = random_routing(dtype=torch.bfloat16)
    wide = routing._replace(logits=routing.logits.float())
    assert masked_losses(routing).dtype == torch.float32
    torch.testing.assert_close(masked_losses(routing), masked_losses(wide))


def test_large_logits_stay_finite():
    logits = (torch.randn(50, 8) * 1e4).requires_grad_()
    loss = edl.load_balancing_loss(logits, top_k=2) + edl.router_z_loss(logits)
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_both_losses_script():
    balance, z_loss = torch.jit.script(edl.load_balancing_loss), torch.jit.script(edl.router_z_loss)
    routing = random_routing(dtype=torch.float32)
    mask = torch.arange(24) % 5 != 0
    torch.testing.assert_close(balance([routing], mask), edl.load_balancing_loss(routing, mask))
    torch.testing.assert_close(z_loss([routing.logits], mask), edl.router_z_loss(routing, mask))


@pytest.mark.parametrize("form", ["routing", "logits"])
def test_both_losses_compile_into_one_graph(form):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def losses(logits, experts, mask):
        if form == "routing":
            routings = [edl.Routing(logits, experts, experts, experts)]
            return edl.load_balancing_loss(routings, mask) + edl.router_z_loss(routings, mask)
        return edl.load_balancing_loss([logits], mask, top_k=2) + edl.router_z_loss([logits], mask)

    for num_tokens in (24, 31):
        routing = random_routing(num_tokens, dtype=torch.float32)
        mask = torch.arange(num_tokens) % 5 != 0
        loss = losses(routing.logits, routing.experts, mask)
        expected = masked_losses(routing, attention_mask=mask).sum()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, routing.logits)[0] for x in (loss, expected)))


def test_minimising_the_loss_balances_a_skewed_router():
    torch.manual_seed(1)
    tokens = torch.randn(512, 16) + 1
    weight = (torch.randn(8, 16) * 0.1).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=1e-2)

    def violation():
        counts = edl.ops.route_tokens(tokens @ weight.T, 2, "softmax")[1].flatten().bincount(minlength=8).double()
        return (counts.max() / counts.mean() - 1).item()

    before = violation()
    for _ in range(150):
        optimizer.zero_grad()
        edl.load_balancing_loss(tokens @ weight.T, top_k=2).backward()
        optimizer.step()
    assert before > 1 and violation() < before / 4


def test_the_expert_bias_moves_by_the_rate_towards_balance():
    layer = edl.MoELayer(8, 8, 4, 2, expert_bias=True)
    edl.update_expert_bias(layer, torch.tensor([10, 0, 5, 5]), rate=0.1)
    torch.testing.assert_close(layer.expert_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    edl.update_expert_bias([layer], [torch.zeros(4, dtype=torch.int64)])
    torch.testing.assert_close(layer.expert_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("loads", "signs"),
    [
        ([257, 257, 256, 256], [-1, -1, 1, 1]),
        ([2**24 + 1, 2**24, 2**24, 2**24 + 1], [-1, 1, 1, -1]),
        ([2**40 + 1, 2**40, 2**40, 2**40 - 1], [-1, 0, 0, 1]),
        ([3, 3, 3, 3], [0, 0, 0, 0]),
    ],
    ids=str,
)
def test_loads_that_differ_by_one_are_told_apart(loads, signs, bias_dtype):
    layer = edl.MoELayer(8, 8, 4, 2, expert_bias=True)
    layer.expert_bias = layer.expert_bias.to(bias_dtype)
    edl.update_expert_bias(layer, torch.tensor(loads), rate=0.5)
    assert layer.expert_bias.tolist() == [0.5 * sign for sign in signs]


def test_closed_experts_keep_their_bias_and_do_not_enter_the_mean():
    layer = edl.MoELayer(8, 8, 4, 2, expert_bias=True)
    is_open = torch.tensor([True, True, False, True])  # the second had no luck
    edl.update_expert_bias(layer, torch.tensor([9, 0, 7, 5]), rate=0.5, open_experts=is_open)
    assert layer.expert_bias.tolist() == [-0.5, 0.5, 0, -0.5]  # against 14 / 3
    edl.update_expert_bias([layer], [torch.tensor([9, 0, 7, 5])], open_experts=[torch.zeros(4, dtype=torch.bool)])
    assert layer.expert_bias.tolist() == [-0.5, 0.5, 0, -0.5]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_updating_the_expert_bias_balances_a_skewed_router(scores):
    layer = edl.MoELayer(16, 8, 8, 2, scores=scores, expert_bias=True)
    tokens = torch.randn(512, 16) + 1

    def violation():
        counts = layer(tokens)[1].tokens_per_expert.double()
        return (counts.max() / counts.mean() - 1).item()

    before = violation()
    for _ in range(300):
        edl.update_expert_bias(layer, layer(tokens)[1], rate=2e-3)
    assert before > 0.5 and violation() < 0.15


def update_on_one_rank(rank, folder, size):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    layers = [edl.MoELayer(8, 8, 3, 2, expert_bias=True) for _ in range(2)]
    counts = (
        [torch.tensor([4, 0, 2]), torch.tensor([0, 1, 1])]
        if rank == 0
        else [torch.tensor([0, 4, 2]), torch.tensor([0, 3, 3])]
    )
    edl.update_expert_bias(layers, counts, rate=0.5, group=torch.distributed.group.WORLD)
    # Open on one rank is open: [9, 0, 3] of all.
    layers.append(edl.MoELayer(8, 8, 3, 2, expert_bias=True))
    own, is_open = (([9, 0, 1], [True, True, False]), ([0, 0, 2], [True, False, False]))[rank]
    edl.update_expert_bias(
        layers[2],
        torch.tensor(own),
        rate=0.5,
        group=torch.distributed.group.WORLD,
        open_experts=torch.tensor(is_open),
    )
    torch.save([layer.expert_bias for layer in layers], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_ranks_that_count_together_move_alike(tmp_path):
    torch.multiprocessing.spawn(update_on_one_rank, (str(tmp_path), 2), nprocs=2)
    for rank in range(2):
        biases = torch.load(tmp_path / str(rank))
        assert [bias.tolist() for bias in biases] == [[0, 0, 0], [0.5, -0.5, -0.5], [-0.5, 0.5, 0]]


def given(op, layers, **options):
    """A loss of router logits."""
    if op == "load_balancing_loss":
        options["top_k"] = 2
    return getattr(edl, op)(layers, **options)


def counted(loads, **options):
    return edl.update_expert_bias(edl.MoELayer(8, 8, 4, 2, expert_bias=True), loads, **options)


REFUSED_LAYERS = {
    "none": (lambda z: None, "must be a Routing, a tensor, or a list of them (got NoneType)"),
    "number": (lambda z: 3, "must be a Routing, a tensor, or a list of them (got int)"),
    "none-of-several": (
        lambda z: [z, None],
        "must hold tensors or Routings, and nothing for a layer without a router (got a list with NoneType)",
    ),
    "only-none": (
        lambda z: (None,),
        "must hold tensors or Routings, and nothing for a layer without a router (got a list with NoneType)",
    ),
    "lists": (
        lambda z: [z.tolist()],
        "must hold tensors or Routings, and nothing for a layer without a router (got a list with list)",
    ),
    "sparse": (lambda z: z.to_sparse(), "must be dense (got layout torch.sparse_coo)"),
    "nested": (lambda z: [torch.nested.nested_tensor([z, z])], "must be dense (got a nested tensor)"),
}
REFUSED_LOGITS = {
    "one-dimension": (lambda z: z[0], "router logits must have the shape [T, E] or [B, S_len, E] (got [6])"),
    "four-dimensions": (
        lambda z: z.view(2, 2, 6, 6),
        "router logits must have the shape [T, E] or [B, S_len, E] (got [2, 2, 6, 6])",
    ),
    "no-dimension": (lambda z: z[0, 0], "router logits must have the shape [T, E] or [B, S_len, E] (got [])"),
    "integers": (lambda z: z.long(), "router logits must be float32, float64, bfloat16 or float16 (got torch.int64)"),
    "two-devices": (lambda z: [z, z.to("meta")], "all layers must be on one device (got cpu and meta)"),
}
REFUSED_MASKS = {
    "list": ([1] * 24, "attention_mask must be a tensor (got list)"),
    "sparse": (torch.ones(24).to_sparse(), "attention_mask must be dense (got layout torch.sparse_coo)"),
    "device": (
        torch.ones(24, device="meta"),
        "the mask must be on the device of the router logits (got meta and cpu)",
    ),
}


@pytest.mark.parametrize(("op", "argument"), [("load_balancing_loss", "routings"), ("router_z_loss", "router_logits")])
def test_losses_refuse_what_are_no_router_logits_alike(op, argument):
    logits = random_routing().logits.detach()
    for form, sentence in REFUSED_LAYERS.values():
        with pytest.raises(ValueError) as error:
            given(op, form(logits))
        assert str(error.value) == f"edl::{op}: {argument} {sentence}"
    for form, sentence in REFUSED_LOGITS.values():
        with pytest.raises(ValueError) as error:
            given(op, form(logits))
        assert str(error.value) == f"edl::{op}: {sentence}"
    for mask, sentence in REFUSED_MASKS.values():
        with pytest.raises(ValueError) as error:
            given(op, logits, attention_mask=mask)
        assert str(error.value) == f"edl::{op}: {sentence}"


def test_a_layer_without_a_router_is_refused_by_every_loss():
    logits = random_routing().logits.detach()
    for loss in (
        lambda layers: edl.load_balancing_loss(layers, top_k=2),
        edl.router_z_loss,
        lambda layers: edl.expert_divergence_loss(layers, torch.zeros(1, dtype=torch.int64), 2),
    ):
        with pytest.raises(ValueError, match="and nothing for a layer without a router .got a list with NoneType"):
            loss([logits, None])


REFUSALS = {
    "text-top_k": (
        lambda r: edl.load_balancing_loss(r.logits, top_k="2"),
        "edl::load_balancing_loss: top_k must be an integer (got '2')",
    ),
    "experts-shape": (
        lambda r: edl.load_balancing_loss(r._replace(experts=r.experts[:, 0])),
        "edl::load_balancing_loss: experts must have the shape [24, K] (got [24])",
    ),
    "experts-device": (
        lambda r: edl.load_balancing_loss(r._replace(experts=r.experts.to("meta"))),
        "edl::load_balancing_loss: experts must be on the device of logits (got meta and cpu)",
    ),
    "experts-none": (
        lambda r: edl.load_balancing_loss(r._replace(experts=None)),
        "edl::load_balancing_loss: experts must be a tensor (got NoneType)",
    ),
    "list-of-counts": (
        lambda r: counted([1, 2, 3, 4]),
        "edl::update_expert_bias: tokens_per_expert must have one entry per layer (got 4 for 1)",
    ),
    "list-of-lists-of-counts": (
        lambda r: counted([[1, 2, 3, 4]]),
        "edl::update_expert_bias: tokens_per_expert must be a tensor (got list)",
    ),
    "counts-that-are-not-finite": (
        lambda r: counted(torch.tensor([1.0, float("nan"), 2.0, 3.0])),
        "edl::update_expert_bias: tokens_per_expert must be finite (got NaN or infinity)",
    ),
    "no-counts": (
        lambda r: counted(None),
        "edl::update_expert_bias: tokens_per_expert must be that of one layer or a list (got NoneType)",
    ),
    "sparse-counts": (
        lambda r: counted(torch.ones(4).to_sparse()),
        "edl::update_expert_bias: tokens_per_expert must be dense (got layout torch.sparse_coo)",
    ),
    "meta-counts": (
        lambda r: counted(torch.ones(4, device="meta")),
        "edl::update_expert_bias: tokens_per_expert must hold real numbers (got a meta tensor)",
    ),
    "rate": (
        lambda r: counted(torch.ones(4), rate="0.1"),
        "edl::update_expert_bias: rate must be a number (got '0.1')",
    ),
    "infinite-rate": (
        lambda r: counted(torch.ones(4), rate=float("inf")),
        "edl::update_expert_bias: rate must be finite (got inf)",
    ),
    "open-type": (
        lambda r: counted(torch.ones(4), open_experts=torch.zeros(4)),
        "edl::update_expert_bias: open_experts must be bool (got torch.float32)",
    ),
    "open-number": (
        lambda r: counted(torch.ones(4), open_experts=[torch.ones(4, dtype=torch.bool)] * 2),
        "edl::update_expert_bias: open_experts must have one entry per layer (got 2 for 1)",
    ),
    "group": (
        lambda r: counted(torch.ones(4), group=3),
        "edl::update_expert_bias: group must be a process group that holds this process (got int)",
    ),
    "no-MoELayer": (
        lambda r: edl.update_expert_bias([torch.nn.Linear(4, 4)], [torch.zeros(4)]),
        "edl::update_expert_bias: layers must be of MoELayer (got Linear)",
    ),
    "no-layer": (
        lambda r: edl.load_balancing_loss([]),
        "edl::load_balancing_loss: routings must hold at least one layer (got an empty list)",
    ),
    "no-logits": (
        lambda r: edl.router_z_loss([]),
        "edl::router_z_loss: router_logits must hold at least one layer (got an empty list)",
    ),
    "no-top_k": (
        lambda r: edl.load_balancing_loss(r.logits),
        "edl::load_balancing_loss: router logits need top_k, the experts per token (got None)",
    ),
    "scores": (
        lambda r: edl.load_balancing_loss(r, scores="tanh"),
        "edl::load_balancing_loss: scores must be 'softmax', 'sigmoid' or 'none' (got 'tanh')",
    ),
    "both-masks": (
        lambda r: edl.router_z_loss(r, attention_mask=torch.ones(24), padding_mask=torch.zeros(24)),
        "edl::router_z_loss: give attention_mask (1 = keep) or padding_mask (True = padding), not both (got both)",
    ),
    "no-bias": (
        lambda r: edl.update_expert_bias(edl.MoELayer(8, 8, 4, 2), torch.zeros(4)),
        "edl::update_expert_bias: layers must be made with expert_bias=True (got one without)",
    ),
    "counts": (
        lambda r: edl.update_expert_bias(edl.MoELayer(8, 8, 4, 2, expert_bias=True), torch.zeros(5)),
        "edl::update_expert_bias: tokens_per_expert must have the shape [4] (got [5])",
    ),
    "layers": (
        lambda r: edl.update_expert_bias([edl.MoELayer(8, 8, 4, 2, expert_bias=True)], [torch.zeros(4)] * 2),
        "edl::update_expert_bias: tokens_per_expert must have one entry per layer (got 2 for 1)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_arguments_are_one_sentence(name):
    call, sentence = REFUSALS[name]
    with pytest.raises(ValueError) as error:
        call(random_routing())
    assert str(error.value) == sentence


@pytest.mark.parametrize("loss", [edl.load_balancing_loss, edl.router_z_loss])
def test_a_mask_value_other_than_0_and_1_is_refused(loss):
    with pytest.raises(IndexError, match="a token whose label or mask value is not allowed"):
        loss(random_routing(), attention_mask=torch.full((24,), 2))


def test_dtensors_are_refused(as_dtensor):
    routing, mask = random_routing(), as_dtensor(torch.ones(24))
    layer = edl.MoELayer(8, 8, routing.logits.shape[1], 2, expert_bias=True)
    calls = {
        "load_balancing_loss": [
            lambda: edl.load_balancing_loss(as_dtensor(routing.logits), top_k=2),
            lambda: edl.load_balancing_loss([routing, routing._replace(experts=as_dtensor(routing.experts))]),
            lambda: edl.load_balancing_loss(routing, padding_mask=mask),
        ],
        "router_z_loss": [
            lambda: edl.router_z_loss([as_dtensor(routing.logits)]),
            lambda: edl.router_z_loss(routing._replace(logits=as_dtensor(routing.logits))),
            lambda: edl.router_z_loss(routing, attention_mask=mask),
        ],
        "update_expert_bias": [lambda: edl.update_expert_bias(layer, as_dtensor(routing.tokens_per_expert))],
    }
    for name, cases in calls.items():
        for call in cases:
            with pytest.raises(ValueError) as error:
                call()
            assert (
                str(error.value)
                == f"edl::{name}: takes plain tensors, call to_local() on the shards first (got a DTensor)"
            )
