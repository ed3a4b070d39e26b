"""MoELayer: its values and gradients, its options, and its ways of use."""

import copy
import io
import warnings

import pytest
import torch

import edl
from edl import reference

LAYERS = {
    "softmax": {},
    "unnormalised": {"normalize_top_k": False, "return_routing": False},
    "deepseek": {
        "scores": "sigmoid",
        "expert_bias": True,
        "routed_scaling_factor": 2.5,
        "num_shared_experts": 2,
        "shared_intermediate_size": 10,
    },
    "qwen2": {
        "num_shared_experts": 1,
        "shared_intermediate_size": 40,
        "shared_expert_gate": True,
        "recompute_activations": True,
    },
}


def make_layer(name, **more):
    layer = edl.MoELayer(16, 24, 6, 2, **LAYERS[name], **more)
    if layer.expert_bias is not None:
        layer.expert_bias.copy_(torch.linspace(-0.2, 0.2, 6))
    return layer


def output_of(result):
    return result[0] if isinstance(result, tuple) else result


def by_definition(layer, hidden):
    """The layer in plain torch."""
    tokens = hidden.reshape(-1, layer.hidden_size)
    logits = tokens @ layer.router.weight.T
    weights, experts = reference.route_tokens(
        logits, layer.top_k, layer.scores, layer.expert_bias, layer.normalize_top_k, layer.routed_scaling_factor
    )
    row_order, offsets = reference.sort_by_expert(experts, layer.num_experts)
    output = reference.expert_mlp(tokens, weights, row_order, offsets, layer.gate_up_proj, layer.down_proj)
    if layer.shared_expert is not None:
        shared = layer.shared_expert(tokens)
        if layer.shared_expert_gate is not None:
            shared = layer.shared_expert_gate(tokens).sigmoid() * shared
        output = output + shared
    return output.reshape(hidden.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_the_definition(name):
    layer = make_layer(name, dtype=torch.float64)
    hidden = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, *layer.parameters()]
    output, expected = output_of(layer(hidden)), by_definition(layer, hidden)
    grad = torch.randn_like(output)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(16,), (0, 16), (1, 16), (2, 0, 16), (2, 3, 4, 16)])
def test_any_leading_shape(shape):
    layer = make_layer("softmax")
    hidden = torch.randn(shape)
    output, routing = layer(hidden)
    tokens = hidden.numel() // 16
    assert output.shape == hidden.shape
    assert routing.logits.shape == (tokens, 6) and routing.weights.shape == routing.experts.shape == (tokens, 2)
    assert routing.tokens_per_expert.tolist() == torch.bincount(routing.experts.flatten(), minlength=6).tolist()


@pytest.mark.parametrize("name", LAYERS)
def test_script_save_and_load(name):
    layer = make_layer(name)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), saved)
    saved.seek(0)
    loaded, hidden = torch.jit.load(saved), torch.randn(4, 16)
    torch.testing.assert_close(loaded(hidden), tuple(layer(hidden)) if layer.return_routing else layer(hidden))
    assert loaded.state_dict().keys() == layer.state_dict().keys()


def test_updates_move_the_expert_bias_of_a_scripted_layer_in_16_bits():
    layer = edl.MoELayer(8, 8, 4, 2, expert_bias=True)
    layer.expert_bias.copy_(START)
    scripted = torch.jit.script(layer).to(torch.bfloat16)
    for _ in range(100):
        edl.update_expert_bias(scripted, torch.tensor([100, 10, 5, 1]))
    expected = START.bfloat16().double() + 0.1 * torch.tensor([-1, 1, 1, 1])
    torch.testing.assert_close(scripted.state_dict()["expert_bias"].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_export_save_load_with_another_batch(name):
    layer = make_layer(name)
    saved = io.BytesIO()
    program = torch.export.export(layer, (torch.randn(3, 5, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, saved)
    saved.seek(0)
    hidden = torch.randn(7, 5, 16)
    result = torch.export.load(saved).module()(hidden)
    torch.testing.assert_close(result, layer(hidden))
    assert type(result) is type(layer(hidden))


@pytest.mark.parametrize("name", LAYERS)
def test_compile_fullgraph_with_dynamic_shapes(name):
    layer = make_layer(name)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        hidden = torch.randn(batch, 3, 16)
        output, expected = output_of(compiled(hidden)), output_of(layer(hidden))
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close([p.grad for p in compiled.parameters()], [p.grad for p in layer.parameters()])


def test_experts_without_tokens_get_exact_zero_gradients():
    layer = make_layer("softmax")
    with torch.no_grad():
        layer.router.weight[:3].abs_()
        layer.router.weight[3:] = -1
    hidden = torch.rand(9, 16)
    output, routing = layer(hidden)
    assert routing.tokens_per_expert[3:].sum() == 0
    output.square().sum().backward()
    for gradient in (layer.gate_up_proj.grad, layer.down_proj.grad):
        assert (gradient[3:] == 0).all() and gradient[:3].isfinite().all()


def test_autocast_runs_the_experts_in_its_type_and_the_router_in_float32():
    layer = make_layer("qwen2")
    hidden = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, routing = layer(hidden)
    assert output.dtype == torch.bfloat16
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, layer(hidden)[1].logits, rtol=0, atol=0)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_the_expert_bias_stays_float32_in_a_16_bit_layer():
    layer = make_layer("deepseek")
    before = layer.expert_bias.clone()
    layer.bfloat16()
    assert layer.expert_bias.dtype == torch.float32 and layer.expert_bias.equal(before)
    assert layer.gate_up_proj.dtype == torch.bfloat16
    assert layer.double().expert_bias.dtype == torch.float64


START = torch.tensor([6.817, 6.901, 7.002, 7.063])
NARROW = {
    "assigned-state": lambda layer, dtype: layer.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}, assign=True
    ),
    "assignment": lambda layer, dtype: setattr(layer, "expert_bias", layer.expert_bias.to(dtype)),
    "data": lambda layer, dtype: setattr(layer.expert_bias, "data", layer.expert_bias.to(dtype)),
    "buffers": lambda layer, dtype: layer._buffers.update(expert_bias=layer.expert_bias.to(dtype)),
    "data-then-cast": lambda layer, dtype: (NARROW["data"](layer, dtype), layer.to(dtype)),
    "scripted": lambda layer, dtype: setattr(torch.jit.script(layer), "expert_bias", layer.expert_bias.to(dtype)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("how", NARROW)
def test_updates_move_an_expert_bias_that_was_narrowed(how, dtype):
    layer = edl.MoELayer(8, 8, 4, 2, expert_bias=True)
    layer.expert_bias.copy_(START)
    NARROW[how](layer, dtype)
    for _ in range(100):
        edl.update_expert_bias(layer, torch.tensor([100, 10, 5, 1]))
    expected = START.to(dtype).double() + 0.1 * torch.tensor([-1, 1, 1, 1])
    if how == "scripted":  # which has a buffer of its own
        expected = START.double() + 0.1 * torch.tensor([-1, 1, 1, 1])
    assert layer.expert_bias.dtype == torch.float32 and "expert_bias" in layer._buffers
    torch.testing.assert_close(layer.expert_bias.double(), expected, rtol=0, atol=1e-4)


def test_a_loaded_expert_bias_is_float32_and_not_rounded():
    layer, state = make_layer("deepseek"), make_layer("deepseek").state_dict()
    layer.expert_bias.data = layer.expert_bias.bfloat16()
    layer.load_state_dict(state)
    assert layer.expert_bias.dtype == torch.float32 and layer.expert_bias.equal(state["expert_bias"])
    with torch.device("meta"):
        layer = make_layer("softmax", expert_bias=True)
    layer.load_state_dict({name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}, assign=True)
    assert layer.expert_bias.dtype == torch.float32 and layer.gate_up_proj.dtype == torch.bfloat16
    layer = make_layer("deepseek", dtype=torch.float64)
    layer.load_state_dict(layer.state_dict(), assign=True)
    assert layer.expert_bias.dtype == torch.float64


def test_the_expert_bias_shifts_the_choice_and_no_weight():
    layer = make_layer("deepseek")
    hidden = torch.randn(50, 16)
    before = layer(hidden)[1]
    layer.expert_bias[4] += 10
    after = layer(hidden)[1]
    assert (after.experts[:, 0] == 4).all()
    assert after.logits.equal(before.logits)
    scores = after.logits.sigmoid().gather(1, after.experts)
    torch.testing.assert_close(after.weights, 2.5 * scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("sizes", [(8, 8, 1, 1), (8, 4, 2048, 8), (1, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_expert_many_experts_and_all_of_them(sizes, dtype):
    layer = edl.MoELayer(*sizes, dtype=dtype)
    hidden = torch.randn(3, 40, sizes[0]).to(dtype).transpose(0, 1).requires_grad_()  # not contiguous
    output, routing = layer(hidden)
    assert output.shape == hidden.shape and output.dtype == dtype and output.isfinite().all()
    assert routing.logits.dtype == torch.float32
    assert routing.tokens_per_expert.sum() == 120 * sizes[3]
    output.float().square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in [hidden, *layer.parameters()])


def test_layers_of_huge_logits_stay_finite():
    layer = make_layer("softmax")
    with torch.no_grad():
        layer.router.weight.mul_(1e6)
    output, routing = layer(torch.randn(30, 16))
    (output.square().sum() + edl.load_balancing_loss(routing)).backward()
    assert routing.weights.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_checkpointing_gives_the_same_gradients():
    layer = make_layer("qwen2")
    hidden = torch.randn(30, 16, requires_grad=True)

    def total(result):
        return result[0].square().sum() + edl.load_balancing_loss(result[1])

    inputs = [hidden, *layer.parameters()]
    expected = torch.autograd.grad(total(layer(hidden)), inputs)
    checkpointed = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(total(checkpointed), inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_state_dicts_carry_everything(name):
    layer, other = make_layer(name), edl.MoELayer(16, 24, 6, 2, **LAYERS[name], device="meta").to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    hidden = torch.randn(9, 16)
    expected = output_of(layer(hidden))
    assert output_of(other(hidden)).equal(expected)
    assert output_of(copy.deepcopy(layer)(hidden)).equal(expected)
    if name == "deepseek":
        assert "expert_bias" in layer.state_dict()
        with torch.device("meta"):
            assert edl.MoELayer(16, 24, 6, 2, expert_bias=True).bfloat16().expert_bias.dtype == torch.float32


def test_the_router_takes_the_type_it_is_told():
    layer = make_layer("softmax", router_dtype=torch.bfloat16)
    assert layer(torch.randn(3, 16))[1].logits.dtype == torch.bfloat16
    assert layer.double()(torch.randn(3, 16, dtype=torch.float64))[1].logits.dtype == torch.float64
    layer = make_layer("softmax").bfloat16()
    assert layer(torch.randn(3, 16).bfloat16())[1].logits.dtype == torch.float32


@pytest.mark.parametrize("grams", [{}, {"output_gram": True, "activation_gram": True}], ids=str)
def test_recompute_activations_keeps_tokens_and_routing_alone(grams):
    layer = make_layer("softmax", **grams)
    hidden = torch.randn(30, 16, requires_grad=True)
    gradients, saved = [], set()
    for layer.recompute_activations in (False, True):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add(x.numel()) or x, lambda x: x):
            output, routing = layer(hidden)
        loss = sum((x.square().sum() for x in (routing.output_gram, routing.activation_gram)) if grams else [])
        gradients.append(torch.autograd.grad(loss + output.square().sum(), [hidden, *layer.parameters()]))
        assert (60 * 48 in saved) == (not layer.recompute_activations)
    tokens, *routing = 30 * 16, 30 * 6, 30 * 2, 7  # logits; weights, experts and their order; offsets
    assert saved <= {tokens, *routing, *(x.numel() for x in layer.parameters())}
    assert all(map(torch.equal, *gradients))


def test_it_says_what_it_is():
    assert "recompute_activations=True" in repr(make_layer("qwen2"))
    text = repr(make_layer("deepseek"))
    for part in (
        "num_experts=6",
        "top_k=2",
        "scores='sigmoid'",
        "expert_bias=True",
        "(router): TopK(",
        "(shared_expert): SharedExpert(",
    ):
        assert part in text


def test_reset_parameters():
    layer = make_layer("deepseek")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    layer.reset_parameters()
    assert (layer.expert_bias == 0).all()
    for parameter in layer.parameters():
        bound = parameter.shape[-1] ** -0.5
        assert parameter.abs().max() <= bound and parameter.std() > bound / 3


@pytest.mark.parametrize("lacking", ["none", "expert_bias", "gate_up_proj", "router.weight"])
def test_reset_parameters_spares_what_transformers_has_loaded(lacking, tmp_path):
    transformers = pytest.importorskip("transformers")
    import safetensors.torch

    class Config(transformers.PreTrainedConfig):
        model_type = "of-layers"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.layer = make_layer("deepseek")
            self.post_init()

        def _init_weights(self, module):
            if isinstance(module, edl.MoELayer):
                module.reset_parameters()

    model = Model(Config())
    model.layer.expert_bias.copy_(torch.arange(6.0))
    model.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(lacking)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = Model.from_pretrained(tmp_path)
    for name, tensor in loaded.layer.state_dict().items():
        same = tensor.equal(model.layer.state_dict()[name])
        assert same == (name != lacking), name
    if lacking == "expert_bias":
        assert (loaded.layer.expert_bias == 0).all()
    else:
        bound = 16**-0.5
        assert loaded.layer.gate_up_proj.abs().max() <= bound and loaded.layer.gate_up_proj.std() > bound / 3
    loaded.layer.reset_parameters()  # by the user: of everything
    assert not any(tensor.equal(model.layer.state_dict()[name]) for name, tensor in loaded.layer.state_dict().items())


def warned_by(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "edl::" in str(warning.message)]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_one_expert_per_token_with_normalised_weights_is_warned_about(scores):
    (sentence,) = warned_by(lambda: edl.MoELayer(16, 8, 4, top_k=1, scores=scores))
    assert sentence == (
        "edl::MoELayer: with top_k=1 and normalised weights every weight is 1 and the router gets no gradient from the "
        "model's loss, set normalize_top_k=False (in a configuration of transformers norm_topk_prob=False), or top_k "
        "to at least 2"
    )
    for layer in (
        lambda: edl.MoELayer(16, 8, 4, top_k=1, scores=scores, normalize_top_k=False),
        lambda: edl.MoELayer(16, 8, 4, top_k=2, scores=scores),
        lambda: edl.MoELayer(16, 8, 1, top_k=1, scores=scores),  # nothing to route
    ):
        assert warned_by(layer) == []
    # What is warned about, and what the advice gives.
    router_gradients = []
    for options in ({}, {"normalize_top_k": False}, {"top_k": 2}):
        layer = edl.MoELayer(16, 8, 4, **{"top_k": 1, "scores": scores, **options})
        output, routing = layer(torch.randn(30, 16))
        output.square().sum().backward()
        router_gradients.append(layer.router.weight.grad.abs().max().item())
        assert options or (routing.weights - 1).abs().max() < 1e-6
    assert router_gradients[0] < 1e-6
    assert min(router_gradients[1:]) > 1e-4


def test_a_block_of_one_expert_per_token_is_warned_about_when_taken_over():
    pytest.importorskip("transformers")
    from transformers.models.mixtral import MixtralConfig, modeling_mixtral

    config = MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=1)
    block = modeling_mixtral.MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    taken = []
    assert len(warned_by(lambda: taken.append(edl.MoELayer.from_transformers(block, return_routing=False)))) == 1
    hidden = torch.randn(1, 9, 16)
    expected = block(hidden)
    torch.testing.assert_close(taken[0](hidden), expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_takes_any_leading_shape(name):
    layer = make_layer(name)
    traced = torch.jit.trace(layer, torch.randn(2, 6, 16), check_trace=False)
    for shape in ((3, 4, 16), (2, 6, 16), (5, 7, 16), (12, 16), (16,), (0, 3, 16), (2, 3, 2, 16)):
        hidden = torch.randn(shape)
        torch.testing.assert_close(output_of(traced(hidden)), output_of(layer(hidden)), rtol=0, atol=0)


REFUSALS = {
    "float-top_k": ((16, 24, 6, 2.0), {}, "edl::MoELayer: top_k must be an integer (got 2.0)"),
    "float-hidden_size": ((16.0, 24, 6, 2), {}, "edl::MoELayer: hidden_size must be an integer (got 16.0)"),
    "float-intermediate_size": ((16, 24.0, 6, 2), {}, "edl::MoELayer: intermediate_size must be an integer (got 24.0)"),
    "text-num_experts": ((16, 24, "6", 2), {}, "edl::MoELayer: num_experts must be an integer (got '6')"),
    "none-top_k": ((16, 24, 6, None), {}, "edl::MoELayer: top_k must be an integer (got None)"),
    "true-top_k": ((16, 24, 6, True), {}, "edl::MoELayer: top_k must be an integer (got True)"),
    "float-num_shared_experts": (
        (16, 24, 6, 2),
        {"num_shared_experts": 1.0},
        "edl::MoELayer: num_shared_experts must be an integer (got 1.0)",
    ),
    "text-shared_intermediate_size": (
        (16, 24, 6, 2),
        {"num_shared_experts": 1, "shared_intermediate_size": "8"},
        "edl::MoELayer: shared_intermediate_size must be an integer (got '8')",
    ),
    "text-routed_scaling_factor": (
        (16, 24, 6, 2),
        {"routed_scaling_factor": "2.5"},
        "edl::MoELayer: routed_scaling_factor must be a number (got '2.5')",
    ),
    "nan-routed_scaling_factor": (
        (16, 24, 6, 2),
        {"routed_scaling_factor": float("nan")},
        "edl::MoELayer: routed_scaling_factor must be finite (got nan)",
    ),
    "text-normalize_top_k": (
        (16, 24, 6, 2),
        {"normalize_top_k": "False"},
        "edl::MoELayer: normalize_top_k must be True or False (got 'False')",
    ),
    "dtype": (
        (16, 24, 6, 2),
        {"dtype": torch.int32},
        (
            "edl::MoELayer: dtype must be one of [torch.float32, torch.float64, torch.bfloat16, torch.float16] (got "
            "torch.int32)"
        ),
    ),
    "top_k": ((16, 24, 6, 7), {}, "edl::MoELayer: top_k must not exceed num_experts (got 7 of 6)"),
    "size": ((16, 0, 6, 2), {}, "edl::MoELayer: intermediate_size must be at least 1 (got 0)"),
    "scores": (
        (16, 24, 6, 2),
        {"scores": "none"},
        "edl::MoELayer: scores must be one of ['softmax', 'sigmoid'] (got 'none')",
    ),
    "router_dtype": (
        (16, 24, 6, 2),
        {"router_dtype": torch.float64},
        "edl::MoELayer: router_dtype must be torch.float32, torch.bfloat16 or torch.float16 (got torch.float64)",
    ),
    "shared": (
        (16, 24, 6, 2),
        {"shared_expert_gate": True},
        "edl::MoELayer: shared_intermediate_size and shared_expert_gate need num_shared_experts of at least 1 (got 0)",
    ),
    "recompute": (
        (16, 24, 6, 2),
        {"recompute_activations": 1},
        "edl::MoELayer: recompute_activations must be True or False (got 1)",
    ),
    "negative": (
        (16, 24, 6, 2),
        {"num_shared_experts": -1},
        "edl::MoELayer: num_shared_experts must not be negative (got -1)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_options_are_one_sentence(name):
    arguments, options, sentence = REFUSALS[name]
    with pytest.raises(ValueError) as error:
        edl.MoELayer(*arguments, **options)
    assert str(error.value) == sentence


def nested(layout):
    return torch.nested.nested_tensor([torch.zeros(2, 16), torch.zeros(3, 16)], layout=layout)


WRONG_HIDDEN = {
    "list": (lambda: [[0.0] * 16], "edl::MoELayer: hidden must be a tensor (got list)"),
    "none": (lambda: None, "edl::MoELayer: hidden must be a tensor (got NoneType)"),
    "numpy": (lambda: torch.zeros(3, 16).numpy(), "edl::MoELayer: hidden must be a tensor (got ndarray)"),
    "sparse": (
        lambda: torch.zeros(3, 16).to_sparse(),
        "edl::MoELayer: hidden must be dense (got layout torch.sparse_coo)",
    ),
    "csr": (
        lambda: torch.zeros(3, 16).to_sparse_csr(),
        "edl::MoELayer: hidden must be dense (got layout torch.sparse_csr)",
    ),
    "nested": (lambda: nested(torch.strided), "edl::MoELayer: hidden must be dense (got a nested tensor)"),
    "jagged": (lambda: nested(torch.jagged), "edl::MoELayer: hidden must be dense (got a nested tensor)"),
    "scalar": (lambda: torch.zeros(()), "edl::MoELayer: hidden must have the shape [..., H] (got a scalar)"),
    "device": (
        lambda: torch.zeros(3, 16, device="meta"),
        "edl::MoELayer: hidden must be on the device of the layer (got meta and cpu)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(sparse|Sparse|nested|Nested).*")
@pytest.mark.parametrize("name", WRONG_HIDDEN)
def test_what_is_no_dense_tensor_is_refused_in_one_sentence(name):
    hidden, sentence = WRONG_HIDDEN[name]
    with pytest.raises(ValueError) as error:
        make_layer("deepseek")(hidden())
    assert str(error.value) == sentence


def test_wrong_input_is_one_sentence():
    with pytest.raises(ValueError) as error:
        make_layer("softmax")(torch.randn(3, 15))
    assert str(error.value) == "edl::MoELayer: hidden must end in 16, the hidden size (got 15)"
    with pytest.raises(ValueError, match="edl::expert_mlp: gate_up must have the type of tokens"):
        make_layer("softmax")(torch.randn(3, 16).bfloat16())


def test_dtensors_are_refused(as_dtensor):
    with pytest.raises(ValueError) as error:
        make_layer("softmax")(as_dtensor(torch.randn(3, 16)))
    assert str(error.value) == "edl::MoELayer: takes plain tensors, call to_local() on the shards first (got a DTensor)"
