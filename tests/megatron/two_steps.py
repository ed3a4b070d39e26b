"""Three kinds of objectives and two sets of labels at once, on four ranks, for two steps of training: gradients,
parameters and logs, and those of one process with a plain loop over `Objectives`."""

import dataclasses
import functools

import megatron_on_cpu
import objective_splits
import one_rank
import splits
import torch

from edl.objectives import ExpertDivergence, LoadBalancing, MutualInformation, Objectives

STEPS, RATE = 2, 0.05
# The weight of one moves from step to step.
WEIGHTS = {"expert_divergence": 0.6, "balance": 0.8, "modalities": lambda step: 2.0 * (step + 1)}
SPLITS = [
    splits._changed(splits.TP_CP, "documents, full recompute", kind="documents", **splits.FULL),
    splits._changed(splits.TP_CP, "selective recompute", **splits.SELECTIVE),
    splits._changed(splits.DP_TP, "padding, full recompute", kind="padding", **splits.FULL),
    splits._changed(splits.DP_TP, "per token, selective recompute", per_token=True, **splits.SELECTIVE),
    splits._changed(splits.PP_TP, "full recompute", **splits.FULL),
]


def objectives(without: str = "") -> Objectives:
    made = {
        "expert_divergence": ExpertDivergence(3),
        "balance": LoadBalancing(scope="sequence"),
        "modalities": MutualInformation(2, labels="modality_ids"),
    }
    return Objectives({name: (each, WEIGHTS[name]) for name, each in made.items() if name != without})


@dataclasses.dataclass
class Trained:
    """What the steps leave, each."""

    gradients: list[dict] = dataclasses.field(default_factory=list)
    parameters: list[dict] = dataclasses.field(default_factory=list)
    values: list[dict] = dataclasses.field(default_factory=list)  # means over micro-batches and layers

    def add(self, gradients: dict, parameters: list, values: dict) -> None:
        self.gradients.append(gradients)
        self.parameters.append({name: parameter.detach().clone() for name, parameter in parameters})
        self.values.append(values)


def plain(split: splits.Split, without: str = "") -> Trained:
    """In one process."""
    bound, trained = objectives(without), Trained()
    model, recorder = objective_splits.plain_model(split)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        values = objective_splits.plain_backward(split, model, recorder, bound)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        bound.step()
        means = {name: sum(of_batch[name] for of_batch in values) / len(values) for name in values[0]}
        trained.add(gradients, list(model.named_parameters()), means)
    return trained


def references() -> dict:
    """Of every split in one process; and of one without each of the objectives."""
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel()
    trained = {reference: plain(reference) for reference in {split.reference for split in SPLITS}}
    return trained | {name: plain(SPLITS[0].reference, name) for name in WEIGHTS}


def _train(split: splits.Split) -> Trained:
    """On this rank, which ends its steps by Megatron's finalisation of gradients."""
    import small_gpt

    from edl.integrations import megatron as edl_megatron

    trained = Trained()
    model = small_gpt.build(
        small_gpt.make_config(**split.config),
        lambda spec: edl_megatron.patch_spec(spec, objectives()),
        small_gpt.GatheredAttention if split.cp > 1 else None,
    )
    wrapped, batches = small_gpt.wrap(model), small_gpt.rank_batches(small_gpt.make_step(split.kind))
    scope = functools.partial(splits._scope, split)
    forward_step = lambda it, model: small_gpt.forward_step(next(it), model, scope)
    for _ in range(STEPS):
        gradients = small_gpt.train_step(model, batches, forward_step, iter(batches), wrapped)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.main_grad
        trained.add(gradients, small_gpt.named_parameters(model), one_rank.shown_of_step(len(batches), [1, 1]))
    return trained


def errors(file: str) -> dict[str, tuple]:
    """By split: what this rank's gradients and its parameters are off by, in the worst of the steps, and what its log
    showed in each; `file` holds the references."""
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    known = torch.load(file, weights_only=False)
    found = {}
    for split in SPLITS:
        splits.initialize(split)
        wanted = known[split.reference]
        try:
            trained = _train(split)
            gradients = max(map(splits._worst, trained.gradients, wanted.gradients))
            parameters = max(map(splits._worst, trained.parameters, wanted.parameters))
        except Exception as error:
            raise RuntimeError(f"in the split {split.name}") from error
        found[split.name] = gradients, parameters, trained.values
        parallel_state.destroy_model_parallel()
    return found
