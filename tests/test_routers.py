"""Routers of one's own in MoELayer: what they are told, what they decide, and what a layer refuses."""

import copy
import io
import pickle
from typing import Optional

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils.checkpoint import checkpoint

import edl
from edl import Choice, RoutingContext
from edl.moe.routers import Router, TopK

H, I, E, K = 16, 24, 6, 2  # noqa: E741


class Told(Router):
    """Each group has every second expert; recorded choices are made again, -1 is chosen anew."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor, context: Optional[RoutingContext] = None) -> Choice:  # noqa: UP045
        logits = self.gate(tokens)
        scores = logits.softmax(-1)
        if context is not None:
            groups = context.groups
            if groups is not None:
                elsewhere = torch.arange(logits.shape[1], device=tokens.device) % 2 != groups.unsqueeze(1)
                scores = scores.masked_fill(elsewhere, 0)
        experts = scores.topk(2).indices
        if context is not None:
            choices = context.choices
            if choices is not None:
                experts = torch.where(choices < 0, experts, choices)
        return Choice(logits, scores.gather(1, experts), experts)


def told_layer(dtype=torch.float32, **options):
    return edl.MoELayer(H, I, E, router=Told(dtype), dtype=dtype, **options)


def contexts(num_tokens):
    """What the router may be told, by name."""
    groups = torch.arange(num_tokens, dtype=torch.int32) % 2
    choices = torch.randint(-1, E, (num_tokens, K))
    return {
        "none": None,
        "empty": RoutingContext(),
        "groups": RoutingContext(groups=groups),
        "choices": RoutingContext(choices=choices),
        "both": RoutingContext(groups=groups, choices=torch.where(choices % 2 == groups[:, None], choices, -1)),
    }


def by_definition(layer, tokens, context):
    """The layer with a `Told` router, token by token."""
    logits, outputs = tokens @ layer.router.gate.weight.T, []
    for t, token in enumerate(tokens):
        scores = logits[t].softmax(-1)
        is_open = torch.ones(E, dtype=torch.bool)
        if context is not None and context.groups is not None:
            is_open = torch.arange(E) % 2 == context.groups[t]
        experts = sorted(is_open.nonzero().flatten().tolist(), key=lambda e, s=scores: -s[e].item())[:K]
        if context is not None and context.choices is not None:
            experts = [new if old < 0 else old for new, old in zip(experts, context.choices[t].tolist(), strict=True)]
        output = torch.zeros_like(token)
        for e in experts:
            gate, up = (layer.gate_up_proj[e] @ token).chunk(2)
            output = output + scores[e] * (layer.down_proj[e] @ (nn.functional.silu(gate) * up))
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("name", contexts(1))
def test_output_and_gradients_are_those_of_what_the_router_chose(name):
    layer, tokens = told_layer(torch.float64), torch.randn(7, H, dtype=torch.float64, requires_grad=True)
    context, inputs = contexts(7)[name], [tokens, *layer.parameters()]
    output, routing = layer(tokens, context)
    expected = by_definition(layer, tokens, context)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        rtol=1e-12,
        atol=1e-12,
    )
    assert type(routing) is edl.Routing and routing.logits.equal(tokens @ layer.router.gate.weight.T)
    assert routing.tokens_per_expert.tolist() == torch.bincount(routing.experts.flatten(), minlength=E).tolist()
    if name in ("groups", "both"):
        assert (routing.experts % 2 == context.groups[:, None]).all()
    if name == "choices":
        assert (routing.experts == context.choices)[context.choices >= 0].all()


def test_tokens_of_a_batch_are_told_apart_in_the_order_of_the_flattened_input():
    layer, hidden = told_layer(), torch.randn(3, 5, H)
    context = RoutingContext(groups=torch.arange(15, dtype=torch.int32) // 5 % 2)
    output, routing = layer(hidden, context)
    assert (routing.experts.view(3, 10) % 2 == torch.tensor([[0], [1], [0]])).all()
    torch.testing.assert_close(output, layer(hidden.reshape(15, H), context)[0].view(3, 5, H), rtol=0, atol=0)


# ---- ways of use ----


def test_script_save_and_load_with_a_context():
    layer, tokens, saved = told_layer(), torch.randn(9, H), io.BytesIO()
    torch.jit.save(torch.jit.script(layer), saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    assert loaded.state_dict().keys() == layer.state_dict().keys()
    for context in contexts(9).values():
        torch.testing.assert_close(loaded(tokens, context), tuple(layer(tokens, context)))


def test_a_scripted_layer_refuses_wrong_contexts_and_choices():
    scripted, tokens = torch.jit.script(told_layer()), torch.randn(9, H)
    with pytest.raises(torch.jit.Error, match=r"edl::MoELayer: context\.groups must have the shape .* 9 tokens"):
        scripted(tokens, RoutingContext(groups=torch.zeros(8, dtype=torch.int32)))
    with pytest.raises(torch.jit.Error, match=r"edl::MoELayer: context\.choices needs a router that"):
        torch.jit.script(edl.MoELayer(H, I, E, K))(tokens, contexts(9)["choices"])


@pytest.mark.parametrize("name", ["none", "groups", "both"])
def test_export_save_load_with_another_batch(name):
    layer, saved, length = told_layer(), io.BytesIO(), torch.export.Dim("length", min=2, max=64)
    context = contexts(7)[name]
    of_context = context and RoutingContext(*(None if field is None else {0: length} for field in context))
    program = torch.export.export(layer, (torch.randn(7, H), context), dynamic_shapes=({0: length}, of_context))
    torch.export.save(program, saved)
    saved.seek(0)
    tokens, context = torch.randn(12, H), contexts(12)[name]
    torch.testing.assert_close(torch.export.load(saved).module()(tokens, context), layer(tokens, context))


@pytest.mark.parametrize("name", contexts(1))
def test_compile_fullgraph_with_dynamic_shapes(name):
    layer = told_layer()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (6, 15):
        tokens, context = torch.randn(num_tokens, H), contexts(num_tokens)[name]
        output, expected = compiled(tokens, context)[0], layer(tokens, context)[0]
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close([p.grad for p in compiled.parameters()], [p.grad for p in layer.parameters()])


class OnlyGroups(TopK):
    """`TopK` over every second expert, as a mask of its logits."""

    def forward(
        self,
        tokens: Tensor,
        context: Optional[RoutingContext] = None,  # noqa: UP045
        expert_bias: Optional[Tensor] = None,  # noqa: UP045
    ) -> Choice:
        logits = self.logits_of(tokens)
        masked = logits
        if context is not None:
            groups = context.groups
            if groups is not None:
                elsewhere = torch.arange(logits.shape[1], device=tokens.device) % 2 != groups.unsqueeze(1)
                masked = logits.masked_fill(elsewhere, float("-inf"))
        choice = self.choice_of(masked, expert_bias)
        return Choice(logits, choice.weights, choice.experts)


def test_a_router_derived_from_top_k_takes_its_options_and_the_layers_bias():
    router = OnlyGroups(H, E, K, scores="sigmoid", routed_scaling_factor=2.5)
    layer = edl.MoELayer(H, I, E, router=router, expert_bias=True)
    assert (layer.top_k, layer.scores, layer.normalize_top_k, layer.routed_scaling_factor) == (2, "sigmoid", True, 2.5)
    assert set(layer.state_dict()) == {"router.weight", "gate_up_proj", "down_proj", "expert_bias"}
    tokens, groups = torch.randn(40, H), torch.arange(40, dtype=torch.int32) % 2
    layer.expert_bias[4:] += 10
    for run in (layer, torch.jit.script(layer)):
        routing = run(tokens, RoutingContext(groups=groups))[1]
        assert routing.experts[:, 0].equal(4 + groups.long())  # the favourite of its group
        assert (routing.experts % 2 == groups[:, None]).all()
        scores = routing.logits.sigmoid().gather(1, routing.experts)
        torch.testing.assert_close(routing.weights, 2.5 * scores / scores.sum(-1, keepdim=True))
    edl.update_expert_bias(layer, torch.tensor([0, 0, 0, 0, 40, 40]), rate=0.5)
    torch.testing.assert_close(layer.expert_bias, torch.tensor([0.5, 0.5, 0.5, 0.5, 9.5, 9.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_bias_that_was_narrowed_is_handed_on_in_float32(dtype):
    layer, tokens = edl.MoELayer(H, I, E, K, expert_bias=True), torch.randn(9, H)
    narrow = torch.linspace(-1, 1, E).to(dtype)
    layer.expert_bias.copy_(narrow)
    expected = layer(tokens)[1]
    layer.expert_bias.data = narrow
    torch.testing.assert_close(layer(tokens)[1], expected, rtol=0, atol=0)


def test_copies_and_pickles_route_alike():
    layer, tokens, context = told_layer(), torch.randn(9, H), contexts(9)["both"]
    expected = layer(tokens, context)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(tokens, context)[0].equal(expected)
        assert other.router is not layer.router


def test_names_in_state_dicts_are_those_of_the_layer_and_of_its_router():
    layer = edl.MoELayer(H, I, E, K, scores="sigmoid", expert_bias=True, num_shared_experts=1, shared_expert_gate=True)
    shared = {f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")} | {"shared_expert_gate.weight"}
    assert set(layer.state_dict()) == {"router.weight", "gate_up_proj", "down_proj", "expert_bias"} | shared
    assert set(told_layer().state_dict()) == {"router.gate.weight", "gate_up_proj", "down_proj"}


def test_a_layer_tells_and_sets_the_options_of_its_router():
    layer = edl.MoELayer(H, I, E, K)
    layer.top_k, layer.scores, layer.normalize_top_k, layer.routed_scaling_factor = 3, "sigmoid", False, 2.0
    routing = layer(torch.randn(5, H))[1]
    torch.testing.assert_close(routing.weights, 2 * routing.logits.sigmoid().topk(3).values)
    assert not hasattr(told_layer(), "top_k")


def test_a_default_router_is_the_top_k_of_the_layers_options():
    options = {"scores": "sigmoid", "normalize_top_k": False, "routed_scaling_factor": 2.5}
    torch.manual_seed(1)
    short = edl.MoELayer(H, I, E, K, **options, dtype=torch.float64)
    torch.manual_seed(1)
    long = edl.MoELayer(H, I, E, router=TopK(H, E, K, **options, dtype=torch.float64), dtype=torch.float64)
    tokens = torch.randn(9, H, dtype=torch.float64)
    torch.testing.assert_close(short(tokens), long(tokens), rtol=0, atol=0)
    assert repr(short) == repr(long)


# ---- a forward pass writes no state: replays see what the first pass saw ----


def test_a_forward_pass_writes_no_state():
    for layer in (told_layer(), edl.MoELayer(H, I, E, K, expert_bias=True)):
        before, attributes = copy.deepcopy(layer.state_dict()), {m: dict(vars(m)) for m in layer.modules()}
        layer(torch.randn(9, H), RoutingContext(groups=torch.zeros(9, dtype=torch.int32)))[0].sum().backward()
        assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())
        assert attributes == {module: vars(module) for module in layer.modules()}


class Blocks(nn.Module):
    """Layers in residual blocks, each a checkpoint."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(told_layer(return_routing=False) for _ in range(3))

    def forward(self, hidden, context, use_reentrant=None):
        for layer in self.layers:
            if use_reentrant is None:
                hidden = hidden + layer(hidden, context)
            else:
                hidden = hidden + checkpoint(layer, hidden, context, use_reentrant=use_reentrant)
        return hidden


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["none", "groups", "both"])
def test_replays_see_the_same_context(name, use_reentrant):
    model, hidden = Blocks(), torch.randn(3, 11, H, requires_grad=True)
    context = contexts(33)[name]
    gradients = []
    for how in (None, use_reentrant):
        hidden.grad = None
        model.zero_grad()
        model(hidden, context, how).square().sum().backward()
        gradients.append([hidden.grad.clone(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def transformers_model():
    """A Qwen3-MoE whose blocks are layers that are told of groups by a keyword of the model's call: it reaches the
    attention of each layer, in the first pass and in the replay, and a hook there hands it to the layer's experts."""
    from transformers_models import make_model

    model = make_model("qwen3_moe")
    for decoder in model.model.layers:
        router = OnlyGroups(32, 8, K)
        decoder.mlp = edl.MoELayer(32, 12, 8, router=router, return_routing=False).train()
        handed = []

        def take(attention, args, kwargs, handed=handed):
            handed[:] = [kwargs.pop("routing_context", None)]
            return args, kwargs

        def give(layer, args, kwargs, handed=handed):
            return args, {**kwargs, "context": handed.pop()}

        decoder.self_attn.register_forward_pre_hook(take, with_kwargs=True)
        decoder.mlp.register_forward_pre_hook(give, with_kwargs=True)
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_keyword_of_a_transformers_model_reaches_routers_in_replays(use_reentrant):
    pytest.importorskip("transformers")
    model, tokens = transformers_model(), torch.randint(3, 99, (2, 9))
    chosen = []
    for decoder in model.model.layers:
        decoder.mlp.router.register_forward_hook(lambda router, args, choice: chosen.append(choice.experts))

    def gradients(groups):
        model.zero_grad()
        chosen.clear()
        context = None if groups is None else RoutingContext(groups=groups)
        model(tokens, routing_context=context, use_cache=False).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    groups = torch.arange(18, dtype=torch.int32) // 9
    untold, expected = gradients(None), gradients(groups)
    assert len(chosen) == 2 and all((experts % 2 == groups[:, None]).all() for experts in chosen)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradients(groups), expected, rtol=0, atol=0)
    assert len(chosen) == 4 and all((experts % 2 == groups[:, None]).all() for experts in chosen)
    assert any(not torch.allclose(a, b) for a, b in zip(untold, expected, strict=True))


def test_a_router_of_ones_own_is_no_block_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    model = transformers_model()
    with pytest.raises(ValueError, match=r"edl::save_pretrained: .*\(got router=OnlyGroups in model.layers.0.mlp\)"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        model.model.layers[0].mlp.to_transformers()
    assert str(error.value) == (
        "edl::MoELayer.to_transformers: a qwen3_moe block cannot express the layer (got a router of one's own, "
        "OnlyGroups)"
    )


# ---- what a layer refuses ----


class Decides(Router):
    """Returns what it was made with."""

    def __init__(self, decide):
        super().__init__()
        self.decide = decide

    def forward(self, tokens, context=None):
        return self.decide(len(tokens))


def choice(t, logits=None, weights=None, experts=None, **more):
    return Choice(
        torch.zeros(t, E) if logits is None else logits,
        torch.ones(t, K) if weights is None else weights,
        torch.zeros(t, K, dtype=torch.int64) if experts is None else experts,
        **more,
    )


FIRST = "edl::MoELayer: the router must "
SHAPES = FIRST + "give weights and experts of one shape [5, K] (got "
DEVICE = FIRST + "give logits, weights and experts on the device of its tokens (got meta and cpu)"
WRONG_CHOICES = {
    "tensor": (lambda t: torch.zeros(t, E), FIRST + "return an edl.Choice (got Tensor)"),
    "none": (lambda t: None, FIRST + "return an edl.Choice (got NoneType)"),
    "tuple": (lambda t: tuple(choice(t)), FIRST + "return an edl.Choice (got tuple)"),
    "no-logits": (
        lambda t: choice(t)._replace(logits=None),
        "edl::MoELayer: logits must be a tensor (got NoneType)",
    ),
    "sparse-weights": (
        lambda t: choice(t, weights=torch.ones(t, K).to_sparse()),
        "edl::MoELayer: weights must be dense (got layout torch.sparse_coo)",
    ),
    "flat-logits": (lambda t: choice(t, torch.zeros(t * E)), FIRST + "give logits of the shape [5, 6] (got [30])"),
    "batched-logits": (
        lambda t: choice(t, torch.zeros(1, t, E)),
        FIRST + "give logits of the shape [5, 6] (got [1, 5, 6])",
    ),
    "few-logits": (lambda t: choice(t, torch.zeros(4, E)), FIRST + "give logits of the shape [5, 6] (got [4, 6])"),
    "more-experts": (lambda t: choice(t, torch.zeros(t, 7)), FIRST + "give 6 logits, one per expert (got 7)"),
    "few-weights": (lambda t: choice(t, weights=torch.ones(4, K)), SHAPES + "[4, 2] and [5, 2])"),
    "few-experts": (lambda t: choice(t, experts=torch.zeros(4, K).long()), SHAPES + "[5, 2] and [4, 2])"),
    "another-k": (lambda t: choice(t, weights=torch.ones(t, 3)), SHAPES + "[5, 3] and [5, 2])"),
    "flat": (
        lambda t: choice(t, weights=torch.ones(t), experts=torch.zeros(t).long()),
        SHAPES + "[5] and [5])",
    ),
    "no-k": (
        lambda t: choice(t, weights=torch.ones(t, 0), experts=torch.zeros(t, 0).long()),
        SHAPES + "[5, 0] and [5, 0])",
    ),
    "integer-weights": (
        lambda t: choice(t, weights=torch.ones(t, K).long()),
        FIRST + "give floating-point logits and weights (got torch.float32 and torch.int64)",
    ),
    "integer-logits": (
        lambda t: choice(t, torch.zeros(t, E).long()),
        FIRST + "give floating-point logits and weights (got torch.int64 and torch.float32)",
    ),
    "floating-experts": (
        lambda t: choice(t, experts=torch.zeros(t, K)),
        FIRST + "give experts in int32 or int64 (got torch.float32)",
    ),
    "bool-experts": (
        lambda t: choice(t, experts=torch.zeros(t, K, dtype=torch.bool)),
        FIRST + "give experts in int32 or int64 (got torch.bool)",
    ),
    "device-of-logits": (lambda t: choice(t, torch.zeros(t, E, device="meta")), DEVICE),
    "device-of-weights": (lambda t: choice(t, weights=torch.ones(t, K, device="meta")), DEVICE),
    "device-of-experts": (lambda t: choice(t, experts=torch.zeros(t, K, device="meta").long()), DEVICE),
    "double-weights": (
        lambda t: choice(t, weights=torch.ones(t, K).double()),
        "edl::expert_mlp: weights must have the type of tokens",
    ),
    "shared-weights": (
        lambda t: choice(t, shared_weights=torch.ones(t, 1)),
        FIRST + "leave shared_weights None, no layer takes them yet (got a tensor)",
    ),
    "token-loss": (
        lambda t: choice(t, token_loss=torch.ones(t)),
        FIRST + "leave token_loss None, no layer hands it on yet (got a tensor)",
    ),
}


@pytest.mark.parametrize("name", WRONG_CHOICES)
def test_a_choice_that_no_layer_can_follow_is_one_sentence(name):
    decide, sentence = WRONG_CHOICES[name]
    with pytest.raises(ValueError) as error:
        edl.MoELayer(H, I, E, router=Decides(decide))(torch.randn(5, H))
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize("expert", [-1, E + 1])
def test_an_expert_that_does_not_exist_is_one_sentence(expert):
    layer = edl.MoELayer(H, I, E, router=Decides(lambda t: choice(t, experts=torch.full((t, K), expert))))
    with pytest.raises(IndexError, match="edl::MoELayer: experts must be at least 0"):
        layer(torch.randn(5, H))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_choice_of_no_expert_adds_nothing(dtype):
    experts = torch.tensor([[0, E], [E, E], [3, 1]], dtype=dtype)
    layer = edl.MoELayer(H, I, E, router=Decides(lambda t: choice(t, experts=experts)), dtype=torch.float64)
    tokens = torch.randn(3, H, dtype=torch.float64)
    layer.router.decide = lambda t: choice(t, weights=torch.ones(t, K).double(), experts=experts)
    output, routing = layer(tokens)
    alone = [
        edl.reference.expert_mlp(
            tokens[t : t + 1],
            torch.ones(1, 1).double(),
            torch.zeros(1).int(),
            (torch.arange(E + 1) > e).int(),
            layer.gate_up_proj,
            layer.down_proj,
        )[0]
        for t, e in ((0, 0), (2, 3), (2, 1))
    ]
    torch.testing.assert_close(output, torch.stack([alone[0], torch.zeros_like(alone[0]), alone[1] + alone[2]]))
    assert routing.tokens_per_expert.tolist() == [1, 1, 0, 1, 0, 0]


SHAPE = " must have the shape {}, a row for each of the 5 tokens (got {})"
INTEGERS = {"dtype": torch.int32}
WRONG_CONTEXTS = {
    "dictionary": ({"groups": None}, " must be an edl.RoutingContext (got dict)"),
    "tensor": (torch.zeros(5, **INTEGERS), " must be an edl.RoutingContext (got Tensor)"),
    "list": (RoutingContext(groups=[0] * 5), ".groups must be a tensor (got list)"),
    "batched": (
        RoutingContext(documents=torch.zeros(1, 5, **INTEGERS)),
        ".documents" + SHAPE.format("[T]", "[1, 5]"),
    ),
    "few-documents": (RoutingContext(torch.zeros(4, **INTEGERS)), ".documents" + SHAPE.format("[T]", "[4]")),
    "scalar": (RoutingContext(torch.zeros((), **INTEGERS)), ".documents" + SHAPE.format("[T]", "[]")),
    "long-documents": (RoutingContext(torch.zeros(5).long()), ".documents must be int32 (got torch.int64)"),
    "pool": (
        RoutingContext(pool_sizes=torch.zeros(2)),
        ".pool_sizes must be int32 and have the shape [N], one for each document (got torch.float32 [2])",
    ),
    "three-groups": (
        RoutingContext(groups=torch.zeros(5, 3, **INTEGERS)),
        ".groups" + SHAPE.format("[T] or [T, 2]", "[5, 3]"),
    ),
    "floating-groups": (RoutingContext(groups=torch.zeros(5)), ".groups must be int32 (got torch.float32)"),
    "meta-groups": (
        RoutingContext(groups=torch.zeros(5, 2, device="meta", **INTEGERS)),
        ".groups must be on the device of hidden (got meta and cpu)",
    ),
    "flat-choices": (RoutingContext(choices=torch.zeros(5).long()), ".choices" + SHAPE.format("[T, K]", "[5]")),
    "floating-choices": (
        RoutingContext(choices=torch.zeros(5, 2)),
        ".choices must be int32 or int64 (got torch.float32)",
    ),
}


@pytest.mark.parametrize("name", WRONG_CONTEXTS)
@pytest.mark.parametrize("make", [told_layer, lambda: edl.MoELayer(H, I, E, K)], ids=["own", "top_k"])
def test_a_context_of_other_tokens_is_one_sentence(make, name):
    context, sentence = WRONG_CONTEXTS[name]
    with pytest.raises(ValueError) as error:
        make()(torch.randn(5, H), context)
    assert str(error.value) == "edl::MoELayer: context" + sentence


def test_top_k_refuses_recorded_choices_that_it_would_not_make():
    with pytest.raises(ValueError) as error:
        edl.MoELayer(H, I, E, K)(torch.randn(5, H), contexts(5)["choices"])
    assert str(error.value) == (
        "edl::MoELayer: context.choices needs a router that makes recorded choices again, TopK does not (got choices "
        "of the shape [5, 2])"
    )


OWN = "edl::MoELayer: a router of one's own has its options already, give them to it (got "
WRONG_OPTIONS = {
    "no-router": ({"router": nn.Linear(H, E)}, "edl::MoELayer: router must be an edl.routers.Router (got Linear)"),
    "class": ({"router": Told}, "edl::MoELayer: router must be an edl.routers.Router (got ABCMeta)"),
    "top_k": ({"router": Told(), "top_k": K}, OWN + "top_k)"),
    "scores": ({"router": Told(), "scores": "softmax"}, OWN + "scores)"),
    "several": (
        {"router": Told(), "normalize_top_k": False, "routed_scaling_factor": 1.0, "router_dtype": torch.float32},
        OWN + "normalize_top_k, routed_scaling_factor, router_dtype)",
    ),
    "bias": (
        {"router": Told(), "expert_bias": True},
        (
            "edl::MoELayer: expert_bias needs a router whose forward takes it, as forward(tokens, context=None, "
            "expert_bias=None) (got Told)"
        ),
    ),
    "neither": ({}, "edl::MoELayer: top_k must be an integer (got None)"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_beside_a_router_are_refused_in_one_sentence(name):
    options, sentence = WRONG_OPTIONS[name]
    with pytest.raises(ValueError) as error:
        edl.MoELayer(H, I, E, **options)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"top_k": 7}, "edl::TopK: top_k must not exceed num_experts (got 7 of 6)"),
        ({"top_k": 0}, "edl::TopK: top_k must be at least 1 (got 0)"),
        ({"num_experts": 6.0}, "edl::TopK: num_experts must be an integer (got 6.0)"),
        ({"scores": "none"}, "edl::TopK: scores must be one of ['softmax', 'sigmoid'] (got 'none')"),
        ({"routed_scaling_factor": float("inf")}, "edl::TopK: routed_scaling_factor must be finite (got inf)"),
        ({"normalize_top_k": 1}, "edl::TopK: normalize_top_k must be True or False (got 1)"),
    ],
)
def test_options_of_top_k_are_refused_in_its_name(options, sentence):
    with pytest.raises(ValueError) as error:
        TopK(**{"hidden_size": H, "num_experts": E, "top_k": K, **options})
    assert str(error.value) == sentence


def test_a_router_of_another_size_is_refused():
    tokens = torch.randn(5, H)
    with pytest.raises(ValueError, match=r"edl::MoELayer: the router must give 6 logits, one per expert \(got 7\)"):
        edl.MoELayer(H, I, E, router=TopK(H, 7, K))(tokens)
    with pytest.raises(ValueError, match=r"edl::MoELayer: router.weight must have the shape \[E, 16\] \(got \[6, 8\]"):
        edl.MoELayer(H, I, E, router=TopK(8, E, K))(tokens)


def test_a_router_without_forward_is_no_router():
    with pytest.raises(TypeError, match="abstract"):
        Router()


# ---- experts spread over ranks ----


def spread_layers(router, group):
    """A layer in one process, and the same with its experts spread over a group."""
    layers = []
    for where in ({}, {"expert_group": group}):
        torch.manual_seed(1)
        layers.append(edl.MoELayer(H, I, E, router=router(), dtype=torch.float64, **where))
    return layers


def follows_its_router_on_ranks():
    rank = dist.get_rank()
    one, spread = spread_layers(lambda: Told(torch.float64), dist.group.WORLD)
    tokens = torch.randn(12, H, dtype=torch.float64)
    for name in ("none", "groups", "both"):
        context = contexts(12)[name]
        own = context and RoutingContext(*(None if field is None else field.split([5, 7])[rank] for field in context))
        expected, expected_routing = one(tokens, context)
        output, routing = spread(tokens.split([5, 7])[rank], own)
        torch.testing.assert_close(output, expected.split([5, 7])[rank], rtol=1e-12, atol=1e-12)
        assert routing.experts.equal(expected_routing.experts.split([5, 7])[rank])


def chooses_no_expert_on_a_rank():
    rank = dist.get_rank()
    experts = [torch.tensor([[0, E], [E, E], [3, 5]]), torch.tensor([[4, 2]])][rank]
    weights = torch.rand(experts.shape, dtype=torch.float64, requires_grad=True)
    one, spread = spread_layers(
        lambda: Decides(lambda t: choice(t, weights=weights, experts=experts)), dist.group.WORLD
    )
    results = []
    for layer in (one, spread):
        tokens = torch.randn(len(experts), H, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        tokens.requires_grad_()
        weights.grad = None
        output, routing = layer(tokens)
        output.square().sum().backward()
        results.append((output, routing.tokens_per_expert, tokens.grad, weights.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def fails_on_one_rank():
    rank, sentences = dist.get_rank(), []
    wrong = {
        "shape": choice(5, weights=torch.ones(5, 1)),
        "type": choice(5, weights=torch.ones(5, K).double()),
        "expert": choice(5, experts=torch.full((5, K), -1)),
    }
    for given in wrong.values():
        decide = lambda t, given=given: given if rank == 1 else choice(t)
        layer = edl.MoELayer(H, I, E, router=Decides(decide), expert_group=dist.group.WORLD)
        with pytest.raises((ValueError, IndexError, RuntimeError)) as error:
            layer(torch.randn(5, H))
        sentences.append(str(error.value))
    return sentences


def hands_on_a_bias_that_fsdp_does_not_round():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "experts"))
    layer = edl.MoELayer(H, I, E, K, expert_bias=True, expert_group=mesh["experts"])
    data = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    edl.expert_parallel.fully_shard_layer(layer, data, mesh["replicas"], mp_policy=policy)
    layer.expert_bias.copy_(7 + torch.arange(E) / 1024)  # all of them 7 in bfloat16
    handed = []
    layer.router.register_forward_hook(lambda router, inputs, choice: handed.append((inputs[2], choice.weights)))
    layer(torch.randn(5, H))[0].sum().backward()
    assert handed[0][0].equal(layer.expert_bias) and handed[0][1].dtype == torch.float32

    by_hand = edl.MoELayer(H, I, E, K, expert_bias=True)
    fully_shard(by_hand.router, mesh=data, mp_policy=policy)
    with pytest.raises(ValueError, match=r"edl::MoELayer: .*cast_forward_inputs=False\) \(got torch.bfloat16\)"):
        by_hand(torch.randn(5, H))


@pytest.mark.parametrize(
    "function",
    [follows_its_router_on_ranks, chooses_no_expert_on_a_rank, hands_on_a_bias_that_fsdp_does_not_round],
)
def test_with_experts_spread_over_ranks_a_layer(function):
    on_ranks(2, function)


def test_a_wrong_choice_of_one_rank_is_raised_on_all():
    for sentences in on_ranks(2, fails_on_one_rank):
        parts = "of one shape [5, K]", "weights must have the type", "edl::MoELayer: experts must"
        for sentence, part in zip(sentences, parts):
            assert part in sentence
