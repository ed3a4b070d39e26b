"""How far a result may be from its float64 reference: computed from dtype and summation length, in one place."""

import math

import torch
from torch import Tensor


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """16-bit types only store: sums are formed in float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def tolerance(dtype: torch.dtype, length: int, roundings: int = 1) -> float:
    """Error of a result of `dtype` relative to the largest, for sums of `length` terms: the roundings to `dtype` on the
    way, and those of the accumulation, which add up like a random walk (8 times that covers exp, log and division)."""
    return roundings * torch.finfo(dtype).eps + 8 * torch.finfo(accumulation_type(dtype)).eps * math.sqrt(length + 1)


def assert_close(actual: Tensor, reference: Tensor, relative: float, scale: float = 0.0) -> None:
    """Holds `actual` to `relative` of the largest entry of the float64 `reference`, or of `scale`, the size of terms
    that cancel, where that is larger; NaN and infinity must stand alike."""
    assert actual.shape == reference.shape
    actual, reference = actual.detach().double().cpu(), reference.detach().double().cpu()
    finite = reference.isfinite()
    torch.testing.assert_close(actual[~finite], reference[~finite], equal_nan=True)
    if finite.any():
        error = (actual - reference)[finite].abs().max().item()
        largest = max(scale, reference[finite].abs().max().item())
        assert error <= relative * largest, f"error {error:.3g}, allowed {relative * largest:.3g}"
