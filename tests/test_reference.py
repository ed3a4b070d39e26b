"""Values and gradients of every operator against its definition in plain torch, in float64."""

import pytest
import torch
from samples import REFUSALS, SAMPLES, operator
from support import all_operators, kernel_and_reference
from tolerances import assert_close, tolerance

import edl
import edl.ops


def allowed(sample, arguments, result):
    """The tolerance of a result. Where intermediate results are stored, their type shows in float32 gradients too."""
    stored = [x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    dtype = max([result.dtype, *stored], key=lambda d: torch.finfo(d).eps) if sample.roundings > 1 else result.dtype
    return tolerance(dtype, sample.length, sample.roundings)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_values_and_gradients(sample, device):
    arguments = sample.arguments()
    (outputs, grads), (expected, expected_grads) = kernel_and_reference(sample, device)
    for actual, wanted in zip(outputs, expected, strict=True):
        if actual.is_floating_point():
            assert_close(actual, wanted, allowed(sample, arguments, actual))
        else:
            assert actual.equal(wanted.to(actual.dtype))
    for position, actual, wanted in zip(sample.differentiable, grads, expected_grads, strict=True):
        assert actual.dtype == arguments[position].dtype
        assert_close(actual, wanted, allowed(sample, arguments, actual))


# The loss of logits is made of operators that have definitions, to which tests/ops/test_expert_divergence_loss.py holds
# it; its function in Python is `edl.expert_divergence_loss`.
@pytest.mark.parametrize("name", sorted(set(all_operators()) - {"expert_divergence_loss"}))
def test_every_operator_has_samples_refusals_wrapper_and_definition(name):
    assert any(sample.op == name for sample in SAMPLES)
    assert any(refusal.op == name for refusal in REFUSALS)
    assert callable(getattr(edl.ops, name))
    assert callable(getattr(edl.reference, name))


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_wrong_arguments_are_one_sentence(refusal):
    with pytest.raises(refusal.error) as error:
        operator(refusal.op)(*refusal.arguments())
    sentence = str(error.value)
    assert sentence.startswith(refusal.sentence)
    assert "\n" not in sentence
    assert refusal.sentence.startswith(f"edl::{refusal.op}: ")
