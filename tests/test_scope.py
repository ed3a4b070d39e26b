"""domain_scope: labels belong to a forward pass, whenever it is replayed."""

import threading
import weakref

import numpy
import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import edl

D, E, H = 3, 8, 5
DIVERGENCE = edl.ExpertDivergenceLoss(D)
BOTH = torch.tensor([0, 1, 2, 0, 1, 2])
ONE = torch.zeros(6, dtype=torch.long)


class Block(torch.nn.Module):
    """A router whose loss is injected, as in a pipeline stage: no argument carries labels."""

    def __init__(self, label_set: str = "domain_ids") -> None:
        super().__init__()
        self.label_set = label_set
        self.router = torch.nn.Linear(H, E, bias=False, dtype=torch.float64)
        torch.nn.init.normal_(self.router.weight, generator=torch.Generator().manual_seed(0))
        self.seen: list = []

    def forward(self, hidden):
        logits = self.router(hidden)
        weights = logits.softmax(-1)
        labels = edl.current_labels() if self.training else None
        ids = None if labels is None else labels.label_sets[self.label_set]
        self.seen.append(None if ids is None else ids.tolist())
        if ids is not None and torch.is_grad_enabled():
            weights = edl.inject(weights, DIVERGENCE(logits, ids))
        return hidden + weights.sum(-1, keepdim=True)


def hidden_states(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, H, generator=generator, dtype=torch.float64).requires_grad_(True)


def plain(block, hidden):
    return block(hidden)


def reentrant(block, hidden):
    return checkpoint(block, hidden, use_reentrant=True)


def not_reentrant(block, hidden):
    return checkpoint(block, hidden, use_reentrant=False)


def selective(block, hidden):
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(
        block, hidden, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )


def nested_inside_not_reentrant(block, hidden):
    return checkpoint(lambda h: checkpoint(block, h, use_reentrant=False), hidden, use_reentrant=False)


CHECKPOINTS = [reentrant, not_reentrant, selective, nested_inside_not_reentrant]
ORDERS = {
    "first in, first out": lambda outputs: [output.backward() for output in outputs],
    "last in, first out": lambda outputs: [output.backward() for output in reversed(outputs)],
    "one backward pass": lambda outputs: sum(outputs).backward(),
}


def router_gradient(run, labels: list, order, between=None) -> torch.Tensor:
    """Gradient of a router after forward passes with the given labels (None: no scope), all in flight together."""
    block = Block()
    outputs = []
    for number, ids in enumerate(labels):
        hidden = hidden_states(number)
        if ids is None:
            outputs.append(run(block, hidden).sum())
        else:
            with edl.domain_scope(ids):
                outputs.append(run(block, hidden).sum())
        if between is not None:
            between(block)
    order(outputs)
    return block.router.weight.grad


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_replays_get_every_set_of_labels_by_its_name(run):
    gradients = []
    for name, how in (("domain_ids", plain), ("topics", run)):
        block = Block(name)
        outputs = []
        for number, ids in enumerate([BOTH, ONE, BOTH.flip(0)]):
            others = {other: ONE for other in ("domain_ids", "topics") if other != name}
            with edl.domain_scope(**{name: ids, **others}):
                outputs.append(how(block, hidden_states(number)).sum())
        for output in outputs:
            output.backward()
        gradients.append(block.router.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
@pytest.mark.parametrize("run", CHECKPOINTS)
def test_replays_get_the_labels_of_their_forward_pass(run, order):
    labels = [BOTH, ONE, BOTH.flip(0), BOTH.roll(1)]
    expected = router_gradient(plain, labels, ORDERS["first in, first out"])
    torch.testing.assert_close(router_gradient(run, labels, order), expected, rtol=1e-12, atol=1e-12)


def test_two_micro_batches_in_flight_under_reentrant_checkpointing_the_second_with_one_domain():
    """Labels set last would give the first replay those of the second pass, one domain, and the router no gradient at
    all."""
    gradient = router_gradient(reentrant, [BOTH, ONE], ORDERS["first in, first out"])
    first_alone = router_gradient(plain, [BOTH], ORDERS["first in, first out"])
    assert first_alone.norm() > 0.1
    torch.testing.assert_close(gradient, first_alone, rtol=1e-12, atol=1e-12)
    set_last = router_gradient(plain, [ONE, ONE], ORDERS["first in, first out"])
    assert set_last.norm() < 1e-12  # the rounding of the weights' sum


@pytest.mark.parametrize("run", [plain, *CHECKPOINTS])
def test_evaluation_in_between_changes_nothing(run):
    def evaluate(block):
        block.eval()
        with torch.no_grad():
            block(hidden_states(7))
            with edl.domain_scope(BOTH):
                block(hidden_states(8))
        block.train()
        with torch.no_grad():
            block(hidden_states(9))

    labels = [BOTH, ONE, BOTH.flip(0)]
    fifo = ORDERS["first in, first out"]
    torch.testing.assert_close(
        router_gradient(run, labels, fifo, evaluate), router_gradient(plain, labels, fifo), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_a_forward_pass_outside_any_scope_has_no_labels_also_when_replayed(run):
    fifo = ORDERS["first in, first out"]
    labels = [None, BOTH, None]
    expected = router_gradient(plain, labels, fifo)
    torch.testing.assert_close(router_gradient(run, labels, fifo), expected, rtol=1e-12, atol=1e-12)


def test_backward_inside_the_scope_of_another_pass():
    block = Block()
    with edl.domain_scope(BOTH):
        first = reentrant(block, hidden_states(0)).sum()
    with edl.domain_scope(ONE):
        second = reentrant(block, hidden_states(1)).sum()
        first.backward()
    second.backward()
    assert block.seen == [BOTH.tolist(), ONE.tolist(), BOTH.tolist(), ONE.tolist()]


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_a_scope_opened_inside_what_is_checkpointed(run):
    """The replay opens it again, and it is the innermost, also where the forward pass had another around it."""

    def opens_its_own(ids):
        def inner(block, hidden):
            def labelled(hidden):
                with edl.domain_scope(ids):
                    return block(hidden)

            return run(labelled, hidden)

        return inner

    fifo = ORDERS["first in, first out"]
    expected = router_gradient(plain, [BOTH], fifo)
    for around in (None, ONE):
        torch.testing.assert_close(
            router_gradient(opens_its_own(BOTH), [around], fifo), expected, rtol=1e-12, atol=1e-12
        )


def test_nested_scopes_and_errors_restore_what_was_before():
    assert edl.current_labels() is None
    with edl.domain_scope(BOTH):
        with pytest.raises(KeyError), edl.domain_scope(ONE, attention_mask=torch.ones(6, 4)):
            assert edl.current_labels().domain_ids is ONE and edl.current_labels().attention_mask is not None
            raise KeyError
        assert edl.current_labels().domain_ids is BOTH and edl.current_labels().attention_mask is None
    assert edl.current_labels() is None


def test_another_thread_sees_no_open_scope():
    found = []
    with edl.domain_scope(BOTH):
        thread = threading.Thread(target=lambda: found.append(edl.current_labels()))
        thread.start()
        thread.join()
    assert found == [None]


def test_what_cannot_be_told_is_refused(monkeypatch):
    block = Block()
    with edl.domain_scope(BOTH):
        output = checkpoint(lambda h: reentrant(block, h), hidden_states(0), use_reentrant=True)
    with pytest.raises(RuntimeError, match="^edl::domain_scope: reentrant checkpointing cannot be nested"):
        output.sum().backward()
    with edl.domain_scope(BOTH):
        output = reentrant(block, hidden_states(0))
    for _ in range(edl.labels.scope.REMEMBERED_SCOPES):
        with edl.domain_scope(ONE):
            plain(block, hidden_states(1))
    with pytest.raises(RuntimeError, match="^edl::domain_scope: at most 512 forward passes may wait"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["domain_ids", "attention_mask", "padding_mask", "cu_seqlens", "modality_ids"])
@pytest.mark.parametrize("wrong", [[0, 1], 3, "mask", numpy.zeros(6)], ids=str)
def test_what_is_no_tensor_is_refused(name, wrong):
    with pytest.raises(ValueError) as error, edl.domain_scope(**{"domain_ids": BOTH, name: wrong}):
        pass
    assert str(error.value) == f"edl::domain_scope: {name} must be a tensor (got {type(wrong).__name__})"


def test_labels_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"^edl::domain_scope: modality_ids must be a tensor \(got NoneType\)"):
        edl.domain_scope(BOTH, modality_ids=None).__enter__()
    for none in ({}, {"domain_ids": None}, {"cu_seqlens": None}):
        with pytest.raises(ValueError) as error, edl.domain_scope(**none):
            pass
        assert str(error.value) == "edl::domain_scope: labels, a mask or boundaries must be given (got none of them)"


def test_sets_of_labels_go_by_name():
    with edl.domain_scope(BOTH, modality_ids=ONE, topics=BOTH):
        assert edl.current_labels().label_sets == {"domain_ids": BOTH, "modality_ids": ONE, "topics": BOTH}
    with edl.domain_scope(modality_ids=ONE):
        labels = edl.current_labels()
        assert labels.domain_ids is None and labels.label_sets == {"modality_ids": ONE}
    with edl.domain_scope(cu_seqlens=BOTH):
        assert edl.current_labels().label_sets == {}


# ---- how long labels are kept ----


def scoped(run, block, seed: int = 0) -> tuple[torch.Tensor, list]:
    """Output of a pass inside a scope, and weak references to the scope's tensors."""
    tensors = [BOTH.clone(), torch.ones(6, 4), ONE.clone()]
    with edl.domain_scope(tensors[0], attention_mask=tensors[1], modality_ids=tensors[2]):
        output = run(block, hidden_states(seed)).sum()
    return output, [weakref.ref(tensor) for tensor in tensors]


def alive(references: list) -> bool:
    found = {reference() is not None for reference in references}
    assert len(found) == 1
    return found.pop()


def saved_on_cpu(block, hidden):
    with torch.autograd.graph.save_on_cpu():
        return block(hidden)


def reentrant_and_plain(block, hidden):
    return block(reentrant(block, hidden))


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
@pytest.mark.parametrize("run", [plain, *CHECKPOINTS, saved_on_cpu, reentrant_and_plain])
def test_labels_are_kept_until_no_backward_pass_can_ask_for_them(run, order):
    block = Block()
    outputs, references = zip(*[scoped(run, block, seed) for seed in range(3)])
    assert all(map(alive, references)) == (run is not plain)
    order(outputs)
    del outputs
    assert not any(map(alive, references))


@pytest.mark.parametrize("run", [reentrant, not_reentrant, nested_inside_not_reentrant])
def test_labels_of_a_graph_that_is_kept_stay(run):
    block = Block()
    output, references = scoped(run, block)
    output.backward(retain_graph=True)
    first = block.router.weight.grad.clone()
    assert alive(references)
    output.backward()
    torch.testing.assert_close(block.router.weight.grad, 2 * first)
    del output
    assert not alive(references)


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_a_graph_that_is_dropped_releases_its_labels(run):
    output, references = scoped(run, Block())
    assert alive(references)
    del output
    assert not alive(references)


def evaluated(block, hidden):
    with torch.no_grad():
        return block(hidden)


@pytest.mark.parametrize("run", [lambda block, hidden: hidden.detach(), evaluated], ids=["nothing", "no gradients"])
def test_labels_of_a_pass_without_graph_are_released_at_once(run):
    _, references = scoped(run, Block())
    assert not alive(references)


class AsksLate(Block):
    """Asks only where gradients are recorded: under reentrant checkpointing in the replay alone."""

    def forward(self, hidden):
        return super().forward(hidden) if torch.is_grad_enabled() else hidden + 1.0


def test_a_router_that_asks_in_the_replay_alone_finds_its_labels_until_the_optimizer_steps():
    block = AsksLate()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    outputs, references = zip(*[scoped(reentrant, block, seed) for seed in range(2)])
    outputs[0].backward()
    assert block.seen == [BOTH.tolist()] and all(map(alive, references))
    optimizer.step()
    assert not any(map(alive, references))
    with pytest.raises(
        RuntimeError, match="^edl::domain_scope: who asks for labels in a replay must ask in its forwar"
    ):
        outputs[1].backward()
