"""RoutingStatistics adds up what NumPy does, token by token, whatever the labels, masks, ranks and micro-batches."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors.numpy import load_file, save_file
from tolerances import assert_close, tolerance
from torch.utils.checkpoint import checkpoint

import edl
from edl.diagnostics.statistics import write_measures
from edl.objectives import LoadBalancing, Objectives, RouterZ
from edl.routing import Observation

B, LENGTH, D = 5, 7, 3
T = B * LENGTH
NAMES = ["code", "news", "prose"]
SIZES = ((6, 2), (4, 1), (9, 3), (3, 3))  # of the layers: E and K
EXACT = 1e-12


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def sigmoid(logits):
    gates = 1 / (1 + np.exp(-logits))
    return gates / gates.sum(1, keepdims=True)


def by_hand(logits, experts, labels, num_domains=D, scores=softmax):
    """The sums of a layer, token by token; labels [T], -1 = not counted."""
    num_experts = logits.shape[1]
    sums = {
        "choices": np.zeros((num_domains, num_experts)),
        "mass": np.zeros((num_domains, num_experts)),
        "tokens": np.zeros(num_domains),
        "coactivation": np.zeros((num_experts, num_experts)),
        "entropy": np.zeros(num_domains),
        "margin": np.zeros(num_domains),
    }
    for token in np.flatnonzero(labels >= 0):
        label, chosen = labels[token], [e for e in experts[token] if e < num_experts]
        distribution = scores(logits[token : token + 1])[0]
        sums["tokens"][label] += 1
        sums["mass"][label] += distribution
        sums["entropy"][label] -= sum(p * np.log(p) for p in distribution if p > 0)
        ordered = np.append(np.sort(distribution)[::-1], np.nan)
        sums["margin"][label] += ordered[experts.shape[1] - 1] - ordered[experts.shape[1]]
        for one in chosen:
            sums["choices"][label, one] += 1
            for other in chosen:
                sums["coactivation"][one, other] += 1
    if experts.shape[1] == num_experts:
        sums["margin"][:] = np.nan
    return sums


def assert_sums(sums, wanted, relative=EXACT):
    for name, value in wanted.items():
        got = getattr(sums, name)
        is_count = name in ("choices", "tokens", "coactivation")
        assert got.dtype == (torch.int64 if is_count else torch.float64)
        assert_close(got, torch.from_numpy(value), 0.0 if is_count else relative)


def make_layers(seed=0, num_tokens=T, dtype=torch.float64):
    """Logits and choices, some of them none, and not always the highest scores."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for num_experts, top_k in SIZES:
        logits = 2 * torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
        order = (logits + torch.randn(logits.shape, generator=generator)).argsort(1, descending=True)
        experts = order[:, :top_k].clone()
        experts[torch.rand(experts.shape, generator=generator) < 0.1] = num_experts
        layers.append(Observation(logits.to(dtype), experts=experts))
    return layers


def assert_layers(statistics, layers, labels, relative=EXACT, **options):
    assert [facts[0] for facts in statistics.layers] == list(range(len(layers)))
    for place, layer in enumerate(layers):
        wanted = by_hand(layer.logits.double().numpy(), layer.experts.numpy(), labels.numpy(), **options)
        assert_sums(statistics.sums[place], wanted, relative)


LABELS = torch.tensor([0, 2, -1, 1, 0])
OF_TOKENS = torch.randint(-1, D, (B, LENGTH), generator=torch.Generator().manual_seed(1))
MASK = torch.rand(B, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7
BOUNDARIES = torch.tensor([0, 4, 4, 20, 33])
DOCUMENTS = torch.tensor([1, 0, -1, 2])


def of_documents():
    labels = torch.full([T], -1)
    for begin, end, label in zip(BOUNDARIES, BOUNDARIES[1:], DOCUMENTS):
        labels[begin:end] = label
    return labels


FORMS = {
    "sequences": ({"domain_ids": LABELS}, LABELS.repeat_interleave(LENGTH)),
    "sequences, attention": (
        {"domain_ids": LABELS.int(), "attention_mask": MASK.long()},
        LABELS.repeat_interleave(LENGTH).masked_fill(~MASK.flatten(), -1),
    ),
    "tokens, padding": (
        {"domain_ids": OF_TOKENS, "padding_mask": ~MASK},
        OF_TOKENS.flatten().masked_fill(~MASK.flatten(), -1),
    ),
    "tokens, flat": ({"domain_ids": OF_TOKENS.flatten()}, OF_TOKENS.flatten()),
    "documents": ({"domain_ids": DOCUMENTS, "cu_seqlens": BOUNDARIES}, of_documents()),
    "documents, tokens": (
        {"domain_ids": OF_TOKENS.flatten(), "cu_seqlens": BOUNDARIES},
        OF_TOKENS.flatten().masked_fill(torch.arange(T) >= 33, -1),
    ),
}


# ---- sums ----


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_numpy(form):
    given, labels = FORMS[form]
    statistics, layers = edl.RoutingStatistics(NAMES), make_layers()
    statistics.update(layers, **given)
    assert_layers(statistics, layers, labels)
    assert [facts[2:] for facts in statistics.layers] == list(SIZES)
    dead = [int((sums.choices.sum(0) == 0).sum()) for _, sums in sorted(statistics.sums.items())]
    assert dead == [
        int((by_hand(x.logits.numpy(), x.experts.numpy(), labels.numpy())["choices"].sum(0) == 0).sum()) for x in layers
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_summed_as_wide_ones(dtype):
    statistics, layers = edl.RoutingStatistics(D), make_layers(dtype=dtype)
    statistics.update(layers, LABELS)
    assert_layers(statistics, layers, LABELS.repeat_interleave(LENGTH), relative=tolerance(torch.float32, T))


def test_sigmoid_scores_are_normalised():
    statistics, layers = edl.RoutingStatistics(D, scores="sigmoid"), make_layers()
    statistics.update(layers, LABELS)
    assert_layers(statistics, layers, LABELS.repeat_interleave(LENGTH), scores=sigmoid)


def test_scores_come_before_logits():
    told, of_logits = edl.RoutingStatistics(D, scores="sigmoid"), edl.RoutingStatistics(D)
    layers = make_layers()
    told.update([layer._replace(scores=layer.logits.softmax(1)) for layer in layers], LABELS)
    of_logits.update(layers, LABELS)
    for number, sums in of_logits.sums.items():
        for one, other in zip(told.sums[number], sums):
            assert_close(one, other.double(), EXACT)


def test_tokens_that_do_not_count_may_hold_anything():
    layers, clean = make_layers(), make_layers()
    uncounted = ~MASK.flatten() | (LABELS.repeat_interleave(LENGTH) == -1)
    hostile = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]], dtype=torch.float64)[torch.arange(T) % 3]
    for layer in layers:
        layer.logits[uncounted] = hostile[uncounted]
        layer.experts[uncounted] = -7
    statistics, wanted = edl.RoutingStatistics(D), edl.RoutingStatistics(D)
    statistics.update(layers, LABELS, attention_mask=MASK)
    wanted.update(clean, LABELS, attention_mask=MASK)
    for number, sums in wanted.sums.items():
        for one, other in zip(statistics.sums[number], sums):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_experts_without_a_chance_have_no_entropy_and_nan_stays():
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [torch.nan, 0.0, 0.0]], dtype=torch.float64)
    statistics = edl.RoutingStatistics(2)
    statistics.update(Observation(logits, experts=torch.tensor([[0], [2]])), torch.tensor([[0, 1]]))
    sums = statistics.sums[0]
    assert_close(sums.entropy, torch.tensor([np.log(2), torch.nan]), EXACT)
    assert_close(sums.mass[0], torch.tensor([0.5, 0.0, 0.5]), EXACT)
    assert sums.mass[1].isnan().all() and sums.choices.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_micro_batches_no_token_and_one_domain():
    layers = make_layers()
    whole, parts = edl.RoutingStatistics(["all"]), edl.RoutingStatistics(["all"])
    whole.update(layers)
    assert_layers(whole, layers, torch.zeros(T, dtype=torch.long), num_domains=1)
    parts.update([Observation(x.logits[:0], experts=x.experts[:0]) for x in layers])
    assert all(int(sums.tokens) == 0 for sums in parts.sums.values()) and parts.measures() == {}
    for begin, end in ((0, 1), (1, 20), (20, T)):
        parts.update([Observation(x.logits[begin:end], experts=x.experts[begin:end]) for x in layers])
    for number, sums in whole.sums.items():
        for one, other in zip(parts.sums[number], sums):
            assert_close(one, other.double(), EXACT)
    assert "moe/domain_divergence_mean" not in whole.measures()


def test_choices_that_a_layer_does_not_tell_are_the_highest_scores():
    logits = make_layers()[0].logits
    statistics = edl.RoutingStatistics(D, top_k=2)
    statistics.update(logits.view(B, LENGTH, -1), LABELS)
    experts = logits.topk(2, dim=1).indices
    assert_layers(statistics, [Observation(logits, experts=experts)], LABELS.repeat_interleave(LENGTH))


def test_a_layer_of_choices_alone_has_no_scores():
    experts = torch.tensor([[0, 2], [2, 1]])
    hashed = Observation(experts=experts, tokens_per_expert=torch.tensor([1, 1, 2, 0]), layer=7, router="hash")
    statistics = edl.RoutingStatistics(1)
    statistics.update(hashed)
    sums = statistics.sums[7]
    assert sums.choices.tolist() == [[1, 1, 2, 0]] and sums.mass.isnan().all() and sums.entropy.isnan().all()
    assert statistics.layers[0]._asdict() == {"number": 7, "name": "hash", "num_experts": 4, "top_k": 2}
    measures = statistics.measures()
    assert measures["moe/dead_expert_frac_mean"] == 0.25 and measures["moe/max_vio_mean"] == 1.0
    assert "moe/token_entropy_mean" not in measures and "moe/margin_mean" not in measures


def test_layers_of_edl_count_as_they_chose():
    torch.manual_seed(0)
    model = edl.MoELayer(8, 12, 6, 2, return_routing=True).double()
    _, routing = model(torch.randn(B, LENGTH, 8, dtype=torch.float64))
    statistics = edl.RoutingStatistics(D)
    statistics.update(routing, LABELS)
    layer = Observation(routing.logits.detach(), experts=routing.experts)
    assert_layers(statistics, [layer], LABELS.repeat_interleave(LENGTH))
    assert not any(x.requires_grad for x in statistics.sums[0])


def test_inference_mode_and_training_share_sums():
    layers, statistics = make_layers(), edl.RoutingStatistics(D)
    with torch.inference_mode():
        statistics.update([Observation(x.logits.clone(), experts=x.experts.clone()) for x in layers], LABELS)
    statistics.update(layers, LABELS)
    twice = by_hand(layers[0].logits.numpy(), layers[0].experts.numpy(), LABELS.repeat_interleave(LENGTH).numpy())
    assert_sums(statistics.sums[0], {name: 2 * value for name, value in twice.items()})


def test_autocast_rounds_nothing():
    statistics, layers = edl.RoutingStatistics(D), make_layers(num_tokens=1500)
    with torch.autocast("cpu", torch.bfloat16):
        statistics.update(layers, torch.zeros(1, 1500, dtype=torch.long))
    assert_layers(statistics, layers, torch.zeros(1500, dtype=torch.long))


def test_compiled_code_counts_too():
    layers, statistics = make_layers(), edl.RoutingStatistics(D)

    @torch.compile(backend="eager")
    def step(logits, experts):
        statistics.update(Observation(logits * 1.0, experts=experts), LABELS)
        return logits + 1

    step(layers[0].logits, layers[0].experts)
    assert_layers(statistics, layers[:1], LABELS.repeat_interleave(LENGTH))


# ---- beside objectives ----


def objectives(**options):
    return Objectives({"z": (RouterZ(), 0.1), "balance": (LoadBalancing(), 0.1)}, **options)


def test_objectives_show_what_they_see_and_lose_nothing():
    layers = [layer._replace(logits=layer.logits.clone().requires_grad_()) for layer in make_layers()]
    plain, statistics = objectives(), edl.RoutingStatistics(D)
    watched = objectives(statistics=statistics)
    assert watched.label_sets == {"domain_ids"} and plain.label_sets == set()
    loss, values = watched(layers, MASK, domain_ids=LABELS)
    wanted, of_plain = plain(layers, MASK)
    assert loss == wanted and values == of_plain
    detached = [layer._replace(logits=layer.logits.detach()) for layer in layers]
    assert_layers(statistics, detached, FORMS["sequences, attention"][1])


def test_evaluation_and_the_first_of_two_passes():
    layers, of_training, of_evaluation = make_layers(), edl.RoutingStatistics(1), edl.RoutingStatistics(1)
    layers = [layer._replace(logits=layer.logits.requires_grad_()) for layer in layers]
    memory = edl.DomainMemory()
    watched = objectives(memory=memory, statistics=of_training, evaluation_statistics=of_evaluation)
    with memory.collect():
        watched(layers)
    assert of_training.layers == ()
    watched(layers)[0].backward()
    watched.step()
    watched.eval()(layers)
    watched(layers)
    assert int(of_training.sums[0].tokens) == T and int(of_evaluation.sums[0].tokens) == 2 * T
    watched.statistics = watched.evaluation_statistics = None
    watched.train()(layers)
    assert int(of_training.sums[0].tokens) == T and watched.needs == {"logits", "experts"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_passes_count_once(use_reentrant):
    statistics = edl.RoutingStatistics(D)
    watched = Objectives({"z": (RouterZ(), 0.1)}, statistics=statistics)
    torch.manual_seed(0)
    model = edl.MoELayer(8, 12, 6, 2, return_routing=True).double()

    def block(hidden):
        output, routing = model(hidden)
        return output.sum() + watched(routing, domain_ids=LABELS)[0]

    hidden = torch.randn(B, LENGTH, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        checkpoint(block, hidden, use_reentrant=use_reentrant).backward()
    assert statistics.sums[0].tokens.tolist() == [4 * LENGTH, 2 * LENGTH, 2 * LENGTH]


def test_statistics_without_objectives_add_nothing():
    statistics, layers = edl.RoutingStatistics(D), make_layers()
    watched = Objectives({}, statistics=statistics)
    total, values = watched(layers, domain_ids=LABELS)
    (torch.ones((), requires_grad=True) + total).backward()
    watched.step()
    assert total == 0 and values == {} and watched.log() == {}
    assert_layers(statistics, layers, LABELS.repeat_interleave(LENGTH))


def test_compiled_objectives_count_too():
    statistics, layers = edl.RoutingStatistics(D), make_layers()
    watched = objectives(statistics=statistics)

    @torch.compile(backend="eager")
    def loss_of(logits, experts):
        return watched(Observation(logits, experts=experts), domain_ids=LABELS)[0]

    for _ in range(2):
        loss_of(layers[0].logits.clone().requires_grad_(), layers[0].experts).backward()
    assert statistics.sums[0].tokens.tolist() == [4 * LENGTH, 2 * LENGTH, 2 * LENGTH]


def test_a_layer_that_runs_twice_in_a_pass_counts_twice():
    statistics, (layer, *_) = edl.RoutingStatistics(D), make_layers()
    statistics.update([layer._replace(layer=2), layer._replace(layer=2)], LABELS)
    assert statistics.sums[2].tokens.tolist() == [4 * LENGTH, 2 * LENGTH, 2 * LENGTH]


def test_copies_share_their_statistics():
    statistics = edl.RoutingStatistics(1)
    watched = objectives(statistics=statistics)
    assert watched.bind().statistics is statistics and copy.deepcopy(watched).statistics is statistics
    assert copy.deepcopy(statistics) is not statistics


# ---- ranks ----


def counted_on_rank():
    """The sums of both ranks: by sequences, by parts of sequences, and by stages."""
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    layers, rows = make_layers(), torch.arange(T).view(B, LENGTH)
    parts = {
        "group": rows[2:] if rank else rows[:2],
        "sequence_group": rows[:, 3:] if rank else rows[:, :3],
    }
    found = []
    for name, mine in parts.items():
        statistics = edl.RoutingStatistics(NAMES)
        for step, micro_batch in enumerate((mine[:1], mine[1:])):
            places = micro_batch.flatten()
            own = [Observation(x.logits[places], experts=x.experts[places]) for x in layers]
            statistics.update(own, OF_TOKENS.flatten()[micro_batch], MASK.flatten()[micro_batch])
            statistics.snapshot(step)
        found.append(statistics.reduce(**{name: group}).state_dict())
    stages = edl.RoutingStatistics(NAMES)
    own = [layer._replace(layer=3 * place) for place, layer in enumerate(layers)]
    stages.update(own[:1] if rank == 0 else own[1:], OF_TOKENS, MASK)
    empty = edl.RoutingStatistics(NAMES)
    sentences = []
    for other in (edl.RoutingStatistics(NAMES[: 2 + rank]), edl.RoutingStatistics(1, top_k=1 + rank), empty):
        try:
            if other.domains == ("0",):
                other.update(torch.zeros(4, 3))
            sentences.append(len(other.reduce(group).layers))
        except ValueError as error:
            sentences.append(str(error))
    return found, stages.reduce(stage_group=group).state_dict(), sentences


def of_state(state):
    statistics = edl.RoutingStatistics(NAMES)
    statistics.load_state_dict(state)
    return statistics


def test_ranks_and_stages_have_the_sums_of_one_process():
    ranks = on_ranks(2, counted_on_rank)
    layers, labels = make_layers(), FORMS["tokens, padding"][1]
    for found, of_stages, sentences in ranks:
        for each in map(of_state, found):
            assert_layers(each, layers, labels)
            assert [snapshot.step for snapshot in each.snapshots] == [0, 1]
            for number, sums in each.sums.items():
                assert torch.equal(sum(snapshot.sums[number].choices for snapshot in each.snapshots), sums.choices)
        stages = of_state(of_stages)
        assert [facts.number for facts in stages.layers] == [0, 3, 6, 9]
        for place, layer in enumerate(layers):
            wanted = by_hand(layer.logits.numpy(), layer.experts.numpy(), labels.numpy())
            assert_sums(stages.sums[3 * place], wanted)
        of_domains, of_layer, of_nothing = sentences
        assert of_domains.startswith(
            "edl::RoutingStatistics: all ranks must have the same domains (got ['code', 'news'] on"
        )
        assert of_layer.startswith(
            "edl::RoutingStatistics: all ranks must know the same of layer 0 (got 3 experts, 1 for"
        )
        assert of_nothing == 0


# ---- snapshots and measures ----


def test_snapshots_hold_what_came_since_the_last():
    first, second = make_layers(1), make_layers(2)
    statistics, alone = edl.RoutingStatistics(D), edl.RoutingStatistics(D)
    statistics.snapshot(3)
    statistics.update(first[:2], LABELS)
    statistics.snapshot(5)
    statistics.update(second, LABELS)
    statistics.snapshot(8)
    alone.update(second, LABELS)
    assert [snapshot.step for snapshot in statistics.snapshots] == [3, 5, 8]
    assert statistics.snapshots[0].sums == {} and set(statistics.snapshots[1].sums) == {0, 1}
    latest = statistics.snapshots[-1].sums
    for number, sums in alone.sums.items():
        for name in ("choices", "tokens", "entropy", "margin"):
            assert_close(getattr(latest[number], name), getattr(sums, name).double(), EXACT)
    assert statistics.measures(snapshot=-1) == pytest.approx(alone.measures(), rel=1e-9)
    assert statistics.measures(snapshot=0) == {}
    statistics.reset()
    assert statistics.layers == () and statistics.snapshots == []


def measures_by_hand(choices, entropy, tokens):
    load, shares = choices.sum(0), choices / choices.sum(1, keepdims=True)
    present = shares[choices.sum(1) > 0]
    log = lambda p, q: float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
    pairs = [(a, b) for a in range(len(choices)) for b in range(a + 1, len(choices))]
    divergence = {
        (a, b): (log(shares[a], (shares[a] + shares[b]) / 2) + log(shares[b], (shares[a] + shares[b]) / 2)) / 2
        for a, b in pairs
    }
    return {
        "cv": load.std() / load.mean(),
        "max_vio": load.max() / load.mean() - 1,
        "dead_expert_frac": (load == 0).mean(),
        "token_entropy": entropy.sum() / tokens.sum(),
        "domain_information": np.mean([log(row, present.mean(0)) for row in present]),
        "domain_divergence": np.mean(list(divergence.values())),
    }, divergence


def test_measures_are_those_of_numpy_by_the_names_of_others():
    statistics, layers = edl.RoutingStatistics(NAMES), make_layers()
    statistics.update(layers, LABELS)
    found = statistics.measures(per_layer=True, per_pair=True)
    of_layers = []
    for place, layer in enumerate(layers):
        sums = by_hand(layer.logits.numpy(), layer.experts.numpy(), LABELS.repeat_interleave(LENGTH).numpy())
        wanted, divergence = measures_by_hand(sums["choices"], sums["entropy"], sums["tokens"])
        of_layers.append(wanted)
        for name, value in wanted.items():
            assert found[f"moe/layer_{place}/{name}"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        for (a, b), value in divergence.items():
            name = f"moe/layer_{place}/domain_divergence/{NAMES[a]}-{NAMES[b]}"
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12)
    for name in of_layers[0]:
        mean = np.mean([wanted[name] for wanted in of_layers])
        assert found[f"moe/{name}_mean"] == pytest.approx(mean, rel=1e-9, abs=1e-12)
    loads = [sums.choices.sum(0).double() for sums in statistics.sums.values()]
    utilization = np.concatenate([(load / load.mean()).numpy() for load in loads])
    for name, value in {"p25": 25, "median": 50, "p75": 75, "min": 0, "max": 100}.items():
        assert found[f"moe/expert_utilization_{name}"] == pytest.approx(np.percentile(utilization, value))
    whole = statistics.measures()
    assert set(whole) < set(found) and not any("layer_" in name for name in whole)
    assert all(type(value) is float for value in found.values())


def test_measures_of_ones_own_loop_go_to_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    statistics = edl.RoutingStatistics(NAMES)
    statistics.update(make_layers(), LABELS)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        write_measures(writer, statistics, 7, per_layer=True)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    wanted = statistics.measures(per_layer=True)
    assert set(events.Tags()["scalars"]) == set(wanted)
    for name, value in wanted.items():
        (event,) = events.Scalars(name)
        assert event.step == 7 and event.value == pytest.approx(value, rel=1e-6)


def test_a_domain_with_half_a_character_has_a_measure_in_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    statistics = edl.RoutingStatistics(["\ud800", *NAMES[1:]])
    statistics.update(make_layers(), LABELS)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        write_measures(writer, statistics, 7, per_pair=True)
    tags = accumulator.EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert set(tags) == {name.replace("\ud800", "?") for name in statistics.measures(per_pair=True)}


def test_a_layer_in_the_place_of_another_is_not_counted_as_it():
    statistics = edl.RoutingStatistics(NAMES)
    first, second, *_ = (edl.routing.observations_of(layer)[0] for layer in make_layers())
    with pytest.raises(ValueError, match="^edl::RoutingStatistics: layers must all tell their numbers in the model, "):
        statistics.update([first._replace(layer=1), second], LABELS)
    assert not statistics.layers


# ---- files and checkpoints ----


def make_statistics():
    statistics = edl.RoutingStatistics(NAMES, scores="sigmoid", facts={"model": "small", "seed": 1})
    statistics.update(make_layers(1)[:2], LABELS)
    statistics.snapshot(10)
    statistics.update([layer._replace(router=f"layer {i}") for i, layer in enumerate(make_layers(2))], LABELS)
    statistics.snapshot(20)
    statistics.update(make_layers(3), LABELS)
    return statistics


def assert_same(one, other):
    assert one.domains == other.domains and one.layers == other.layers
    for number, sums in one.sums.items():
        for a, b in zip(sums, other.sums[number]):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert [each.step for each in one.snapshots] == [each.step for each in other.snapshots]
    for place in range(len(one.snapshots)):
        assert one.measures(True, True, place) == other.measures(True, True, place)


def test_files_and_checkpoints_hold_everything(tmp_path):
    statistics = make_statistics()
    statistics.save(tmp_path / "routing.safetensors")
    loaded = edl.RoutingStatistics.load(tmp_path / "routing.safetensors")
    assert_same(loaded, statistics)
    assert (loaded.scores, loaded.top_k, loaded.labels, loaded.facts) == (
        "sigmoid",
        None,
        "domain_ids",
        {"model": "small", "seed": 1},
    )
    torch.save(statistics.state_dict(), tmp_path / "state.pt")
    resumed = edl.RoutingStatistics(NAMES, scores="sigmoid")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(resumed, statistics)
    for each in (statistics, loaded, resumed):  # they go on alike
        each.update(make_layers(4), LABELS)
        each.snapshot(30)
    assert_same(loaded, statistics)
    assert_same(resumed, statistics)
    empty = edl.RoutingStatistics(2)
    empty.save(tmp_path / "empty.safetensors")
    assert edl.RoutingStatistics.load(tmp_path / "empty.safetensors").layers == ()


def changed(path, header=None, **arrays):
    """The file with another header or other arrays; None removes one."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        words = json.loads(file.metadata()["edl"])
    tensors = {**load_file(path), **arrays}
    save_file(
        {name: array for name, array in tensors.items() if array is not None},
        path,
        {"edl": json.dumps({**words, **(header or {})})},
    )


BROKEN = {
    "steps": lambda path: changed(path, {"steps": [20, 10]}),
    "steps that are none": lambda path: changed(path, {"steps": "two"}),
    "more steps": lambda path: changed(path, {"steps": [1, 2, 3]}),
    "layers": lambda path: changed(path, {"layers": [{"number": 0}]}),
    "domains": lambda path: changed(path, {"domains": ["code"]}),
    "no domains": lambda path: changed(path, {"domains": None}),
    "scores": lambda path: changed(path, {"scores": []}),
    "facts": lambda path: changed(path, {"facts": 3}),
    "kind": lambda path: changed(path, {"kind": "routing_record"}),
    "version": lambda path: changed(path, {"version": 2}),
    "negative": lambda path: changed(path, **{"layer.0.choices": np.full((3, 6), -1)}),
    "missing": lambda path: changed(path, **{"layer.1.mass": None}),
    "shape": lambda path: changed(path, **{"snapshots.0.tokens": np.zeros((2, 2), np.int64)}),
    "type": lambda path: changed(path, **{"layer.0.tokens": np.zeros(3)}),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("no file of ours"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_and_foreign_files_are_a_sentence(how, tmp_path):
    path = tmp_path / "routing.safetensors"
    make_statistics().save(path)
    BROKEN[how](path)
    with pytest.raises(ValueError, match=r"^edl::routing_statistics: .*\(got .*\)$"):
        edl.RoutingStatistics.load(path)


# ---- what is refused ----

LOGITS = torch.zeros(4, 3)


def freed():
    logits = torch.zeros(4, 3)
    logits.untyped_storage().resize_(0)
    return logits


LAYER = Observation(LOGITS, experts=torch.zeros(4, 1, dtype=torch.long))
WRONG_STATE = {**make_statistics().state_dict(), "layer.0.mass": torch.zeros(2)}
REFUSED = {
    "domains must be different names": lambda: edl.RoutingStatistics(["a", "a"]),
    "domains must be different names, at least one (got [])": lambda: edl.RoutingStatistics([]),
    "domains, names or their number, must be at least 1": lambda: edl.RoutingStatistics(0),
    "domains, names or their number, must be an integer (got 'code')": lambda: edl.RoutingStatistics("code"),
    "scores must be one of": lambda: edl.RoutingStatistics(2, scores="linear"),
    "top_k must be at least 1": lambda: edl.RoutingStatistics(2, top_k=0),
    "labels must be a string": lambda: edl.RoutingStatistics(2, labels=3),
    "facts must be JSON": lambda: edl.RoutingStatistics(2, facts={"x": torch.zeros(1)}),
    "observations must be an Observation": lambda: edl.RoutingStatistics(2).update([]),
    "observations must hold what was observed": lambda: edl.RoutingStatistics(1).update(Observation()),
    "domain_ids must be given": lambda: edl.RoutingStatistics(2).update(LAYER),
    "domain_ids must be one label per token, sequence or document": lambda: edl.RoutingStatistics(2).update(
        LAYER, torch.ones(2, 2)
    ),
    "domain_ids must be in [-1, 2)": lambda: edl.RoutingStatistics(2).update(LAYER, torch.tensor([0, 2])),
    "domain_ids must be in [-1, 2), masks must hold 0 and 1": lambda: edl.RoutingStatistics(2).update(
        LAYER, torch.tensor([0, 1]), torch.tensor([1, 1, 0, 5])
    ),
    "give attention_mask (1 = keep) or padding_mask": lambda: edl.RoutingStatistics(1).update(
        LAYER, None, torch.ones(4), torch.zeros(4)
    ),
    "layer 0 must tell its choices, experts": lambda: edl.RoutingStatistics(1).update(LOGITS),
    "layer 0 must tell its number of experts": lambda: edl.RoutingStatistics(1).update(
        Observation(experts=LAYER.experts)
    ),
    "layer 1 must tell its number of experts": lambda: edl.RoutingStatistics(1).update(
        [LAYER, Observation(router_gram=LOGITS)]
    ),
    "layer 0 must tell its number of experts, by logits, scores or tokens_per_expert (got experts alone)": (
        lambda: edl.RoutingStatistics(1).update(LAYER._replace(logits=None, tokens_per_expert=torch.tensor(3)))
    ),
    "logits must have memory": lambda: edl.RoutingStatistics(1).update(LAYER._replace(logits=freed())),
    "observations must be dense (got layout": lambda: edl.RoutingStatistics(1).update(
        LAYER._replace(logits=LOGITS.to_sparse())
    ),
    "layer 3 must have 3 experts, 1 for each token, as before (got 3 and 2)": lambda: edl.RoutingStatistics(1).update(
        [LAYER._replace(layer=3), LAYER._replace(layer=3, experts=LAYER.experts.expand(4, 2))]
    ),
    "experts must be int32 or int64": lambda: edl.RoutingStatistics(1).update(
        LAYER._replace(experts=torch.zeros(4, 1))
    ),
    "experts must be in [0, 3], 3 for none (got 4)": lambda: edl.RoutingStatistics(1).update(
        LAYER._replace(experts=LAYER.experts + 4)
    ),
    "experts of layer 0 must have a row for each of the 4 tokens": lambda: edl.RoutingStatistics(1).update(
        LAYER._replace(experts=LAYER.experts[:2])
    ),
    "a token chooses at most 3 experts (got 4": lambda: edl.RoutingStatistics(1, top_k=4).update(LOGITS),
    "logits or scores must be floating": lambda: edl.RoutingStatistics(1).update(LAYER._replace(logits=LOGITS.long())),
    "every row of routing must be a distribution": lambda: edl.RoutingStatistics(1).update(
        LAYER._replace(scores=LOGITS + 2)
    ),
    "layer 0 must have 3 experts, 1 for each token, as before (got 5 and 1)": lambda: (
        both := edl.RoutingStatistics(1, top_k=1),
        both.update(LOGITS),
        both.update(torch.zeros(4, 5)),
    ),
    "a snapshot must come after that of step 3": lambda: (
        each := edl.RoutingStatistics(1),
        each.snapshot(3),
        each.snapshot(3),
    ),
    "snapshot must be one of 0 (got -1)": lambda: edl.RoutingStatistics(1).measures(snapshot=-1),
    "a state must be what state_dict() gives": lambda: edl.RoutingStatistics(1).load_state_dict({"sums": 1}),
    "a state must be of the domains ['0'] (got ['code'": lambda: edl.RoutingStatistics(1).load_state_dict(
        make_statistics().state_dict()
    ),
    "layer.0.mass of a state must be torch.float64 [3, 6] (got torch.float32 [2])": lambda: edl.RoutingStatistics(
        NAMES
    ).load_state_dict(WRONG_STATE),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_what_is_refused(rule):
    with pytest.raises((ValueError, IndexError)) as caught:
        REFUSED[rule]()
    assert str(caught.value).startswith("edl::RoutingStatistics: ") and rule in str(caught.value)


def test_a_call_that_is_refused_counts_nothing():
    statistics = edl.RoutingStatistics(1)
    with pytest.raises(IndexError):
        statistics.update([LAYER, LAYER._replace(experts=LAYER.experts + 4)])
    assert statistics.layers == () and statistics.sums == {}


def test_objectives_refuse_what_is_no_statistics():
    with pytest.raises(ValueError, match="^edl::Objectives: statistics must be edl.RoutingStatistics or alike"):
        Objectives({}, statistics=3)
    with pytest.raises(ValueError, match="^edl::Objectives: objectives must be a mapping"):
        Objectives({})
    with pytest.raises(ValueError, match="^edl::write_measures: writer must have add_scalar"):
        write_measures(None, edl.RoutingStatistics(1), 0)


def test_importing_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert edl.RoutingStatistics(["a"]).measures() == {}
