"""Arguments of measures: numbers, shares and integers, or a sentence."""

from typing import Any

import torch
from torch import Tensor

from edl.diagnostics.extras import require
from edl.ops import checks

# By how much the sum of shares may miss 1: float32 does, counts that were not divided miss it by more.
_TOLERANCE = 1e-4
# What rounding may add to an expected number.
_ROUNDING = 1e-9
# Choices that are added to those seen and to those expected before they are compared, so that a pair seen once does not
# count as the strongest.
_CAUTION = 10.0


def _tensor(op: str, name: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(_own(values))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(
                f"edl::{op}: {name} must be a tensor or an array of numbers (got {type(values).__name__})"
            ) from None
    checks.check_tensor(op, name, values)
    checks.check_memory(op, **{name: values})
    if values.is_meta:
        raise ValueError(f"edl::{op}: {name} must have values (got a tensor on the device meta)")
    tensor: Tensor = values.detach()
    return tensor


def _own(values: Any) -> Any:
    """An array of NumPy as torch takes it without a word: writable, and no view backwards."""
    if type(values).__module__.partition(".")[0] != "numpy":
        return values
    return require("numpy", "measures").require(values, requirements=["C", "W"])


def numbers(op: str, name: str, values: Any, shape: str) -> Tensor:
    """Numbers of at least 0 as float64, of at least as many dimensions as the shape has letters, none of the last ones
    empty but N."""
    tensor = _tensor(op, name, values)
    letters = shape.split(", ")
    sizes = tensor.shape[-len(letters) :] if tensor.dim() >= len(letters) else ()
    if not sizes or any(size == 0 for letter, size in zip(letters, sizes) if letter != "N"):
        raise ValueError(f"edl::{op}: {name} must have the shape [..., {shape}] (got {list(tensor.shape)})")
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(f"edl::{op}: {name} must be real numbers (got {tensor.dtype})")
    tensor = tensor.double()
    if (tensor < 0).any() or tensor.isinf().any():
        raise ValueError(f"edl::{op}: {name} must be finite and not negative (got others)")
    return tensor


def shares_of(op: str, values: Any, shape: str) -> tuple[Tensor, Tensor]:
    """Shares [..., E] as float64, and which rows are there [...]: those without a NaN."""
    tensor = numbers(op, "shares", values, shape)
    present = ~tensor.isnan().any(-1)
    sums = tensor.sum(-1)[present]
    if ((sums - 1).abs() > _TOLERANCE).any():
        raise ValueError(
            f"edl::{op}: shares must add up to 1, or be NaN (got a sum of {sums[(sums - 1).abs().argmax()].item():.6g})"
        )
    return tensor, present


def integers(op: str, name: str, values: Any, *shape: int | None) -> Tensor:
    """Integers as int64, of this shape (None: any size)."""
    tensor = _tensor(op, name, values)
    fits = tensor.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape))
    if not fits or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"edl::{op}: {name} must be integers of the shape [{wanted}] (got {tensor.dtype} {list(tensor.shape)})"
        )
    return tensor.long()


def labels_of(op: str, values: Any, number: int, num_domains: int | None = None) -> tuple[Tensor, int]:
    """The domains of N documents, -1 for none, and how many there are; without D those that occur are numbered anew."""
    labels = integers(op, "labels", values, number)
    lowest, highest = (int(labels.min()), int(labels.max())) if number else (-1, -1)
    if lowest < -1 or (num_domains is not None and highest >= num_domains):
        rule = (
            "be at least -1, which is none" if num_domains is None else f"be in [-1, {num_domains}), where -1 is none"
        )
        raise ValueError(f"edl::{op}: labels must {rule} (got {lowest} to {highest})")
    if num_domains is not None:
        return labels, num_domains
    occurring, places = labels.unique(return_inverse=True)  # sorted
    unlabelled = int((occurring == -1).sum())
    return places - unlabelled, len(occurring) - unlabelled


def strength(seen: Tensor, expected: Tensor) -> Tensor:
    """How much more is seen than expected, so that few say little: (seen + 10) / (expected + 10); -inf where it is not
    more."""
    is_more = seen > expected * (1 + _ROUNDING)
    return ((seen + _CAUTION) / (expected + _CAUTION)).where(is_more, -torch.inf)
