"""DomainMemory: micro-batches that know of each other."""

import contextlib
import copy
import io
import warnings

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from ranks import Collectives, on_ranks
from tolerances import assert_close, tolerance
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import checkpoint
from torch.utils.checkpoint import checkpoint as recompute

import edl

B, LENGTH, H, E, D = 12, 6, 5, 8, 3
L = 2
HIDDEN = torch.randn(L, B, LENGTH, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROUTER = torch.randn(L, E, H, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
# Sorted: with four micro-batches none has three domains, and with twelve each has one.
LABELS = torch.arange(B) // 4


def losses_and_gradient(divergence, micro_batches: int, order=None, hidden=HIDDEN, labels=LABELS):
    """Trains on micro-batches of one router: their losses, and the mean of their gradients."""
    order = torch.arange(len(labels)) if order is None else order
    router = ROUTER.clone().requires_grad_(True)
    losses = []
    for rows in order.chunk(micro_batches):
        loss = divergence([h[rows] @ w.T for h, w in zip(hidden, router)], labels[rows])
        (loss / micro_batches).backward()
        losses.append(loss.detach())
    return torch.stack(losses), router.grad


def collect(memory, divergence, micro_batches: int, hidden=HIDDEN, labels=LABELS) -> None:
    with memory.collect():
        for rows in torch.arange(len(labels)).chunk(micro_batches):
            assert not divergence([h[rows] @ w.T for h, w in zip(hidden, ROUTER)], labels[rows]).requires_grad


ALLOWED = tolerance(torch.float64, B * LENGTH, roundings=4) * 10  # divided by the root of a divergence of 0.01
OPTIONS = [{}, {"bias_correction": True}, {"sequence_reduction": "token"}, {"pair_reduction": "log_of_mean"}]


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 12])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_passes_give_the_gradient_of_the_whole_batch(options, micro_batches):
    expected_loss, expected = losses_and_gradient(edl.ExpertDivergenceLoss(D, **options), 1)
    memory = edl.DomainMemory()
    divergence = edl.ExpertDivergenceLoss(D, memory=memory, **options)
    for _ in range(2):  # the second step starts afresh
        collect(memory, divergence, micro_batches)
        losses, gradient = losses_and_gradient(divergence, micro_batches)
        memory.step()
        assert_close(losses, expected_loss.expand(micro_batches), ALLOWED)
        assert_close(gradient, expected, ALLOWED)


def test_one_pass_sees_the_micro_batches_before():
    """The loss of each micro-batch is that of all up to it; its gradient is that loss's, through its own tokens, times
    their number."""
    memory = edl.DomainMemory()
    divergence = edl.ExpertDivergenceLoss(D, memory=memory)
    losses, gradient = losses_and_gradient(divergence, 4)
    expected_gradient = torch.zeros_like(ROUTER)
    for number in range(1, 5):
        rows = torch.arange(3 * number)
        router = ROUTER.clone().requires_grad_(True)
        earlier, own = (
            [h[rows[:-3]] @ w.T for h, w in zip(HIDDEN, ROUTER)],
            [h[rows[-3:]] @ w.T for h, w in zip(HIDDEN, router)],
        )
        loss = edl.ExpertDivergenceLoss(D)([torch.cat(parts) for parts in zip(earlier, own)], LABELS[rows])
        assert_close(losses[number - 1], loss, ALLOWED)
        if loss.requires_grad and loss.item() != 0:
            expected_gradient += torch.autograd.grad(loss, router)[0] * number / 4
    assert_close(gradient, expected_gradient, ALLOWED)


def test_a_micro_batch_with_one_domain_has_a_gradient_once_another_domain_was_seen():
    memory = edl.DomainMemory()
    plain, _ = losses_and_gradient(edl.ExpertDivergenceLoss(D), 12)
    losses, gradient = losses_and_gradient(edl.ExpertDivergenceLoss(D, memory=memory), 12)
    assert plain.eq(0).all()
    assert losses[:4].eq(0).all() and losses[4:].ne(0).all() and gradient.ne(0).any()


def test_decay_keeps_an_exponential_average_over_steps():
    memory = edl.DomainMemory(decay=0.5)
    divergence = edl.ExpertDivergenceLoss(D, memory=memory)
    halves = torch.arange(B).chunk(3)  # one domain each
    for rows in halves[:2]:
        losses_and_gradient(divergence, 1, rows)
        memory.step()
    # Domains 0 and 1 are worth a quarter and a half of a batch, which moves no mean.
    loss, gradient = losses_and_gradient(divergence, 1, halves[2])
    expected, _expected_gradient = losses_and_gradient(edl.ExpertDivergenceLoss(D), 1)
    assert_close(loss, expected, ALLOWED)
    router = ROUTER.clone().requires_grad_(True)
    whole = [torch.cat([h[:8] @ w.detach().T, h[8:] @ w.T]) for h, w in zip(HIDDEN, router)]
    through_own = torch.autograd.grad(edl.ExpertDivergenceLoss(D)(whole, LABELS), router)[0]
    assert_close(gradient, through_own * 1.75, ALLOWED)


def two_passes_over_ranks(data_ranks: int, micro_batches: int):
    """Averaged gradient over data ranks and micro-batches, and the collectives of the second pass."""
    rank, share = dist.get_rank(), B // data_ranks
    hidden, labels = HIDDEN[:, rank * share : (rank + 1) * share], LABELS[rank * share : (rank + 1) * share]
    memory = edl.DomainMemory()
    divergence = edl.ExpertDivergenceLoss(D, group=dist.group.WORLD, memory=memory)
    collect(memory, divergence, micro_batches, hidden, labels)
    with Collectives() as second_pass:
        losses, gradient = losses_and_gradient(divergence, micro_batches, hidden=hidden, labels=labels)
    memory.step()
    dist.all_reduce(gradient)
    return losses, gradient / data_ranks, second_pass.numbers


def test_two_passes_over_ranks_and_micro_batches_give_the_gradient_of_the_whole_batch():
    expected_loss, expected = losses_and_gradient(edl.ExpertDivergenceLoss(D), 1)
    for losses, gradient, collectives in on_ranks(2, two_passes_over_ranks, 2, 3):
        assert_close(losses, expected_loss.expand(3), ALLOWED)
        assert_close(gradient, expected, ALLOWED)
        assert collectives == []  # the batch's moments are known


# ---- activation checkpointing ----


def in_flight(divergence, use_reentrant) -> torch.Tensor:
    """Gradient of three micro-batches whose forward passes all run before any backward pass."""
    router = ROUTER[0].clone().requires_grad_(True)

    def block(hidden):
        logits = hidden @ router.T
        weights = logits.softmax(-1)
        labels = edl.current_labels()
        if torch.is_grad_enabled() and labels is not None:
            weights = edl.inject(weights, divergence(logits, labels.domain_ids))
        return hidden.sum(-1) + 0 * weights.sum(-1)

    outputs = []
    for rows in torch.arange(B).chunk(3):
        hidden = HIDDEN[0][rows].clone().requires_grad_(True)
        with edl.domain_scope(LABELS[rows]):
            output = block(hidden) if use_reentrant is None else recompute(block, hidden, use_reentrant=use_reentrant)
        outputs.append(output.sum())
    for output in outputs:
        output.backward()
    return router.grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_replay_finds_what_its_forward_pass_found(use_reentrant):
    memory = edl.DomainMemory()
    divergence = edl.ExpertDivergenceLoss(D, memory=memory)
    expected = in_flight(divergence, None)
    memory.step()
    actual = in_flight(divergence, use_reentrant)
    assert memory.get_extra_state()[-1] == 3
    memory.step()
    assert expected.ne(0).any()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "scope, got", [(contextlib.nullcontext, "in none"), (lambda: edl.domain_scope(LABELS), "that opens its own")]
)
def test_a_replay_without_a_scope_around_it_is_refused(scope, got):
    divergence = edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory())
    router = ROUTER[0].clone().requires_grad_(True)

    def block(hidden):
        with scope():
            return divergence(hidden @ router.T, LABELS)

    loss = recompute(block, HIDDEN[0].clone().requires_grad_(True), use_reentrant=True)
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    assert str(error.value) == (
        "edl::DomainMemory: under activation checkpointing labels must come from an edl.domain_scope around what is "
        f"checkpointed (got a replay {got})"
    )


# ---- life of a memory ----


def test_evaluation_neither_reads_nor_changes_the_memory():
    memory = edl.DomainMemory()
    divergence = edl.ExpertDivergenceLoss(D, memory=memory)
    losses_and_gradient(divergence, 12)
    before = copy.deepcopy(memory.state_dict())
    one_domain = [h[:4] @ w.T for h, w in zip(HIDDEN, ROUTER)]
    with torch.no_grad():
        assert divergence(one_domain, LABELS[:4]) == 0
    divergence.eval()
    assert divergence(one_domain, LABELS[:4]) == 0
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)


def with_average(**options) -> edl.ExpertDivergenceLoss:
    return edl.ExpertDivergenceLoss(**{"num_domains": D, **options}, memory=edl.DomainMemory(decay=0.9))


def saved_and_loaded(state, into, folder):
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    return torch.load(saved)


def saved_and_loaded_by_safetensors(state, into, folder):
    safetensors.torch.save_file(state, folder / "state.safetensors")
    return safetensors.torch.load_file(folder / "state.safetensors")


def saved_and_loaded_by_distributed_checkpoint(state, into, folder):
    checkpoint.save({"divergence": state}, checkpoint_id=folder, no_dist=True)
    loaded = {"divergence": into}
    checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    return loaded["divergence"]


def numbers_of(memory) -> torch.Tensor:
    """What a state holds behind what it is of: the sums, and their worth."""
    state = memory.get_extra_state()
    return state[1 - int(state[0]) :]


WAYS = [saved_and_loaded, saved_and_loaded_by_safetensors, saved_and_loaded_by_distributed_checkpoint]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("resume", WAYS)
def test_a_state_dict_resumes_the_average(resume, bias_correction, tmp_path):
    divergence = with_average(bias_correction=bias_correction)
    losses_and_gradient(divergence, 1, torch.arange(0, 8))
    divergence.memory.step()
    resumed = with_average(bias_correction=bias_correction)
    resumed.allocate_memory(L, E)
    resumed.load_state_dict(resume(divergence.state_dict(), resumed.state_dict(), tmp_path))
    expected, actual = (losses_and_gradient(module, 1, torch.arange(8, 12)) for module in (divergence, resumed))
    assert expected[0].ne(0).all() or bias_correction  # which counts no domain of one segment
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_is_one_tensor_whose_size_stays():
    divergence = with_average()
    assert divergence.state_dict()["memory._extra_state"].numel() == 0
    meaning = "ExpertDivergence: sums [2, 3, 8], counts [2, 3]"
    size = 1 + len(meaning) + L * D * (E + 1) + 1
    divergence.allocate_memory(L, E)
    sizes = [divergence.state_dict()["memory._extra_state"].shape]
    for _ in range(2):
        losses_and_gradient(divergence, 3)
        sizes.append(divergence.state_dict()["memory._extra_state"].shape)
        divergence.memory.step()
        sizes.append(divergence.state_dict()["memory._extra_state"].shape)
    assert sizes == [torch.Size([size])] * 5


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_memory_of_unknown_size_is_no_silent_empty_start(tmp_path):
    divergence, fresh = with_average(), with_average()
    losses_and_gradient(divergence, 1)
    with pytest.raises(checkpoint.CheckpointException) as error:
        saved_and_loaded_by_distributed_checkpoint(divergence.state_dict(), fresh.state_dict(), tmp_path)
    assert "Size mismatch between saved" in str(error.value) and "memory._extra_state" in str(error.value)
    fresh.load_state_dict(divergence.state_dict())  # a state that is passed brings its sizes
    assert fresh.memory.get_extra_state().equal(divergence.memory.get_extra_state())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("resume", [saved_and_loaded, saved_and_loaded_by_distributed_checkpoint])
@pytest.mark.parametrize("is_allocated", [False, True])
def test_states_that_were_saved_as_tuples_are_read(is_allocated, resume, tmp_path):
    divergence, resumed = with_average(), with_average()
    losses_and_gradient(divergence, 1, torch.arange(0, 8))
    if is_allocated:
        resumed.allocate_memory(L, E)
    old = {"memory._extra_state": (numbers_of(divergence.memory), (L, D, E), False)}
    resumed.load_state_dict(resume(old, resumed.state_dict(), tmp_path))
    assert resumed.memory.get_extra_state().equal(divergence.memory.get_extra_state())
    resumed.load_state_dict({"memory._extra_state": ()})
    assert numbers_of(resumed.memory).eq(0).all()


@pytest.mark.parametrize("bias_correction", [False, True])
def test_states_that_were_saved_with_their_sizes_are_read(bias_correction):
    divergence, resumed = (with_average(bias_correction=bias_correction) for _ in range(2))
    losses_and_gradient(divergence, 1)
    old = torch.cat([torch.tensor([L, D, E, bias_correction]).double(), numbers_of(divergence.memory)])
    resumed.load_state_dict({"memory._extra_state": old})
    assert resumed.memory.get_extra_state().equal(divergence.memory.get_extra_state())
    torch.testing.assert_close(*(losses_and_gradient(each, 2) for each in (divergence, resumed)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_pretrained_of_a_model_that_holds_the_loss(dtype, tmp_path):
    from transformers import PreTrainedConfig, PreTrainedModel

    class Model(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.router = torch.nn.Linear(H, E)
            self.divergence = with_average()
            self.post_init()

        def forward(self, hidden):
            return self.divergence([self.router(hidden)] * L, LABELS)

    model = Model(PreTrainedConfig())
    model.save_pretrained(tmp_path / "unused")
    Model.from_pretrained(tmp_path / "unused")
    model(HIDDEN[0].float())
    model.divergence.memory.step()
    model.save_pretrained(tmp_path / "used")
    loaded = Model.from_pretrained(tmp_path / "used", dtype=dtype)
    assert loaded.divergence.memory.get_extra_state().equal(model.divergence.memory.get_extra_state())
    assert loaded.divergence.memory.get_extra_state()[-1] == 0.9


def test_sizes_that_are_none_are_refused():
    divergence = with_average()
    for sizes, rule in [
        ((0, 8), "num_layers must be at least 1 (got 0)"),
        ((2, True), "num_experts must be an integer (got True)"),
    ]:
        assert refused(lambda sizes=sizes: divergence.allocate_memory(*sizes)) == f"edl::expert_divergence_loss: {rule}"
    assert refused(lambda: edl.ExpertDivergenceLoss(D).allocate_memory(L, E)) == (
        "edl::expert_divergence_loss: allocate_memory() needs a memory (got none)"
    )
    divergence.allocate_memory(L, E)
    divergence.allocate_memory(L, E)
    assert refused(lambda: divergence.allocate_memory(L + 1, E)) == (
        "edl::DomainMemory: what is carried is known already, ExpertDivergence: sums [2, 3, 8], counts [2, 3] "
        "(got ExpertDivergence: sums [3, 3, 8], counts [3, 3])"
    )


def test_a_state_that_is_restored_ends_a_step_that_failed():
    divergence = edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory())
    state = divergence.state_dict()
    collect(divergence.memory, divergence, 3)
    divergence.load_state_dict(state)
    collect(divergence.memory, divergence, 4)
    losses, _ = losses_and_gradient(divergence, 4)
    divergence.memory.step()
    expected, _ = losses_and_gradient(edl.ExpertDivergenceLoss(D), 1)
    assert_close(losses, expected.expand(4), ALLOWED)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"num_domains": D + 1}, "sums [2, 4, 8], counts [2, 4]"),
        ({"bias_correction": True}, "sums [2, 3, 8], squares [2, 3, 8], counts [2, 3]"),
    ],
)
def test_the_state_of_another_loss_is_refused(options, sentence):
    divergence, other = with_average(), with_average(**options)
    losses_and_gradient(divergence, 1)
    other.load_state_dict(divergence.state_dict())
    assert refused(lambda: losses_and_gradient(other, 1)) == (
        "edl::DomainMemory: all micro-batches, and a state that was restored, must be of the same objectives, layers "
        f"and sizes, ExpertDivergence: sums [2, 3, 8], counts [2, 3] (got ExpertDivergence: {sentence})"
    )


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_micro_batch_that_overflowed_leaves_no_trace(steps_before):
    results = []
    for overflows in (False, True):
        memory = edl.DomainMemory(decay=0.9)
        divergence = edl.ExpertDivergenceLoss(D, memory=memory)
        for _ in range(steps_before):
            losses_and_gradient(divergence, 2)
            memory.step()
        if overflows:
            assert divergence([torch.full((B, LENGTH, E), float("nan"), requires_grad=True)] * L, LABELS).isnan()
        results.append(losses_and_gradient(divergence, 2))
    assert_close(results[1][0], results[0][0], 0.0)
    assert_close(results[1][1], results[0][1], 0.0)


def without_values(divergence, logits):
    with FakeTensorMode() as mode:
        return divergence(mode.from_tensor(logits), mode.from_tensor(LABELS))


@pytest.mark.parametrize(
    "call",
    [
        lambda divergence, logits: torch.func.grad(divergence)(logits, LABELS),
        lambda divergence, logits: torch.func.vmap(lambda x: divergence(x, LABELS))(logits[None]),
        lambda divergence, logits: divergence(logits.to("meta"), LABELS.to("meta")),
        without_values,
    ],
    ids=["grad", "vmap", "meta", "fake"],
)
def test_what_has_no_values_is_refused_and_leaves_no_trace(call):
    memory = edl.DomainMemory()
    divergence = edl.ExpertDivergenceLoss(D, memory=memory)
    logits = (HIDDEN[0] @ ROUTER[0].T).requires_grad_(True)
    sentence = refused(lambda: call(divergence, logits))
    assert sentence.startswith("edl::DomainMemory: takes losses of tensors with values, not under torch.func")
    assert memory.get_extra_state().numel() == 0
    memory.step()


def restore_on_one_rank() -> str:
    memory = edl.DomainMemory(decay=0.5)
    if dist.get_rank() == 1:
        earlier = edl.DomainMemory(decay=0.5)
        losses_and_gradient(edl.ExpertDivergenceLoss(D, memory=earlier), 1)
        memory.load_state_dict(earlier.state_dict())
    divergence = edl.ExpertDivergenceLoss(D, memory=memory, group=dist.group.WORLD)
    return refused(lambda: losses_and_gradient(divergence, 1))


def test_a_memory_that_only_one_rank_restored_is_an_error_on_all():
    first, second = on_ranks(2, restore_on_one_rank)
    held = f"{L * D * (E + 1)} numbers up to "
    assert first.startswith(f"edl::parallel: the memories of all ranks must hold the same (got nothing, and {held}")
    assert second.startswith(f"edl::parallel: the memories of all ranks must hold the same (got {held}")


def state_of(*moments: float, sizes=(1, 1, 2, 0)) -> torch.Tensor:
    return torch.tensor([*sizes, *moments], dtype=torch.float64)


@pytest.mark.parametrize(
    "state, got",
    [
        (5, "int"),
        (None, "NoneType"),
        ("moments", "str"),
        ([1], "[1]"),
        ((torch.zeros(1, 3, 5), torch.zeros(0), torch.zeros(1, 3), 2.0), "[[1, 3, 5], [0], [1, 3], 2.0]"),
        ((torch.zeros(7), (1, 3, 5), False), "[[7], (1, 3, 5), False]"),
        ((torch.zeros(19), [1, 3], False), "[[19], [1, 3], False]"),
        ((None, (1, 3, 5), False), "[None, (1, 3, 5), False]"),
        (state_of(1, 1, 2, 1).float(), "[8] torch.float32"),
        (state_of(1, 1, 2, 1)[None], "[1, 8] torch.float64"),
        (state_of(1, 1, 2), "[7] torch.float64"),
        (state_of(1, 1, 2, 1, sizes=(1, 1, 2.5, 0)), "[8] torch.float64"),
        (state_of(1, 1, 2, 1, sizes=(1, -1, 2, 0)), "[8] torch.float64"),
        (state_of(1, 1, 2, 1, sizes=(1, float("nan"), 2, 0)), "[8] torch.float64"),
        (state_of(1, 1, 2, 1, sizes=(1, 1, 2, 2)), "[8] torch.float64"),
        (state_of(1, 1, 2, 1).to("meta"), "[8] torch.float64"),
        (state_of(1, sizes=(-3, 65, 66)), "[4] torch.float64"),
        (state_of(1, 1, sizes=(-2, 65, 300)), "[5] torch.float64"),
    ],
)
def test_a_state_of_another_kind_is_refused(state, got):
    memory = edl.DomainMemory()
    assert refused(lambda: memory.load_state_dict({"_extra_state": state})).endswith(
        "edl::DomainMemory: a state must be one that a memory gave, a row of float64 numbers that begins with what "
        f"they are of (got {got})"
    )
    assert memory.get_extra_state().numel() == 0


@pytest.mark.parametrize("moments", [(float("nan"), 1, 2, 1), (1, float("inf"), 2, 1), (1, 1, -2, 1), (1, 1, 2, -1)])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_state_of_numbers_that_are_no_moments_is_refused(moments, is_old):
    state = state_of(*moments)
    wrong = [number for number in moments if not 0 <= number < float("inf")]
    sentence = refused(lambda: edl.DomainMemory().set_extra_state((state[4:], (1, 1, 2), False) if is_old else state))
    assert sentence == (
        "edl::DomainMemory: the moments in a state, sums and counts, must be finite and not negative "
        f"(got {float(wrong[0])})"
    )


@pytest.mark.parametrize("numbers", [(float("nan"), 1), (1, float("inf")), (1, -1)])
def test_a_state_of_sums_that_are_none_is_refused(numbers):
    sentence = refused(lambda: edl.DomainMemory().set_extra_state(state_of(*numbers, sizes=(-1, 65))))
    assert sentence.startswith("edl::DomainMemory: the sums in a state must be finite, and of at least 0 micro-batches")


# ---- one memory, one loss ----


def test_a_memory_that_is_assigned_is_used():
    divergence = edl.ExpertDivergenceLoss(D)
    divergence.memory = edl.DomainMemory()
    losses, _ = losses_and_gradient(divergence, 12)
    assert losses[:4].eq(0).all() and losses[4:].ne(0).all()
    divergence.memory = None
    losses, _ = losses_and_gradient(divergence, 12)
    assert losses.eq(0).all()


def test_what_cannot_be_assigned_is_refused():
    divergence = edl.ExpertDivergenceLoss(D)
    assert refused(lambda: setattr(divergence, "memory", {})) == (
        "edl::expert_divergence_loss: memory must be a DomainMemory (got dict)"
    )
    for name in ("group", "sequence_group", "averaging_ranks"):
        assert refused(lambda name=name: setattr(divergence, name, 2)) == (
            f"edl::expert_divergence_loss: {name} must be given when the loss is made (got an assignment)"
        )


TWO_OWNERS = (
    "edl::DomainMemory: a memory must belong to one loss, whose sums others would mix with theirs; set the other's "
    "memory to None first (got one that another loss has)"
)


def test_a_memory_in_two_losses_is_refused():
    first, second = edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory()), edl.ExpertDivergenceLoss(D)
    assert refused(lambda: edl.ExpertDivergenceLoss(D, memory=first.memory)) == TWO_OWNERS
    assert refused(lambda: setattr(second, "memory", first.memory)) == TWO_OWNERS
    assert second.memory is None
    assert refused(lambda: losses_and_gradient(copy.copy(first), 1)) == TWO_OWNERS
    losses_and_gradient(first, 1)
    memory, first.memory = first.memory, None
    second.memory = memory
    losses_and_gradient(second, 1)
    assert memory.get_extra_state()[-1] == 2


def test_a_loss_that_is_gone_frees_its_memory():
    memory = edl.DomainMemory()
    model = torch.nn.Sequential(edl.ExpertDivergenceLoss(D, memory=memory))
    model.around = [model]  # a cycle, which only the collector ends
    del model
    losses_and_gradient(edl.ExpertDivergenceLoss(D, memory=memory), 1)


def through_a_file(module):
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_has_a_memory_of_its_own(copied):
    divergence = edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory())
    with edl.domain_scope(LABELS):
        losses_and_gradient(divergence, 1)
    other = copied(divergence)
    for module in (divergence, other):
        losses_and_gradient(module, 1)
        assert module.memory.get_extra_state()[-1] == 2
    assert refused(lambda: edl.ExpertDivergenceLoss(D, memory=other.memory)) == TWO_OWNERS


def test_forgetting_step_warns_once():
    router = torch.nn.Parameter(ROUTER[0].clone())
    optimizer = torch.optim.SGD([router], lr=0.1)

    def train(divergence, steps: bool):
        for _ in range(3):
            divergence(HIDDEN[0] @ router.T, LABELS).backward()
            optimizer.step()
            if steps:
                divergence.memory.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory()), True)
    with pytest.warns(UserWarning, match="an optimizer stepped but memory.step\\(\\) was not called") as caught:
        train(edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory()), False)
    assert len(caught) == 1


def refused(call) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error:
        call()
    return str(error.value)


def test_a_wrong_label_is_an_error_and_changes_nothing():
    divergence = edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory())
    router = ROUTER[0].clone().requires_grad_(True)
    with pytest.raises(IndexError) as error:
        divergence(HIDDEN[0] @ router.T, LABELS + 1)
    assert "labels must be at least -1 and below num_domains = 3 (got 3 for segment 8)" in str(error.value)
    fresh = edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory())
    torch.testing.assert_close(divergence.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_wrong_use_is_refused():
    divergence = edl.ExpertDivergenceLoss(D, memory=edl.DomainMemory())
    memory = divergence.memory
    assert (
        refused(lambda: edl.DomainMemory(decay=1.0))
        == "edl::DomainMemory: decay must be at least 0 and below 1 (got 1.0)"
    )
    assert refused(lambda: edl.DomainMemory(decay="0.9")) == "edl::DomainMemory: decay must be a number (got '0.9')"
    assert refused(lambda: edl.ExpertDivergenceLoss(D, memory={})) == (
        "edl::expert_divergence_loss: memory must be a DomainMemory (got dict)"
    )
    assert "two passes are exact without decay only (got decay = 0.5)" in refused(
        lambda: edl.DomainMemory(decay=0.5).collect().__enter__()
    )
    losses_and_gradient(divergence, 1)
    assert "collect() must come first in a step, once" in refused(lambda: memory.collect().__enter__())
    assert "sums [2, 3, 8], counts [2, 3] (got ExpertDivergence: sums [1, 3, 8], counts [1, 3])" in refused(
        lambda: divergence((HIDDEN[0] @ ROUTER[0].T).requires_grad_(True), LABELS)
    )
    memory.step()
    collect(memory, divergence, 3)
    losses_and_gradient(divergence, 4)
    assert refused(memory.step) == (
        "edl::DomainMemory: the second pass must train on every micro-batch that was collected (got 4 of 3)"
    )
    with edl.domain_scope(LABELS):
        losses_and_gradient(divergence, 1)
        assert "takes one loss per forward pass, give each router a memory of its own" in refused(
            lambda: losses_and_gradient(divergence, 1)
        )


def test_losses_that_are_begun_before_the_first_is_finished_are_carried_in_their_order():
    batches = [(HIDDEN[0][:6] @ ROUTER[0].T, LABELS[:6]), (HIDDEN[0][6:] @ ROUTER[0].T, LABELS[6:])]
    states, losses = [], []
    for begin_all in (False, True):
        memory = edl.DomainMemory()
        divergence = edl.ExpertDivergenceLoss(D, memory=memory)
        with memory.collect():
            if begin_all:
                finishes = [divergence.begin(*batch) for batch in batches]
                [finish() for finish in finishes]
            else:
                [divergence(*batch) for batch in batches]
        states.append(memory.get_extra_state())
        losses.append([divergence(*batch) for batch in batches])
        memory.step()
    assert states[0].equal(states[1])
    assert (
        bytes(map(int, states[0][1 : 1 - int(states[0][0])])).decode()
        == "ExpertDivergence: sums [1, 3, 8], counts [1, 3]"
    )
    assert states[0][-1] == 2  # micro-batches
    assert losses[0] == losses[1]


@pytest.mark.parametrize("where", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_loss_of_the_second_pass(where):
    logits = HIDDEN[0] @ ROUTER[0].T
    bad = logits.clone()
    bad[0, 0, 0] = where
    memory = edl.DomainMemory()
    divergence = edl.ExpertDivergenceLoss(D, memory=memory)
    with memory.collect():
        divergence(logits, LABELS)
        divergence(bad, LABELS)
    assert divergence(logits, LABELS).isfinite()
    leaf = bad.clone().requires_grad_(True)
    loss = divergence(leaf, LABELS)
    loss.backward()
    assert loss.isnan() and leaf.grad.isnan().any()
