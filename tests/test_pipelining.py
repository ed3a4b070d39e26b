"""Stages of torch.distributed.pipelining whose routers inject their loss get the gradients of one process that adds the
losses."""

import functools

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tolerances import assert_close, tolerance
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.checkpoint import checkpoint

import edl

STAGES, MICRO_BATCHES, SEQUENCES, LENGTH, H, E, D = 2, 4, 6, 5, 4, 8, 3
BETA = 0.5
DIVERGENCE = edl.ExpertDivergenceLoss(D)


class Stage(torch.nn.Module):
    """A mixing layer and a Mixture-of-Experts block that finds its labels in the scope of its forward pass."""

    def __init__(self, index: int, run=None, inject: bool = True) -> None:
        super().__init__()
        self.run, self.inject = run, inject
        for name, shape in {"mixer": (H, H), "router": (E, H), "experts": (E, H, H)}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=torch.float64)))
        generator = torch.Generator().manual_seed(index)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator)

    def logits_and_output(self, hidden):
        logits = hidden @ self.router.T
        experts = torch.einsum("...h,ehk->...ek", hidden, self.experts).tanh()
        return logits, hidden + (logits.softmax(-1).unsqueeze(-1) * experts).sum(-2)

    def block(self, hidden):
        logits, output = self.logits_and_output(hidden)
        if self.inject and torch.is_grad_enabled():
            output = edl.inject(output, BETA * DIVERGENCE(logits, edl.current_labels().domain_ids))
        return output

    def forward(self, hidden, domain_ids):
        with edl.domain_scope(domain_ids):
            return self.run(self.block, hidden @ self.mixer)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, targets and labels; every micro-batch has all domains, in an order of its own."""
    generator = torch.Generator().manual_seed(7)
    hidden, target = torch.randn(
        2, MICRO_BATCHES * SEQUENCES, LENGTH, H, generator=generator, dtype=torch.float64
    ).unbind()
    orders = [torch.randperm(SEQUENCES, generator=generator) % D for _ in range(MICRO_BATCHES)]
    return hidden, target, torch.cat(orders)


def gradients_of_a_stage(
    schedule_type, run, infer_shapes: bool, inject: bool, options: dict
) -> dict[str, torch.Tensor]:
    hidden, target, labels = batch()
    rank = dist.get_rank()
    stage = Stage(rank, run, inject)
    passed_on = torch.empty(SEQUENCES, LENGTH, H, dtype=torch.float64).requires_grad_()
    received = passed_on if rank > 0 else hidden[:SEQUENCES]
    shapes = {} if infer_shapes else {"input_args": received, "output_args": passed_on}
    pipeline_stage = PipelineStage(stage, rank, STAGES, torch.device("cpu"), **shapes)
    schedule = schedule_type(pipeline_stage, MICRO_BATCHES, torch.nn.functional.mse_loss, **options)
    arguments = [hidden] if rank == 0 else []
    schedule.step(*arguments, target=target if rank == STAGES - 1 else None, domain_ids=labels)
    return {name: parameter.grad for name, parameter in stage.named_parameters()}


def gradients_of_one_process(divided_by: int) -> list[dict[str, torch.Tensor]]:
    stages = [Stage(index) for index in range(STAGES)]
    for hidden, target, labels in zip(*(tensor.chunk(MICRO_BATCHES) for tensor in batch()), strict=True):
        loss = torch.zeros((), dtype=torch.float64)
        for stage in stages:
            logits, hidden = stage.logits_and_output(hidden @ stage.mixer)
            loss = loss + BETA * DIVERGENCE(logits, labels)
        ((loss + torch.nn.functional.mse_loss(hidden, target)) / divided_by).backward()
    return [{name: parameter.grad for name, parameter in stage.named_parameters()} for stage in stages]


def directly(block, hidden):
    return block(hidden)


ALLOWED = tolerance(torch.float64, MICRO_BATCHES * SEQUENCES * LENGTH, roundings=16)
# Shapes are inferred from one more pass, which reentrant checkpointing does not allow.
RUNS = {
    "no checkpointing": (directly, True),
    "not reentrant": (functools.partial(checkpoint, use_reentrant=False), True),
    "reentrant": (functools.partial(checkpoint, use_reentrant=True), False),
}


@pytest.mark.parametrize("options, divided_by", [({}, MICRO_BATCHES), ({"scale_grads": False}, 1)], ids=["mean", "sum"])
@pytest.mark.parametrize("run, infer_shapes", RUNS.values(), ids=list(RUNS))
@pytest.mark.parametrize("schedule_type", [ScheduleGPipe, Schedule1F1B])
def test_gradients_of_both_stages_equal_one_process(schedule_type, run, infer_shapes, options, divided_by):
    stages = on_ranks(STAGES, gradients_of_a_stage, schedule_type, run, infer_shapes, True, options)
    for gradients, expected in zip(stages, gradients_of_one_process(divided_by), strict=True):
        for name in expected:
            assert_close(gradients[name], expected[name], ALLOWED)


def test_without_inject_the_gradients_of_both_routers_differ():
    stages = on_ranks(STAGES, gradients_of_a_stage, ScheduleGPipe, directly, True, False, {})
    for gradients, expected in zip(stages, gradients_of_one_process(MICRO_BATCHES), strict=True):
        assert (gradients["router"] - expected["router"]).norm() > 0.1 * expected["router"].norm()
