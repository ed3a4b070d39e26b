"""What the tests of routers with several objectives run on ranks of their own."""

import argparse
import dataclasses
import warnings

import megatron_on_cpu
import objective_splits
import one_rank
import splits
import torch

import edl
from edl.objectives import (
    ExpertDivergence,
    LoadBalancing,
    ModalityDivergence,
    ModalityMutualInformation,
    MutualInformation,
    Objective,
    Objectives,
    RouterZ,
    linear_warmup,
)

ROUTER_Z = Objectives({"router_z": (RouterZ(), 0.5)})


def _model(objectives, patch_options=None, parallel=None, **config):
    import small_gpt
    from megatron.core import parallel_state

    from edl.integrations import megatron as edl_megatron

    megatron_on_cpu.enable()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(**(parallel or {}))
    patch = lambda spec: edl_megatron.patch_spec(spec, objectives, **(patch_options or {}))
    return small_gpt.build(small_gpt.make_config(**config, **(parallel or {})), patch)


def _train_step(model, domain_ids=None):
    import small_gpt

    step = small_gpt.make_step()
    batches = small_gpt.rank_batches(small_gpt.Step(step.tokens, step.domain_ids if domain_ids is None else domain_ids))
    scope = lambda batch: edl.domain_scope(batch["domain_ids"])
    forward_step = lambda it, model: small_gpt.forward_step(next(it), model, scope)
    return small_gpt.train_step(model, batches, forward_step, iter(batches))


def logged(pp: int, moe_layers: list[int], config: dict):
    """What Megatron's log shows of a step with all objectives, and of one whose labels make no pair."""
    parallel = {"pipeline_model_parallel_size": pp}
    model = _model(objective_splits.objectives(), parallel=parallel, moe_layer_freq=moe_layers, **config)
    shown = []
    for domain_ids in (None, torch.ones(2, 4, dtype=torch.long)):
        _train_step(model, domain_ids)
        shown.append(one_rank.shown_of_step(2, moe_layers))
    return shown


def plain_values():
    """By name, the mean over the micro-batches of the step in one process."""
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel()
    _, values = objective_splits.plain(splits.ONE.reference)
    return {name: sum(of_batch[name] for of_batch in values) / len(values) for name in values[0]}


def schedules():
    """The weights of a schedule of eight steps after each of three, of which none or six were taken before; whether the
    first changes gradients; and what is said where nothing ends a step."""
    import small_gpt

    objectives = Objectives({"router_z": (RouterZ(), linear_warmup(1.0, 8))})
    seen = []
    for steps_taken in (None, lambda: 6):
        model = _model(objectives, {"steps_taken": steps_taken})
        routers = [layer.mlp.router.objectives for layer in model.decoder.layers]
        weights = []
        for _ in range(3):
            _train_step(model)
            weights.append([float(router.weights["router_z"]) for router in routers])
        seen.append(weights)
    model = _model(objectives)
    first = _train_step(model)
    plain = small_gpt.reference_gradients(small_gpt.make_step(), coeff=0.0)[0]
    is_plain = all(torch.allclose(first[name], plain[name], rtol=1e-9, atol=1e-12) for name in plain)
    model.config.finalize_model_grads_func = None
    logits = torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    return seen, is_plain, sentence(model.decoder.layers[0].mlp.router.routing, logits)


def sentence(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError, OSError) as error:
        return str(error)
    return "no error"


def outside_of_a_scope():
    """Of routers outside of any scope: the gradient of logits [S_len, B, E] and [T, E], the one of a plain loop over
    those objectives that need no labels, and what was warned of."""
    import small_gpt

    logits = torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(8).view(8, 1) >= torch.tensor([8, 3, 5, 8])
    results = {}
    for name, objectives in (("without labels", ROUTER_Z), ("both", objective_splits.objectives())):
        router = _model(objectives).decoder.layers[0].mlp.router.train()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            probs, routing_map = router.routing(logits, padding)
            flat_probs, _ = router.routing(logits.view(32, -1), padding.view(32))
        warned = [str(warning.message) for warning in caught]
        (gradient,) = torch.autograd.grad(0.0 * probs.sum(), logits)
        (of_flat,) = torch.autograd.grad(0.0 * flat_probs.sum(), logits)
        experts = routing_map.nonzero()[:, 1].view(32, -1)
        observation = edl.routing.Observation(logits.view(32, -1), experts=experts)
        label_free = {
            each: (objective, objectives._given_weights[each])
            for each, objective in objectives.objectives.items()
            if objective.labels is None
        }
        loss, _ = Objectives(label_free)(observation, padding_mask=padding.view(32))
        (wanted,) = torch.autograd.grad(loss / small_gpt.LAYERS, logits)
        results[name] = (gradient, of_flat, wanted, warned)
    return results


def sequences_and_weights_of_tokens():
    """What routing adds to the gradient of logits [S_len, B, E] under weights per token, of two sets, and a plain loop
    over those of [B, S_len, E]; the same of logits [T, E], of which the second set tells B."""
    import small_gpt

    given = {
        "load_balancing": (LoadBalancing(scope="sequence", devices=small_gpt.EXPERTS // 2), 1.0),
        "information": (MutualInformation(3), 1.0),
        "bins": (ModalityMutualInformation(2, bins=small_gpt.EXPERTS), 1.0),
    }
    router = _model(Objectives(given)).decoder.layers[0].mlp.router.train()
    logits = torch.randn(6, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    weights, modalities = torch.rand(4, 6, 3, dtype=torch.float64), torch.rand(4, 6, 2, dtype=torch.float64)
    keep = torch.arange(6) < torch.tensor([[6], [2], [5], [4]])
    with edl.domain_scope(weights, attention_mask=keep, modality_ids=modalities):
        probs, routing_map = router.routing(logits)
    (gradient,) = torch.autograd.grad(0.0 * probs.sum(), logits)
    with edl.domain_scope(weights.flatten(0, 1), attention_mask=keep.flatten(), modality_ids=modalities):
        flat_probs, _ = router.routing(logits.view(24, -1))
    (of_flat,) = torch.autograd.grad(0.0 * flat_probs.sum(), logits)
    experts = routing_map.nonzero()[:, 1].view(6, 4, -1).transpose(0, 1).flatten(0, 1)
    observation = edl.routing.Observation(logits.transpose(0, 1).flatten(0, 1), experts=experts)
    loss, _ = Objectives(given)(observation, keep, domain_ids=weights, modality_ids=modalities)
    (wanted,) = torch.autograd.grad(loss / small_gpt.LAYERS, logits)
    return gradient, of_flat, wanted


def boundaries_alone():
    """What routing adds to the gradient of logits in a scope with nothing but boundaries, and a plain loop; and what is
    said there where an objective needs labels."""
    import small_gpt

    given, boundaries = {"balance": (LoadBalancing(scope="sequence"), 1.0)}, torch.tensor([0, 5, 12])
    router = _model(Objectives(given)).decoder.layers[0].mlp.router.train()
    logits = torch.randn(12, 1, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    with edl.domain_scope(cu_seqlens=boundaries):
        probs, routing_map = router.routing(logits)
    (gradient,) = torch.autograd.grad(0.0 * probs.sum(), logits)
    observation = edl.routing.Observation(logits.flatten(0, 1), experts=routing_map.nonzero()[:, 1].view(12, -1))
    loss, _ = Objectives(given)(observation, cu_seqlens=boundaries)
    (wanted,) = torch.autograd.grad(loss / small_gpt.LAYERS, logits)
    sentences = []
    for objective in (ExpertDivergence(3), ModalityDivergence()):
        router = _model(Objectives({"objective": (objective, 1.0)})).decoder.layers[0].mlp.router.train()
        sentences.append(sentence(_in_scope, router, logits, None, topics=torch.zeros(1), cu_seqlens=boundaries))
    return gradient, wanted, sentences


def masks_of_a_scope():
    """What routing adds to the gradient of logits under a scope's masks, flat or not, and a plain loop."""
    import small_gpt

    router = _model(objective_splits.objectives(without="expert_divergence")).decoder.layers[0].mlp.router.train()
    logits = torch.randn(6, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(6) < torch.tensor([[6], [2], [5], [4]])).long()
    ids = torch.tensor([0, 1, 2, 1])
    results = []
    for rows, scope in (
        (logits, {"attention_mask": mask}),
        (logits.view(24, -1), {"attention_mask": mask}),
        (logits.view(24, -1), {"padding_mask": mask == 0}),
        (logits, {"attention_mask": mask.flatten()}),
    ):
        with edl.domain_scope(ids, **scope):
            probs, routing_map = router.routing(rows)
        (gradient,) = torch.autograd.grad(0.0 * probs.sum(), logits)
        by_sequence = lambda x: x.view(6, 4, -1).transpose(0, 1).reshape(24, -1)
        experts = by_sequence(routing_map).nonzero()[:, 1].view(24, -1)
        observation = edl.routing.Observation(by_sequence(logits), experts=experts)
        plain = objective_splits.objectives(without="expert_divergence")
        loss, _ = plain(observation, attention_mask=mask.flatten())
        results.append((gradient, torch.autograd.grad(loss / small_gpt.LAYERS, logits)[0]))
    with edl.domain_scope(torch.arange(24) % 3):  # B cannot be told, and need not be
        probs, _ = router.routing(logits.view(24, -1))
    told = sentence(_in_scope, router, logits.view(24, -1), torch.arange(24) % 3, attention_mask=mask.flatten())
    return results, bool(torch.autograd.grad(0.0 * probs.sum(), logits)[0].abs().sum() > 0), told


def _in_scope(router, logits, ids, **scope):
    with edl.domain_scope(ids, **scope):
        router.routing(logits)


@dataclasses.dataclass(frozen=True)
class _Weights(Objective):
    """An objective of the weights of choices: the mean of their squares."""

    needs = frozenset({"weights", "experts"})

    def of_tokens(self, layers, segments):
        kept = (segments.segment_ids == 0).unsqueeze(1)
        squares = torch.stack([(layer.weights.square() * kept).sum() for layer in layers])
        missing = torch.stack([(layer.experts == 4).double().sum() for layer in layers])
        return {"squares": squares, "missing": missing, "tokens": kept.double().sum().expand(len(layers))}

    def formula(self, sums):
        return sums["squares"] / sums["tokens"]

    def measures(self, sums):
        return {"missing": sums["missing"].sum()}


def choices():
    """The gradient of routers' logits by an objective of weights, that of Megatron's own weights, and how many choices
    are missing where an own router chooses fewer; and what is said where it chooses more."""
    import small_gpt
    from megatron.core.transformer.moe.router import TopKRouter

    router = _model(Objectives({"weights": (_Weights(), 3.0)})).decoder.layers[0].mlp.router.train()
    logits = torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    probs, _ = router.routing(logits)
    (gradient,) = torch.autograd.grad(0.0 * probs.sum(), logits)
    plain, _ = TopKRouter.routing(router.eval(), logits)
    (wanted,) = torch.autograd.grad(3.0 / small_gpt.LAYERS * plain.square().sum() / 32, logits)
    routing, sentences, missing = TopKRouter.routing, [], None
    for changed in (lambda chosen: chosen & (torch.arange(4) != 2), torch.ones_like):

        def other(self, logits, padding_mask=None, changed=changed):
            probs, chosen = routing(self, logits, padding_mask=padding_mask)
            return probs, changed(chosen)

        TopKRouter.routing = other
        sentences.append(sentence(router.train().routing, logits))
        TopKRouter.routing = routing
        if missing is None:
            chosen = routing(router, logits)[1]
            counts = router.objectives.take_sums()["weights"]["missing"]
            missing = (float(counts[0]), float(chosen[:, 2].sum()))
    return gradient, wanted, missing, sentences


def errors(folder: str):
    """Sentences, by what is wrong."""
    from pathlib import Path

    import small_gpt
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from edl.integrations.megatron import EDTopKRouter, add_arguments, options, patch_spec

    model = _model(ROUTER_Z)
    assert model is not None
    layer, all_three = get_gpt_layer_local_spec(num_experts=4), objective_splits.objectives()
    router = lambda objectives, **changes: sentence(
        EDTopKRouter, small_gpt.make_config(**changes), get_default_pg_collection(), objectives=objectives
    )
    hybrid = small_gpt.make_config()
    hybrid.is_hybrid_model = True
    parse = lambda *arguments: options(add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(arguments))
    file, wrong = Path(folder) / "objectives.json", Path(folder) / "wrong.json"
    file.write_text('{"router_z": {"weight": 1}}')
    wrong.write_text("{")
    aux_loss = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    sentences = {
        "bound": sentence(patch_spec, layer, all_three.bind(memory=edl.DomainMemory())),
        "two": sentence(patch_spec, layer, all_three, objectives=all_three),
        "mapping": sentence(patch_spec, layer, objectives={"router_z": (RouterZ(), 1.0)}),
        "coefficient": sentence(patch_spec, layer, all_three, 0.1),
        "eps": sentence(patch_spec, layer, all_three, eps=1e-3),
        "no coefficient": sentence(patch_spec, layer, 3),
        "one domain": sentence(patch_spec, layer, 1, 0.1),
        "dropped tokens": router(all_three, moe_expert_capacity_factor=1.0, moe_token_dispatcher_type="alltoall"),
        "hybrid": sentence(EDTopKRouter, hybrid, get_default_pg_collection(), objectives=all_three),
        "Megatron's name": router(all_three, **aux_loss),
        "both flags": sentence(parse, "--objectives", str(file), "--expert-divergence-coeff", "0.1"),
        "both options": sentence(parse, "--objectives", str(file), "--expert-divergence-bias-correction"),
        "no JSON": sentence(parse, "--objectives", str(wrong)),
        "no file": sentence(parse, "--objectives", str(file) + "x"),
    }
    args = add_arguments(argparse.ArgumentParser()).parse_args(
        ["--objectives", str(file), "--expert-divergence-accumulate"]
    )
    rest = options(args)
    args.iteration = 7  # as Megatron-LM sets it when it has loaded a checkpoint, after the model was built
    return sentences, list(rest.pop("objectives").objectives), {**rest, "steps_taken": rest["steps_taken"]()}


def scores():
    """The gradient of logits where the divergence reads scores, and where it reads logits."""
    import small_gpt

    logits = torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    gradients = []
    for form in ("probs", "logits"):
        objectives = Objectives({"divergence": (ExpertDivergence(3, input=form), 1.0)})
        router = _model(objectives).decoder.layers[0].mlp.router.train()
        with edl.domain_scope(torch.tensor([0, 1, 2, 0])):
            probs, _ = router.routing(logits)
        gradients.append(torch.autograd.grad(0.0 * probs.sum(), logits)[0])
    return gradients


def collectives():
    """The all-reduces of one router's loss over two data-parallel ranks, after the first."""
    import small_gpt
    from ranks import Collectives

    router = _model(objective_splits.objectives()).decoder.layers[0].mlp.router.train()
    logits = torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        with edl.domain_scope(torch.tensor([0, 1, 2, 0])), Collectives() as seen:
            router.routing(logits)
    return seen.names


def unlabelled_data():
    """Whether a forward step without labels goes through `with_domain_ids` where no objective needs these."""
    from edl.integrations.megatron import with_domain_ids

    seen = []

    def forward_step(data_iterator, model):
        seen.append((next(data_iterator), edl.current_labels()))

    for objectives in (ROUTER_Z, Objectives({"modalities": (ModalityDivergence(), 1.0)})):
        with_domain_ids(forward_step)(iter([{"tokens": 0}]), _model(objectives).train())
    return seen
