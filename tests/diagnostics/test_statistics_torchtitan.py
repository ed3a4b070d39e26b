"""Statistics of torchtitan's routers are those of what these return themselves, on one rank and on two."""

import importlib.metadata

import pytest
import torch
import torchtitan_interface as interface
import torchtitan_objectives as samples
import torchtitan_released as released
from ranks import on_ranks
from tolerances import assert_close, tolerance

import edl
from edl.objectives import Objectives
from edl.routing import Observation


def is_installed(name, version):
    try:
        return importlib.metadata.version(name).startswith(version)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_torchtitan = pytest.mark.skipif(not is_installed("torchtitan", "0.3."), reason="torchtitan 0.3 is not installed")

PRECISION = tolerance(torch.float32, released.BATCH * released.LENGTH, roundings=4)
PER_TOKEN = torch.randint(
    -1, released.NUM_DOMAINS, (released.BATCH, released.LENGTH), generator=torch.Generator().manual_seed(3)
)


def watching(objectives=None, dims=None, **options):
    from edl.integrations.torchtitan import number_layers

    model = released.with_objectives(Objectives(objectives or {}, **options), dims=dims, micro_batches=2)
    number_layers(model)
    return model


def by_hand(labels):
    """Of the routers' own scores, as distributions, and choices."""
    model, layers = released.build(released.model_config()), []
    for layer in model.layers.values():
        layer.router.register_forward_hook(lambda router, args, output: layers.append(output))
    with torch.no_grad():
        model(released.inputs())
    statistics = edl.RoutingStatistics(released.NUM_DOMAINS)
    observed = [
        Observation(scores=(scores / scores.sum(-1, keepdim=True)).flatten(0, -2), experts=experts.flatten(0, -2))
        for _, experts, scores in layers
    ]
    statistics.update(observed, labels)
    return statistics.state_dict()


def on_one_process():
    released.without_triton()
    from torchtitan.distributed.activation_checkpoint import FullAC

    found = {}
    for name in ("plain", "with objectives", "checkpointed"):
        statistics, held_out = edl.RoutingStatistics(released.NUM_DOMAINS), edl.RoutingStatistics(released.NUM_DOMAINS)
        objectives = {"certainty": (samples.Certainty(), 0.5)} if name == "with objectives" else {}
        model = watching(objectives, statistics=statistics, evaluation_statistics=held_out)
        if name == "checkpointed":
            FullAC.Config().build().apply(model)
        for batch, labels in zip(released.inputs().chunk(2), released.DOMAINS.chunk(2)):
            released.train(model, labels, batch)
        model.eval()
        with torch.no_grad(), edl.domain_scope(PER_TOKEN):
            model(released.inputs())
        names = [(facts.number, facts.name) for facts in statistics.layers]
        found[name] = statistics.state_dict(), held_out.state_dict(), names
    unnumbered = released.with_objectives(Objectives({}, statistics=edl.RoutingStatistics(released.NUM_DOMAINS)))
    return (
        found,
        released.sentence(released.train, unnumbered, released.DOMAINS),
        by_hand(released.DOMAINS),
        by_hand(PER_TOKEN),
    )


def on_rank():
    """The sums of both ranks, which hold different sequences, and then different parts of them."""
    released.without_triton()
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    found = []
    for context_size, dim in ((1, 0), (2, 1)):
        dims, context = released._parallel(context_size=context_size)
        statistics = edl.RoutingStatistics(released.NUM_DOMAINS)
        model = watching(dims=dims, statistics=statistics)
        mine, labels = (whole.chunk(2, dim=dim)[rank].contiguous() for whole in (released.inputs(), PER_TOKEN))
        with context():
            released.train(model, labels, mine)
        found.append(statistics.reduce(world).state_dict())
    return found


def assert_same(state, wanted):
    fields = [name for name in wanted if name != "header"]
    assert fields and set(state) == set(wanted)
    for name in fields:
        is_count = name.split(".")[-1] in ("choices", "tokens", "coactivation")
        assert_close(state[name], wanted[name].double(), 0.0 if is_count else PRECISION)
    assert state["layer.0.tokens"].sum() > 0


@pytest.fixture(scope="module")
def single():
    return on_ranks(1, on_one_process)[0]


@needs_torchtitan
def test_training_and_evaluation_count_each_token_once(single):
    found, sentence, wanted, of_tokens = single
    for trained, evaluated, names in found.values():
        assert_same(trained, wanted)
        assert_same(evaluated, of_tokens)
        assert [number for number, _ in names] == [0, 1] and all("router" in name for _, name in names)
    assert sentence.startswith("edl::torchtitan: statistics need the numbers of the layers, number_layers(model)")


@needs_torchtitan
def test_two_ranks_have_the_sums_of_one(single):
    wanted = single[3]
    for found in on_ranks(2, on_rank):
        for state in found:
            assert_same(state, wanted)


# ---- the auxiliary loss of its development version ----


def watched_auxiliary_loss(**options):
    bound = samples.objectives()
    objectives = {name: (objective, 0.5) for name, objective in bound.objectives.items()}
    return interface.model_with_objectives(Objectives(objectives, **options))


def test_auxiliary_losses_count_what_their_routers_chose():
    statistics, wanted = edl.RoutingStatistics(released.NUM_DOMAINS), edl.RoutingStatistics(released.NUM_DOMAINS)
    model, seen = watched_auxiliary_loss(statistics=statistics), []
    interface.integration().number_layers(model)
    for layer in model.layers:
        layer.gate.register_forward_hook(lambda gate, args, logits: seen.append(logits.detach()))
    padding = torch.arange(interface.BATCH * interface.LENGTH) % 5 == 0
    interface.train(model, interface.DOMAINS, interface.inputs(), 24, padding)
    observed = []
    for logits in seen:
        gates = logits.sigmoid()
        experts = gates.topk(interface.TOP_K, dim=1).indices
        observed.append(Observation(scores=gates / gates.sum(1, keepdim=True), experts=experts))
    wanted.update(observed, interface.DOMAINS, padding_mask=padding)
    assert_same(statistics.state_dict(), wanted.state_dict())
    assert [facts.name for facts in statistics.layers] == ["layers.0.aux_loss", "layers.1.aux_loss"]


def test_what_auxiliary_losses_cannot_count():
    statistics = edl.RoutingStatistics(released.NUM_DOMAINS)
    with pytest.raises(ValueError, match="^edl::torchtitan: statistics must be those of training, in which alone"):
        watched_auxiliary_loss(evaluation_statistics=statistics)
    with pytest.raises(ValueError, match="^edl::torchtitan: statistics alone need an objective, of weight 0"):
        interface.model_with_objectives(Objectives({}, statistics=statistics))
    model = watched_auxiliary_loss(statistics=statistics)
    with pytest.raises(ValueError, match="^edl::torchtitan: statistics need the numbers of the layers"):
        interface.train(model, interface.DOMAINS, interface.inputs(), 24)
