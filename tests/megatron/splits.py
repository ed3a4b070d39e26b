"""The splits of the model that the tests train, and what one rank does for each: a step, compared with that of one
process."""

import contextlib
import dataclasses
import functools

import megatron_on_cpu

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = FULL | {"recompute_method": "block"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("moe",)}
ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}


@dataclasses.dataclass(frozen=True)
class Split:
    """How a step is taken, and on how many ranks; the rest of the ranks are data parallel."""

    name: str
    ranks: int = 1
    tp: int = 1  # with sequence parallel
    cp: int = 1
    pp: int = 1
    ep: int = 1
    kind: str = "sequences"
    per_token: bool = False
    accumulate: bool = False
    from_blend: bool = False  # labels through with_domain_ids, else through domain_scope
    masks_model: bool = True  # padding through the model, else through domain_scope
    attach_of_0_19: bool = False  # with what newer versions of Megatron do to a loss per token
    changes: tuple = ()  # of the configuration

    @property
    def config(self) -> dict:
        parallel = {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.tp > 1,
            "context_parallel_size": self.cp,
        }
        parallel |= {"pipeline_model_parallel_size": self.pp, "expert_model_parallel_size": self.ep}
        return parallel | {"calculate_per_token_loss": self.per_token, **dict(self.changes)}

    @property
    def reference(self) -> "Split":
        """The step of one process that this one must equal; recomputation changes nothing either."""
        scores = tuple(change for change in self.changes if change[0] == "moe_router_score_function")
        return Split("", kind=self.kind, per_token=self.per_token, accumulate=self.accumulate, changes=scores)


def _changed(split: Split, suffix: str, **changes) -> Split:
    """The split taken otherwise; `changes` are fields of it, or of the configuration."""
    fields = {field.name for field in dataclasses.fields(Split)}
    config = tuple((key, value) for key, value in changes.items() if key not in fields)
    own = {key: value for key, value in changes.items() if key in fields}
    return dataclasses.replace(split, name=f"{split.name}, {suffix}", changes=config, **own)


def _variants(split: Split) -> list[Split]:
    """What every split of one kind is tried with."""
    return [
        split,
        _changed(split, "padding, per token", kind="padding", per_token=True),
        _changed(split, "labels per token, selective recompute", kind="token labels", **SELECTIVE),
        _changed(split, "accumulated, full recompute", kind="single domain", accumulate=True, **FULL),
    ]


TOKENS = 128  # of a step
WITHOUT_LOSS = Split("without the loss")
ONE, DP, TP, CP = Split("one process"), Split("DP 2", 2), Split("TP 2", 2, tp=2), Split("CP 2", 2, cp=2)
PP, EP = Split("PP 2", 2, pp=2), Split("EP 2", 2, ep=2)
DP_TP, DP_CP, TP_CP = Split("DP 2 x TP 2", 4, tp=2), Split("DP 2 x CP 2", 4, cp=2), Split("TP 2 x CP 2", 4, tp=2, cp=2)
PP_TP, PP_DP, TP_EP = (
    Split("PP 2 x TP 2", 4, tp=2, pp=2),
    Split("PP 2 x DP 2", 4, pp=2),
    Split("TP 2 x EP 2", 4, tp=2, ep=2),
)
SPLITS = [
    *_variants(ONE),
    _changed(ONE, "padding", kind="padding"),
    _changed(ONE, "documents", kind="documents"),
    _changed(ONE, "accumulated", kind="single domain", accumulate=True),
    _changed(ONE, "sigmoid scores", moe_router_score_function="sigmoid"),
    _changed(ONE, "full recompute by block", **BLOCK),
    _changed(ONE, "recompute of attention", **ATTENTION),
    _changed(ONE, "labels from the blend", from_blend=True),
    *_variants(DP),
    _changed(DP, "padding in the scope", kind="padding", masks_model=False),
    *_variants(TP),
    _changed(TP, "per token", per_token=True),
    _changed(TP, "per token with 0.19", per_token=True, attach_of_0_19=True),
    _changed(TP, "documents", kind="documents"),
    _changed(TP, "padding in the scope, per token", kind="padding", per_token=True, masks_model=False),
    _changed(TP, "labels from the blend, full recompute", from_blend=True, **FULL),
    *_variants(CP),
    _changed(CP, "per token", per_token=True),
    _changed(CP, "documents, per token", kind="documents", per_token=True),
    *_variants(PP),
    _changed(PP, "labels from the blend", from_blend=True),
    EP,
    *_variants(DP_TP),
    _changed(DP_CP, "padding, per token", kind="padding", per_token=True),
    _changed(TP_CP, "labels per token", kind="token labels", per_token=True),
    _changed(TP_CP, "documents", kind="documents"),
    _changed(PP_TP, "full recompute", **FULL),
    _changed(PP_DP, "accumulated", kind="single domain", accumulate=True, from_blend=True),
    _changed(TP_EP, "labels from the blend", from_blend=True),
]


def _scope(split: Split, batch: dict):
    import edl

    padding = None if split.masks_model else batch["padding"]
    return edl.domain_scope(
        batch["domain_ids"],
        padding_mask=padding,
        cu_seqlens=batch["cu_seqlens"],
        modality_ids=batch["modality_ids"],
    )


def gradients(split: Split, objectives: dict) -> dict:
    """This rank's gradients by name, with these objectives as `patch_spec` takes them."""
    import small_gpt
    from megatron.core import parallel_state

    from edl.integrations import megatron as edl_megatron

    step = small_gpt.make_step(split.kind)
    model = small_gpt.build(
        small_gpt.make_config(**split.config),
        lambda spec: edl_megatron.patch_spec(spec, accumulate=split.accumulate, **objectives),
        small_gpt.GatheredAttention if split.cp > 1 or split.kind == "documents" else None,
    )
    batches = small_gpt.rank_batches(step)
    if not split.from_blend:
        scope = functools.partial(_scope, split)
        forward_step = lambda it, model: small_gpt.forward_step(next(it), model, scope, split.masks_model)
        return small_gpt.train_step(model, batches, forward_step, iter(batches))
    small_gpt.init_micro_batches(len(batches[0]["tokens"]), len(batches))
    contents = iter(batches)  # where Megatron broadcasts what the first tensor-parallel rank has read
    forward_step = edl_megatron.with_domain_ids(
        lambda it, model: small_gpt.forward_step(next(contents), model, lambda batch: contextlib.nullcontext())
    )
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    labels = iter([{"dataset_id": batch["domain_ids"].short()} for batch in batches])
    return small_gpt.train_step(model, batches, forward_step, labels if reads else None)


def _worst(actual: dict, reference: dict) -> float:
    """The largest error of a gradient, relative to the largest entry of that parameter's gradient."""
    import small_gpt

    errors = (
        (gradient - small_gpt.shard_of(reference[name], gradient)).abs().max() / reference[name].abs().max()
        for name, gradient in actual.items()
    )
    return max(float(error) for error in errors)


def references() -> dict[Split, tuple]:
    """(gradients, divergence losses) of all steps in one process, without edl and Megatron's schedules."""
    import oracle
    import small_gpt
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel()
    steps = {}
    for split in {split.reference for split in SPLITS}:
        changes = dict(split.changes)
        scores = oracle.normalised_sigmoid if changes else oracle.softmax
        steps[split] = small_gpt.reference_gradients(
            small_gpt.make_step(split.kind),
            per_token=split.per_token,
            accumulate=split.accumulate,
            scores=scores,
            **changes,
        )
    steps[WITHOUT_LOSS] = small_gpt.reference_gradients(small_gpt.make_step(), coeff=0.0)
    return steps


def initialize(split: Split) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=split.tp,
        pipeline_model_parallel_size=split.pp,
        context_parallel_size=split.cp,
        expert_model_parallel_size=split.ep,
    )


def errors(ranks: int, file: str) -> dict[str, float]:
    """What this rank's gradients are off by, for every split over so many ranks; `file` holds the references."""
    import small_gpt
    import torch
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    known = torch.load(file, weights_only=False)
    worst = {}
    for split in SPLITS:
        if split.ranks != ranks:
            continue
        initialize(split)
        try:
            with megatron_on_cpu.attach_of_0_19() if split.attach_of_0_19 else contextlib.nullcontext():
                short_form = {"num_domains": small_gpt.DOMAINS, "coeff": small_gpt.COEFF}
                worst[split.name] = _worst(gradients(split, short_form), known[split.reference][0])
        except Exception as error:
            raise RuntimeError(f"in the split {split.name}") from error
        parallel_state.destroy_model_parallel()
    return worst
