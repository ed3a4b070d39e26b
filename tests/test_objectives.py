"""Objectives on one path: equal to the losses of one process, and exact however the batch is split."""

import copy
import dataclasses
import functools
import json
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from commands import ROOT
from ranks import Collectives, on_ranks
from tolerances import assert_close, tolerance
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import edl
from edl.objectives import (
    ExpertDivergence,
    LoadBalancing,
    ModalityDivergence,
    Objective,
    Objectives,
    RouterZ,
    available,
    linear_decay,
    linear_warmup,
    objectives_from_file,
    objectives_of,
    off_after,
)
from edl.routing import Observation

H, K, D = 6, 2, 3
EXACT = 1e-12


class Batch:
    """Hidden states [B, S_len, H], a mask, labels, and the weights of the routers of layers of unequal E."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.hidden = random(8, 4, H)
        self.weights = [random(size, H) for size in (12, 5, 12)]
        self.keep = torch.rand(8, 4, generator=generator) < 0.7
        self.labels = torch.randint(-1, D, (8,), generator=generator)


def objectives(**groups) -> Objectives:
    divergence = ExpertDivergence(D, eps=1e-3)
    bound = {"balance": (LoadBalancing(), 0.5), "divergence": (divergence, 0.2), "z": (RouterZ(), 0.1)}
    return Objectives(bound, **groups)


def losses_and_gradients(bound, batch, sequences=slice(None), positions=slice(None)):
    """(total, values) and the gradients of the routers' weights, of a part of the batch."""
    weights = [weight.clone().requires_grad_(True) for weight in batch.weights]
    hidden = batch.hidden[sequences, positions].flatten(0, 1)
    routings = []
    for weight in weights:
        logits = hidden @ weight.T
        _, experts = edl.ops.route_tokens(logits.detach(), K, "softmax")
        routings.append(Observation(logits=logits, experts=experts))
    total, values = bound(routings, batch.keep[sequences, positions], domain_ids=batch.labels[sequences])
    return total.detach(), values, torch.autograd.grad(total, weights)


def by_functions(batch):
    """The same by the functions for one process, which know one size of layers at a time."""
    weights = [weight.clone().requires_grad_(True) for weight in batch.weights]
    logits = [batch.hidden @ weight.T for weight in weights]
    balance = sum(edl.load_balancing_loss(layer, batch.keep, top_k=K) for layer in logits) / 3
    z = sum(edl.router_z_loss(layer, batch.keep) for layer in logits) / 3
    divergence = edl.ExpertDivergenceLoss(D, eps=1e-3)
    apart = sum(divergence(layer, batch.labels, batch.keep) for layer in logits) / 3
    total = 0.5 * balance + 0.2 * apart + 0.1 * z
    values = {"balance": balance.detach(), "divergence": apart.detach(), "z": z.detach()}
    return total.detach(), values, torch.autograd.grad(total, weights)


def check(found, expected):
    assert_close(found[0], expected[0], EXACT)
    assert list(found[1]) == list(expected[1])
    for name, value in found[1].items():
        assert_close(value, expected[1][name], EXACT)
    for gradient, wanted in zip(found[2], expected[2], strict=True):
        assert wanted.abs().max() > 0
        assert_close(gradient, wanted, EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_of_one_process_they_are_the_functions(seed):
    batch = Batch(seed)
    check(losses_and_gradients(objectives(), batch), by_functions(batch))


@pytest.mark.parametrize("form", ["routing", "batch of logits"])
def test_observations_come_as_the_layer_or_a_model_gives_them(form):
    if form == "routing":
        layer = edl.MoELayer(H, 8, 4, K).double()
        _, routing = layer(torch.randn(10, H, dtype=torch.float64))
        total, values = Objectives({"balance": (LoadBalancing(), 1.0)})(routing)
        assert_close(total, edl.load_balancing_loss(routing), EXACT)
    else:
        logits = torch.randn(3, 5, 7, dtype=torch.float64)
        total, values = Objectives({"z": (RouterZ(), 2.0)})([logits, logits.square()])
        assert_close(total, 2 * edl.router_z_loss([logits, logits.square()]), EXACT)
    assert not next(iter(values.values())).requires_grad


def this_part(data_ranks, context_ranks):
    data, context = divmod(dist.get_rank(), context_ranks)
    sequences, positions = 8 // data_ranks, 4 // context_ranks
    return slice(data * sequences, (data + 1) * sequences), slice(context * positions, (context + 1) * positions)


def groups_of(data_ranks, context_ranks):
    mesh = init_device_mesh("cpu", (data_ranks, context_ranks), mesh_dim_names=("data", "context"))
    groups = {"group": mesh["data"] if data_ranks > 1 else None}
    if context_ranks > 1:
        groups |= {"sequence_group": mesh["context"], "averaging_ranks": data_ranks * context_ranks}
    return groups


def check_splits(data_ranks, context_ranks):
    groups = groups_of(data_ranks, context_ranks)
    for seed in range(5):
        batch = Batch(seed)
        bound = objectives(**groups)
        total, values, gradients = losses_and_gradients(bound, batch, *this_part(data_ranks, context_ranks))
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        check((total, values, gradients), by_functions(batch))
    with Collectives() as collectives:
        losses_and_gradients(bound, batch, *this_part(data_ranks, context_ranks))
    assert collectives.names.count("all_reduce") == (data_ranks > 1) + (context_ranks > 1)  # one per seam


@pytest.mark.parametrize("split", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_however_the_batch_is_split_the_gradient_is_that_of_one_process(split):
    on_ranks(split[0] * split[1], check_splits, *split)


def balance_of_ranks():
    batch = Batch(1)
    scoped = {scope: Objectives({"balance": (LoadBalancing(scope=scope), 1.0)}, dist.group.WORLD) for scope in SCOPES}
    return {scope: losses_and_gradients(bound, batch, *this_part(2, 1)) for scope, bound in scoped.items()}


SCOPES = ("global", "rank")


def test_balance_per_rank_is_the_mean_of_the_ranks_own():
    """The value of today's function on each rank, whose gradients a framework averages."""
    found, batch = on_ranks(2, balance_of_ranks), Batch(1)
    own = []
    for rank in range(2):
        part = Batch(1)
        part.hidden, part.keep = batch.hidden[4 * rank : 4 * rank + 4], batch.keep[4 * rank : 4 * rank + 4]
        own.append(losses_and_gradients(Objectives({"balance": (LoadBalancing(), 1.0)}), part))
    for rank, each in enumerate(found):
        assert_close(each["rank"][0], (own[0][0] + own[1][0]) / 2, EXACT)
        assert (each["rank"][0] - each["global"][0]).abs() > 1e-3
        for gradient, wanted in zip(each["rank"][2], own[rank][2], strict=True):
            assert_close(gradient, wanted, EXACT)


def fail_on_one_rank():
    bound, batch = objectives(group=dist.group.WORLD), Batch(2)
    sentences = []
    for call in range(3):
        keep = batch.keep
        if call == 1 and dist.get_rank() == 1:
            batch.keep = batch.keep[:, :1]
        try:
            losses_and_gradients(bound, batch, *this_part(2, 1))
            sentences.append("no error")
        except (ValueError, RuntimeError) as error:
            sentences.append(str(error))
        batch.keep = keep
    return sentences


def test_a_rank_that_fails_takes_part_and_is_named():
    first, second = on_ranks(2, fail_on_one_rank)
    rule = "edl::Objectives: attention_mask must have the shape [B, S_len] or [T] of the 16 tokens (got [4, 1])"
    assert first == ["no error", f"edl::parallel: rank 1 failed: {rule}", "no error"]
    assert second == ["no error", rule, "no error"]


def differ():
    weight = LoadBalancing() if dist.get_rank() == 0 else LoadBalancing(scope="rank")
    bound = Objectives({"balance": (weight, 1.0)}, dist.group.WORLD)
    with pytest.raises(ValueError) as error:
        losses_and_gradients(bound, Batch(0), *this_part(2, 1))
    return str(error.value)


def test_ranks_with_other_options_are_told_apart_at_the_first_call():
    for sentence in on_ranks(2, differ):
        assert sentence.startswith("edl::parallel: all ranks must have one layout (got Layout(")
        assert "scope='rank'" in sentence and "scope='global'" in sentence


def test_begun_early_it_is_the_same():
    batch = Batch(3)
    logits = batch.hidden @ batch.weights[0].T
    bound = Objectives({"z": (RouterZ(), 1.0)})
    finish = bound.begin(logits, batch.keep)
    assert_close(finish()[0], edl.router_z_loss(logits, batch.keep), EXACT)


def test_weights_follow_the_steps_and_are_saved():
    logits = torch.randn(9, 4, dtype=torch.float64)
    bound = Objectives({"z": (RouterZ(), linear_warmup(0.4, steps=4))})
    found = []
    for _ in range(6):
        total, values = bound(logits)
        found.append((total / values["z"]).item())
        bound.step()
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    resumed = Objectives({"z": (RouterZ(), linear_warmup(0.4, steps=4))})
    other = Objectives({"z": (RouterZ(), linear_warmup(0.4, steps=4))})
    other.step()
    resumed.load_state_dict(other.state_dict())
    total, values = resumed(logits)
    assert (total / values["z"]).item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (linear_warmup(0.4, 2), [0.0, 0.2, 0.4, 0.4]),
        (linear_decay(0.4, 1, 3), [0.4, 0.4, 0.2, 0.0, 0.0]),
        (linear_decay(0.4, 0, 2, final=1.0), [0.4, 0.7, 1.0, 1.0]),
        (off_after(0.4, 2), [0.4, 0.4, 0.0, 0.0]),
        (off_after(0.4, 0), [0.0, 0.0]),
        (off_after(linear_decay(linear_warmup(1.0, 2), 2, 4, final=0.5), 5), [0.0, 0.5, 1.0, 0.75, 0.5, 0.0]),
        (linear_decay(lambda step: step, 1, 3, final=10.0), [0.0, 1.0, 6.0, 10.0, 10.0]),
        (linear_warmup(off_after(0.4, 3), 4), [0.0, 0.1, 0.2, 0.0, 0.0]),
    ],
)
def test_schedules_are_functions_of_the_step_and_of_each_other(schedule, expected):
    assert [schedule(step) for step in range(len(expected))] == pytest.approx(expected)
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    bound = Objectives({"z": (RouterZ(), schedule)})
    for weight in expected:
        total, values = bound(logits)
        assert (total / values["z"]).item() == pytest.approx(weight)
        bound.step()


def test_schedules_are_compared_copied_and_saved():
    schedule = off_after(linear_decay(linear_warmup(1.0, steps=2), 3, 4), 5)
    assert pickle.loads(pickle.dumps(schedule)) == schedule == copy.deepcopy(schedule)
    assert schedule != off_after(linear_decay(linear_warmup(1.0, steps=2), 3, 4), 6)
    assert all(each in repr(schedule) for each in ("weight=1.0", "steps=2", "begin=3", "end=4", "step=5"))


@dataclasses.dataclass(frozen=True)
class _Infinite(Objective):
    needs = frozenset({"logits"})

    def of_tokens(self, layers, segments):
        return {"sums": torch.stack([layer.logits.square().sum() * math.inf for layer in layers])}

    def formula(self, sums):
        return sums["sums"]


@pytest.mark.parametrize("memory", [None, edl.DomainMemory()], ids=["alone", "shared"])
def test_an_objective_of_weight_0_adds_nothing_whatever_it_is(memory):
    logits = torch.randn(9, 4, dtype=torch.float64).requires_grad_(True)
    objectives = {"bad": (_Infinite(), linear_warmup(1.0, steps=2)), "z": (RouterZ(), 0.5)}
    bound = Objectives(objectives, memory=memory)
    total, values = bound(logits)
    expected = 0.5 * edl.router_z_loss(logits)
    assert_close(total, expected.detach(), EXACT)
    assert_close(*(torch.autograd.grad(x, logits)[0] for x in (total, expected)), EXACT)
    assert values["bad"] == math.inf and bound.log()["bad_loss"] == math.inf
    bound.step()
    total, _ = bound(logits)
    assert total == math.inf and not torch.autograd.grad(total, logits)[0].isfinite().any()


@pytest.mark.parametrize("objective", [_Infinite(), RouterZ()], ids=str)
def test_weights_that_are_all_0_have_a_total_of_0_with_gradients_of_0(objective):
    layers = [torch.randn(9, 4, requires_grad=True), torch.randn(9, 5, requires_grad=True)]
    total, _ = Objectives({"it": (objective, 0.0)})(layers)
    assert total == 0 and total.dtype == torch.float32
    assert all(x.eq(0).all() for x in torch.autograd.grad(total, layers))
    total, _ = Objectives({"it": (objective, 0.0)}).eval()([x.detach() for x in layers])
    assert total == 0 and not total.requires_grad


def test_weights_lie_on_the_cpu_also_where_a_model_has_no_memory_yet():
    logits = torch.randn(9, 4, dtype=torch.float64)
    with torch.device("meta"):
        bound = Objectives({"z": (RouterZ(), linear_warmup(0.4, steps=4))})
        bound.step()
    total, values = bound(logits)
    assert (total / values["z"]).item() == pytest.approx(0.1)


def test_objectives_tell_of_their_latest_effect():
    logits, nothing = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.bool)
    bound = Objectives({"z": (RouterZ(), 1.0)})
    for keep in (None, nothing):
        bound(logits, keep)
        assert bound.has_effect["z"] == (keep is None)


def test_no_token_that_counts_is_0_without_gradient():
    logits = torch.randn(4, 5, dtype=torch.float64).requires_grad_(True)
    _, experts = edl.ops.route_tokens(logits.detach(), K, "softmax")
    observation, nothing = Observation(logits=logits, experts=experts), torch.zeros(4, dtype=torch.bool)
    total, values = objectives()(observation, nothing, domain_ids=torch.zeros(2, dtype=torch.long))
    total.backward()
    assert total == 0 and logits.grad.eq(0).all() and not any(values.values())


def test_padding_may_hold_nan_and_what_counts_may_not():
    logits = torch.randn(4, 5, dtype=torch.float64)
    keep = torch.tensor([True, True, False, True])
    expected = Objectives({"z": (RouterZ(), 1.0)})(logits, keep)[0]
    logits[2] = torch.nan
    assert Objectives({"z": (RouterZ(), 1.0)})(logits, keep)[0] == expected
    logits[1] = -torch.inf
    assert Objectives({"z": (RouterZ(), 1.0)})(logits, keep)[0].isnan()


LOGITS = torch.zeros(4, 3)
LABELS = torch.tensor([0, 1])
REFUSED = {
    "edl::Objectives: objectives must be a mapping of names to (objective, weight) (got {})": lambda: Objectives({}),
    "edl::Objectives: objectives must map names to (objective, weight) (got 'z': RouterZ())": lambda: Objectives(
        {"z": RouterZ()}
    ),
    "edl::Objectives: a weight must be finite and not negative (got -1.0 of 'z')": lambda: Objectives(
        {"z": (RouterZ(), -1.0)}
    ),
    "edl::Objectives: weight must be a number (got '1')": lambda: Objectives({"z": (RouterZ(), "1")}),
    "edl::LoadBalancing: scope must be one of ['global', 'sequence', 'micro_batch', 'rank'] (got 'batch')": lambda: (
        LoadBalancing(scope="batch")
    ),
    "edl::LoadBalancing: scores must be one of ['softmax', 'sigmoid'] (got None)": lambda: LoadBalancing(scores=None),
    "edl::linear_warmup: steps must be at least 1 (got 0)": lambda: linear_warmup(1.0, 0),
    "edl::linear_warmup: weight must be finite and not negative (got nan)": lambda: linear_warmup(float("nan"), 1),
    "edl::linear_warmup: weight must be a number (got '1')": lambda: linear_warmup("1", 1),
    "edl::linear_decay: weight must be finite and not negative (got inf)": lambda: linear_decay(math.inf, 0, 1),
    "edl::linear_decay: begin must not be negative (got -1)": lambda: linear_decay(1.0, -1, 1),
    "edl::linear_decay: end must be an integer (got 1.5)": lambda: linear_decay(1.0, 0, 1.5),
    "edl::linear_decay: end must be above begin (got 3 and 3)": lambda: linear_decay(1.0, 3, 3),
    "edl::linear_decay: final must be finite and not negative (got -0.5)": lambda: linear_decay(1.0, 0, 1, -0.5),
    "edl::off_after: step must not be negative (got -1)": lambda: off_after(1.0, -1),
    "edl::Objectives: weight must be a number (got 'x')": lambda: Objectives(
        {"z": (RouterZ(), off_after(linear_decay(lambda step: "x", 2, 3), 4))}
    ),
    "edl::objectives: decay_steps must be [begin, end] (got 5)": lambda: objectives_of(
        {"router_z": {"weight": 1, "decay_steps": 5}}
    ),
    "edl::Objectives: a layer must offer what 'balance' needs, experts, logits (got 1 without)": lambda: objectives()(
        LOGITS
    ),
    "edl::Objectives: domain_ids must be given (got labels ['modality_ids'])": lambda: Objectives(
        {"apart": (ExpertDivergence(3), 1.0)}
    )(LOGITS, modality_ids=LABELS),
    "edl::ExpertDivergence: num_domains must be at least 2, or there is no pair to push apart (got 1)": lambda: (
        ExpertDivergence(1)
    ),
    "edl::ExpertDivergence: eps must be finite and not negative (got nan)": lambda: ExpertDivergence(2, float("nan")),
    "edl::ExpertDivergence: bias_correction needs one label per segment (got soft labels)": lambda: Objectives(
        {"apart": (ExpertDivergence(3, bias_correction=True), 1.0)}
    )(LOGITS, domain_ids=torch.ones(2, 3)),
    "edl::Objectives: memory must be a DomainMemory (got int)": lambda: Objectives({"z": (RouterZ(), 1.0)}, memory=3),
    "edl::Objectives: an integration binds objectives to ranks and memory itself, pass them without group, "
    "sequence_group, averaging_ranks and memory (got some that are bound)": lambda: objectives(
        memory=edl.DomainMemory()
    ).bind(),
    "edl::Objectives: name must be one of ['z'] (got 'y')": lambda: Objectives({"z": (RouterZ(), 1.0)}).set_weight(
        "y", 1.0
    ),
    "edl::Objectives: allocate_memory() needs a memory (got none)": lambda: objectives().allocate_memory(LOGITS),
    "edl::objectives: a configuration must be a mapping (got list)": lambda: objectives_of([]),
    "edl::objectives: 'router_z' must map to its options, weight among them (got {})": lambda: objectives_of(
        {"router_z": {}}
    ),
    "edl::objectives: the options of 'load_balancing' must be among ['scores', 'scope', 'devices', "
    "'devices_per_token', 'choices'] (got 'group')": lambda: objectives_of(
        {"load_balancing": {"weight": 1, "group": 3}}
    ),
    "edl::Objectives: observations must be an Observation, a Routing or router logits, or a list of them (got "
    "an empty list)": lambda: objectives()([]),
    "edl::Objectives: observations must hold Observations, Routings or router logits, and nothing for a layer without "
    "a router (got a list with NoneType)": lambda: objectives()([LOGITS, None]),
    "edl::Objectives: logits must have two dimensions (got [4])": lambda: Objectives({"z": (RouterZ(), 1.0)})(
        torch.zeros(4)
    ),
    "edl::Objectives: attention_mask must be a tensor (got list)": lambda: Objectives({"z": (RouterZ(), 1.0)})(
        LOGITS, [1, 1, 1, 1]
    ),
    "edl::Objectives: a state's steps must be an integer (got 'x')": lambda: objectives().set_extra_state("x"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_with_a_sentence(sentence):
    with pytest.raises(ValueError) as error:
        REFUSED[sentence]()
    assert str(error.value) == sentence


def test_an_objective_of_ones_own_is_two_functions():
    class MeanLogit(Objective):
        needs = frozenset({"logits"})

        def of_tokens(self, layers, segments):
            counts = segments.segment_ids == 0
            sums = [layer.logits.where(counts.unsqueeze(1), 0.0).sum() for layer in layers]
            return {"sum": torch.stack(sums), "tokens": counts.sum().expand(len(layers))}

        def formula(self, sums):
            return sums["sum"] / sums["tokens"]

    logits = torch.randn(6, 3, dtype=torch.float64)
    total, _ = Objectives({"mean": (MeanLogit(), 3.0)})(logits)
    assert_close(total, 3 * logits.sum() / 6, EXACT)


# ---- micro-batches ----


def over_micro_batches(data_ranks):
    """Two passes over three micro-batches on each rank: the mean of their gradients."""
    memory = edl.DomainMemory()
    bound, batch = objectives(group=dist.group.WORLD, memory=memory), Batch(4)
    batch.hidden, batch.keep, batch.labels = (torch.cat([x] * 3) for x in (batch.hidden, batch.keep, batch.labels))
    batch.labels = torch.arange(24) // 8  # one domain in each micro-batch
    own = 24 // data_ranks
    parts = [slice(dist.get_rank() * own + m * own // 3, dist.get_rank() * own + (m + 1) * own // 3) for m in range(3)]
    with memory.collect():
        for part in parts:
            logits = [batch.hidden[part].flatten(0, 1) @ weight.T for weight in batch.weights]
            chosen = [edl.ops.route_tokens(each, K, "softmax")[1] for each in logits]
            seen = [Observation(logits=each, experts=experts) for each, experts in zip(logits, chosen)]
            bound(seen, batch.keep[part], domain_ids=batch.labels[part])
    found = [losses_and_gradients(bound, batch, part) for part in parts]
    bound.step()
    gradients = [sum(each) / 3 for each in zip(*(gradients for _, _, gradients in found))]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= data_ranks
    for total, values, _ in found:
        check((total, values, gradients), by_functions(batch))


def test_two_passes_over_micro_batches_and_ranks_are_exact_for_all_objectives():
    on_ranks(2, over_micro_batches, 2)


def test_a_memory_carries_the_sums_of_all_objectives_into_a_new_process():
    first, second, batch = *(objectives(memory=edl.DomainMemory(0.5)) for _ in range(2)), Batch(5)
    losses_and_gradients(first, batch, slice(0, 4))
    first.step()
    second.load_state_dict(first.state_dict())
    expected, found = (losses_and_gradients(each, batch, slice(4, 8)) for each in (first, second))
    assert found[0].equal(expected[0]) and all(x.equal(y) for x, y in zip(found[2], expected[2]))
    assert found[0] != losses_and_gradients(objectives(), batch, slice(4, 8))[0]
    other = Objectives({"z": (RouterZ(), 1.0)}, memory=edl.DomainMemory())
    other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="must be of the same objectives, layers and sizes, LoadBalancing: scores"):
        other(batch.hidden.flatten(0, 1) @ batch.weights[0].T)


# ---- what is logged ----


def observed(batch, sequences=slice(None)):
    logits = [(batch.hidden[sequences].flatten(0, 1) @ weight.T).requires_grad_(True) for weight in batch.weights]
    return [Observation(logits=x, experts=edl.ops.route_tokens(x.detach(), K, "softmax")[1]) for x in logits]


def test_logs_are_means_since_the_last_without_what_had_nothing_to_act_on():
    bound, batch = objectives(), Batch(6)
    pairs, one = torch.arange(8) % D, torch.zeros(8, dtype=torch.long)
    for labels in (pairs, one, pairs):
        bound(observed(batch), batch.keep, domain_ids=labels)
        bound.step()
    with torch.no_grad():
        bound(observed(batch), batch.keep, domain_ids=one)  # no training
    logged = bound.log()
    divergence = edl.ExpertDivergenceLoss(D, eps=1e-3)
    divergence.keep_moments()
    of_layers = []
    for place, layer in enumerate(observed(batch)):
        of_layers.append(divergence(layer.logits.view(8, 4, -1), pairs, batch.keep))
        assert_close(logged[f"divergence/layer_{place}"], of_layers[-1].detach(), EXACT)
    assert_close(logged["divergence_loss"], torch.stack(of_layers).mean().detach(), EXACT)
    assert logged["divergence/pairs"] == (3 + 0 + 3) / 3
    assert logged["divergence/steps_without_effect"] == 1 and logged["z/steps_without_effect"] == 0
    assert [logged[f"{name}/weight"] for name in ("balance", "divergence", "z")] == [0.5, 0.2, 0.1]
    assert_close(
        logged["z_loss"],
        edl.router_z_loss([x.logits.view(8, 4, -1) for x in observed(batch)], batch.keep).detach(),
        EXACT,
    )
    assert set(bound.log()) == {"balance/weight", "divergence/weight", "z/weight"}


def test_a_loss_that_is_not_finite_is_logged():
    bound = Objectives({"z": (RouterZ(), 1.0)})
    bound(torch.full((3, 4), torch.nan).requires_grad_(True))
    assert bound.log()["z_loss"].isnan()


def test_steps_without_effect_warn_once_after_a_hundred():
    bound = Objectives({"apart": (ExpertDivergence(2), 1.0)})
    logits = torch.randn(2, 3, 4, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(250):
            bound(logits, domain_ids=torch.tensor([1, 1]))
            bound.step()
    (sentence,) = [str(each.message) for each in caught]
    assert sentence == (
        "edl::Objectives: a batch must hold something for apart to act on, for a divergence two domains: mix domains "
        "in batches or check masks and labels (got none for 100 steps)"
    )


def test_layers_that_lack_something_are_named_once():
    bound, logits = objectives(), torch.randn(8, 5, requires_grad=True)
    layers = [Observation(logits=logits), Observation(logits=logits, experts=torch.zeros(8, 2, dtype=torch.long))]
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            _, values = bound(layers, domain_ids=LABELS)
    assert [str(each.message) for each in caught] == [
        "edl::Objectives: 'balance' skips layers that do not offer what it needs, experts, logits (got 0 of 2 layers)"
    ]
    assert_close(
        values["balance"],
        edl.load_balancing_loss(edl.Routing(logits, logits, layers[1].experts, LABELS)).detach(),
        1e-6,
    )


def test_scores_without_a_gradient_warn_once_while_training():
    bound = Objectives({"z": (RouterZ(), 1.0)})
    with pytest.warns(UserWarning) as caught:
        bound(LOGITS)
        bound(LOGITS)
    (sentence,) = [str(each.message) for each in caught]
    assert sentence == (
        "edl::Objectives: what 'z' reads must have a gradient while training, or it teaches nothing "
        "(got logits without)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objectives({"z": (RouterZ(), 1.0)}).eval()(LOGITS)


# ---- classes and files ----


def test_a_file_makes_objectives(tmp_path):
    configuration = {
        "apart": {"objective": "expert_divergence", "weight": 0.01, "num_domains": 3, "eps": 1e-3},
        "router_z": {"weight": 0.5, "warmup_steps": 2},
    }
    (tmp_path / "objectives.json").write_text(json.dumps(configuration))
    made = objectives_from_file(tmp_path / "objectives.json")
    assert made.objectives == {"apart": ExpertDivergence(3, eps=1e-3), "router_z": RouterZ()}
    assert [made.weights["router_z"].item(), made.weights["apart"].item()] == [0.0, 0.01]
    made.step()
    assert made.weights["router_z"] == 0.25
    schedules = {
        "decayed": {"objective": "router_z", "weight": 0.5, "warmup_steps": 2, "decay_steps": [3, 5]},
        "off": {"objective": "router_z", "weight": 0.5, "warmup_steps": 2, "off_after_step": 4},
    }
    (tmp_path / "objectives.json").write_text(json.dumps(schedules))
    made, found = objectives_from_file(tmp_path / "objectives.json"), []
    for _ in range(6):
        found.append([made.weights[name].item() for name in schedules])
        made.step()
    assert found == [[0.0, 0.0], [0.25, 0.25], [0.5, 0.5], [0.5, 0.5], [0.25, 0.0], [0.0, 0.0]]
    (tmp_path / "objectives.json").write_text("{")
    with pytest.raises(ValueError, match="objectives.json must hold JSON"):
        objectives_from_file(tmp_path / "objectives.json")


def own_objective(name="LogitSize"):
    """A class of docs/objectives.md, as it stands there."""
    page = (ROOT / "docs" / "objectives.md").read_text()
    source = re.search(r"(import dataclasses\n.*?class LogitSize.*?)\n\n\nobjectives = ", page, re.DOTALL).group(1)
    assert len([line for line in source.splitlines() if line]) <= 12
    names = {"__name__": "own_objective", "torch": torch}
    exec(source, names)
    exec(re.search(r"(from edl.objectives.tokens import sums_by_segment.*?)\n```", page, re.DOTALL).group(1), names)
    return names[name]()


def check_own_objective():
    batch = Batch(7)
    bound = Objectives({"size": (own_objective(), 1.0)}, group=dist.group.WORLD)
    total, _, gradients = losses_and_gradients(bound, batch, *this_part(2, 1))
    weights = [weight.clone().requires_grad_(True) for weight in batch.weights]
    logits = [(batch.hidden @ weight.T)[batch.keep] for weight in weights]
    expected = sum(each.square().mean() for each in logits) / 3
    assert_close(total, expected.detach(), EXACT)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, weights)):
        dist.all_reduce(gradient)
        assert_close(gradient / 2, wanted, EXACT)


def test_the_objective_of_the_documentation_is_exact_over_two_ranks():
    on_ranks(2, check_own_objective)


def test_the_documentations_objective_of_sequences_sees_each_whole():
    logits = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
    keep = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    whole = torch.softmax(logits, -1)
    means = torch.stack([whole[row][keep[row] > 0].mean(0) for row in (0, 1, 3)])
    expected = torch.special.entr(means).sum(1).mean()
    bound = Objectives({"entropy": (own_objective("SequenceEntropy"), 1.0)})
    total, _ = bound(logits, keep)
    assert_close(total, expected.detach(), EXACT)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (total, expected)]
    assert_close(gradients[0], gradients[1], EXACT)
    with pytest.raises(IndexError, match="^edl::Objectives: segment_ids must be"):
        bound(logits, 2 * keep)


def test_a_step_without_a_token_is_in_no_log():
    bound = Objectives({"size": (own_objective(), 1.0)})
    logits = torch.full((6, 4), 3.0, requires_grad=True)
    for keep in (torch.ones(6), torch.zeros(6)):
        bound(logits, keep)
        bound.step()
    logged = bound.log()
    assert logged["size_loss"] == 9.0 and logged["size/steps_without_effect"] == 1


def test_measures_are_means_over_layers_whatever_their_sizes():
    bound = Objectives({"apart": (ModalityDivergence(2), 1.0)})
    logits = [torch.randn(8, size, dtype=torch.float64, requires_grad=True) for size in (4, 6, 4)]
    total, _ = bound(logits, modality_ids=torch.arange(8) % 2)
    assert_close(bound.log()["apart/nats"], -total.detach(), EXACT)


class Wrong(RouterZ):
    def __init__(self, **methods):
        for name, method in methods.items():
            object.__setattr__(self, name, method)


WRONG = {
    "formula must give a loss for each layer, [L] (got [] of 'z')": Wrong(formula=lambda sums: sums["squares"].sum()),
    "has_effect must give a bool scalar (got [1] of Wrong)": Wrong(has_effect=lambda sums: sums["tokens"] > 0),
    "of_tokens must give sums of each layer, [L, ...] (got squares [], tokens [1] of 'z')": Wrong(
        of_tokens=lambda layers, segments: {"squares": layers[0].logits.sum(), "tokens": torch.ones(1)}
    ),
    "an objective needs fields of an edl.routing.Observation (got 'logit' of 'z')": Wrong(needs=frozenset({"logit"})),
    "measures must give scalars by names other than loss, weight, steps_without_effect and layer_<i> (got 'weight' [] "
    "of Wrong)": Wrong(measures=lambda sums: {"weight": torch.ones(())}),
    "measures must give scalars by names other than loss, weight, steps_without_effect and layer_<i> (got 'mean' [1] "
    "of Wrong)": Wrong(measures=lambda sums: {"mean": sums["tokens"]}),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_an_objective_of_ones_own_with_a_mistake_is_refused(sentence):
    with pytest.raises(ValueError) as error:
        bound = Objectives({"z": (WRONG[sentence], 1.0)})
        bound(torch.randn(5, 4, requires_grad=True))
        bound.log()
    assert str(error.value) == f"edl::Objectives: {sentence}"


def test_classes_are_listed_by_their_names_in_words():
    assert {"expert_divergence", "load_balancing", "router_z"} <= set(available())

    @dataclasses.dataclass(frozen=True)
    class Z2Loss(RouterZ):
        pass

    assert available()["z2_loss"] is Z2Loss


def test_compiles_in_one_graph_that_a_schedule_does_not_change():
    bound = Objectives({"balance": (LoadBalancing(), 0.5), "z": (RouterZ(), linear_warmup(1.0, steps=3))})

    def total_of(logits):
        _, experts = edl.ops.route_tokens(logits.detach(), K, "softmax")
        return bound(Observation(logits=logits, experts=experts))[0]

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(total_of, fullgraph=True, backend="aot_eager")
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        expected, total = total_of(logits), compiled(logits)
        assert_close(total, expected.detach(), EXACT)
        assert_close(*(torch.autograd.grad(x, logits)[0] for x in (total, expected)), EXACT)
        bound.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_loss_inside_of_a_checkpoint_is_logged_once(use_reentrant):
    bound = Objectives({"router_z": (RouterZ(), 1.0)})

    def block(logits):
        return logits.sum() + (bound(logits)[0] if torch.is_grad_enabled() else 0.0)

    for _ in range(2):
        logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        wanted = torch.logsumexp(logits.detach(), 1).square().mean()
        checkpoint(block, logits, use_reentrant=use_reentrant).backward()
        total, count = bound.take_sums()["router_z"]["loss"]
        assert count == 1 and total == pytest.approx(wanted.item(), rel=tolerance(torch.float64, 4))
        assert bound.take_sums() == {"router_z": {}}
        bound.step()


def test_copies_warn_once_together():
    bound = Objectives({"router_z": (RouterZ(), 1.0)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for copy in (bound.bind(), bound.bind()):
            copy(torch.randn(4, 3))
    assert len([each for each in caught if "'router_z' reads must have a gradient" in str(each.message)]) == 1
