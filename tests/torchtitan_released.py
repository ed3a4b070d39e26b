"""A small model of the installed torchtitan's own Mixture-of-Experts layers, and what the tests run on it."""

import copy
import dataclasses
import importlib.util
import json
import sys
import types
import unittest.mock
import warnings

import torch
import torch.distributed as dist
import torchtitan_objectives as samples
from ranks import Collectives
from torch.distributed.tensor import DTensor

import edl

NUM_DOMAINS, NUM_EXPERTS, SIZE, COEFF = 3, 8, 16, 0.7
BATCH, LENGTH = 4, 6
DOMAINS = torch.tensor([0, 1, 2, 0])


def without_triton():
    """Lets torchtitan be imported without Triton: what needs it is one of its expert-parallel backends, for GPUs."""
    name = "torchtitan.distributed.minimal_async_ep"
    if importlib.util.find_spec("triton") is None and name not in sys.modules:
        names = "combine_op dispatch_op init_buffer maybe_update_minimal_async_ep_config MinimalAsyncEPDispatchMetadata"
        sys.modules[name] = types.SimpleNamespace(**dict.fromkeys(names.split(), object))


def model_config(score_func="sigmoid"):
    """Two Mixture-of-Experts layers, as a torchtitan model's configuration holds them."""
    from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config
    from torchtitan.protocols.module import Module, ModuleDict

    class Model(Module):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(Module.Config):
            layers: list

        def __init__(self, config):
            super().__init__()
            self.layers = ModuleDict({str(i): layer.build() for i, layer in enumerate(config.layers)})

        def forward(self, hidden):
            for layer in self.layers.values():
                hidden = hidden + layer(hidden.detach())  # the loss of a layer reaches its own gate alone
            return hidden

    def normal(parameter):
        return torch.nn.init.normal_(parameter, std=0.3)

    sizes = {"dim": SIZE, "num_experts": NUM_EXPERTS, "top_k": 2}
    weights = ["w1_EFD", "w2_EDF", "w3_EFD"]
    return Model.Config(
        layers=[
            make_moe_config(
                num_experts=NUM_EXPERTS,
                router=make_router_config(**sizes, gate_param_init={"weight": normal}, score_func=score_func),
                routed_experts=make_routed_experts_config(
                    **sizes, hidden_dim=SIZE, param_init=dict.fromkeys(weights, normal), comm_backend="standard"
                ),
            )
            for _ in range(2)
        ]
    )


def build(config, dims=None):
    torch.manual_seed(1)
    model = config.build()
    model.init_states()
    return _parallelize(model, dims).train() if dims is not None else model.train()


def with_divergence(score_func="sigmoid", dims=None, **options):
    from edl.integrations.torchtitan import add_expert_divergence

    config = model_config(score_func)
    add_expert_divergence(config, num_domains=NUM_DOMAINS, coeff=COEFF, **options)
    return build(config, dims)


def with_objectives(objectives, dims=None, **options):
    from edl.integrations.torchtitan import add_objectives

    config = model_config()
    add_objectives(config, objectives, **options)
    return build(config, dims)


def inputs():
    return torch.randn(BATCH, LENGTH, SIZE, generator=torch.Generator().manual_seed(2))


def gate_gradients(model):
    gradients = [module.gate.weight.grad for module in model.modules() if hasattr(module, "gate")]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for grad in gradients]


def expected(domain_ids, score_func="sigmoid", micro_batches=1, memory=False, model=None):
    """(gradients of the gates, latest losses of the layers) of one process in float64, fed what the layers see."""
    model, hidden = build(model_config(score_func)) if model is None else model, inputs()
    gradients, losses = [], []
    for layer in model.layers.values():
        weight = layer.router.gate.weight.detach().double().requires_grad_()
        total, earlier = 0.0, []
        for count, batch in enumerate(hidden.chunk(micro_batches), start=1):
            logits = torch.nn.functional.linear(batch.double(), weight)
            known = torch.cat([*earlier, logits])
            ids = domain_ids.chunk(micro_batches)[count - 1] if not memory else domain_ids[: known.shape[0]]
            loss = edl.expert_divergence_loss(known, ids, NUM_DOMAINS, scores=score_func)
            total = total + loss * (count if memory else 1) / micro_batches
            if memory:
                earlier.append(logits.detach())
        gradients.append(torch.autograd.grad(total * COEFF / len(model.layers), weight)[0])
        losses.append(loss.detach())
        with torch.no_grad():
            hidden = hidden + layer(hidden)
    return gradients, losses


def train(model, domain_ids, batch=None, language_model=0.0, **labels):
    """A forward and a backward pass. The factor 0 leaves the gradient of Expert Divergence alone."""
    with edl.domain_scope(domain_ids, **labels):
        output = model(inputs() if batch is None else batch)
    (output * language_model).sum().backward()
    return output


def results(model):
    from edl.integrations.torchtitan import layer_losses

    return gate_gradients(model), list(layer_losses(model).values())


def scores_of_every_kind():
    """Per score function: what the model gives, and what one process in float64 does."""
    found = {}
    for score_func in ("sigmoid", "softmax"):
        model = with_divergence(score_func)
        train(model, DOMAINS)
        found[score_func] = results(model), expected(DOMAINS, score_func)
    return found


def accumulation_with_memory():
    """Two micro-batches, the first with one domain, in two steps; between them torchtitan's hook ends the step."""
    from edl.integrations.torchtitan import register_step_hook

    domain_ids = torch.tensor([0, 0, 1, 2])
    model = with_divergence(micro_batches=2, memory=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    register_step_hook(optimizer, [model], None)
    steps = []
    for _ in range(2):
        model.zero_grad()
        for batch, ids in zip(inputs().chunk(2), domain_ids.chunk(2)):
            train(model, ids, batch)
        steps.append(results(model))
        optimizer.step()
    return steps, expected(domain_ids, micro_batches=2, memory=True)


def without_a_pair():
    """Metrics of a pass with two domains and of one with none; the losses of the first; warnings of steps without."""
    from edl.integrations.torchtitan import layer_losses, objective_metrics

    model = with_divergence()
    train(model, DOMAINS)
    losses = list(layer_losses(model).values())
    train(model, torch.full_like(DOMAINS, -1))
    metrics = objective_metrics(model)
    with (
        unittest.mock.patch("edl.objectives.log.STEPS_WITHOUT_EFFECT", 4),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for _ in range(8):
            train(model, torch.zeros_like(DOMAINS))
    return metrics, losses, [str(warning.message) for warning in caught if "two domains" in str(warning.message)]


def wrong_number_of_micro_batches():
    from edl.integrations.torchtitan import register_step_hook

    model = with_divergence(micro_batches=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    register_step_hook(optimizer, [model])
    train(model, DOMAINS)
    return sentence(optimizer.step)


def beside_a_language_model_loss():
    """Gradients of the gates with both losses; with the language model's alone; and by torchtitan's own router."""
    both, alone, own = with_divergence(), with_divergence(), build(model_config())
    train(both, DOMAINS, language_model=1.0)
    output = alone(inputs())
    output.sum().backward()
    expected_output = own(inputs())
    expected_output.sum().backward()
    return {
        "both": gate_gradients(both),
        "alone": gate_gradients(alone),
        "own": gate_gradients(own),
        "outputs": (output.detach(), expected_output.detach()),
        "keys": (list(both.state_dict()), list(own.state_dict())),
    }


def checkpointed():
    """Gradients and losses under each policy of torchtitan, with a later micro-batch of one domain in flight."""
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    plain = with_divergence()
    train(plain, DOMAINS)
    found = {"none": results(plain)[0]}
    for policy in (FullAC, SelectiveAC):
        model = with_divergence()
        policy.Config().build().apply(model)
        with edl.domain_scope(DOMAINS):
            output = model(inputs())
        with edl.domain_scope(torch.zeros_like(DOMAINS)):
            model(inputs().flip(0))
        (output * 0.0).sum().backward()
        found[policy.__name__] = results(model)[0]
    return found


def copied():
    """A model that is copied before it is trained, as pipeline parallelism does it."""
    model = copy.deepcopy(with_divergence(memory=True))
    train(model, DOMAINS)
    return results(model), expected(DOMAINS)


def of_plain_loop(bound, batches, shares):
    """(gradients of the gates, values of each batch and layer) of one process in float64, fed what the layers see."""
    model, gradients, values = build(model_config()), [], []
    for layer in model.layers.values():
        gradient, of_layer = samples.plain_loop(bound, layer.router.gate.weight, batches, shares)
        gradients.append(gradient / len(model.layers))
        values.append(of_layer)
        with torch.no_grad():
            batches = [(hidden + layer(hidden), arguments) for hidden, arguments in batches]
    return gradients, values


def several_objectives():
    """Two micro-batches: (gradients, metrics, latest losses of the layers), and (gradients, values) of a plain loop."""
    from edl.integrations.torchtitan import layer_losses, objective_metrics

    model = with_objectives(samples.objectives(), micro_batches=2)
    for batch, ids in zip(inputs().chunk(2), DOMAINS.chunk(2)):
        train(model, ids, batch)
    losses = {name: list(layer_losses(model, name).values()) for name in ("sequences", "tokens", "certainty")}
    batches = [(hidden, {"domain_ids": ids}) for hidden, ids in zip(inputs().chunk(2), DOMAINS.chunk(2))]
    expected_of_loop = of_plain_loop(samples.objectives("sigmoid"), batches, [0.5, 0.5])
    return (gate_gradients(model), objective_metrics(model), losses), expected_of_loop


def two_sets_of_labels():
    """As `several_objectives`, with another set of labels by its name; and what is said where it is missing."""
    from edl.integrations.torchtitan import objective_metrics

    model = with_objectives(samples.of_two_sets())
    train(model, DOMAINS, modality_ids=samples.MODALITIES)
    of_loop = of_plain_loop(
        samples.of_two_sets("sigmoid"),
        [(inputs(), {"domain_ids": DOMAINS, "modality_ids": samples.MODALITIES})],
        [1.0],
    )
    return (gate_gradients(model), objective_metrics(model)), of_loop, sentence(train, model, DOMAINS)


def configured_by_hand():
    """Gradients with routers that derive from `ObjectivesRouter`, and with those of `add_objectives`."""
    from edl.integrations.torchtitan import ObjectivesRouter

    class OtherRouter(ObjectivesRouter):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(ObjectivesRouter.Config):
            pass

    config = model_config()
    for layer in config.layers:
        same = {field.name: getattr(layer.router, field.name) for field in dataclasses.fields(layer.router)}
        layer.router = OtherRouter.Config(**same, coeff=1 / 2, objectives=samples.objectives())
    models = build(config), with_objectives(samples.objectives())
    for model in models:
        train(model, DOMAINS)
    return [gate_gradients(model) for model in models]


def outside_any_scope():
    """Gradients and metrics of a pass without labels, and of a plain loop in which no token has one."""
    from edl.integrations.torchtitan import objective_metrics

    model = with_objectives(samples.objectives())
    (model(inputs()) * 0.0).sum().backward()
    none = torch.full((BATCH,), -1)
    expected_of_loop = of_plain_loop(samples.objectives("sigmoid"), [(inputs(), {"domain_ids": none})], [1.0])
    return (gate_gradients(model), objective_metrics(model)), expected_of_loop


def warmed_up():
    """(weight, gradient of a gate) of each step of two micro-batches, with the hook and without; of a resumed model."""
    from edl.integrations.torchtitan import objective_metrics, register_step_hook, set_step

    def step(model):
        model.zero_grad()
        for batch, ids in zip(inputs().chunk(2), DOMAINS.chunk(2)):
            train(model, ids, batch)
        return objective_metrics(model)["divergence/weight"].item(), gate_gradients(model)[0]

    found = {}
    for name in ("hook", "no hook"):
        model = with_objectives(samples.warmed_up(), micro_batches=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if name == "hook":
            register_step_hook(optimizer, [model])
        found[name] = []
        for _ in range(6):
            found[name].append(step(model))
            optimizer.step()
    resumed = with_objectives(samples.warmed_up(), micro_batches=2)
    set_step(resumed, 3)
    return found, [step(resumed), step(resumed)]


def memory_without_a_hook():
    """As `accumulation_with_memory`: a step is then two passes."""
    domain_ids = torch.tensor([0, 0, 1, 2])
    model = with_divergence(micro_batches=2, memory=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="edl")
        for _ in range(2):
            model.zero_grad()
            for batch, ids in zip(inputs().chunk(2), domain_ids.chunk(2)):
                train(model, ids, batch)
            steps.append(results(model))
            optimizer.step()
    return steps, expected(domain_ids, micro_batches=2, memory=True)


def built_on_meta():
    """A model that is built without memory, as torchtitan's Trainer does it; and its configuration in JSON."""
    from edl.integrations.torchtitan import add_expert_divergence

    config = model_config()
    add_expert_divergence(config, num_domains=NUM_DOMAINS, coeff=COEFF)
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    model.init_states()
    train(model.train(), DOMAINS)
    reference = build(model_config())
    reference.load_state_dict(model.state_dict())
    return results(model), expected(DOMAINS, model=reference), json.dumps(config.to_dict())


def evaluated():
    """Gradients in evaluation mode, by the model and by torchtitan's own."""
    model, own = with_divergence().eval(), build(model_config()).eval()
    train(model, DOMAINS, language_model=1.0)
    train(own, DOMAINS, language_model=1.0)
    return gate_gradients(model), gate_gradients(own)


def sentence(function, *arguments, **options):
    """What a call complains of."""
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return None


def refused():
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    from edl.integrations.torchtitan import add_expert_divergence

    class OtherRouter(TokenChoiceTopKRouter):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(TokenChoiceTopKRouter.Config):
            pass

    def with_another_router():
        config = model_config()
        router = config.layers[1].router
        same = {field.name: getattr(router, field.name) for field in dataclasses.fields(router)}
        config.layers[1].router = OtherRouter.Config(**same)
        return config

    from edl.integrations.torchtitan import add_objectives, layer_losses

    arguments = {"num_domains": NUM_DOMAINS, "coeff": COEFF}
    twice, other, untouched = model_config(), with_another_router(), model_config()
    add_expert_divergence(twice, **arguments)
    return {
        "twice": sentence(add_expert_divergence, twice, **arguments),
        "no router": sentence(add_expert_divergence, model_config().layers[0].routed_experts, **arguments),
        "another router": sentence(add_expert_divergence, other, **arguments),
        "left alone": type(other.layers[0].router) is TokenChoiceTopKRouter.Config,
        "micro_batches": sentence(with_divergence, micro_batches=0),
        "objectives": samples.refused(add_objectives, untouched),
        "untouched": type(untouched.layers[0].router) is TokenChoiceTopKRouter.Config,
        "unknown objective": sentence(layer_losses, with_divergence(), "balance"),
    }


SINGLE = (
    scores_of_every_kind,
    accumulation_with_memory,
    without_a_pair,
    wrong_number_of_micro_batches,
    beside_a_language_model_loss,
    checkpointed,
    copied,
    several_objectives,
    two_sets_of_labels,
    configured_by_hand,
    outside_any_scope,
    warmed_up,
    memory_without_a_hook,
    built_on_meta,
    evaluated,
    refused,
)


def on_one_process():
    """What every function above returns, by its name."""
    without_triton()
    return {function.__name__: function() for function in SINGLE}


def _parallel(context_size=1, tensor_size=1):
    """torchtitan's dimensions and training context for all ranks, on the CPU."""
    from torchtitan.distributed import ParallelDims, parallel_dims, utils

    parallel_dims.device_type = "cpu"
    degrees = {"dp_replicate": 1, "cp": context_size, "tp": tensor_size, "pp": 1, "ep": 1}
    data_size = dist.get_world_size() // (context_size * tensor_size)
    dims = ParallelDims(**degrees, dp_shard=data_size, world_size=dist.get_world_size(), spmd_backend="spmd_types")
    dims.build_mesh()
    return dims, utils.get_spmd_context(parallel_dims=dims)


def _parallelize(model, dims):
    """FSDP that adds gradients up and divides by nothing, over all ranks that share a batch or its sequences.

    As torchtitan does it, but for its `Module.parallelize`: that needs an FSDP newer than torch 2.13's.
    """
    from torch.distributed.fsdp import fully_shard
    from torchtitan.distributed.fsdp import disable_fsdp_gradient_division

    for module in (*model.layers.values(), model):
        fully_shard(module, mesh=dims.get_mesh("loss")).set_force_sum_reduction_for_comms(True)  # gloo has no other
    disable_fsdp_gradient_division(model)
    return model


def data_parallel(micro_batches):
    """A step in which each rank has its part of every micro-batch."""
    dims, context = _parallel()
    model = with_divergence(dims=dims, micro_batches=micro_batches)
    for batch, labels in zip(inputs().chunk(micro_batches), DOMAINS.chunk(micro_batches)):
        mine, ids = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in (batch, labels))
        with context():
            train(model, ids, mine)
    return results(model), expected(DOMAINS, micro_batches=micro_batches)


def context_parallel(domain_ids):
    """A step in which each rank has a slice of every sequence, and of its labels where they are per token."""
    dims, context = _parallel(context_size=dist.get_world_size())
    model = with_divergence(dims=dims)

    def slice_of(tokens):
        return tokens.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous()

    with context():
        train(model, domain_ids if domain_ids.dim() == 1 else slice_of(domain_ids), slice_of(inputs()))
    return results(model), expected(domain_ids)


def several_objectives_of_data_parallel():
    """As `several_objectives`, one sequence of each micro-batch on each rank; and the all-reduces of a forward pass."""
    from edl.integrations.torchtitan import objective_metrics

    dims, context = _parallel()
    model = with_objectives(samples.objectives(), dims=dims, micro_batches=2)
    batches = list(zip(inputs().chunk(2), DOMAINS.chunk(2)))
    for batch, labels in batches:
        mine, ids = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in (batch, labels))
        with context(), edl.domain_scope(ids):
            with Collectives() as collectives:
                output = model(mine)
            (output * 0.0).sum().backward()
    of_loop = of_plain_loop(
        samples.objectives("sigmoid"), [(hidden, {"domain_ids": ids}) for hidden, ids in batches], [0.5, 0.5]
    )
    return (gate_gradients(model), objective_metrics(model)), of_loop, collectives.names.count("all_reduce")


def several_objectives_of_context_parallel():
    from edl.integrations.torchtitan import objective_metrics

    dims, context = _parallel(context_size=dist.get_world_size())
    model = with_objectives(samples.objectives(), dims=dims)
    with context():
        train(model, DOMAINS, inputs().chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous())
    of_loop = of_plain_loop(samples.objectives("sigmoid"), [(inputs(), {"domain_ids": DOMAINS})], [1.0])
    return (gate_gradients(model), objective_metrics(model)), of_loop


def two_sets_of_labels_of_context_parallel():
    """As `several_objectives_of_context_parallel`: labels of tokens are those of the slice."""
    from edl.integrations.torchtitan import objective_metrics

    dims, context = _parallel(context_size=dist.get_world_size())
    model = with_objectives(samples.of_two_sets(), dims=dims)
    hidden, modalities = (
        whole.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous()
        for whole in (inputs(), samples.MODALITIES)
    )
    with context():
        train(model, DOMAINS, hidden, modality_ids=modalities)
    labels = {"domain_ids": DOMAINS, "modality_ids": samples.MODALITIES}
    of_loop = of_plain_loop(samples.of_two_sets("sigmoid"), [(inputs(), labels)], [1.0])
    return (gate_gradients(model), objective_metrics(model)), of_loop


def refused_on_ranks():
    _dims, context = _parallel(tensor_size=dist.get_world_size())
    found = {"no mesh": sentence(train, with_divergence(), DOMAINS)}
    with context():
        found["tensor parallel"] = sentence(train, with_divergence(), DOMAINS)
    return found


def on_ranks_of_torchtitan():
    """What the functions on ranks return."""
    without_triton()
    per_token = torch.randint(-1, NUM_DOMAINS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    return {
        "data": data_parallel(1),
        "data and micro-batches": data_parallel(2),
        "context": context_parallel(DOMAINS),
        "context, labels per token": context_parallel(per_token),
        "several objectives, data": several_objectives_of_data_parallel(),
        "several objectives, context": several_objectives_of_context_parallel(),
        "two sets of labels, context": two_sets_of_labels_of_context_parallel(),
        "refused": refused_on_ranks(),
    }
