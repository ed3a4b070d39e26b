"""Samples of inject(carrier, loss, scale)."""

import torch

from samples.tables import DTYPES, Refusal, Sample


def _inject(case, *shape, dtype=torch.float64, loss=False, scale_dtype=torch.float64):
    return Sample(
        "inject",
        case,
        lambda inputs: (
            inputs.normal(*shape, dtype=dtype),
            inputs.normal(dtype=dtype),
            inputs.normal(dtype=scale_dtype),
        ),
        differentiable=(0, 1) if loss else (0,),
        gradient_is_derivative=not loss,
    )


SAMPLES = [
    _inject("carrier", 4, 2),
    *(_inject(f"loss-{name}", 4, 2, dtype=dtype, loss=True, scale_dtype=dtype) for name, dtype in DTYPES.items()),
    _inject("loss-scale-fp32", 4, 2, dtype=torch.bfloat16, loss=True, scale_dtype=torch.float32),
    _inject("empty", 0, 2, loss=True),
    _inject("scalar", loss=True),
]

REFUSALS = [
    Refusal(
        *("inject", "carrier", lambda inputs: (inputs.ids(4, low=0, high=2), inputs.normal(), inputs.normal())),
        "edl::inject: carrier must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("inject", "loss", lambda inputs: (inputs.normal(4), inputs.normal(1), inputs.normal())),
        "edl::inject: loss must be a scalar tensor (got 1 dimensions)",
    ),
    Refusal(
        *("inject", "loss-dtype", lambda inputs: (inputs.normal(4), inputs.ids(low=0, high=2), inputs.normal())),
        "edl::inject: loss must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("inject", "scale", lambda inputs: (inputs.normal(4), inputs.normal(), inputs.normal(2, 2))),
        "edl::inject: scale must be a scalar tensor (got 2 dimensions)",
    ),
]
