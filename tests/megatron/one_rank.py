"""What the tests of the router run on ranks of their own, where megatron-core takes the CPU for a device."""

import copy
import dataclasses
import functools
import unittest.mock
import warnings

import megatron_on_cpu
import torch


def _model(parallel=None, patch_options=None, **config):
    import small_gpt
    from megatron.core import parallel_state

    from edl.integrations import megatron as edl_megatron

    megatron_on_cpu.enable()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(**(parallel or {}))
    options = {"num_domains": small_gpt.DOMAINS, "coeff": small_gpt.COEFF} | (patch_options or {})
    return small_gpt.build(small_gpt.make_config(**config), lambda spec: edl_megatron.patch_spec(spec, **options))


def in_flight(newest_first: bool):
    """Router gradients of two micro-batches, the second with one domain, both in flight under reentrant checkpointing.

    Returns those gradients, the sum of what each micro-batch alone gives, and what the second one alone gives.
    """
    import small_gpt
    import splits

    import edl

    model = _model(**splits.FULL)
    step = small_gpt.make_step("single domain")
    batches = small_gpt.rank_batches(step)

    def forward(batch):
        masked = torch.triu(torch.ones(small_gpt.LENGTH, small_gpt.LENGTH, dtype=torch.bool), 1)[None, None]
        with edl.domain_scope(batch["domain_ids"]):
            output = model(batch["tokens"], batch["positions"].expand_as(batch["tokens"]), masked)
        return 0.0 * output.sum()  # leaves the divergence loss, which is attached to the graph

    def gradients(order, together):
        model.zero_grad()
        if together:
            outputs = [forward(batch) for batch in batches]
            for i in order:
                outputs[i].backward()
        else:
            for i in order:
                forward(batches[i]).backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "router" in n])

    return gradients([1, 0] if newest_first else [0, 1], True), gradients([0, 1], False), gradients([1], False)


class Writer:
    """Keeps what Megatron would write for TensorBoard."""

    def __init__(self) -> None:
        self.scalars = {}

    def add_scalar(self, name, value, iteration) -> None:
        self.scalars[name] = float(value)


def shown_of_step(num_micro_batches: int, moe_layers: list[int]) -> dict[str, float]:
    """What Megatron's log shows of the step that was, by name."""
    from megatron.core.transformer.moe import moe_utils

    writer = Writer()
    moe_utils.track_moe_metrics(
        1 / num_micro_batches, 0, writer, total_loss_dict={}, num_layers=2, moe_layer_freq=moe_layers, track_names=[]
    )
    return writer.scalars


def logged(pp: int, moe_layers: list[int], domain_ids: torch.Tensor | None = None):
    """What Megatron's log shows of steps with these labels [N, M, B], or of the one of `make_step`: its new names."""
    import small_gpt

    import edl

    model = _model({"pipeline_model_parallel_size": pp}, pipeline_model_parallel_size=pp, moe_layer_freq=moe_layers)
    forward_step = lambda it, model: small_gpt.forward_step(
        next(it), model, lambda batch: edl.domain_scope(batch["domain_ids"])
    )
    step = small_gpt.make_step()
    shown = []
    for ids in [step.domain_ids] if domain_ids is None else domain_ids:
        batches = small_gpt.rank_batches(small_gpt.Step(step.tokens, ids))
        small_gpt.train_step(model, batches, forward_step, iter(batches))
        scalars = shown_of_step(len(batches), moe_layers)
        shown.append({name: value for name, value in scalars.items() if "divergence" in name})
    return shown


def warnings_of_steps_without_a_pair(num_steps: int):
    """What Megatron's log warns of in so many steps, where four are enough."""
    with (
        unittest.mock.patch("edl.objectives.log.STEPS_WITHOUT_EFFECT", 4),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        logged(1, [1, 1], torch.zeros(num_steps, 2, 4, dtype=torch.long))
    return [str(warning.message) for warning in caught if "two domains" in str(warning.message)]


def divergences(domain_ids: torch.Tensor | None = None):
    """Of the step of `make_step`, with its labels [M, B] or these, in one process: by micro-batch and layer, without
    edl."""
    import small_gpt
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel()
    step = small_gpt.make_step()
    ids = step.domain_ids if domain_ids is None else domain_ids
    return small_gpt.reference_gradients(small_gpt.Step(step.tokens, ids))[1]


def _moe_of(layer):
    """The part of a layer's spec that names the router; behind a partial from megatron-core 0.18 on."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def specs():
    """Claims about patched specs, by sentence."""
    import small_gpt
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter

    from edl.integrations.megatron import EDTopKRouter, patch_spec

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel()
    patch = functools.partial(patch_spec, num_domains=3, coeff=0.1)
    config = small_gpt.make_config(mtp_num_layers=1)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    layer, dense = get_gpt_layer_local_spec(num_experts=4), get_gpt_layer_local_spec()
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False)
    newer = functools.partial(MoELayer, submodules=MoESubmodules(experts=None))  # the form of newer versions

    class OwnRouter(TopKRouter):
        pass

    own = copy.deepcopy(layer)
    _moe_of(own).router = OwnRouter
    own_router = _moe_of(patch(own)).router.func
    other = copy.deepcopy(layer)
    _moe_of(other).router = lambda **kwargs: None

    def function(config, vp_stage=None):
        return block

    router = lambda spec: _moe_of(spec).router
    claims = {
        "blocks": all(router(x).func is EDTopKRouter for x in patch(block).layer_specs),
        "layers": router(patch(layer)).func is EDTopKRouter,
        "partials": patch(newer).keywords["submodules"].router.func is EDTopKRouter,
        "nested": patch({"stack": [newer, dense]})["stack"][0].keywords["submodules"].router.func is EDTopKRouter,
        "functions": router(patch(function)(config, vp_stage=0).layer_specs[0]).func is EDTopKRouter,
        "prediction": "EDTopKRouter" in repr(patch(mtp)) and "EDTopKRouter" not in repr(mtp),
        "the given spec stays": router(block.layer_specs[0]) is TopKRouter and router(layer) is TopKRouter,
        "own routers": issubclass(own_router, EDTopKRouter) and issubclass(own_router, OwnRouter),
        "coefficient 0 changes nothing": patch_spec(layer, None, 0.0) is layer,
    }
    sentences = [
        _sentence(patch, dense),
        _sentence(patch, other),
        _sentence(patch, patch(layer)),
        _sentence(patch_spec, layer, None, 0.1),
        _sentence(patch_spec, layer, 3, -1.0),
        _sentence(patch_spec, layer, 3, float("nan")),
    ]
    fields = dataclasses.fields
    dataclasses.fields = lambda kind: [f for f in fields(kind) if f.name != "router"]
    try:
        sentences.append(_sentence(patch, layer))  # what megatron-core before 0.16 gives
    finally:
        dataclasses.fields = fields
    return claims, sentences


def _sentence(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, IndexError) as error:
        return str(error)
    return "no error"


def routers():
    """Sentences for configurations that the router refuses; warnings outside a scope; names of its parameters."""
    import small_gpt
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    from edl.integrations.megatron import EDTopKRouter

    model = _model(patch_options={"accumulate": True})
    sentences = []
    for changes in (
        {"mlp_chunks_for_training": 2},
        {"hybrid_context_parallel": True},
        {"overlap_moe_expert_parallel_comm": True},
        {"cuda_graph_impl": "local", "cuda_graph_scope": []},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn", "moe_router"]},
    ):
        config = small_gpt.make_config()
        vars(config).update(changes)
        sentences.append(_sentence(EDTopKRouter, config, get_default_pg_collection(), num_domains=3, coeff=0.1))
    plain = TopKRouter(small_gpt.make_config(), get_default_pg_collection())
    router = model.decoder.layers[0].mlp.router
    logits = torch.randn(8, 4, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probs, _ = router.train().routing(logits)
        router.eval().routing(logits)
    (without,) = torch.autograd.grad(probs.square().sum(), logits)
    (wanted,) = torch.autograd.grad(plain.routing(logits)[0].square().sum(), logits)
    keys = list(router.state_dict()) == list(plain.state_dict())
    return sentences, [str(warning.message) for warning in caught], bool(torch.equal(without, wanted)), keys


def flat_logits():
    """What routing adds to the gradient of logits [T, E], and what the loss of the same sequences does, by labels; and
    sentences."""
    import small_gpt

    import edl

    router = _model().decoder.layers[0].mlp.router.train()
    length, batch_size = 6, 4
    logits = torch.randn(length * batch_size, small_gpt.EXPERTS, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 1])
    per_token = torch.arange(24).view(batch_size, length) % 3
    weights = torch.rand(batch_size, 3, dtype=torch.float64)
    mask = torch.ones(batch_size, length, dtype=torch.int64)
    mask[1, 4:] = mask[3, :2] = 0
    scopes = {
        "labels": ({"domain_ids": labels}, None),
        "labels per token": ({"domain_ids": per_token}, None),
        "weights": ({"domain_ids": weights}, None),
        "mask": ({"domain_ids": labels, "attention_mask": mask}, None),
        "padding_mask": ({"domain_ids": labels}, (mask == 0).t()),
        "flat padding_mask": ({"domain_ids": labels}, (mask == 0).t().reshape(-1)),
        "sequences of one token": ({"domain_ids": (torch.arange(24) % 3).view(24, 1)}, None),
        "a mask tells": ({"domain_ids": torch.arange(24) % 3, "attention_mask": torch.ones(24, 1)}, None),
    }
    results = {}
    for name, (scope, padding_mask) in scopes.items():
        with edl.domain_scope(**scope):
            probs, routing_map = router.routing(logits, padding_mask)
        assert probs.shape == routing_map.shape == logits.shape
        (gradient,) = torch.autograd.grad(0.0 * probs.sum(), logits)
        ids = scope["domain_ids"]
        by_sequence = logits.view(-1, len(ids), small_gpt.EXPERTS).transpose(0, 1)
        keep = mask if "mask" in name and len(ids) == batch_size else None
        loss = edl.ExpertDivergenceLoss(small_gpt.DOMAINS)(by_sequence, ids, keep)
        results[name] = (gradient, torch.autograd.grad(small_gpt.COEFF * loss, logits)[0])
    boundaries = torch.tensor([0, 8, 24])
    with edl.domain_scope(torch.arange(24).view(1, 24) // 8, cu_seqlens=boundaries):  # one stream, in its order
        probs, _ = router.routing(logits)
    (gradient,) = torch.autograd.grad(0.0 * probs.sum(), logits)
    loss = edl.ExpertDivergenceLoss(small_gpt.DOMAINS)(logits, torch.arange(24) // 8, cu_seqlens=boundaries)
    results["stream"] = (gradient, torch.autograd.grad(small_gpt.COEFF * loss, logits)[0])

    def route(logits, *args, **kwargs):
        with edl.domain_scope(*args, **kwargs):
            router.routing(logits)

    sentences = [
        _sentence(route, logits, torch.arange(24) % 3),
        _sentence(route, logits, torch.tensor([0, 1, 2, 0, 1])),
        _sentence(route, logits, labels[:0]),
        _sentence(route, logits, torch.tensor([0, 1]), cu_seqlens=boundaries),
        _sentence(route, logits, per_token[:, :3]),
        _sentence(route, logits[:, 0], labels),
        _sentence(route, logits[None, None], labels),
    ]
    return results, sentences


def wrong_labels():
    """What every rank raises where the labels of one are wrong."""
    import small_gpt

    import edl

    model = _model()
    batch = small_gpt.rank_batches(small_gpt.make_step())[0]
    ids = batch["domain_ids"]
    if torch.distributed.get_rank() == 1:
        ids = ids[:1]
    try:
        small_gpt.forward_step(batch, model, lambda batch: edl.domain_scope(ids))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def blend(folder: str):
    """Labels that reach the scope from Megatron's own `BlendedDataset`, and sentences for batches without."""
    import runpy
    from pathlib import Path

    import edl
    from edl.integrations.megatron import with_domain_ids

    model = _model()
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "megatron" / "pretrain_gpt.py"))
    batch = next(iter(torch.utils.data.DataLoader(example["build_data"](None), 8)))
    seen = []

    def forward_step(data_iterator, model, extra=None):
        labels = edl.current_labels()
        seen.append((None if labels is None else labels.domain_ids, next(data_iterator) is batch, extra))

    with_domain_ids(forward_step)(iter([batch]), model, extra=1)
    with_domain_ids(forward_step, domains=[2, -1, 0])(iter([batch]), model)
    with_domain_ids(forward_step)(iter([batch]), model.eval())
    model.train()
    sentences = [
        _sentence(with_domain_ids(forward_step), iter([{"tokens": 0}]), model),
        _sentence(with_domain_ids(forward_step), None, model),
        _sentence(with_domain_ids(forward_step), iter([{"dataset_id": torch.zeros(2, 2)}]), model),
        _sentence(with_domain_ids(forward_step, domains=[0, 1]), iter([batch]), model),
    ]
    thirds = batch["tokens"][:, 0] // (example["VOCABULARY"] // example["NUM_DOMAINS"])
    return thirds, seen, sentences
