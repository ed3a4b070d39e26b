"""Several objectives at once, in every split: a step of Megatron's, and the same step of one process with a plain loop
over `Objectives`."""

import contextlib
import functools
import math

import megatron_on_cpu
import splits
import torch

import edl
from edl.objectives import ExpertDivergence, LoadBalancing, Objectives, RouterZ
from edl.routing import Observation

WEIGHTS = {"expert_divergence": 0.6, "load_balancing": 1.0, "router_z": 0.2}


def objectives(scores: str = "softmax", without: str = "", **bound) -> Objectives:
    made = {
        "expert_divergence": ExpertDivergence(3, scores=scores),
        "load_balancing": LoadBalancing(scores=scores),
        "router_z": RouterZ(),
    }
    return Objectives({name: (each, WEIGHTS[name]) for name, each in made.items() if name != without}, **bound)


SPLITS = [
    *splits._variants(splits.ONE),
    splits._changed(splits.ONE, "documents", kind="documents"),
    splits._changed(splits.ONE, "sigmoid scores", moe_router_score_function="sigmoid"),
    splits._changed(splits.ONE, "labels from the blend", from_blend=True),
    *splits._variants(splits.DP),
    splits._changed(splits.DP, "padding in the scope", kind="padding", masks_model=False),
    *splits._variants(splits.TP),
    splits._changed(splits.TP, "documents", kind="documents"),
    splits._changed(splits.TP, "padding in the scope, per token", kind="padding", per_token=True, masks_model=False),
    *splits._variants(splits.CP),
    splits._changed(splits.CP, "documents, per token", kind="documents", per_token=True),
    *splits._variants(splits.PP),
]


class _Recorder:
    """What the routers of a plain model decided, in the order b·S_len + s of `Objectives`."""

    def __init__(self) -> None:
        self.layers: list[Observation] = []

    def watch(self, model) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.routing = functools.partial(self._routing, module.routing)

    def _routing(self, routing, logits, padding_mask=None):
        probs, routing_map = routing(logits, padding_mask=padding_mask)
        length, batch_size = logits.shape[:2]
        order = torch.arange(length * batch_size).view(length, batch_size).t().flatten()
        in_order = lambda x: x.flatten(0, x.dim() - 2)[order]
        experts = in_order(routing_map).nonzero()[:, 1].view(length * batch_size, -1)
        weights = in_order(probs).gather(1, experts)
        self.layers.append(Observation(in_order(logits), None, weights, experts, batch_size))
        return probs, routing_map


def plain_model(split: splits.Split):
    """The model in one process, and the recorder of its routers."""
    import small_gpt
    from plain_layers import GatheredAttention

    model = small_gpt.build(
        small_gpt.make_config(**dict(split.changes)), None, GatheredAttention if split.kind == "documents" else None
    )
    recorder = _Recorder()
    recorder.watch(model)
    return model, recorder


def plain_backward(split: splits.Split, model, recorder: _Recorder, bound: Objectives) -> list[dict]:
    """Leaves the gradients of the step in the parameters, and returns the values by micro-batch."""
    import small_gpt
    from plain_layers import Layout

    step = small_gpt.make_step(split.kind)
    Layout.current = (torch.arange(small_gpt.LENGTH), step.cu_seqlens)
    totals, weights, values = [], [], []
    for batch in small_gpt.rank_batches(step):
        recorder.layers.clear()
        logits, _ = small_gpt.forward_step(batch, model, lambda batch: contextlib.nullcontext())
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        kept = torch.ones_like(losses) if batch["padding"] is None else (~batch["padding"]).flatten().double()
        masks = {"padding_mask": batch["padding"], "cu_seqlens": batch["cu_seqlens"]}
        labels = {name: batch[name] for name in ("domain_ids", "modality_ids")}
        total, of_batch = bound(list(recorder.layers), **masks, **labels)
        totals.append((losses * kept).sum() / kept.sum() + total)
        weights.append(float(kept.sum()) if split.per_token else 1.0)
        values.append({name: float(value) for name, value in of_batch.items()})
    sum(weight * total for weight, total in zip(weights, totals)).div(sum(weights)).backward()
    return values


def plain(split: splits.Split, without: str = ""):
    """Gradients by name of the step in one process, and the values by micro-batch."""
    scores = dict(split.changes).get("moe_router_score_function", "softmax")
    bound = objectives(scores, without, memory=edl.DomainMemory() if split.accumulate else None)
    model, recorder = plain_model(split)
    values = plain_backward(split, model, recorder, bound)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, values


def references() -> dict:
    """Of every step in one process; and of one without each of the objectives."""
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel()
    steps = {split: plain(split) for split in {split.reference for split in SPLITS}}
    return steps | {name: plain(splits.ONE.reference, name) for name in WEIGHTS}


def _gradients(split: splits.Split) -> dict:
    """This rank's gradients by name."""
    return splits.gradients(
        split, {"objectives": objectives(dict(split.changes).get("moe_router_score_function", "softmax"))}
    )


def allowed(split: splits.Split, values: list[dict]) -> float:
    from tolerances import tolerance

    # The gradient of a logarithm: rounding counts for more as the divergence, exp(-loss), shrinks.
    condition = math.exp(max(of_batch["expert_divergence"] for of_batch in values))
    in_float32 = tolerance(torch.float32, 1) if split.per_token else 0.0  # Megatron divides by the number of tokens so
    return condition * tolerance(torch.float64, splits.TOKENS) + in_float32


def errors(ranks: int, file: str) -> dict[str, float]:
    """What this rank's gradients are off by, for every split over so many ranks; `file` holds the references."""
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    known = torch.load(file, weights_only=False)
    worst = {}
    for split in SPLITS:
        if split.ranks == ranks:
            splits.initialize(split)
            try:
                worst[split.name] = splits._worst(_gradients(split), known[split.reference][0])
            except Exception as error:
                raise RuntimeError(f"in the split {split.name}") from error
            parallel_state.destroy_model_parallel()
    return worst
