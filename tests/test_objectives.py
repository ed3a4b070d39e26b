"""Objectives on one path: equal to the losses of one process, and exact however the batch is split."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import Collectives, on_ranks
from tolerances import assert_close, tolerance
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import edl
from edl.objectives import LoadBalancing, Objective, Objectives, RouterZ, linear_warmup
from edl.routing import Observation

H, K = 6, 2
EXACT = 1e-12


class Batch:
    """Hidden states [B, S_len, H] of two layers of unequal E, a mask, and the routers' weights."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.hidden = random(8, 4, H)
        self.weights = [random(size, H) for size in (12, 5, 12)]
        self.keep = torch.rand(8, 4, generator=generator) < 0.7


def objectives(**groups) -> Objectives:
    return Objectives({"balance": (LoadBalancing(), 0.5), "z": (RouterZ(), 0.1)}, **groups)


def losses_and_gradients(bound, batch, sequences=slice(None), positions=slice(None)):
    """(total, values) and the gradients of the routers' weights, of a part of the batch."""
    weights = [weight.clone().requires_grad_(True) for weight in batch.weights]
    hidden = batch.hidden[sequences, positions].flatten(0, 1)
    routings = []
    for weight in weights:
        logits = hidden @ weight.T
        _, experts = edl.ops.route_tokens(logits.detach(), K, "softmax")
        routings.append(Observation(logits=logits, experts=experts))
    total, values = bound(routings, batch.keep[sequences, positions])
    return total.detach(), values, torch.autograd.grad(total, weights)


def by_functions(batch):
    """The same by the functions for one process, which know one size of layers at a time."""
    weights = [weight.clone().requires_grad_(True) for weight in batch.weights]
    logits = [batch.hidden @ weight.T for weight in weights]
    balance = sum(edl.load_balancing_loss(layer, batch.keep, top_k=K) for layer in logits) / 3
    z = sum(edl.router_z_loss(layer, batch.keep) for layer in logits) / 3
    total = 0.5 * balance + 0.1 * z
    return total.detach(), {"balance": balance.detach(), "z": z.detach()}, torch.autograd.grad(total, weights)


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
    rule = "edl::segments: attention_mask must have the shape [B, S_len] or [T] of the 16 tokens (got [4, 1])"
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


def test_no_token_that_counts_is_0_without_gradient():
    logits = torch.randn(4, 5, dtype=torch.float64).requires_grad_(True)
    _, experts = edl.ops.route_tokens(logits.detach(), K, "softmax")
    total, values = objectives()(Observation(logits=logits, experts=experts), torch.zeros(4, dtype=torch.bool))
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
REFUSED = {
    "edl::Objectives: objectives must be a mapping of names to (objective, weight) (got {})": lambda: Objectives({}),
    "edl::Objectives: objectives must map names to (objective, weight) (got 'z': RouterZ())": lambda: Objectives(
        {"z": RouterZ()}
    ),
    "edl::Objectives: a weight must be finite and not negative (got -1.0 of 'z')": lambda: Objectives(
        {"z": (RouterZ(), -1.0)}
    ),
    "edl::Objectives: weight must be a number (got '1')": lambda: Objectives({"z": (RouterZ(), "1")}),
    "edl::LoadBalancing: scope must be one of ['global', 'rank'] (got 'batch')": lambda: LoadBalancing(scope="batch"),
    "edl::LoadBalancing: scores must be one of ['softmax', 'sigmoid'] (got None)": lambda: LoadBalancing(scores=None),
    "edl::linear_warmup: steps must be at least 1 (got 0)": lambda: linear_warmup(1.0, 0),
    "edl::linear_warmup: weight must be finite and not negative (got nan)": lambda: linear_warmup(float("nan"), 1),
    "edl::Objectives: a layer must offer what 'balance' needs, experts, logits (got 1 without)": lambda: objectives()(
        LOGITS
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


def test_compiles_in_one_graph_that_a_schedule_does_not_change():
    bound = Objectives({"balance": (LoadBalancing(), 0.5), "z": (RouterZ(), linear_warmup(1.0, steps=3))})

    def total_of(logits):
        _, experts = edl.ops.route_tokens(logits.detach(), K, "softmax")
        return bound(Observation(logits=logits, experts=experts))[0]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(total_of, fullgraph=True, backend="aot_eager")
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        expected, total = total_of(logits), compiled(logits)
        assert_close(total, expected.detach(), EXACT)
        assert_close(*(torch.autograd.grad(x, logits)[0] for x in (total, expected)), EXACT)
        bound.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


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
