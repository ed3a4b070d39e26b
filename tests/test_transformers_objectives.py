"""Objectives on a model of transformers: what routers decided is what the objectives get, in a plain loop and in the
Trainer, on one process and on several."""

import copy
import importlib

import pytest
import torch
from oracle import normalised_sigmoid, softmax
from ranks import on_ranks
from tolerances import assert_close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import edl
from edl.objectives import (
    ExpertDivergence,
    ExpertRouterCoupling,
    LoadBalancing,
    MutualInformation,
    Objective,
    Objectives,
    RouterOrthogonality,
    RouterSimilarity,
    RouterZ,
    linear_warmup,
)

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from test_transformers_trainer import (
    PRECISION,
    Gradients,
    added,
    arguments,
    assert_steps,
    be_a_rank_of_torchrun,
    make_dataset,
    seeded_model,
)
from transformers import DataCollatorWithFlattening, Trainer
from transformers_models import CONFIGS, VOCABULARY, make_model, routers_of

from edl.integrations.transformers import DomainCollator, EDTrainerMixin, attach, pack_documents, register

D, E, K = 3, 8, 2
LABELS = torch.tensor([0, 1, 2, 0, -1, 1])
MASK = torch.ones(6, 8, dtype=torch.int64)
MASK[0, :3] = MASK[1, 5:] = MASK[4, 1:] = 0
BALANCE = {"load_balancing": (LoadBalancing(), 1.0)}


class Concentration(Objective):
    """The mean over tokens of the sum of squares of their experts' weights."""

    needs = frozenset({"weights"})

    def of_tokens(self, layers, segments):
        kept = segments.segment_ids == 0
        squares = [layer.weights.square().sum(1)[kept].sum() for layer in layers]
        return {"squares": torch.stack(squares), "tokens": kept.sum().expand(len(layers)).to(squares[0].dtype)}

    def formula(self, sums):
        return sums["squares"] / sums["tokens"]


class Outputs:
    """What the routers themselves return: logits, weights and experts."""

    def __init__(self, model):
        self.layers = []
        for router in routers_of(model).values():
            router.register_forward_hook(lambda router, args, output: self.layers.append(output))


def make_tokens():
    return torch.randint(3, VOCABULARY, (6, 8))


def router_gradient(model, loss):
    weights = [router.weight for router in routers_of(model).values()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])


# ---- what is captured ----


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "llama4"])
def test_choices_and_weights_of_every_family(family):
    """Value and gradient, of the definition on what the routers return."""
    dtype = torch.float32 if family == "gpt_oss" else torch.float64
    model = make_model(family, dtype)
    scores = "sigmoid" if family == "deepseek_v3" else "softmax"
    outputs = Outputs(model)
    handle = attach(model, {"balance": (LoadBalancing(scores), 0.5), "concentration": (Concentration(), 0.25)})
    model(input_ids=make_tokens(), attention_mask=MASK)
    total = handle.loss(attention_mask=MASK)
    kept = MASK.flatten().bool()
    balances, squares = [], []
    for logits, weights, experts in outputs.layers:
        mass = {"softmax": softmax, "sigmoid": normalised_sigmoid}[scores](logits)[kept].mean(0)
        fractions = torch.stack([(experts[kept] == e).sum() for e in range(E)]).double() / (kept.sum() * K)
        balances.append(E * (fractions * mass).sum())
        squares.append(weights[kept].square().sum(1).mean())
    balance, concentration = torch.stack(balances).mean(), torch.stack(squares).mean()
    assert len(outputs.layers) == 2
    assert_close(handle.values["balance"], balance.double(), PRECISION)
    assert_close(handle.values["concentration"], concentration.double(), PRECISION)
    wanted = router_gradient(model, 0.5 * balance + 0.25 * concentration)
    assert_close(router_gradient(model, total), wanted.double(), PRECISION)
    assert wanted.abs().max() > 0


OF_ROWS = {"rows": (RouterOrthogonality(), 0.5), "similarity": (RouterSimilarity(), 0.25)}


def loss_of_rows(model):
    losses = []
    for router in routers_of(model).values():
        rows = torch.nn.functional.normalize(router.weight)
        identity = torch.eye(E, dtype=rows.dtype)
        similarity = (router.weight @ router.weight.T - identity).abs().mean()
        losses.append(0.5 * (rows @ rows.T - identity).square().mean() + 0.25 * similarity)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"])
def test_rows_of_routers(family, checkpointing):
    model = make_model(family, torch.float32 if family == "gpt_oss" else torch.float64)
    wanted = loss_of_rows(model)
    gradient = router_gradient(model, wanted)
    if checkpointing:
        model.gradient_checkpointing_enable()
    handle = attach(model, OF_ROWS)
    model(input_ids=make_tokens(), attention_mask=MASK).logits.mean().backward(retain_graph=True)
    model.zero_grad()
    output = model(input_ids=make_tokens(), attention_mask=MASK)
    total = handle.loss(attention_mask=MASK)
    assert_close(total, wanted.double(), PRECISION)
    (total + 0.0 * output.logits.sum()).backward()
    found = torch.cat([router.weight.grad.flatten() for router in routers_of(model).values()])
    assert gradient.abs().max() > 0
    assert_close(found, gradient.double(), PRECISION)


def test_rows_of_routers_in_two_passes():
    model, memory = make_model("mixtral", torch.float64), edl.DomainMemory()
    handle = attach(model, Objectives(OF_ROWS, memory=memory))
    with memory.collect(), torch.no_grad():
        for _ in range(2):
            model(make_tokens())
            handle.loss()
    for _ in range(2):
        model(make_tokens())
        (handle.loss() / 2).backward()
    handle.objectives.step()
    found = torch.cat([router.weight.grad.flatten() for router in routers_of(model).values()])
    assert_close(found, router_gradient(model, loss_of_rows(model)), PRECISION)


def test_objectives_that_no_router_serves_are_refused():
    with pytest.raises(ValueError) as error:
        attach(make_model("mixtral"), {"coupling": (ExpertRouterCoupling(), 1.0)})
    assert str(error.value) == (
        "edl::attach: objectives must do with experts, logits, router_gram, scores, weights, which is what routers "
        "hand over (got 'coupling', which needs router_responses)"
    )
    model = make_model("mixtral")
    model.model.layers[1].mlp.gate.rows = model.model.layers[1].mlp.gate._parameters.pop("weight")
    with pytest.raises(ValueError) as error:
        attach(model, OF_ROWS)
    assert str(error.value) == (
        "edl::attach: objectives on the router's rows need a router with a weight [E, H] (got layers.1.mlp.gate, a "
        "MixtralTopKRouter without)"
    )
    assert not any(module._forward_hooks for module in model.modules())


def transformers_balance(family, router_logits, mask):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return modeling.load_balancing_loss_func(tuple(router_logits), E, K, mask)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_balance_is_that_of_transformers(family, layers, mask):
    """Theirs is K times ours of one layer. Of several it is that of all layers' tokens together, which ours never is:
    there ours is the mean of theirs layer by layer."""
    model = make_model(family, num_hidden_layers=layers)
    handle = attach(model, BALANCE)
    output = model(input_ids=make_tokens(), attention_mask=mask, output_router_logits=True)
    loss = handle.loss(attention_mask=mask)
    each = torch.stack([transformers_balance(family, [logits], mask) for logits in output.router_logits])
    assert_close(K * loss, each.mean().double(), PRECISION)
    assert_close(router_gradient(model, K * loss), router_gradient(model, each.mean()).double(), PRECISION)
    together = transformers_balance(family, output.router_logits, mask)
    if layers == 1:
        assert_close(K * loss, together.double(), PRECISION)
    else:
        assert abs(K * loss - together) > 1e-3


@pytest.mark.parametrize("replaced", [(0,), (0, 1)])
def test_layers_of_edl_tell_what_blocks_tell(replaced):
    model, tokens = make_model("mixtral", torch.float64), make_tokens()
    objectives = {**BALANCE, "concentration": (Concentration(), 1.0)}
    handle = attach(model, objectives)
    model(tokens)
    loss = handle.loss()
    wanted, gradient = handle.values, router_gradient(model, loss)
    handle.remove()
    for place in replaced:
        decoder = model.model.layers[place]
        decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    handle = attach(model, objectives)
    model(tokens)
    loss = handle.loss()
    for name, value in wanted.items():
        assert_close(handle.values[name], value.double(), PRECISION)
    assert_close(router_gradient(model, loss), gradient.double(), PRECISION)


def test_a_layers_own_bias_decides_what_is_captured():
    model = make_model("mixtral", torch.float64, num_hidden_layers=1)
    decoder = model.model.layers[0]
    layer = edl.MoELayer(32, 24, E, K, expert_bias=True, return_routing=False).double()
    layer.expert_bias[:K] = 100.0  # all tokens choose these
    decoder.mlp = layer
    handle = attach(model, BALANCE)
    logits = []
    layer.router.register_forward_hook(lambda router, args, choice: logits.append(choice.logits))
    model(make_tokens())
    handle.loss()
    mass = logits[0].softmax(-1).mean(0)
    assert_close(handle.values["load_balancing"], E / K * mass[:K].sum().detach().double(), PRECISION)


def test_a_model_that_tells_no_choices_is_refused_by_who_needs_them():
    """Llama 4 gives its experts tokens that are weighted already."""
    model = make_model("llama4")
    handle = attach(model, BALANCE)
    model(make_tokens())
    with pytest.raises(ValueError) as error:
        handle.loss()
    assert str(error.value) == (
        "edl::Objectives: a layer must offer what 'load_balancing' needs, experts, logits (got 2 without)"
    )
    handle = attach(model, {"router_z": (RouterZ(), 1.0)})
    model(make_tokens())
    assert handle.loss() > 0


def gives_probabilities(model):
    for router in routers_of(model).values():
        router.register_forward_hook(lambda module, args, output: (output[0].softmax(-1), *output[1:]), prepend=True)
    return model


@pytest.mark.parametrize("objective", [LoadBalancing(), RouterZ(), ExpertDivergence(D)])
def test_probabilities_are_not_taken_for_logits(objective):
    model = gives_probabilities(make_model("mixtral", torch.float64))
    handle = attach(model, {"mine": (objective, 1.0)})
    model(make_tokens())
    with pytest.raises(ValueError) as error:
        handle.loss(LABELS)
    assert str(error.value) == (
        "edl::attach: routing must be logits for 'mine'; for probabilities pass input='probs' to ExpertDivergence (got "
        "a router that gives probabilities)"
    )


def test_probabilities_are_scores():
    tokens = make_tokens()
    model = seeded_model()
    of_logits = attach(model, D, 1.0)
    model(tokens)
    wanted = of_logits.loss(LABELS)
    of_logits.remove()
    handle = attach(gives_probabilities(model), D, 1.0, input="probs")
    model(tokens)
    assert_close(handle.loss(LABELS), wanted.detach().double(), PRECISION)
    of_logits = attach(seeded_model(), D, 1.0, input="probs")
    of_logits.model(tokens)
    with pytest.raises(ValueError, match="a layer must offer what 'expert_divergence' needs, scores"):
        of_logits.loss(LABELS)


ALL = {"divergence": (ExpertDivergence(D), 0.5), **BALANCE, "concentration": (Concentration(), 0.25)}


@pytest.fixture
def mixtral():
    return make_model("mixtral", torch.float64)


def loss_of(model, handle, tokens):
    model(tokens)
    return handle.loss(LABELS)


def test_checkpointing_changes_nothing(mixtral):
    """Choices are those of the first pass, whose replays leave no trace."""
    handle, tokens = attach(mixtral, ALL), make_tokens()
    wanted = router_gradient(mixtral, loss_of(mixtral, handle, tokens))
    mixtral.gradient_checkpointing_enable()
    for _ in range(2):
        assert router_gradient(mixtral, loss_of(mixtral, handle, tokens)).equal(wanted)
    with pytest.raises(ValueError, match="takes them once"):
        handle.loss(LABELS)


@pytest.mark.parametrize("layers_of_edl", [False, True])
def test_compiled_models(layers_of_edl):
    register()
    model, tokens = make_model("mixtral", torch.float64, experts="edl", num_hidden_layers=1), make_tokens()
    if layers_of_edl:
        decoder = model.model.layers[0]
        decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    handle = attach(model, ALL)
    loss = loss_of(model, handle, tokens)
    wanted = router_gradient(model, loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled_loss = loss_of(compiled, handle, tokens)
        torch.testing.assert_close(compiled_loss, loss)
        torch.testing.assert_close(router_gradient(model, compiled_loss), wanted)


def test_wrappers_and_copies(mixtral, tmp_path):
    """DDP and FSDP2, attached before and after; a copy of the model is not attached."""
    tokens = make_tokens()
    before = attach(mixtral, ALL)
    wanted = loss_of(mixtral, before, tokens)
    mixtral(tokens)
    copy.deepcopy(mixtral)(make_tokens()[:2])
    assert before.loss(LABELS).equal(wanted)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(mixtral)
        after = attach(parallel, ALL)
        parallel(tokens)
        assert before.loss(LABELS).equal(wanted) and after.loss(LABELS).equal(wanted)
        sharded = copy.deepcopy(mixtral)
        before_sharding = attach(sharded, ALL)
        mesh = init_device_mesh("cpu", (1,))
        for part in (*(layer.mlp.experts for layer in sharded.model.layers), *sharded.model.layers, sharded):
            fully_shard(part, mesh=mesh)
        after = attach(sharded, ALL)
        sharded(tokens)
        assert before_sharding.loss(LABELS).equal(wanted) and after.loss(LABELS).equal(wanted)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:edl..attach. a router without trainable:UserWarning")
@pytest.mark.parametrize("layers_of_edl", [False, True])
@pytest.mark.parametrize("options", ["gate", "mlp", "experts"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_choices_of_what_peft_puts_in_their_place(mixtral, order, options, layers_of_edl):
    """Of copies of routers and of whole blocks, and of experts with adapters."""
    peft = pytest.importorskip("peft")
    if layers_of_edl:
        for decoder in mixtral.model.layers:
            decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    trained = {
        "gate": {"modules_to_save": ["router" if layers_of_edl else "gate"]},
        "mlp": {"modules_to_save": ["mlp"]},
        "experts": {"target_parameters": ["mlp.down_proj" if layers_of_edl else "experts.down_proj"]},
    }[options]
    handle = attach(mixtral, BALANCE) if order == "before" else None
    torch.manual_seed(1)
    model = peft.get_peft_model(mixtral, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **trained))
    handle = handle or attach(model, BALANCE)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path and path.endswith(("gate.weight", "router.weight")):
                parameter.mul_(-2)  # no longer like the module as it was
    output = model(make_tokens(), output_router_logits=True)
    loss = handle.loss()
    each = torch.stack([transformers_balance("mixtral", [logits], None) for logits in output.router_logits])
    assert_close(K * loss, each.mean().detach().double(), PRECISION)


# ---- the two forms of attach ----


def test_the_short_form_is_one_objective(mixtral):
    tokens = make_tokens()
    short = attach(mixtral, D, 0.5, eps=1e-3)
    named = attach(mixtral, num_domains=D, beta=0.5, eps=1e-3, layer_reduction="sum")
    long = attach(mixtral, Objectives({"expert_divergence": (ExpertDivergence(D, eps=1e-3), 0.5)}))
    mixtral(tokens)
    loss = long.loss(LABELS)
    assert short.loss(domain_ids=LABELS).equal(loss) and named.loss(LABELS).equal(2 * loss)
    assert short.value.equal(long.value) and named.value.equal(2 * long.value)
    assert long.values.keys() == {"expert_divergence"} and not long.value.requires_grad
    assert short.beta == named.beta == long.beta == 0.5
    named.beta = 0.25
    mixtral(tokens)
    assert named.loss(LABELS).equal(loss)


def test_several_objectives_with_labels_of_their_own(mixtral):
    """The total is that of `Objectives` on the model's own output."""
    objectives = {
        "domains": (ExpertDivergence(D), 0.5),
        "kinds": (ExpertDivergence(2, labels="modality_ids"), linear_warmup(1.0, steps=4)),
        "router_z": (RouterZ(), 0.1),
    }
    kinds = torch.randint(-1, 2, (6, 8))
    handle, plain = attach(mixtral, objectives), Objectives(objectives)
    for _ in range(3):
        output = mixtral(make_tokens(), output_router_logits=True)
        logits = [layer.unflatten(0, (6, 8)) for layer in output.router_logits]
        wanted, values = plain(logits, MASK, domain_ids=LABELS, modality_ids=kinds)
        assert handle.loss(LABELS, MASK, modality_ids=kinds).equal(wanted)
        assert handle.values == values
        for each in (plain, handle.objectives):
            each.step()
    assert handle.objectives.weights["kinds"] == 0.75


BAD_FORMS = {
    "both": (
        lambda model: attach(model, BALANCE, 1.0, eps=1e-3),
        "objectives must be given alone, as they have options and weights of their own (got beta, eps beside them)",
    ),
    "no beta": (
        lambda model: attach(model, D),
        "objectives, or num_domains and beta, must be given (got no beta)",
    ),
    "nothing": (attach, "objectives, or num_domains and beta, must be given (got no num_domains)"),
    "value of several": (
        lambda model: attach(model, ALL).value,
        (
            "value must be that of a single objective, for several there are values and objectives.weights (got "
            "['divergence', 'load_balancing', 'concentration'])"
        ),
    ),
    "text": (lambda model: attach(model, D, "1"), "beta must be a number (got '1')"),
}


@pytest.mark.parametrize("name", BAD_FORMS)
def test_what_attach_refuses(mixtral, name):
    make, sentence = BAD_FORMS[name]
    with pytest.raises(ValueError) as error:
        make(mixtral)
    assert str(error.value) == f"edl::attach: {sentence}"


def test_a_memory_is_free_when_the_short_form_is_removed(mixtral):
    memory = edl.DomainMemory()
    attach(mixtral, D, 1.0, memory=memory).remove()
    handle = attach(mixtral, D, 1.0, memory=memory)
    with pytest.raises(ValueError, match="a memory must belong to one loss"):
        attach(mixtral, D, 1.0, memory=memory)
    assert handle.objectives.memory is memory


# ---- the Trainer ----


class EDTrainer(EDTrainerMixin, Trainer):
    pass


def trainer_objectives():
    return {
        "expert_divergence": (ExpertDivergence(D), 0.3),
        "kinds": (ExpertDivergence(2, labels="modality_ids"), linear_warmup(0.4, steps=2)),
        "load_balancing": (LoadBalancing(), 0.2),
    }


def two_sets(num_rows=20):
    dataset = make_dataset(num_rows)
    return dataset.add_column("modality_ids", [row % 2 for row in range(num_rows)])


def train(args, objectives=None, dataset=None, checkpoint=None, **options):
    trainer = EDTrainer(
        seeded_model(),
        args,
        train_dataset=two_sets() if dataset is None else dataset,
        objectives=trainer_objectives() if objectives is None else objectives,
        callbacks=[recorded := Gradients()],
        **options,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.gradients = recorded.steps
    return trainer


def train_plain(args, dataset=None):
    trainer = Trainer(
        seeded_model(),
        args,
        train_dataset=(two_sets() if dataset is None else dataset).remove_columns(["domain_ids", "modality_ids"]),
        callbacks=[recorded := Gradients()],
    )
    trainer.train()
    trainer.gradients = recorded.steps
    return trainer


def in_a_plain_loop(steps, memory=None):
    """(mean total, gradient of the mean over micro-batches, what is logged) of each step."""
    model = seeded_model()
    objectives = Objectives(trainer_objectives(), memory=memory)
    handle = attach(model, objectives)
    for micro_batches in steps:
        model.zero_grad()
        totals = []
        for batch in micro_batches:
            labels = {name: torch.tensor(batch[name]) for name in ("domain_ids", "modality_ids")}
            model(torch.tensor(batch["input_ids"]))
            total = handle.loss(**labels)
            (total / len(micro_batches)).backward()
            totals.append(total.item())
        objectives.step()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        log = {name: x.item() for name, x in objectives.log().items() if not x.isnan()}
        yield sum(totals) / len(totals), gradient, log


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_step_is_that_of_a_plain_loop(tmp_path, accumulation):
    """Gradients and logs, five micro-batches: with three per step the last step has two."""
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer, plain = train(args), train_plain(args)
    dataset = two_sets()
    micro_batches = [dataset[4 * i : 4 * i + 4] for i in range(5)]
    steps = [micro_batches[i : i + accumulation] for i in range(0, 5, accumulation)]
    by_hand = list(in_a_plain_loop(steps, edl.DomainMemory(decay=0.9) if accumulation > 1 else None))
    assert_steps(added(trainer, plain), [gradient for _, gradient, _ in by_hand])
    entries, before = ([x for x in each.state.log_history if "loss" in x] for each in (trainer, plain))
    for entry, plain_entry, (total, _, log) in zip(entries, before, by_hand, strict=True):
        assert entry["loss"] == pytest.approx(plain_entry["loss"] + total, rel=1e-4)
        assert {name: entry[name] for name in log} == pytest.approx(log, rel=1e-5)
        assert entry.keys() - plain_entry.keys() == log.keys()
    assert {"kinds/nats", "load_balancing_loss", "load_balancing/layer_1", "kinds/weight"} <= entries[0].keys()


def test_two_passes_have_the_gradient_of_one_batch(tmp_path):
    accumulated = train(arguments(tmp_path, gradient_accumulation_steps=3), two_passes=True)
    at_once = train(arguments(tmp_path, per_device_train_batch_size=12))
    assert_steps(accumulated.gradients, at_once.gradients)


RANK_CASES = [(1, False), (2, True)]


def train_on_rank(folder):
    be_a_rank_of_torchrun()
    results = []
    for accumulation, two_passes in RANK_CASES:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
        args = arguments(folder, ddp_backend="gloo", **options)
        trainer = train(args, dataset=two_sets(8), two_passes=two_passes)
        results.append((trainer.gradients, trainer.state.log_history))
    return results


def test_two_processes_are_one(tmp_path):
    ranks = on_ranks(2, train_on_rank, tmp_path)
    for case, (accumulation, two_passes) in enumerate(RANK_CASES):
        args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
        trainer = train(args, dataset=two_sets(8), two_passes=two_passes)
        (wanted,) = [[x[name] for name in sorted(x) if "/" in name] for x in trainer.state.log_history[:1]]
        for results in ranks:
            gradients, log = results[case]
            assert_steps(gradients, trainer.gradients)
            assert [log[0][name] for name in sorted(log[0]) if "/" in name] == pytest.approx(wanted, rel=1e-5)


# What a checkpoint may have of objectives: everything, nothing (`save_only_model`), or the memory of former versions.
CHECKPOINTS = ["whole", "only the model", "former"]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_resumed_training_goes_on(tmp_path, kind):
    """With its memory, and at its step of a schedule."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    args = arguments(tmp_path, **options, save_steps=2, save_only_model=kind == "only the model")
    objectives = {"kinds": (ExpertDivergence(2, labels="modality_ids"), linear_warmup(0.4, steps=4))}
    whole, checkpoint = train(args, objectives), tmp_path / "checkpoint-2"
    assert (checkpoint / "objectives.pt").exists() == (kind != "only the model")
    if kind == "former":
        state = torch.load(checkpoint / "objectives.pt", weights_only=True)
        torch.save({"_extra_state": state["memory._extra_state"]}, checkpoint / "domain_memory.pt")
        (checkpoint / "objectives.pt").unlink()
    rest = train(args, objectives, checkpoint=str(checkpoint))
    weights = [[x["kinds/weight"] for x in each.state.log_history if "loss" in x] for each in (whole, rest)]
    assert weights[0] == weights[1] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    if kind == "only the model":  # a memory that begins anew tells
        with pytest.raises(AssertionError):
            assert_steps(rest.gradients, whole.gradients[2:])
    else:
        assert_steps(rest.gradients, whole.gradients[2:])


def test_a_training_begins_anew(tmp_path):
    """Also the schedule of a weight."""
    recorded = Gradients()
    trainer = EDTrainer(
        seeded_model(),
        arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=two_sets(),
        objectives=trainer_objectives(),
        callbacks=[recorded],
    )
    trainer.train()
    first = list(recorded.steps)
    trainer.train()
    assert_steps(recorded.steps[len(first) :], first)


def test_objectives_without_labels_need_no_column(tmp_path):
    dataset = make_dataset(labels=False)
    args = arguments(tmp_path)
    trainer = train(args, BALANCE, dataset)
    model = seeded_model()
    output = model(torch.tensor(dataset[:4]["input_ids"]), output_router_logits=True)
    wanted = edl.load_balancing_loss([*output.router_logits], top_k=K).item()
    assert trainer.state.log_history[0]["load_balancing_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_columns_of_labels_do_not_reach_the_model(tmp_path, remove_unused_columns):
    args = arguments(tmp_path, remove_unused_columns=remove_unused_columns, max_steps=1)
    trainer = EDTrainer(
        seeded_model(),
        args,
        train_dataset=two_sets().remove_columns("notes"),
        objectives=trainer_objectives(),
    )
    seen = []
    trainer.model.register_forward_pre_hook(lambda model, inputs, named: seen.append(set(named)), with_kwargs=True)
    trainer.train()
    assert seen and all(not names & {"domain_ids", "modality_ids"} for names in seen)


def test_a_batch_without_a_set_of_labels_is_an_error(tmp_path):
    with pytest.raises(ValueError) as error:
        train(arguments(tmp_path), dataset=make_dataset())
    assert str(error.value) == (
        "edl::EDTrainerMixin: every training batch must have modality_ids, from a column of the dataset and a collator "
        "that keeps it, such as DomainCollator (got ['domain_ids', 'input_ids', 'labels'])"
    )


@pytest.mark.parametrize("kind", ["labels", "weights"])
def test_packed_documents_with_labels_per_row_and_per_token(tmp_path, kind):
    """Documents of one row each, and the same in rows of two."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (8, 4), generator=generator)
    domains, kinds = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0]), torch.tensor([0, 1, 1, 0, 0, 1, 1, 0])
    per_token = kinds.repeat_interleave(4).view(4, 8)
    objectives = trainer_objectives()
    if kind == "weights":  # of the tokens
        kinds = torch.rand(8, 4, 2, generator=generator)
        per_token = kinds.view(4, 8, 2)
        objectives["kinds"] = (MutualInformation(2, labels="modality_ids"), 1.0)

    def value(batch):
        args = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
        trainer = train(args, objectives, data_collator=lambda examples: dict(batch))
        return [trainer.state.log_history[0][name] for name in ("expert_divergence_loss", "kinds_loss")]

    alone = value({"input_ids": tokens, "labels": tokens, "domain_ids": domains, "modality_ids": kinds})
    packed = tokens.view(4, 8)
    positions = torch.arange(4).repeat(4, 2)
    of_rows = domains[::2]  # both documents of a row have it
    together = value(
        {
            "input_ids": packed,
            "labels": packed,
            "position_ids": positions,
            "domain_ids": of_rows,
            "modality_ids": per_token,
        }
    )
    assert together == pytest.approx(alone, rel=1e-5)


def test_weights_follow_a_callback(tmp_path):
    trainer = train(arguments(tmp_path, max_steps=1))
    trainer.objectives.set_weight("kinds", 7.0)
    assert trainer.objectives.weights["kinds"] == 7.0


FORMS = {
    "both": ({"objectives": BALANCE, "num_domains": D, "beta": 1.0}, "objectives, num_domains, beta"),
    "options": ({"objectives": BALANCE, "divergence_options": {}}, "objectives, divergence_options"),
    "half": ({"num_domains": D}, "num_domains"),
    "none": ({}, "none"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_trainer_takes_one_form(tmp_path, name):
    options, got = FORMS[name]
    with pytest.raises(ValueError) as error:
        EDTrainer(seeded_model(), arguments(tmp_path), train_dataset=make_dataset(), **options)
    assert str(error.value) == (
        f"edl::EDTrainerMixin: either objectives, or num_domains and beta, must be given (got {got})"
    )


def test_objectives_that_are_bound_are_refused(tmp_path):
    bound = Objectives(BALANCE, memory=edl.DomainMemory())
    with pytest.raises(ValueError, match=r"edl::Objectives: an integration binds objectives .*that are bound\)$"):
        EDTrainer(seeded_model(), arguments(tmp_path), train_dataset=make_dataset(), objectives=bound)


# ---- labels on their way ----


def test_collating_and_packing_of_several_sets():
    examples = [
        {"input_ids": [5, 6], "domain_ids": 1, "modality_ids": [0, 1]},
        {"input_ids": [7, 8, 9], "domain_ids": 2, "modality_ids": [1, 1, 0]},
    ]
    sets = ("domain_ids", "modality_ids")
    batch = DomainCollator(DataCollatorWithFlattening(), sets)(examples)
    assert batch["domain_ids"].tolist() == [[1, 1, 2, 2, 2]] and batch["modality_ids"].tolist() == [[0, 1, 1, 1, 0]]
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    packed = pack_documents(columns, 5, sets)
    assert packed["domain_ids"] == [[1, 1, 2, 2, 2]] and packed["modality_ids"] == [[0, 1, 1, 1, 0]]
    with pytest.raises(ValueError, match="every example must have modality_ids"):
        DomainCollator(DataCollatorWithFlattening(), sets)([examples[0], {"input_ids": [7], "domain_ids": 2}])
    with pytest.raises(ValueError, match="a column modality_ids"):
        pack_documents({"input_ids": [[1]], "domain_ids": [0]}, 1, sets)
    assert pack_documents({"input_ids": [[5, 6], [7]]}, 3, []).keys() == {"input_ids", "labels", "position_ids"}
    for name in ("labels", "modality_ids"):
        with pytest.raises(ValueError, match=rf"every document must have {name} \(got 1 for 2 documents\)"):
            pack_documents({**columns, name: [[0, 1]]}, 5, sets)
    with pytest.raises(ValueError, match="label_sets must be names of columns"):
        DomainCollator(DataCollatorWithFlattening(), "domain_ids")
