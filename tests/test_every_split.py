"""However a batch is split, over ranks, slices of its sequences and micro-batches in two passes, every additive
objective has the loss and the gradient of one process."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tolerances import assert_close
from torch.distributed.device_mesh import init_device_mesh

import edl
from edl.moe.router_weights import gram_of, responses_of
from edl.objectives import (
    ActivationCosine,
    CrossLayerCoupling,
    DirichletPrior,
    ExpertDivergence,
    ExpertOrthogonality,
    ExpertRouterCoupling,
    LoadBalancing,
    ModalityDivergence,
    ModalityMutualInformation,
    MutualInformation,
    Objectives,
    RouterEntropy,
    RouterOrthogonality,
    RouterSimilarity,
    RouterZ,
    RoutingVariance,
    available,
)
from edl.routing import Observation

B, LENGTH, H, K, D = 12, 4, 6, 3, 3
SIZES = (12, 6, 12)  # of the layers, in experts
EXACT = 1e-12
WHOLE = {
    "activations": ActivationCosine(),
    "coupling": CrossLayerCoupling(),
    "prior": DirichletPrior(bins=8),
    "divergence": ExpertDivergence(D, eps=1e-3),
    "divergence, corrected": ExpertDivergence(D, eps=1e-3, bias_correction=True),
    "divergence of tokens": ExpertDivergence(D, eps=1e-3, sequence_reduction="token", labels="of_tokens"),
    "balance": LoadBalancing(),
    "balance of sequences": LoadBalancing("sigmoid", scope="sequence", choices="by_score"),
    "balance of devices": LoadBalancing(devices=3, devices_per_token=2),
    "outputs": ExpertOrthogonality(),
    "outputs, normalised": ExpertOrthogonality(normalize=True),
    "outputs of the code": ExpertOrthogonality("released_code"),
    "modalities": ModalityDivergence(D, "forward", labels="weights"),
    "bins": ModalityMutualInformation(D, bins=3, labels="of_tokens"),
    "bins, sorted": ModalityMutualInformation(D, bins=3, binning="specialisation", labels="weights"),
    "information": MutualInformation(D, "uniform"),
    "information of weights": MutualInformation(D, labels="weights"),
    "entropy": RouterEntropy(),
    "rows": RouterOrthogonality(groups=2, margin=0.1),
    "rows, similarity": RouterSimilarity(),
    "rows and experts": ExpertRouterCoupling(),
    "z": RouterZ(),
    "variance": RoutingVariance(),
    "variance of the code": RoutingVariance("released_code"),
}
# Of which one process would have one unit: the balance of each part, and the mean of these.
OF_PARTS = {
    "balance of micro-batches": (LoadBalancing(scope="micro_batch"), LoadBalancing()),
    "balance of ranks": (LoadBalancing(scope="rank", devices=3), LoadBalancing(devices=3)),
}
SPLITS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}  # data × context ranks


class Batch:
    """Hidden states, a mask, labels in every form, and the routers of layers of unequal sizes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.hidden = random(B, LENGTH, H)
        self.routers = [random(size, H) for size in SIZES]
        self.keep = torch.rand(B, LENGTH, generator=generator) < 0.7
        self.labels = {
            "domain_ids": torch.randint(-1, D, (B,), generator=generator),
            "of_tokens": torch.randint(-1, D, (B, LENGTH), generator=generator),
            "weights": random(B, LENGTH, D).abs(),
        }
        self.gates = [random(size, 4, H) for size in SIZES]

    def losses(self, bound, routers, part):
        sequences, positions = part
        hidden = self.hidden[sequences, positions].flatten(0, 1)
        layers = []
        for router, gates in zip(routers, self.gates, strict=True):
            logits = hidden @ router.T
            experts = edl.ops.route_tokens(logits.detach(), K, "softmax")[1]
            weights = logits.sigmoid().gather(1, experts)
            rows = router[experts] * hidden.unsqueeze(1)  # what a layer would not let out, of each choice
            gram = rows @ rows.mT
            told = {
                "output_gram": gram,
                "activation_gram": gram,
                "router_gram": gram_of(router),
                "router_responses": responses_of(router, gates),
            }
            size = len(self.keep[part])  # of one token each, sequences are told by their number alone
            layers.append(Observation(logits, weights=weights, experts=experts, batch_size=size, **told))
        of_part = {name: x[part] if x.dim() > 1 else x[sequences] for name, x in self.labels.items()}
        return bound(layers, self.keep[part], **of_part)

    def losses_and_gradients(self, bound, part):
        routers = [router.clone().requires_grad_(True) for router in self.routers]
        total, values = self.losses(bound, routers, part)
        return values, list(torch.autograd.grad(total, routers))


def weight_of(name):
    return 0.1 + len(name) / 20


def of_one_process(batch, parts):
    """The values and gradients that all ranks together must have, with these parts of the batch as units: names → the
    parts that are one."""
    everything = slice(None), slice(None)
    bound = Objectives({name: (objective, weight_of(name)) for name, objective in WHOLE.items()})
    values, gradients = batch.losses_and_gradients(bound, everything)
    for name, (_, objective) in OF_PARTS.items():
        alone = Objectives({name: (objective, weight_of(name))})
        that_count = [part for part in parts[name] if batch.keep[part].any()]
        of_parts = [batch.losses_and_gradients(alone, part) for part in that_count]
        values[name] = sum(each[0][name] for each in of_parts) / len(of_parts)
        for place in range(len(gradients)):
            gradients[place] += sum(each[1][place] for each in of_parts) / len(of_parts)
    return values, gradients


def pieces(length, number, smallest=1):
    """Slices of unequal lengths."""
    ends = [round(length * (place / number) ** 1.2) for place in range(number + 1)]
    found = [slice(*pair) for pair in itertools.pairwise(ends)]
    assert all(each.stop - each.start >= smallest for each in found)
    return found


def check(found, expected):
    assert set(found[0]) == set(expected[0])
    for name, value in found[0].items():
        assert expected[0][name] != 0, name
        assert_close(value, expected[0][name], EXACT, scale=1e-3)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert wanted.abs().max() > 0
        assert_close(gradient, wanted, EXACT)


def added(gradients, averaging_ranks):
    """What a framework makes of the gradients of all ranks: some it averages over, over the others it sums."""
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / averaging_ranks for gradient in gradients]


def check_split(seed, data_ranks, context_ranks, groups):
    batch, averaging_ranks = Batch(seed), [1, data_ranks, data_ranks * context_ranks][seed % 3]
    sequences, positions = pieces(B, data_ranks, 2), pieces(LENGTH, context_ranks)
    data, context = divmod(dist.get_rank(), context_ranks)
    both = {name: (objective, weight_of(name)) for name, objective in WHOLE.items()}
    both |= {name: (objective, weight_of(name)) for name, (objective, _) in OF_PARTS.items()}

    def units(rows):
        return {
            "balance of micro-batches": [(each, slice(None)) for each in rows],
            "balance of ranks": list(itertools.product(rows, positions)),
        }

    bound = Objectives(both, averaging_ranks=averaging_ranks, **groups)
    values, gradients = batch.losses_and_gradients(bound, (sequences[data], positions[context]))
    check((values, added(gradients, averaging_ranks)), of_one_process(batch, units(sequences)))

    halves = [slice(x.start, x.start + 1) for x in sequences], [slice(x.start + 1, x.stop) for x in sequences]
    memory = edl.DomainMemory()
    bound = Objectives(both, averaging_ranks=averaging_ranks, memory=memory, **groups)
    parts = [(half[data], positions[context]) for half in halves]
    with memory.collect():
        for part in parts:
            batch.losses(bound, batch.routers, part)
    found = [batch.losses_and_gradients(bound, part) for part in parts]
    bound.step()
    gradients = added([sum(each) / 2 for each in zip(*(gradients for _, gradients in found))], averaging_ranks)
    expected = of_one_process(batch, units(halves[0] + halves[1]))
    for values, _ in found:
        check((values, gradients), expected)


def check_splits(ranks):
    for data_ranks, context_ranks in SPLITS[ranks]:
        mesh = init_device_mesh("cpu", (data_ranks, context_ranks), mesh_dim_names=("data", "context"))
        groups = {"group": mesh["data"], "sequence_group": mesh["context"]}
        for seed in range(3):
            check_split(seed, data_ranks, context_ranks, groups)


@pytest.mark.parametrize("ranks", SPLITS)
def test_every_additive_objective_is_that_of_one_process(ranks):
    on_ranks(ranks, check_splits, ranks)


def test_every_objective_is_looked_at():
    looked_at = {*WHOLE.values(), *(objective for objective, _ in OF_PARTS.values())}
    of_the_library = {each for each in available().values() if each.__module__.startswith("edl.")}
    assert {type(objective) for objective in looked_at} == of_the_library
