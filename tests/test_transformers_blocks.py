"""MoELayer and the blocks of transformers: equal outputs and gradients, shared parameters, there and back."""

import copy
import pickle
import sys

import pytest
import torch
from commands import run

import edl

pytest.importorskip("transformers")

import transformers
from transformers.models.mixtral import configuration_mixtral, modeling_mixtral
from transformers.models.olmoe import configuration_olmoe, modeling_olmoe
from transformers.models.qwen2_moe import configuration_qwen2_moe, modeling_qwen2_moe
from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe
from transformers_models import make_model

SIZES = {"hidden_size": 32, "num_experts_per_tok": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
BLOCKS = {
    "mixtral": lambda: modeling_mixtral.MixtralSparseMoeBlock(
        configuration_mixtral.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=8)
    ),
    "qwen2_moe": lambda: modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(
        configuration_qwen2_moe.Qwen2MoeConfig(
            **SIZES, moe_intermediate_size=48, num_experts=8, shared_expert_intermediate_size=56
        )
    ),
    "qwen2_moe-normalised": lambda: modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(
        configuration_qwen2_moe.Qwen2MoeConfig(
            **SIZES, moe_intermediate_size=48, num_experts=8, shared_expert_intermediate_size=56, norm_topk_prob=True
        )
    ),
    "qwen3_moe": lambda: modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(
        configuration_qwen3_moe.Qwen3MoeConfig(**SIZES, moe_intermediate_size=48, num_experts=8, norm_topk_prob=True)
    ),
    "qwen3_moe-unnormalised": lambda: modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(
        configuration_qwen3_moe.Qwen3MoeConfig(**SIZES, moe_intermediate_size=48, num_experts=8, norm_topk_prob=False)
    ),
    "olmoe": lambda: modeling_olmoe.OlmoeSparseMoeBlock(
        configuration_olmoe.OlmoeConfig(**SIZES, intermediate_size=48, num_experts=8)
    ),
}


def make_block(name, dtype=torch.float32):
    block = BLOCKS[name]().to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        block.gate.weight.mul_(3)  # a router with opinions
    return block


def outputs_and_gradients(module, hidden, parameters, grad):
    hidden = hidden.detach().requires_grad_()
    output = module(hidden)
    return [output.detach(), *torch.autograd.grad(output, [hidden, *parameters], grad)]


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", BLOCKS)
def test_float32_output_and_all_gradients_are_equal(name):
    block = make_block(name)
    layer = edl.MoELayer.from_transformers(block, return_routing=False)
    hidden, grad = torch.randn(2, 4, 31, 32)
    parameters = list(block.parameters())
    theirs = outputs_and_gradients(block, hidden.unsqueeze(0)[0], parameters, grad)
    ours = outputs_and_gradients(layer, hidden, parameters, grad)
    for expected, actual in zip(theirs, ours, strict=True):
        assert relative_error(actual, expected) < 5e-6


@pytest.mark.parametrize("name", BLOCKS)
def test_float64_output_and_all_gradients_are_equal(name):
    block = make_block(name, torch.float64)
    layer = edl.MoELayer.from_transformers(block, return_routing=False, recompute_activations=True)
    assert layer.recompute_activations
    hidden, grad = torch.randn(2, 4, 31, 32, dtype=torch.float64)
    parameters = list(block.parameters())
    # transformers weighs in float32, so its float64 output is right to float32 only.
    for expected, actual in zip(
        outputs_and_gradients(block, hidden, parameters, grad),
        outputs_and_gradients(layer, hidden, parameters, grad),
        strict=True,
    ):
        assert relative_error(actual, expected) < 5e-6


class FixedRouting(torch.nn.Module):
    """A router of transformers whose choice is given; the weights of that choice come from its own logits."""

    def __init__(self, gate, experts):
        super().__init__()
        self.weight, self.experts = gate.weight, experts
        self.normalizes = getattr(gate, "norm_topk_prob", True)

    def forward(self, hidden):
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        weights = logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        weights = weights.gather(1, self.experts)
        if self.normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), self.experts


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_on_the_same_routing_is_as_close_to_float64_as_transformers(name):
    block = make_block(name, torch.bfloat16)
    layer = edl.MoELayer.from_transformers(block)
    hidden, grad = torch.randn(2, 4, 31, 32).bfloat16()
    experts = layer(hidden)[1].experts
    layer.return_routing = False
    exact = copy.deepcopy(block).double()
    exact.gate = FixedRouting(exact.gate, experts)
    fixed = copy.copy(block)
    fixed._modules = dict(block._modules, gate=FixedRouting(block.gate, experts))
    wanted = outputs_and_gradients(exact, hidden.double(), exact.parameters(), grad.double())
    ours = outputs_and_gradients(layer, hidden, block.parameters(), grad)
    theirs = outputs_and_gradients(fixed, hidden, block.parameters(), grad)
    for ours_i, theirs_i, wanted_i in zip(ours, theirs, wanted, strict=True):
        bound = max(1.5 * relative_error(theirs_i, wanted_i), 4 * torch.finfo(torch.bfloat16).eps)
        assert relative_error(ours_i, wanted_i) < bound


@pytest.mark.parametrize("name", BLOCKS)
def test_there_and_back_share_every_parameter(name):
    block = make_block(name).eval()
    layer = edl.MoELayer.from_transformers(block)
    assert not layer.training
    assert {id(p) for p in layer.parameters()} == {id(p) for p in block.parameters()}
    back = layer.to_transformers()
    assert type(back) is type(block) and not back.training
    hidden = torch.randn(2, 9, 32)
    assert back(hidden).equal(block(hidden))
    for (key, ours), (their_key, theirs) in zip(back.named_parameters(), block.named_parameters(), strict=True):
        assert key == their_key and ours is theirs
    assert back.state_dict().keys() == block.state_dict().keys()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_a_layer_of_our_own_becomes_a_block(family):
    shared = {"num_shared_experts": 1, "shared_intermediate_size": 40, "shared_expert_gate": True}
    layer = edl.MoELayer(16, 24, 6, 2, return_routing=False, **(shared if family == "qwen2_moe" else {}))
    hidden = torch.randn(2, 9, 16)
    torch.testing.assert_close(layer.to_transformers(family)(hidden), layer(hidden))


def test_the_family_follows_from_the_layer():
    assert type(edl.MoELayer(16, 24, 6, 2).to_transformers()).__name__ == "Qwen3MoeSparseMoeBlock"
    layer = edl.MoELayer(16, 24, 6, 2, num_shared_experts=1, shared_expert_gate=True)
    assert type(layer.to_transformers()).__name__ == "Qwen2MoeSparseMoeBlock"


def test_a_layer_takes_a_blocks_place_in_its_model():
    config = configuration_mixtral.MixtralConfig(
        **SIZES, intermediate_size=48, num_local_experts=8, num_hidden_layers=2, vocab_size=99
    )
    model = modeling_mixtral.MixtralForCausalLM(config).eval()
    tokens = torch.randint(0, 99, (2, 7))
    before = model(tokens, labels=tokens)
    for decoder in model.model.layers:
        decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    after = model(tokens, labels=tokens)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    after.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


def replace_blocks(model, layers=(0, 1)):
    for i in layers:
        decoder = model.model.layers[i]
        decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    return model


def seeded_model(family, **config):
    torch.manual_seed(0)
    return make_model(family, **config)


TOKENS = torch.arange(3, 23).view(2, 10)


@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_stay_visible_to_the_recording_of_transformers(family, layers, recorded_before):
    model = seeded_model(family)
    wanted = seeded_model(family)(TOKENS, labels=TOKENS, output_router_logits=True)
    if recorded_before:  # which puts hooks on the routers, once
        model(TOKENS, output_router_logits=True)

    def check():
        output = model(TOKENS, labels=TOKENS, output_router_logits=True)
        assert len(output.router_logits) == 2
        torch.testing.assert_close(output.router_logits, wanted.router_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.aux_loss, wanted.aux_loss)
        torch.testing.assert_close(output.loss, wanted.loss)

    replace_blocks(model, layers)
    check()
    copied = copy.deepcopy(model)(TOKENS, output_router_logits=True)
    assert len(copied.router_logits) == 2
    for i in layers:
        model.model.layers[i].mlp = model.model.layers[i].mlp.to_transformers()
    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_blocks_pickle_script_and_compile(family):
    layer = replace_blocks(seeded_model(family)).model.layers[0].mlp
    hidden = torch.randn(2, 5, 32)
    for other in (
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        torch.jit.script(layer),
        torch.compile(layer, fullgraph=True, backend="eager"),
        torch.export.export(layer, (hidden,)).module(),
    ):
        torch.testing.assert_close(other(hidden), layer(hidden))


def save_and_load(model, folder, **options):
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("options", [{}, {"save_original_format": False}, {"max_shard_size": "20KB"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_have_the_names_of_their_family(tmp_path, family, options):
    """With one block of two replaced, or both, the file is that of the model without edl."""
    plain = seeded_model(family)
    plain.save_pretrained(tmp_path / "plain", **options)
    files = {file.name: file.read_bytes() for file in (tmp_path / "plain").glob("model*")}
    for layers in ([1], [0, 1]):
        model = replace_blocks(seeded_model(family), layers)
        names, state = set(model.state_dict()), torch.get_rng_state()
        loaded, report = save_and_load(model, tmp_path / "ours", **options)
        assert {file.name: file.read_bytes() for file in (tmp_path / "ours").glob("model*")} == files
        assert torch.equal(state, torch.get_rng_state())
        assert set(model.state_dict()) == names and "model.layers.1.mlp.router.weight" in names
        assert not any(report.values())
        assert all(value.equal(loaded.state_dict()[name]) for name, value in plain.state_dict().items())
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, plain.eval()(TOKENS).logits)
        # and into a model with replaced blocks, there and with the state of its own
        again = replace_blocks(loaded, layers)
        again.load_state_dict(model.state_dict())


def test_a_state_dict_that_is_given_has_the_names_of_the_family_too(tmp_path):
    model = replace_blocks(seeded_model("mixtral"))
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    for arguments in ((True, doubled), ()):
        model.save_pretrained(tmp_path, *arguments, **({} if arguments else {"state_dict": doubled}))
        loaded = type(model).from_pretrained(tmp_path).state_dict()
        assert loaded["model.layers.0.mlp.gate.weight"].equal(doubled["model.layers.0.mlp.router.weight"])
        assert loaded["model.layers.1.mlp.experts.down_proj"].equal(doubled["model.layers.1.mlp.down_proj"])


class ModelOfLayers(modeling_mixtral.MixtralForCausalLM):
    """A model that holds layers of edl of its own accord."""

    def __init__(self, config):
        super().__init__(config)
        for decoder in self.model.layers:
            decoder.mlp = edl.MoELayer(32, 24, 8, 2, scores="sigmoid", expert_bias=True, return_routing=False)


def test_models_of_layers_keep_their_own_names(tmp_path):
    model = ModelOfLayers(seeded_model("mixtral").config)
    model.model.layers[0].mlp.expert_bias.fill_(0.5)
    loaded, report = save_and_load(model, tmp_path)
    assert not any(report.values())
    for name, value in loaded.state_dict().items():
        assert value.equal(model.state_dict()[name]), name


IN_A_PROCESS_OF_ITS_OWN = {
    "unpickled": """
import torch
torch.load("model.pt", weights_only=False).save_pretrained("saved")
""",
    "made before transformers has imported its models": """
import torch
import transformers
import edl
torch.manual_seed(0)
layer = edl.MoELayer(32, 24, 8, 2, return_routing=False)
model = transformers.MixtralForCausalLM.from_pretrained("plain")
model.model.layers[1].mlp = layer
model.save_pretrained("saved")
""",
}


@pytest.mark.parametrize("name", IN_A_PROCESS_OF_ITS_OWN)
def test_layers_that_transformers_meets_late_are_saved_under_the_names_of_their_family(tmp_path, name):
    model = replace_blocks(seeded_model("mixtral"))
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "plain")
    run(sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN[name], cwd=tmp_path)
    _, report = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())


class ModelOfMore(modeling_mixtral.MixtralForCausalLM):
    """A model that is made from more than its configuration."""

    def __init__(self, config, scores):
        super().__init__(config)
        self.model.layers[0].mlp = edl.MoELayer(32, 24, 8, 2, scores=scores, return_routing=False)


def test_models_of_more_than_their_configuration(tmp_path):
    model = ModelOfMore(seeded_model("mixtral").config, "sigmoid")
    model.save_pretrained(tmp_path)
    loaded, report = ModelOfMore.from_pretrained(tmp_path, "sigmoid", output_loading_info=True)
    assert not any(report.values())
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())
    replace_blocks(model, [1])
    with pytest.raises(ValueError, match="made from its configuration alone.*got ModelOfMore, whose constructor needs"):
        model.save_pretrained(tmp_path)


def with_layer(**options):
    model = seeded_model("mixtral")
    model.model.layers[1].mlp = edl.MoELayer(
        **{"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2, "return_routing": False, **options}
    )
    return model


def with_changed_layer(**attributes):
    model = replace_blocks(seeded_model("mixtral"))
    for name, value in attributes.items():
        setattr(model.model.layers[1].mlp, name, value)
    return model


def with_layers_for_dense_networks():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
        )
    )
    model.model.layers[0].mlp = edl.MoELayer(32, 24, 8, 2, return_routing=False)
    return model


def with_a_wrapper():
    model = replace_blocks(seeded_model("mixtral"))
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp)
    return model


UNNAMED = {
    "bias": (lambda: with_layer(expert_bias=True), "expert_bias=present in model.layers.1.mlp"),
    "sigmoid": (lambda: with_layer(scores="sigmoid"), "scores='sigmoid' in model.layers.1.mlp"),
    "changed": (lambda: with_changed_layer(scores="sigmoid"), "scores='sigmoid' in model.layers.1.mlp"),
    "bias of a block's": (
        lambda: with_changed_layer(expert_bias=torch.zeros(8)),
        "expert_bias=present in model.layers.1.mlp",
    ),
    "factor": (lambda: with_layer(routed_scaling_factor=2.5), "routed_scaling_factor=2.5 in model.layers.1.mlp"),
    "top_k": (lambda: with_layer(top_k=3), "top_k=3 in model.layers.1.mlp"),
    "weights": (lambda: with_layer(normalize_top_k=False), "normalize_top_k=False in model.layers.1.mlp"),
    "sizes": (lambda: with_layer(intermediate_size=16), "intermediate_size=16 in model.layers.1.mlp"),
    "shared": (lambda: with_layer(num_shared_experts=1), "shared_expert=present in model.layers.1.mlp"),
    "dense": (with_layers_for_dense_networks, "a layer where the model has no block in model.layers.0.mlp"),
    "wrapped": (with_a_wrapper, "a layer where the model has no block in model.layers.1.mlp.0"),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_layers_without_names_in_their_family_are_not_saved(tmp_path, name):
    make, got = UNNAMED[name]
    model = make()
    with pytest.raises(ValueError) as error:
        model.save_pretrained(tmp_path / "model")
    assert str(error.value) == (
        "edl::save_pretrained: a layer in the place of a block must be one that to_transformers makes a block of the "
        f"model's configuration; state_dict() saves others under names of their own (got {got})"
    )
    assert not (tmp_path / "model").exists()


def test_a_plain_layer_in_the_place_of_a_block_is_saved(tmp_path):
    model = with_layer()
    loaded, report = save_and_load(model, tmp_path)
    assert not any(report.values())
    torch.testing.assert_close(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_adapters_of_models_with_layers(tmp_path):
    """Adapters on the attention fit both models; those on layers keep the layers' names."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ours = peft.get_peft_model(replace_blocks(seeded_model("mixtral")), config)
    ours.save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(seeded_model("mixtral"), tmp_path / "adapter")
    torch.testing.assert_close(plain.eval()(TOKENS).logits, ours.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)
    loaded, report = save_and_load(ours.merge_and_unload(), tmp_path / "merged")
    assert not any(report.values())
    torch.testing.assert_close(loaded.eval()(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
    layered = peft.get_peft_model(
        replace_blocks(seeded_model("mixtral")), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["router"])
    )
    with torch.no_grad():
        layered.base_model.model.model.layers[0].mlp.router.modules_to_save.default.weight.normal_()
    layered.save_pretrained(tmp_path / "router")
    again = peft.PeftModel.from_pretrained(replace_blocks(seeded_model("mixtral")), tmp_path / "router")
    assert again.eval()(TOKENS).logits.equal(layered.eval()(TOKENS).logits)


def test_adapters_on_blocks_are_merged_first():
    peft = pytest.importorskip("peft")
    for family, options in [
        ("qwen2_moe", {"target_modules": ["up_proj"]}),
        ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
        ("olmoe", {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}),
    ]:
        adapted = peft.get_peft_model(seeded_model(family), peft.LoraConfig(init_lora_weights=False, **options))
        wanted = adapted.eval()(TOKENS).logits
        with pytest.raises(ValueError, match="merge adapters of PEFT first"):
            replace_blocks(adapted.base_model.model)
        merged = replace_blocks(adapted.merge_and_unload())
        torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


def mixtral_with(**options):
    block = make_block("mixtral")
    for name, value in options.items():
        setattr(block.experts if name == "act_fn" else block, name, value)
    return block


class Adapted(torch.nn.Module):
    """As PEFT puts it around a linear layer, whose weight it shows."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, 2)

    @property
    def weight(self):
        return self.base_layer.weight


def qwen2_with_an_adapter():
    block = make_block("qwen2_moe")
    block.shared_expert.up_proj = Adapted(block.shared_expert.up_proj)
    return block


def mixtral_with_wrapped_experts():
    block = make_block("mixtral")
    block.experts = torch.nn.Sequential(block.experts)
    return block


BAD_BLOCKS = {
    "adapter": (
        qwen2_with_an_adapter,
        (
            "edl::MoELayer.from_transformers: only the parameters of the family can be taken over, merge adapters of "
            "PEFT first or add them afterwards (got shared_expert.up_proj.base_layer.weight)"
        ),
    ),
    "wrapped": (
        mixtral_with_wrapped_experts,
        (
            "edl::MoELayer.from_transformers: only the parameters of the family can be taken over, merge adapters of "
            "PEFT first or add them afterwards (got experts.0.down_proj)"
        ),
    ),
    "other": (
        lambda: torch.nn.Linear(2, 2),
        (
            "edl::MoELayer.from_transformers: block must be the Mixture-of-Experts block of a Mixtral, Qwen2-MoE, "
            "Qwen3-MoE or OLMoE model (got Linear)"
        ),
    ),
    "activation": (
        lambda: mixtral_with(act_fn=torch.nn.GELU()),
        "edl::MoELayer.from_transformers: the activation must be SiLU (got GELU)",
    ),
    "jitter": (
        lambda: mixtral_with(jitter_noise=0.1),
        "edl::MoELayer.from_transformers: router_jitter_noise must be 0, edl has none (got 0.1)",
    ),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_blocks_that_a_layer_cannot_express_are_refused(name):
    make, sentence = BAD_BLOCKS[name]
    with pytest.raises(ValueError) as error:
        edl.MoELayer.from_transformers(make())
    assert str(error.value) == sentence


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scripted", [False, True])
def test_quantised_routers_are_refused(dtype, scripted):
    block = make_block("mixtral")
    block.gate.weight = torch.nn.Parameter(block.gate.weight.detach().to(dtype), requires_grad=False)
    layer = edl.MoELayer.from_transformers(block)
    with pytest.raises(
        torch.jit.Error if scripted else ValueError, match="edl::MoELayer: router.weight must be float32"
    ):
        (torch.jit.script(layer) if scripted else layer)(torch.randn(2, 32))


BAD_LAYERS = {
    "unknown": ({}, "gpt", "family must be one of ['mixtral', 'qwen2_moe', 'qwen3_moe', 'olmoe'] (got 'gpt')"),
    "sigmoid": ({"scores": "sigmoid"}, "olmoe", "a olmoe block cannot express the layer (got scores='sigmoid')"),
    "bias": ({"expert_bias": True}, "olmoe", "a olmoe block cannot express the layer (got an expert bias)"),
    "factor": (
        {"routed_scaling_factor": 2.5},
        "qwen3_moe",
        "a qwen3_moe block cannot express the layer (got a routed_scaling_factor other than 1)",
    ),
    "unnormalised": (
        {"normalize_top_k": False},
        "mixtral",
        "a mixtral block cannot express the layer (got weights that are not normalised)",
    ),
    "shared": ({"num_shared_experts": 1}, "mixtral", "a mixtral block cannot express the layer (got a shared expert)"),
    "not-shared": ({}, "qwen2_moe", "a qwen2_moe block cannot express the layer (got no gated shared expert)"),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_layers_that_a_block_cannot_express_are_refused(name):
    options, family, sentence = BAD_LAYERS[name]
    with pytest.raises(ValueError) as error:
        edl.MoELayer(16, 24, 6, 2, **options).to_transformers(family)
    assert str(error.value) == f"edl::MoELayer.to_transformers: {sentence}"


def test_adapters_on_layers_are_merged_first():
    layer = edl.MoELayer.from_transformers(make_block("qwen2_moe"))
    layer.shared_expert.up_proj = Adapted(layer.shared_expert.up_proj)
    with pytest.raises(ValueError, match=r"to_transformers: only the .* \(got shared_expert.up_proj.base_layer"):
        layer.to_transformers()
