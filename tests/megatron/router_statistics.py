"""What the tests of statistics run on ranks of their own: Megatron's routers under a split of the model."""

import contextlib
import dataclasses
import types
import warnings

import megatron_on_cpu
import splits
import torch

import edl
from edl.objectives import LoadBalancing, Objectives, RouterZ

DOMAINS = ["a", "b", "c"]
OBJECTIVES = {"router_z": (RouterZ(), 0.5), "load_balancing": (LoadBalancing(), 0.5)}


def _model(split, statistics, objectives=OBJECTIVES, **watching):
    import small_gpt
    from megatron.core import parallel_state

    from edl.integrations import megatron as edl_megatron

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=split.tp, pipeline_model_parallel_size=split.pp, context_parallel_size=split.cp
    )
    watched = Objectives(objectives, statistics=statistics, **watching)
    config = small_gpt.make_config(**split.config)
    attention = None if split.cp == 1 and split.kind != "documents" else small_gpt.GatheredAttention
    return small_gpt.build(config, lambda spec: edl_megatron.patch_spec(spec, watched), attention)


def _scope(batch):
    return edl.domain_scope(batch["domain_ids"])


def _train(model, split):
    import small_gpt

    batches = small_gpt.rank_batches(small_gpt.make_step(split.kind))
    forward_step = lambda it, model: small_gpt.forward_step(next(it), model, _scope)
    small_gpt.train_step(model, batches, forward_step, iter(batches))


def counted(ranks: int, kind: str):
    """For each split over so many ranks: the sums of all ranks, and by rank the layers that it saw."""
    from edl.integrations.megatron import reduce_statistics

    megatron_on_cpu.enable()
    splits_of_ranks = {
        1: [splits.Split("one"), splits.Split("full", changes=tuple(splits.FULL.items()))],
        2: [
            splits.Split("dp", 2),
            splits.Split("tp", 2, tp=2),
            splits.Split("cp", 2, cp=2),
            splits.Split("pp", 2, pp=2),
        ],
    }[ranks]
    found = {}
    for split in splits_of_ranks:
        split = dataclasses.replace(split, kind=kind)
        statistics = edl.RoutingStatistics(DOMAINS)
        model = _model(split, statistics)
        _train(model, split)
        statistics.snapshot(1)
        whole = reduce_statistics(statistics, model.config)
        found[split.name] = whole.state_dict(), [facts.number for facts in statistics.layers]
    return found


def by_hand(kind: str):
    """The routing of one process, as Megatron's own routers have it: of each layer the logits, and the choices, of the
    rows s·B + b of all micro-batches; and the label of each row."""
    import small_gpt
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel()
    model = small_gpt.build(small_gpt.make_config())
    recorded = []

    def record(router, args, output):
        recorded.append((args, output))

    for layer in model.decoder.layers:
        layer.mlp.router.register_forward_hook(record)
    step = small_gpt.make_step(kind)
    layers, labels = [[], []], []
    for m, batch in enumerate(small_gpt.rank_batches(step)):
        recorded.clear()
        small_gpt.forward_step(batch, model, lambda batch: contextlib.nullcontext())
        for place, (args, (_, routing_map)) in enumerate(recorded):
            hidden = args[0].flatten(0, 1)
            logits = hidden @ model.decoder.layers[place].mlp.router.weight.T
            layers[place].append((logits.detach(), routing_map))
        ids = step.domain_ids[m] if step.domain_ids.dim() == 3 else step.domain_ids[m].unsqueeze(1)
        ids = ids.expand(-1, small_gpt.LENGTH)
        if step.padding is not None:
            ids = ids.masked_fill(step.padding[m], -1)
        labels.append(ids.T.flatten())
    return [tuple(torch.cat(part) for part in zip(*layer)) for layer in layers], torch.cat(labels)


def evaluated():
    """What training and evaluation count beside each other, without objectives; warnings outside of any scope; and what
    is refused."""
    import small_gpt

    megatron_on_cpu.enable()
    of_training, of_evaluation = edl.RoutingStatistics(DOMAINS), edl.RoutingStatistics(DOMAINS)
    split = splits.Split("one")
    model = _model(split, of_training, {}, evaluation_statistics=of_evaluation)
    _train(model, split)
    trained = {number: sums.tokens.tolist() for number, sums in of_training.sums.items()}
    batch = small_gpt.rank_batches(small_gpt.make_step())[0]
    model.eval()
    with torch.no_grad():
        small_gpt.forward_step(batch, model, _scope)
    router = model.decoder.layers[0].mlp.router
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        router.routing(torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64))
    router.layer_number = None
    try:
        router.routing(torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64))
        sentence = "no error"
    except ValueError as error:
        sentence = str(error)
    evaluated = {number: sums.tokens.tolist() for number, sums in of_evaluation.sums.items()}
    return trained, evaluated, [str(each.message) for each in caught], sentence


def tensor_ranks_without_sequence_parallelism():
    """How many tokens count where two tensor-parallel ranks hold the same five, and where each has its own."""
    from megatron.core import parallel_state

    from edl.integrations.megatron import reduce_statistics

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    statistics = edl.RoutingStatistics(1, top_k=1)
    statistics.update(torch.zeros(5, 4))
    configs = [types.SimpleNamespace(sequence_parallel=flag) for flag in (False, True)]
    return [int(reduce_statistics(statistics, config).sums[0].tokens.sum()) for config in configs]
