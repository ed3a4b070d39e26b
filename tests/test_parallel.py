"""The loss over several ranks: after the framework's averaging, the gradients are those of one process that saw the
whole batch."""

import copy
import math
import types

import pytest
import torch
import torch.distributed as dist
from oracle import paper_loss, softmax
from ranks import Collectives, on_ranks
from tolerances import assert_close, tolerance
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import edl

D = 4
E = 12
H = 6


class Batch:
    """A random global batch of hidden states [L, B, S_len, H], router weights [L, E, H], and labels in one of their
    forms."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layers = 1 + seed % 3
        self.sequences = 8
        self.length = 8
        self.hidden = self.random(self.layers, self.sequences, self.length, H).to(dtype)
        self.router = self.random(self.layers, E, H).to(dtype)
        labels = torch.randint(-1, D, (self.sequences,), generator=self.generator)
        self.keep = torch.rand(self.sequences, self.length, generator=self.generator) < 0.8
        form = seed % 5
        self.options: dict = {}
        if form == 1:  # sorted: a rank rarely has two domains
            labels = labels.sort().values
            self.options["bias_correction"] = seed % 2 == 0
        elif form == 2:
            labels = torch.randint(-1, D, (self.sequences, self.length), generator=self.generator)
        elif form == 3:
            labels = self.random(self.sequences, D).abs() * (torch.arange(self.sequences) % 3 > 0).unsqueeze(1)
        elif form == 4:
            self.options["sequence_reduction"] = "token"
            labels[: self.sequences // 2] = -1  # half of the ranks have no label
            self.keep[self.sequences // 2] = False
        self.labels = labels

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def part(self, sequences: slice, positions: slice) -> tuple:
        labels = self.labels[sequences]
        if labels.shape == (labels.shape[0], self.length):
            labels = labels[:, positions]
        return self.hidden[:, sequences, positions], labels, self.keep[sequences, positions]


def loss_and_gradient(divergence, hidden, router, labels, keep) -> tuple[torch.Tensor, torch.Tensor]:
    router = router.clone().requires_grad_(True)
    loss = divergence([h @ w.T for h, w in zip(hidden, router)], labels, attention_mask=keep)
    return loss.detach(), torch.autograd.grad(loss, router)[0]


def one_process(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    divergence = edl.ExpertDivergenceLoss(D, **batch.options)
    return loss_and_gradient(divergence, batch.hidden.double(), batch.router.double(), batch.labels, batch.keep)


def smallest_divergence(batch: Batch) -> float:
    """Between any two domains of any layer; 1 where there are no two."""
    layers = [(h @ w.T).double() for h, w in zip(batch.hidden, batch.router)]
    per_token = batch.options.get("sequence_reduction") == "token"
    segments = edl.segments.make_segments(
        batch.keep.numel(),
        batch.labels,
        D,
        "token" if per_token else "sequence",
        batch.keep,
        batch_size=batch.sequences,
    )
    smallest = 1.0
    for layer in layers:
        sums, counts = edl.ops.aggregate_routing(layer.flatten(0, 1), segments.segment_ids, segments.num_segments)
        sums, _, counts = edl.ops.domain_moments(sums, counts, segments.labels, D)
        pairs = edl.ops.pairwise_divergence(sums, counts)[torch.triu(torch.ones(D, D), 1).bool()]
        smallest = min([smallest, *pairs[pairs.isfinite()].tolist()])
    return smallest


def this_rank_part(batch: Batch, data_ranks: int, context_ranks: int) -> tuple:
    data, context = divmod(dist.get_rank(), context_ranks)
    sequences, positions = batch.sequences // data_ranks, batch.length // context_ranks
    return batch.part(
        slice(data * sequences, (data + 1) * sequences), slice(context * positions, (context + 1) * positions)
    )


def check_random_splits(data_ranks: int, context_ranks: int, seeds: range) -> None:
    """On every rank: value and averaged gradient of random batches, split into data × context."""
    mesh = init_device_mesh("cpu", (data_ranks, context_ranks), mesh_dim_names=("data", "context"))
    groups = {"group": mesh["data"] if data_ranks > 1 else None}
    if context_ranks > 1:
        groups |= {"sequence_group": mesh["context"].get_group(), "averaging_ranks": data_ranks * context_ranks}
    for seed in seeds:
        dtype = torch.float32 if seed % 4 == 3 else torch.float64
        batch = Batch(seed, dtype)
        hidden, labels, keep = this_rank_part(batch, data_ranks, context_ranks)
        divergence = edl.ExpertDivergenceLoss(D, **batch.options, **groups)
        loss, gradient = loss_and_gradient(divergence, hidden, batch.router, labels, keep)
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        expected_loss, expected_gradient = one_process(batch)
        # The rounding of the routing reaches the loss divided by the root of the divergence.
        allowed = tolerance(dtype, batch.sequences * batch.length, roundings=4) / smallest_divergence(batch) ** 0.5
        assert_close(loss, expected_loss, allowed)
        assert_close(gradient, expected_gradient, allowed)


@pytest.mark.parametrize("data_ranks, context_ranks", [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_gradients_equal_one_process_however_the_batch_is_split(data_ranks, context_ranks):
    on_ranks(data_ranks * context_ranks, check_random_splits, data_ranks, context_ranks, range(20))


def check_random_splits_in_two_passes(data_ranks: int, context_ranks: int, seeds: range) -> None:
    """The same in two micro-batches a rank, whose statistics a first pass collects."""
    mesh = init_device_mesh("cpu", (data_ranks, context_ranks), mesh_dim_names=("data", "context"))
    groups = {"group": mesh["data"] if data_ranks > 1 else None}
    if context_ranks > 1:
        groups |= {"sequence_group": mesh["context"], "averaging_ranks": data_ranks * context_ranks}
    for seed in seeds:
        batch = Batch(seed)
        hidden, labels, keep = this_rank_part(batch, data_ranks, context_ranks)
        halves = list(zip(hidden.chunk(2, dim=1), labels.chunk(2), keep.chunk(2)))
        memory = edl.DomainMemory()
        divergence = edl.ExpertDivergenceLoss(D, memory=memory, **batch.options, **groups)
        with memory.collect():
            for h, label, kept in halves:
                divergence([x @ w.T for x, w in zip(h, batch.router)], label, attention_mask=kept)
        results = [loss_and_gradient(divergence, h, batch.router, label, kept) for h, label, kept in halves]
        memory.step()
        gradient = sum(gradient for _, gradient in results) / 2
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        expected_loss, expected_gradient = one_process(batch)
        allowed = tolerance(torch.float64, batch.keep.numel(), roundings=4) / smallest_divergence(batch) ** 0.5
        for loss, _ in results:
            assert_close(loss, expected_loss, allowed)
        assert_close(gradient, expected_gradient, allowed)


@pytest.mark.parametrize("data_ranks, context_ranks", [(2, 1), (1, 2), (2, 2)])
def test_two_passes_over_micro_batches_equal_one_process_however_the_batch_is_split(data_ranks, context_ranks):
    on_ranks(data_ranks * context_ranks, check_random_splits_in_two_passes, data_ranks, context_ranks, range(20))


def rank_without_tokens() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every rank: its value, and the gradient added over ranks, where the last rank has no token."""
    batch = Batch(1)
    divergence = edl.ExpertDivergenceLoss(D, group=dist.group.WORLD)
    shapes = (lambda h: h, lambda h: h.flatten(1, 2))
    results = []
    for shape in shapes:
        sequences = slice(8) if dist.get_rank() == 0 else slice(0)
        hidden, labels, keep = batch.part(sequences, slice(None))
        loss, gradient = loss_and_gradient(divergence, shape(hidden), batch.router, labels, keep)
        dist.all_reduce(gradient)
        results.append((loss, gradient / 2))
    return results


def test_a_rank_may_have_no_token():
    loss, gradient = one_process(Batch(1))
    for results in on_ranks(2, rank_without_tokens):
        for own_loss, own_gradient in results:
            assert_close(own_loss, loss, tolerance(torch.float64, 64))
            assert_close(own_gradient, gradient, tolerance(torch.float64, 64, roundings=4))


def test_the_reference_of_the_splits_is_the_papers_loss():
    batch = Batch(0)
    loss, _ = one_process(batch)
    tokens = [
        (row, label) if kept else None
        for row, label in enumerate(batch.labels.tolist())
        for kept in batch.keep[row].tolist()
    ]
    layers = [softmax(h.reshape(-1, H) @ w.T) for h, w in zip(batch.hidden, batch.router)]
    expected = torch.stack([paper_loss(layer, tokens) for layer in layers]).mean()
    assert_close(loss, expected, tolerance(torch.float64, 64) * 100)


# ---- frameworks ----


class Model(torch.nn.Module):
    """Two blocks of a router, a mixing layer and its residual; returns the hidden states and the router logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.routers = torch.nn.ModuleList(torch.nn.Linear(8, E, bias=False) for _ in range(2))
        self.mixers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = self.embed(tokens)
        logits = []
        for router, mixer in zip(self.routers, self.mixers):
            logits.append(router(hidden))
            hidden = hidden + torch.tanh(mixer(hidden))
        return hidden, logits


def model_and_batch() -> tuple[Model, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Model().double()
    return model, torch.randint(16, (8, 6)), torch.tensor([0, 0, 0, 1, 1, 2, -1, 1])


def total_loss(model, divergence, tokens, labels) -> torch.Tensor:
    """A language model's loss stands in: the mean over tokens of something that depends on every parameter."""
    hidden, logits = model(tokens)
    return hidden.square().mean() + 0.1 * divergence(logits, labels)


def gradients_of_one_process() -> dict[str, torch.Tensor]:
    model, tokens, labels = model_and_batch()
    total_loss(model, edl.ExpertDivergenceLoss(D), tokens, labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_of_one_process(model: torch.nn.Module, prefix: str = "") -> None:
    expected = gradients_of_one_process()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        assert_close(grad, expected[name.removeprefix(prefix)], tolerance(torch.float64, 48, roundings=16))


def check_ddp() -> None:
    model, tokens, labels = model_and_batch()
    model = torch.nn.parallel.DistributedDataParallel(model)
    divergence = edl.ExpertDivergenceLoss(D, group=dist.group.WORLD)
    mine = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    total_loss(model, divergence, tokens[mine], labels[mine]).backward()
    assert_gradients_of_one_process(model, "module.")


def check_fsdp2(*shape: int) -> None:
    """FSDP2 over a mesh: of one dimension, or hybrid (replicas, shards), where all ranks share the batch."""
    from torch.distributed.fsdp import fully_shard

    model, tokens, labels = model_and_batch()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for layer in (*model.routers, *model.mixers, model):
        fully_shard(layer, mesh=mesh)
    divergence = edl.ExpertDivergenceLoss(D, group=mesh if len(shape) == 1 else mesh._flatten("data"))
    sequences = 8 // dist.get_world_size()
    mine = slice(dist.get_rank() * sequences, (dist.get_rank() + 1) * sequences)
    total_loss(model, divergence, tokens[mine], labels[mine]).backward()
    assert_gradients_of_one_process(model)


def check_tensor_parallel(data_ranks: int) -> None:
    """Sequence parallel: each tensor rank routes a slice of every sequence, and the routers' gradients are summed over
    them."""
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh = init_device_mesh("cpu", (data_ranks, 2), mesh_dim_names=("data", "tensor"))
    model, tokens, labels = model_and_batch()
    plan = {f"routers.{layer}": SequenceParallel(sequence_dim=0, use_local_output=True) for layer in range(2)}
    plan |= {f"mixers.{layer}": SequenceParallel(sequence_dim=0, use_local_output=True) for layer in range(2)}
    model = parallelize_module(model, mesh["tensor"], plan)
    divergence = edl.ExpertDivergenceLoss(
        D,
        sequence_group=mesh["tensor"],
        group=mesh["data"] if data_ranks > 1 else None,
        averaging_ranks=data_ranks,
    )
    sequences, positions = 8 // data_ranks, 3
    rows = slice(mesh.get_local_rank("data") * sequences, (mesh.get_local_rank("data") + 1) * sequences)
    columns = slice(mesh.get_local_rank("tensor") * positions, (mesh.get_local_rank("tensor") + 1) * positions)
    # Positions first, as Megatron has it: torch 2.11 cannot flatten the second dimension where it is sharded.
    hidden, logits = model(tokens[rows, columns].t())
    logits = [layer.transpose(0, 1) for layer in logits]
    # The mean over all tokens of the data rank is half the mean of each half.
    (hidden.square().mean() / 2 + 0.1 * divergence(logits, labels[rows])).backward()
    expected = gradients_of_one_process()
    for name, parameter in model.named_parameters():
        if isinstance(parameter.grad, DTensor):  # routers and mixers: summed over the tensor ranks
            gradient = parameter.grad.full_tensor()
        else:  # the embedding's is that of a slice
            gradient = parameter.grad
            dist.all_reduce(gradient, group=mesh.get_group("tensor"))
        dist.all_reduce(gradient, group=mesh.get_group("data"))
        assert_close(gradient / data_ranks, expected[name], tolerance(torch.float64, 48, roundings=16))


@pytest.mark.parametrize(
    "check, arguments, ranks",
    [
        (check_ddp, (), 2),
        (check_fsdp2, (2,), 2),
        (check_fsdp2, (2, 2), 4),
        (check_tensor_parallel, (1,), 2),
        (check_tensor_parallel, (2,), 4),
    ],
    ids=["DDP", "FSDP2", "hybrid FSDP2", "tensor + sequence parallel", "data x tensor + sequence parallel"],
)
def test_gradients_of_a_model_in_a_framework_equal_one_process(check, arguments, ranks):
    on_ranks(ranks, check, *arguments)


# ---- what travels ----


def count_collectives(data_ranks: int, context_ranks: int, bias_correction: bool) -> tuple[list[int], list[int]]:
    """How many numbers each collective sends, forward and backward, of 48 layers whose batch the ranks share."""
    batch, num_layers = Batch(0), 48
    seam = {"group": dist.group.WORLD}
    if context_ranks > 1:
        seam = {"sequence_group": dist.group.WORLD, "averaging_ranks": context_ranks}
    divergence = edl.ExpertDivergenceLoss(D, bias_correction=bias_correction, **seam)
    hidden, labels, keep = this_rank_part(batch, data_ranks, context_ranks)
    layers = [(hidden[0] @ batch.router[0].T).requires_grad_(True) for _ in range(num_layers)]
    divergence(layers, labels, attention_mask=keep)  # agrees on the layout
    with Collectives() as forward:
        loss = divergence(layers, labels, attention_mask=keep)
    with Collectives() as backward:
        loss.backward()
    return forward.numbers, backward.numbers


@pytest.mark.parametrize("bias_correction", [False, True])
def test_all_layers_travel_in_one_all_reduce_forward_and_none_backward(bias_correction):
    moments = 48 * (D * E * (2 if bias_correction else 1) + D)
    expected = ([moments + 1], [])  # one more: failed ranks
    assert on_ranks(2, count_collectives, 2, 1, bias_correction) == [expected] * 2


def test_all_layers_of_a_slice_travel_in_one_all_reduce_behind_a_comparison_of_the_segments():
    for forward, backward in on_ranks(2, count_collectives, 1, 2, False):
        *comparison, sums = forward
        assert sums == Batch(0).sequences * (48 * E + 1) + 1 and backward == []
        assert len(comparison) == 2 and max(comparison) < 200  # the length of an object, and its bytes


def test_a_rank_alone_in_its_groups_sends_nothing(group_of_one):
    divergence = edl.ExpertDivergenceLoss(D, group=group_of_one, sequence_group=group_of_one, averaging_ranks=1)
    with Collectives() as collectives:
        loss = divergence(LOGITS, LABELS)
    assert collectives.names == []
    assert loss.equal(edl.ExpertDivergenceLoss(D)(LOGITS, LABELS))


def begin_and_finish() -> tuple[list[str], list[str], bool]:
    """What two losses that are begun, and finished later, do with other ranks; whether they are those of two calls."""
    divergence = edl.ExpertDivergenceLoss(D, group=dist.group.WORLD)
    batches = [(LOGITS.clone().requires_grad_(True), LABELS), (LOGITS.flip(2).requires_grad_(True), LABELS.flip(0))]
    expected = [torch.autograd.grad(divergence(*batch), batch[0])[0] for batch in batches]
    segments = edl.segments.make_segments(LOGITS.shape[0] * LOGITS.shape[1], batches[1][1], D)
    with Collectives() as begun:
        finishes = [
            divergence.begin(*batches[0]),
            divergence.begin_from_segments(batches[1][0].flatten(0, 1), segments),
        ]
    with Collectives() as finished:
        losses = [finish() for finish in finishes]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss, (logits, _) in zip(losses, batches, strict=True)]
    return begun.names, finished.names, all(map(torch.equal, gradients, expected))


def test_a_loss_that_is_begun_waits_only_where_it_is_finished():
    assert on_ranks(2, begin_and_finish) == [(["all_reduce"] * 2, ["wait_tensor"] * 2, True)] * 2


def compiled_and_eager(dynamic: bool | None, backend: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    batch = Batch(2)
    hidden, labels, keep = this_rank_part(batch, 2, 2)
    divergence = edl.ExpertDivergenceLoss(
        D, group=mesh["data"], sequence_group=mesh["context"], averaging_ranks=4, **batch.options
    )
    compiled = torch.compile(divergence, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (slice(None), slice(0, -1)):
        given = hidden[:, rows], batch.router, labels[rows], keep[rows]
        expected = loss_and_gradient(divergence, *given)
        torch.testing.assert_close(loss_and_gradient(compiled, *given), expected, rtol=0, atol=0)


# None begins with the graph that False has for each size and makes sizes dynamic at the second, as True does at once:
# what inductor makes of both is shown by it.
@pytest.mark.parametrize("dynamic, backend", [(False, "aot_eager"), (True, "aot_eager"), (None, "inductor")])
def test_compiles_without_graph_break(dynamic, backend):
    on_ranks(4, compiled_and_eager, dynamic, backend)


def value_of_a_copy() -> list[float]:
    divergence = edl.ExpertDivergenceLoss(D, group=dist.group.WORLD)
    labels = LABELS[2 * dist.get_rank() :][:2]
    values = [copied(LOGITS[:2], labels).item() for copied in (divergence, copy.deepcopy(divergence))]
    return [*values, copy.deepcopy(divergence)(LOGITS[:2], labels).item()]


def test_a_copy_spans_the_same_ranks():
    for first, unused, used in on_ranks(2, value_of_a_copy):
        assert first == unused == used != 0


def no_two_ranks_differ() -> bytes:
    batch = Batch(1, torch.float32)
    hidden, labels, keep = this_rank_part(batch, 4, 1)
    loss, _ = loss_and_gradient(edl.ExpertDivergenceLoss(D, group=dist.group.WORLD), hidden, batch.router, labels, keep)
    return loss.numpy().tobytes()


def test_all_ranks_have_the_same_value_to_the_bit():
    assert len(set(on_ranks(4, no_two_ranks_differ))) == 1


# ---- a rank that fails ----

LOGITS = torch.randn(4, 6, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3])


def outcome(call) -> str:
    """The sentence that a call raises, or 'a number'."""
    try:
        value = call()
    except (ValueError, IndexError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    assert value.isfinite()
    return "a number"


def fail_on_one_rank(failing_rank: int, data_ranks: int, context_ranks: int) -> list[str]:
    """Outcomes of calls in which one rank gets bad input, good calls in between."""
    mesh = init_device_mesh("cpu", (data_ranks, context_ranks), mesh_dim_names=("data", "context"))
    groups = {"group": mesh["data"], "averaging_ranks": 1}
    if context_ranks > 1:
        groups["sequence_group"] = mesh["context"]
    divergence = edl.ExpertDivergenceLoss(D, **groups)
    bad_inputs = [
        (LOGITS, torch.tensor([0, 1, 2, 9])),
        (LOGITS, LABELS[:3]),
        (LOGITS[:, :, :-1], LABELS),
        (LOGITS.softmax(-1), LABELS),
        ([LOGITS, LOGITS], LABELS),
        (LOGITS.float(), LABELS),
    ]
    outcomes = [outcome(lambda: divergence(LOGITS, LABELS))]
    for bad in bad_inputs:
        good = (LOGITS, LABELS)
        arguments = bad if dist.get_rank() == failing_rank else good
        outcomes += [outcome(lambda: divergence(*arguments)), outcome(lambda: divergence(*good))]
    return outcomes


SENTENCES = [
    (
        "IndexError: edl::expert_divergence_loss: labels must be at least -1 and below num_domains = 4 (got 9 for "
        "segment 3)"
    ),
    "ValueError: edl::expert_divergence_loss: domain_ids must have one row per sequence, 4 (got [3])",
    "ValueError: edl::parallel: a loss over several ranks must be given one layout",
    "ValueError: edl::expert_divergence_loss: with scores = 'softmax' or 'sigmoid' routing must be logits",
    "ValueError: edl::parallel: a loss over several ranks must be given one layout",
    "ValueError: edl::parallel: a loss over several ranks must be given one layout",
]


@pytest.mark.parametrize("failing_rank, data_ranks, context_ranks", [(1, 2, 1), (3, 2, 2)])
def test_a_rank_that_fails_hangs_no_other_and_is_named(failing_rank, data_ranks, context_ranks):
    outcomes = on_ranks(data_ranks * context_ranks, fail_on_one_rank, failing_rank, data_ranks, context_ranks)
    for rank, sentences in enumerate(outcomes):
        assert sentences[0::2] == ["a number"] * len(sentences[0::2])
        for got, expected in zip(sentences[1::2], SENTENCES, strict=True):
            if rank == failing_rank:
                assert got.startswith(expected)
            else:
                # A rank that shares no group with the one that failed hears of it through one that does.
                assert got.startswith("RuntimeError: edl::parallel: rank "), (rank, got)
                assert f"rank {failing_rank} failed: {expected.split(': ', 1)[1]}" in got


def fail_where_values_are_not_read(
    failing_rank: int, data_ranks: int, context_ranks: int, options: dict[str, str]
) -> list[str]:
    """As on a device: no rank looks at the number of failed ranks."""
    edl.reduction.ranks.reads_values = lambda tensor: False
    mesh = init_device_mesh("cpu", (data_ranks, context_ranks), mesh_dim_names=("data", "context"))
    groups = {"group": mesh["data"], "averaging_ranks": 1}
    if context_ranks > 1:
        groups["sequence_group"] = mesh["context"]
    divergence = edl.ExpertDivergenceLoss(D, **groups, **options)

    def value(labels: torch.Tensor) -> str:
        logits = LOGITS.clone().requires_grad_(True)
        try:
            loss = divergence(logits, labels)
        except ValueError as error:
            return str(error)
        loss.backward()
        assert loss.isnan().item() == logits.grad.isnan().any().item()
        return str(loss.item())

    divergence(LOGITS, LABELS)  # agrees on the layout
    bad = LABELS[:3] if dist.get_rank() == failing_rank else LABELS
    return [value(bad), value(LABELS)]


@pytest.mark.parametrize("options", [{}, {"sequence_reduction": "token"}], ids=["sequence", "token"])
@pytest.mark.parametrize("failing_rank, data_ranks, context_ranks", [(1, 2, 1), (3, 2, 2)])
def test_where_values_are_not_read_a_rank_that_fails_gives_the_others_nan(
    failing_rank, data_ranks, context_ranks, options
):
    outcomes = on_ranks(
        data_ranks * context_ranks, fail_where_values_are_not_read, failing_rank, data_ranks, context_ranks, options
    )
    for rank, (bad, good) in enumerate(outcomes):
        failed = rank == failing_rank
        assert bad == (
            "edl::expert_divergence_loss: domain_ids must have one row per sequence, 4 (got [3])" if failed else "nan"
        )
        assert good == outcomes[0][1] != "nan"


def test_values_on_a_device_are_read_only_where_edl_check_asks(monkeypatch):
    on_device = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.delenv("EDL_CHECK", raising=False)
    assert not edl.reduction.ranks.reads_values(on_device)
    assert edl.reduction.ranks.reads_values(LOGITS)
    monkeypatch.setenv("EDL_CHECK", "1")
    assert edl.reduction.ranks.reads_values(on_device)


def differ_at_the_first_call(case: str) -> str:
    second = dist.get_rank() == 1
    logits = {"experts": LOGITS[:, :, :-1], "dtype": LOGITS.float(), "layers": [LOGITS, LOGITS]}.get(case, LOGITS)
    options = {"domains": {"num_domains": 5}, "options": {"eps": 1e-3}}.get(case, {}) if second else {}
    if case == "averaging_ranks":
        options = {"averaging_ranks": 1 + dist.get_rank()}
    divergence = edl.ExpertDivergenceLoss(**{"num_domains": D, **options}, group=dist.group.WORLD)
    labels = LABELS[:2] if case == "error" and second else LABELS
    return outcome(lambda: divergence(logits if second else LOGITS, labels))


@pytest.mark.parametrize("case", ["experts", "dtype", "layers", "domains", "options", "averaging_ranks", "error"])
def test_what_ranks_must_agree_on_is_compared_at_the_first_call(case):
    first, second = on_ranks(2, differ_at_the_first_call, case)
    if case == "error":
        assert second.startswith("ValueError: edl::expert_divergence_loss: domain_ids must have one row per sequence")
        assert first.startswith(
            "RuntimeError: edl::parallel: rank 1 failed: edl::expert_divergence_loss: domain_ids must have one row"
        )
    else:
        for own, other in ((first, 1), (second, 0)):
            assert own.startswith("ValueError: edl::parallel: all ranks must have one layout (got Layout(")
            assert own.endswith(f"on rank {other})")


def differ_in_segments() -> list[str]:
    """Ranks of a sequence_group with other segments than each other, or than in the last call."""
    divergence = edl.ExpertDivergenceLoss(D, sequence_group=dist.group.WORLD, averaging_ranks=2)
    first = dist.get_rank() == 0
    three, four = (LOGITS[:3], LABELS[:3]), (LOGITS, LABELS)
    wrong, rolled = (LOGITS[:3], LABELS), (LOGITS, LABELS.roll(1))
    calls = [three if first else four, four, three if first else wrong, three if first else four, three]
    calls += [rolled if first else four, rolled]
    return [outcome(lambda: divergence(*arguments)) for arguments in calls]


def test_ranks_of_a_sequence_group_with_other_segments_are_an_error_on_all():
    first, second = on_ranks(2, differ_in_segments)
    sentence = (
        "ValueError: edl::parallel: all ranks of sequence_group must pass the same segments: labels, or cu_seqlens, "
        "of whole sequences (got, by rank, these numbers of segments: {0: 3, 1: 4})"
    )
    for outcomes in (first, second):
        assert outcomes[0] == outcomes[3] == sentence
        assert outcomes[1] == outcomes[4] == outcomes[6] == "a number"
        assert outcomes[5] == sentence.split(", by rank", maxsplit=1)[0] + " labels that differ between ranks [0, 1])"
    assert second[2].startswith(
        "ValueError: edl::expert_divergence_loss: domain_ids must have one row per sequence, 3 (got [4])"
    )
    assert first[2].startswith(
        "RuntimeError: edl::parallel: rank 1 failed: edl::expert_divergence_loss: domain_ids must have one row"
    )


def routing_that_is_not_finite() -> tuple[float, bool]:
    divergence = edl.ExpertDivergenceLoss(D, group=dist.group.WORLD)
    logits = LOGITS.clone()
    if dist.get_rank() == 1:
        logits[0, 0, 0] = float("inf")
    logits.requires_grad_(True)
    loss = divergence(logits, LABELS)
    loss.backward()
    return loss.item(), bool(logits.grad.isnan().any())


def test_routing_that_is_not_finite_reaches_the_loss_of_every_rank():
    for loss, gradient_is_nan in on_ranks(2, routing_that_is_not_finite):
        assert math.isnan(loss) and gradient_is_nan


# ---- arguments ----


def wrong_groups() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    world = dist.group.WORLD
    foreign = dist.new_group([0, 1])
    return [
        outcome(lambda: edl.ExpertDivergenceLoss(D, group=mesh)),
        outcome(lambda: edl.ExpertDivergenceLoss(D, group="data")),
        outcome(lambda: edl.ExpertDivergenceLoss(D, sequence_group=mesh["context"])),
        outcome(lambda: edl.ExpertDivergenceLoss(D, group=mesh["data"], averaging_ranks=0)),
        outcome(lambda: edl.ExpertDivergenceLoss(D, group=world, sequence_group=mesh["context"], averaging_ranks=4)),
        outcome(lambda: edl.ExpertDivergenceLoss(D, group=foreign)) if dist.get_rank() == 2 else "",
    ]


def test_groups_that_cannot_be_are_refused():
    for rank, sentences in enumerate(on_ranks(4, wrong_groups)):
        assert sentences[:4] == [
            "ValueError: edl::parallel: group must be one dimension of a DeviceMesh, as mesh['dp'] (got 2)",
            (
                "ValueError: edl::parallel: group must be a ProcessGroup of this rank or a DeviceMesh of one dimension "
                "(got str)"
            ),
            (
                "ValueError: edl::parallel: averaging_ranks is required with sequence_group: the number of ranks "
                "over which the framework averages gradients (got None)"
            ),
            "ValueError: edl::parallel: averaging_ranks must be an integer of at least 1 (got 0)",
        ]
        neighbour = rank + 1 - 2 * (rank % 2)
        assert sentences[4] == (
            "ValueError: edl::parallel: group must hold one rank of each sequence_group, or tokens are counted twice "
            f"(got ranks [{neighbour}] in both)"
        )
        if rank == 2:
            assert sentences[5].startswith("ValueError: edl::parallel: group must be a ProcessGroup of this rank")


def test_a_group_needs_an_initialised_process_group():
    with pytest.raises(ValueError, match="^edl::parallel: group needs torch.distributed to be initialised"):
        edl.ExpertDivergenceLoss(D, group=object())


def test_a_loss_over_ranks_is_not_scripted_silently():
    with pytest.raises(Exception, match="groups and memory are not for TorchScript"):
        torch.jit.script(edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory()))(LOGITS, LABELS)
