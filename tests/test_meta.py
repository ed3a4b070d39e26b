"""Without data: the shapes, dtypes and strides of the CPU, and its error sentences."""

import pytest
import torch
from samples import REFUSALS, SAMPLES, operator
from support import as_tuple


def to_meta(arguments):
    return tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_outputs_have_the_layout_of_the_cpu(sample):
    arguments = sample.arguments()
    on_cpu = as_tuple(operator(sample.op)(*arguments))
    on_meta = as_tuple(operator(sample.op)(*to_meta(arguments)))
    for expected, actual in zip(on_cpu, on_meta, strict=True):
        assert actual.device.type == "meta"
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("refusal", [r for r in REFUSALS if not r.by_value], ids=str)
def test_wrong_arguments_are_the_sentence_of_the_cpu(refusal):
    arguments = refusal.arguments()
    with pytest.raises(refusal.error) as on_cpu:
        operator(refusal.op)(*arguments)
    with pytest.raises(refusal.error) as on_meta:
        operator(refusal.op)(*to_meta(arguments))
    assert str(on_meta.value) == str(on_cpu.value)
