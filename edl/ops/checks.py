"""Arguments that are what they should be, or a sentence."""

import operator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a tensor is one of torch.distributed.tensor, of which this process may hold a part."""
    if type(tensor) is Tensor or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def refuse_dtensor(op: str, *tensors: Tensor | None) -> None:
    """Raises where an operator is given a DTensor, whose shards only the caller knows how to combine."""
    for tensor in tensors:
        if tensor is not None and is_dtensor(tensor):
            raise ValueError(f"edl::{op}: takes plain tensors, call to_local() on the shards first (got a DTensor)")


def _shown(value: object) -> str:
    """An argument as one line of a sentence."""
    text = repr(value)
    return text if "\n" not in text else type(value).__name__


def check_tensor(op: str, name: str, tensor: object) -> None:
    """Raises where an argument is no dense tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"edl::{op}: {name} must be a tensor (got {type(tensor).__name__})")
    if tensor.is_nested:
        raise ValueError(f"edl::{op}: {name} must be dense (got a nested tensor)")
    if tensor.layout != torch.strided:
        raise ValueError(f"edl::{op}: {name} must be dense (got layout {tensor.layout})")
    if tensor.is_quantized:
        raise ValueError(f"edl::{op}: {name} must not be quantised (got {tensor.dtype})")
    refuse_dtensor(op, tensor)


def check_tensors(op: str, **tensors: object) -> None:
    """Raises where one of several arguments is no dense tensor."""
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)


def check_given(op: str, **tensors: object) -> None:
    """The same for arguments that may be None."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(op, name, tensor)


def check_memory(op: str, **tensors: Tensor | None) -> None:
    """Raises where the memory of a tensor was freed, for operators of torch, which crash; ours look themselves."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.numel() == 0:  # subclasses may keep their values elsewhere
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            continue
        if tensor.untyped_storage().nbytes() == 0:
            raise ValueError(f"edl::{op}: {name} must have memory (got a tensor whose storage was freed)")


def _is_scalar(tensor: Tensor) -> bool:
    """Whether a tensor is a number, such as a size that torch.jit.trace follows."""
    is_dense = not tensor.is_nested and tensor.layout == torch.strided and not tensor.is_quantized
    return is_dense and tensor.dim() == 0 and tensor.dtype != torch.bool and not (tensor.is_meta or tensor.is_complex())


def _is_integer(number: object) -> bool:
    if isinstance(number, Tensor):
        return _is_scalar(number) and not number.is_floating_point()
    try:
        operator.index(number)  # type: ignore[arg-type]  # a TypeError is the answer
    except TypeError:
        return False
    return not isinstance(number, bool)


def _is_number(number: object) -> bool:
    if isinstance(number, Tensor):
        return _is_scalar(number)
    try:
        float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(number, (bool, str, bytes))


def check_integers(op: str, **numbers: object) -> None:
    """Raises where an argument is no integer; one that torch.compile or torch.jit.trace follows is."""
    for name, number in numbers.items():
        if type(number) is not int and not isinstance(number, torch.SymInt) and not _is_integer(number):
            raise ValueError(f"edl::{op}: {name} must be an integer (got {_shown(number)})")
        if type(number) is int and not torch.compiler.is_compiling() and not -(2**63) <= number < 2**63:
            raise ValueError(f"edl::{op}: {name} must be an integer of 64 bits (got {number})")


def as_integer(op: str, name: str, number: Any, lowest: int = 0) -> int:
    """An argument as an int of at least `lowest`; what torch.compile follows stays what it is."""
    check_integers(op, **{name: number})
    whole: Any = number if isinstance(number, (int, torch.SymInt)) else operator.index(number)
    if whole < lowest:
        rule = "not be negative" if lowest == 0 else f"be at least {lowest}"
        raise ValueError(f"edl::{op}: {name} must {rule} (got {whole})")
    result: int = whole
    return result


def check_numbers(op: str, **numbers: object) -> None:
    """Raises where an argument is no number."""
    for name, number in numbers.items():
        if type(number) is not float and not isinstance(number, torch.SymFloat) and not _is_number(number):
            raise ValueError(f"edl::{op}: {name} must be a number (got {_shown(number)})")


def check_texts(op: str, **texts: object) -> None:
    """Raises where an argument is no text."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"edl::{op}: {name} must be a string (got {_shown(text)})")


def router_scores() -> list[str]:
    """The score functions of routers, as operators know them; a function, as TorchScript reads no global list."""
    return ["softmax", "sigmoid"]


def check_choice(op: str, name: str, value: str, choices: list[str]) -> None:
    """Raises where an argument is none of its choices; TorchScript takes it too."""
    if value not in choices:
        got = f"'{value}'"
        if not torch.jit.is_scripting():
            got = repr(value)  # something else than a text, perhaps
        raise ValueError(f"edl::{op}: {name} must be one of {choices} (got {got})")


def check_flags(op: str, **flags: object) -> None:
    """Raises where an argument is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"edl::{op}: {name} must be True or False (got {_shown(flag)})")
