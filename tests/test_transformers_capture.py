"""attach: the loss on captured router logits equals the definition on logits computed from the routers' weights,
whatever else the model does in between."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracle import normalised_sigmoid, paper_loss, softmax
from tolerances import assert_close, tolerance
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import edl

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers_models import CONFIGS, SIZES, VOCABULARY, make_model, routers_of

from edl.integrations.transformers import attach, register

D = 3
LABELS = torch.tensor([0, 1, 2, 0, -1, 1])
MASK = torch.ones(6, 8, dtype=torch.int64)
MASK[0, :3] = MASK[1, 5:] = MASK[4, 1:] = 0  # padding on the left and on the right


def make_tokens():
    return torch.randint(3, VOCABULARY, (6, 8))


class OwnLogits:
    """Router logits once more: from each router's input and weight."""

    def __init__(self, model):
        self.logits = []
        for router in routers_of(model).values():
            router.register_forward_pre_hook(self.add)

    def add(self, router, args):
        weight = router.weight
        hidden = args[0].reshape(-1, weight.shape[1]).to(torch.float32 if self.in_float32(router) else weight.dtype)
        self.logits.append(F.linear(hidden, weight.to(hidden.dtype), getattr(router, "bias", None)))

    @staticmethod
    def in_float32(router):
        return hasattr(router, "e_score_correction_bias")


def definition(logits, labels=LABELS, mask=None, scores=softmax):
    """The paper's loss, mean over layers, of router logits [T, E]."""
    length = logits[0].shape[0] // len(labels)
    places = itertools.product(range(len(labels)), range(length))
    tokens = [(b, int(labels[b])) if mask is None or mask[b, s] else None for b, s in places]
    return torch.stack([paper_loss(scores(layer), tokens) for layer in logits]).mean()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(family):
    """Value and gradient of each parameter, padding included."""
    dtype = torch.float32 if family == "gpt_oss" else torch.float64  # grouped_mm has no float64
    model, tokens = make_model(family, dtype), make_tokens()
    own = OwnLogits(model)
    scores = {"deepseek_v3": "sigmoid"}.get(family, "softmax")
    handle = attach(model, D, beta=0.5, scores=scores)
    model(input_ids=tokens, attention_mask=MASK)
    loss = handle.loss(LABELS, MASK)
    wanted = definition(own.logits, mask=MASK, scores={"softmax": softmax, "sigmoid": normalised_sigmoid}[scores])
    assert len(own.logits) == 2
    precision = tolerance(torch.float32 if loss.dtype == torch.float32 else torch.float64, 32 * 8, roundings=4)
    assert_close(loss, 0.5 * wanted.double(), precision)
    assert_close(handle.value, wanted.double(), precision)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(0.5 * wanted, parameters, allow_unused=True)
    for actual, expected in zip(ours, theirs, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_close(actual, expected.double(), 8 * precision)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in ours) > 5


def gradient(model, loss):
    weights = [router.weight for router in routers_of(model).values()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


@pytest.fixture
def mixtral():
    return make_model("mixtral", torch.float64)


def test_labels_and_options_pass_through(mixtral):
    tokens = make_tokens()
    own = OwnLogits(mixtral)
    handle = attach(mixtral, D, 1.0, eps=1e-3, sequence_reduction="token", layer_reduction="sum")
    per_token = torch.randint(-1, D, (6, 8))
    boundaries = torch.tensor([0, 5, 8, 20, 48])
    reference = edl.ExpertDivergenceLoss(D, eps=1e-3, sequence_reduction="token", layer_reduction="sum")
    for arguments in (
        {"domain_ids": per_token},
        {"domain_ids": LABELS, "padding_mask": MASK == 0},
        {"domain_ids": LABELS[:4], "cu_seqlens": boundaries},
    ):
        own.logits.clear()
        mixtral(tokens)
        batched = [logits.unflatten(0, (6, 8)) for logits in own.logits]
        torch.testing.assert_close(handle.loss(**arguments), reference(batched, **arguments))


def test_labels_of_another_batch_are_refused(mixtral):
    """Three labels for six sequences would fit the flattened tokens."""
    handle = attach(mixtral, D, 1.0)
    for inputs in ({"input_ids": make_tokens()}, {"inputs_embeds": torch.randn(6, 8, 32, dtype=torch.float64)}):
        mixtral(**inputs)
        with pytest.raises(ValueError) as error:
            handle.loss(LABELS[:3])
        assert str(error.value) == "edl::Objectives: domain_ids must have one row per sequence, 6 (got [3])"


def test_beta_may_change(mixtral):
    handle, tokens = attach(mixtral, D, 1.0), make_tokens()
    mixtral(tokens)
    first = handle.loss(LABELS)
    handle.beta = 0.25
    mixtral(tokens)
    assert handle.loss(LABELS).equal(0.25 * first)


# ---- which forward it is ----

NO_TRAINING_FORWARD = (
    "edl::attach: loss() takes the router logits of the last training forward, and takes them once; attach before "
    "the model is compiled or copied (got no router logits since)"
)


def test_other_forwards_in_between_do_not_count(mixtral):
    handle, tokens = attach(mixtral, D, 1.0), make_tokens()
    mixtral(tokens)
    wanted = handle.loss(LABELS)
    others = torch.randint(3, VOCABULARY, (2, 5))
    mixtral(tokens)
    mixtral.eval()
    mixtral(others)
    mixtral.generate(others, max_new_tokens=3, do_sample=False)
    mixtral.train()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            mixtral(others)
    assert handle.loss(LABELS).equal(wanted)


def test_forwards_that_a_memory_collects_count(mixtral):
    """Two passes over two micro-batches have the gradient of one batch."""
    whole, tokens = attach(mixtral, D, 1.0), make_tokens()
    mixtral(tokens)
    wanted = gradient(mixtral, whole.loss(LABELS))
    memory = edl.DomainMemory()
    handle = attach(mixtral, D, 1.0, memory=memory)
    parts = [(tokens[:3], LABELS[:3]), (tokens[3:], LABELS[3:])]
    with memory.collect():
        for part, labels in parts:
            mixtral(part)
            handle.loss(labels)
    gradients = []
    for part, labels in parts:
        mixtral(part)
        gradients.append(gradient(mixtral, handle.loss(labels)))
    torch.testing.assert_close(sum(gradients) / 2, wanted)
    memory.step()
    with torch.no_grad():
        mixtral(tokens)
    with pytest.raises(ValueError):
        handle.loss(LABELS)


def test_the_last_of_several_training_forwards_counts(mixtral):
    handle, tokens = attach(mixtral, D, 1.0), make_tokens()
    mixtral(tokens)
    wanted = handle.loss(LABELS)
    mixtral(make_tokens())
    mixtral(make_tokens()[:3])
    mixtral(tokens)
    assert handle.loss(LABELS).equal(wanted)


def test_each_forward_is_taken_once(mixtral):
    handle = attach(mixtral, D, 1.0)
    for prepare in (
        lambda: None,
        lambda: (mixtral(make_tokens()), handle.loss(LABELS)),
        lambda: mixtral.eval()(make_tokens()),
    ):
        prepare()
        with pytest.raises(ValueError) as error:
            handle.loss(LABELS)
        assert str(error.value) == NO_TRAINING_FORWARD


def test_a_forward_that_fails_leaves_no_mixture(mixtral):
    handle, tokens = attach(mixtral, D, 1.0), make_tokens()
    mixtral(tokens)
    wanted = handle.loss(LABELS)
    last = mixtral.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mixtral(make_tokens())
    last.remove()
    mixtral(tokens)
    assert handle.loss(LABELS).equal(wanted)


# ---- checkpointing and compilation ----


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_non_reentrant_checkpointing_changes_nothing(family):
    model, tokens = make_model(family, torch.float64), make_tokens()
    handle = attach(model, D, 1.0)

    def total():
        return model(input_ids=tokens, labels=tokens).loss + handle.loss(LABELS)

    wanted = gradient(model, total())
    model.gradient_checkpointing_enable()
    runs = []
    next(iter(routers_of(model).values())).register_forward_hook(lambda *_: runs.append(None))
    assert gradient(model, total()).equal(wanted)
    assert len(runs) == 2  # the router ran again, in the replay
    with pytest.raises(ValueError) as error:
        handle.loss(LABELS)
    assert str(error.value) == NO_TRAINING_FORWARD


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_the_whole_model_changes_nothing(mixtral):
    handle, tokens = attach(mixtral, D, 1.0), make_tokens()
    language = mixtral(tokens).logits.square().mean()
    wanted = gradient(mixtral, language + handle.loss(LABELS))
    language = torch.utils.checkpoint.checkpoint(
        lambda x: mixtral(x).logits.square().mean(), tokens, use_reentrant=False
    )
    assert gradient(mixtral, language + handle.loss(LABELS)).equal(wanted)
    with pytest.raises(ValueError):
        handle.loss(LABELS)  # the replay leaves nothing


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe"])
def test_reentrant_checkpointing_is_an_error(family):
    model = make_model(family)
    handle = attach(model, D, 1.0)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(make_tokens())
    with pytest.raises(ValueError) as error:
        handle.loss(LABELS)
    assert str(error.value) == (
        "edl::attach: activation checkpointing must be non-reentrant, with use_reentrant=False "
        "(got router logits computed without gradient)"
    )


@pytest.fixture
def compilable():
    """One layer, to trace it quickly, and experts without graph breaks."""
    register()
    return make_model("mixtral", torch.float64, experts="edl", num_hidden_layers=1)


def test_compiled_models(compilable):
    model, tokens = compilable, make_tokens()
    handle = attach(model, D, 1.0)
    model(tokens)
    loss = handle.loss(LABELS)
    wanted = gradient(model, loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(tokens)
    with torch.no_grad():
        compiled.eval()(tokens[:2])
    compiled.train()
    compiled_loss = handle.loss(LABELS)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(gradient(model, compiled_loss), wanted)


def test_compiled_models_of_dynamic_shapes(compilable):
    model = compilable
    handle = attach(model, D, 1.0)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for rows in (6, 4):
        tokens = make_tokens()[:rows]
        model(tokens)
        wanted = handle.loss(LABELS[:rows])
        compiled(tokens)
        torch.testing.assert_close(handle.loss(LABELS[:rows]), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_layers_under_checkpointing(compilable):
    model, tokens = compilable, make_tokens()
    handle = attach(model, D, 1.0)
    model(tokens)
    wanted = gradient(model, handle.loss(LABELS))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    model(tokens)
    torch.testing.assert_close(gradient(model, handle.loss(LABELS)), wanted)
    model.gradient_checkpointing_enable()
    model(tokens)
    torch.testing.assert_close(gradient(model, handle.loss(LABELS)), wanted)


def test_attaching_to_a_model_that_was_compiled_and_run_is_an_error(compilable):
    compiled = torch.compile(compilable, backend="eager")
    compiled(make_tokens())
    handle = attach(compilable, D, 1.0)
    compiled(make_tokens())
    with pytest.raises(ValueError) as error:
        handle.loss(LABELS)
    assert str(error.value) == NO_TRAINING_FORWARD


# ---- life of a handle ----


def test_logits_are_released(mixtral):
    captured = []
    mixtral.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, output: captured.append(weakref.ref(output[0])))
    handle = attach(mixtral, D, 1.0)
    for _ in range(3):
        mixtral(make_tokens())
    assert [logits() is not None for logits in captured] == [False, False, True]  # of the last forward only
    handle.loss(LABELS)
    assert captured[-1]() is None
    mixtral(make_tokens())
    handle.remove()
    assert captured[-1]() is None


def test_removal(mixtral):
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in mixtral.modules()]
    handle, other = attach(mixtral, D, 1.0), attach(mixtral, D, 1.0)
    handle.remove()
    handle.remove()
    mixtral(make_tokens())
    other.loss(LABELS)
    other.remove()
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in mixtral.modules()]
    with pytest.raises(ValueError):
        handle.loss(LABELS)


def test_model_and_handle_are_collected_together():
    model = make_model("mixtral")
    handle = attach(model, D, 1.0)
    model(make_tokens())
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_two_handles_are_independent(mixtral):
    """Coarse and fine labels, say."""
    coarse, fine = attach(mixtral, 2, 1.0), attach(mixtral, D, 0.1)
    tokens = make_tokens()
    mixtral(tokens)
    fine_loss, coarse_loss = fine.loss(LABELS), coarse.loss(LABELS.clamp(max=1))
    for handle in (coarse, fine):
        handle.remove()
    alone = attach(mixtral, D, 0.1)
    mixtral(tokens)
    assert alone.loss(LABELS).equal(fine_loss) and not coarse_loss.equal(fine_loss)


# What PEFT trains beside adapters of the attention: copies of the routers or of what holds them, or adapters.
PEFT_OPTIONS = {
    "gate": {"modules_to_save": ["gate"]},
    "mlp": {"modules_to_save": ["mlp"]},
    "parameter": {"target_parameters": ["gate.weight"]},
    "attention": {},
}


def with_peft(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options))


@pytest.mark.filterwarnings("ignore:edl..attach. a router without trainable:UserWarning")
@pytest.mark.parametrize("layers_of_edl", [False, True])
@pytest.mark.parametrize("name", PEFT_OPTIONS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_routers_that_peft_copies(mixtral, order, name, layers_of_edl):
    """The loss, and its gradient, are those of the copy that PEFT trains."""
    options = dict(PEFT_OPTIONS[name])
    if layers_of_edl:
        for decoder in mixtral.model.layers:
            decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
        options = {key: [value.replace("gate", "router") for value in values] for key, values in options.items()}
    tokens = make_tokens()
    handle = attach(mixtral, D, 1.0) if order == "before" else None
    torch.manual_seed(1)
    model = with_peft(mixtral, **options)
    handle = handle or attach(model, D, 1.0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path and path.endswith(("gate.weight", "router.weight")):
                parameter.mul_(-2)  # no longer like the module as it was
    output = model(tokens, output_router_logits=True)
    loss = handle.loss(LABELS)
    recorded = [logits.unflatten(0, tokens.shape) for logits in output.router_logits]
    # transformers' own hooks are on both, of which one runs
    torch.testing.assert_close(loss, edl.ExpertDivergenceLoss(D)(recorded, LABELS))
    loss.backward()
    trained = [p for path, p in model.named_parameters() if p.requires_grad and ("gate." in path or "router." in path)]
    assert len(trained) == {"gate": 2, "mlp": 2, "parameter": 4, "attention": 0}[name]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    if name in ("gate", "mlp"):
        mixtral.model.embed_tokens.weight.requires_grad_()
        with model.disable_adapter():  # the module as it was
            other = model(tokens, output_router_logits=True)
        recorded = [logits.unflatten(0, tokens.shape) for logits in other.router_logits]
        torch.testing.assert_close(handle.loss(LABELS), edl.ExpertDivergenceLoss(D)(recorded, LABELS))


def frozen_routers_told(model, handle):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()(make_tokens())
        assert not caught
        model.train()(make_tokens())
    told = [str(entry.message) for entry in caught if str(entry.message).startswith("edl::attach: a router without")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.loss(LABELS)
        model(make_tokens())
        handle.loss(LABELS)
    return told


@pytest.mark.parametrize("name", PEFT_OPTIONS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_frozen_routers_are_told_of_once(mixtral, order, name):
    handle = attach(mixtral, D, 1.0) if order == "before" else None
    model = with_peft(mixtral, **PEFT_OPTIONS[name])
    told = frozen_routers_told(model, handle or attach(model, D, 1.0))
    if name == "attention":
        assert len(told) == 1 and told[0].endswith(
            "(got no trainable parameter in layers.0.mlp.gate, layers.1.mlp.gate)"
        )
    else:
        assert told == []


def test_one_frozen_router_is_told_of(mixtral):
    mixtral.model.layers[1].mlp.gate.requires_grad_(False)
    (told,) = frozen_routers_told(mixtral, attach(mixtral, D, 1.0))
    assert told.endswith("(got no trainable parameter in layers.1.mlp.gate)")


def test_frozen_routers_of_compiled_models_are_told_of(compilable):
    model = compilable
    model.model.layers[0].mlp.gate.requires_grad_(False)
    handle = attach(model, D, 1.0)
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="a router without trainable parameters"):
        compiled(make_tokens())
        handle.loss(LABELS)


def test_copies_do_not_keep_the_model_alive(mixtral):
    model = make_model("mixtral")
    attach(model, D, 1.0)
    copied, alive = copy.deepcopy(model), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    copied(make_tokens())


def test_copies_of_a_model_are_not_attached(mixtral):
    handle, tokens = attach(mixtral, D, 1.0), make_tokens()
    mixtral(tokens)
    wanted = handle.loss(LABELS)
    mixtral(tokens)  # so that there is something to copy
    for copied in (copy.deepcopy(mixtral), pickle.loads(pickle.dumps(mixtral))):
        copied.train()(make_tokens()[:2])
    assert handle.loss(LABELS).equal(wanted)
    copied = copy.deepcopy(mixtral)
    own = attach(copied, D, 1.0)
    copied(tokens)
    assert own.loss(LABELS).equal(wanted)


def test_models_inside_others(mixtral, tmp_path):
    """DDP and FSDP2 before and after attaching, wrappers that call forward itself as PEFT's do, the backbone alone."""
    tokens = make_tokens()
    before = attach(mixtral, D, 1.0)
    mixtral(tokens)
    wanted = before.loss(LABELS)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(mixtral)
        after = attach(parallel, D, 1.0)
        parallel(tokens)
        assert before.loss(LABELS).equal(wanted) and after.loss(LABELS).equal(wanted)
        sharded = copy.deepcopy(mixtral)
        before_sharding = attach(sharded, D, 1.0)
        for part in (*sharded.model.layers, sharded):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        after = attach(sharded, D, 1.0)
        sharded(tokens)
        assert before_sharding.loss(LABELS).equal(wanted) and after.loss(LABELS).equal(wanted)
    finally:
        torch.distributed.destroy_process_group()
    mixtral.forward(tokens)
    assert before.loss(LABELS).equal(wanted)
    mixtral.model(tokens)
    assert before.loss(LABELS).equal(wanted)


def test_layers_of_edl_in_the_place_of_blocks(mixtral):
    tokens = make_tokens()
    handle = attach(mixtral, D, 1.0)
    mixtral(tokens)
    wanted = handle.loss(LABELS)
    handle.remove()
    decoder = mixtral.model.layers[1]
    decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    handle = attach(mixtral, D, 1.0)
    mixtral(tokens)
    torch.testing.assert_close(handle.loss(LABELS), wanted)


def test_the_models_own_auxiliary_loss_is_left_alone():
    model = make_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    tokens = make_tokens()
    before = model(input_ids=tokens, labels=tokens)
    handle = attach(model, D, 1.0)
    after = model(input_ids=tokens, labels=tokens)
    handle.loss(LABELS)
    assert before.aux_loss > 0 and after.aux_loss.equal(before.aux_loss) and after.loss.equal(before.loss)
    model.config.output_router_logits = False
    plain = model(input_ids=tokens, labels=tokens)
    assert plain.router_logits is None and handle.loss(LABELS).isfinite()


def test_training_pushes_domains_apart():
    """Experts and loss of edl together."""
    register()
    model, tokens = make_model("qwen3_moe", experts="edl"), make_tokens()
    handle = attach(model, D, 1e-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss + handle.loss(LABELS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(handle.value.item())
    assert values[-1] < values[0] - 0.5


# ---- what it refuses ----


def dense():
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "num_experts_per_tok": None}, intermediate_size=24))


def encoder_and_decoder():
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 24, "num_heads": 2, "num_experts": 4}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes, **layers))


NO_ROUTERS = (
    "model must hold routers whose logits transformers records, or edl.MoELayer, inside a model of transformers "
    "(got {}, which has none)"
)
BAD_ATTACHMENTS = {
    "dense": (dense, {}, NO_ROUTERS.format("LlamaForCausalLM")),
    "module": (lambda: nn.Linear(2, 2), {}, NO_ROUTERS.format("Linear")),
    "parts": (
        encoder_and_decoder,
        {},
        (
            "model must be a model of transformers with Mixture-of-Experts routers in exactly one of its parts "
            "(got 2 parts with routers: SwitchTransformersStack, SwitchTransformersStack)"
        ),
    ),
    "beta": (dense, {"beta": float("nan")}, "beta must be finite (got nan)"),
    "layers": (dense, {"layer_reduction": "none"}, "layer_reduction must be 'mean' or 'sum' (got 'none')"),
}


@pytest.mark.parametrize("name", BAD_ATTACHMENTS)
def test_what_attach_refuses(name):
    make, options, sentence = BAD_ATTACHMENTS[name]
    with pytest.raises(ValueError) as error:
        attach(make(), D, **{"beta": 1.0, **options})
    assert str(error.value) == f"edl::attach: {sentence}"


def test_options_of_the_loss_are_checked(mixtral):
    with pytest.raises(ValueError, match="num_domains must be at least 2"):
        attach(mixtral, 0, 1.0)
    with pytest.raises(TypeError, match="scale"):
        attach(mixtral, D, 1.0, scale=2)


def test_a_router_that_does_not_run_is_an_error(mixtral):
    """As where a kernel computes a whole block."""
    handle = attach(mixtral, D, 1.0)
    mixtral.model.layers[1].mlp = nn.Identity()
    mixtral(make_tokens())
    with pytest.raises(ValueError) as error:
        handle.loss(LABELS)
    assert str(error.value) == (
        "edl::attach: every router must run in the training forward, as a module (got no logits of layers.1.mlp.gate)"
    )


def test_frozen_models_are_an_error_but_frozen_routers_are_not(mixtral):
    handle = attach(mixtral, D, 1.0)
    for router in routers_of(mixtral).values():
        router.weight.requires_grad_(False)
    mixtral(make_tokens())
    assert handle.loss(LABELS).requires_grad  # through the layers before
    mixtral.requires_grad_(False)
    mixtral(make_tokens())
    with pytest.raises(ValueError) as error:
        handle.loss(LABELS)
    assert str(error.value) == (
        "edl::attach: at least one router must be trainable, or something before it (got router logits that require no "
        "gradient)"
    )


def test_probabilities_are_refused(mixtral):
    """As the routers of some models give, and old releases of transformers gave."""
    handle = attach(mixtral, D, 1.0)
    for router in routers_of(mixtral).values():
        router.register_forward_hook(lambda module, args, output: (output[0].softmax(-1), *output[1:]), prepend=True)
    mixtral(make_tokens())
    with pytest.raises(ValueError, match="routing must be logits"):
        handle.loss(LABELS)
