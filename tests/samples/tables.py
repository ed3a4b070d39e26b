"""What a sample is: arguments that an operator accepts, or refuses."""

import dataclasses
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs:
    """Makes the random tensors of one sample: the same numbers on every device and in every process."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return self.on_device((torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype))

    def logits(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Of the size that trained routers have."""
        return self.normal(*shape, dtype=dtype, scale=2.5)

    def distributions(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.logits(*shape).softmax(dim=-1).to(dtype)

    def ids(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.on_device(torch.randint(low, high, shape, generator=self.generator).to(dtype))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arguments that an operator accepts."""

    op: str  # name in torch.ops.edl, and in edl.reference
    case: str
    make: Callable[[Inputs], tuple]  # arguments in the order of the schema
    differentiable: tuple[int, ...] = ()  # positions of the arguments with a gradient
    length: int = 1  # terms in the longest sum, for tolerances
    roundings: int = 1  # to the storage type on the way to a result, for tolerances
    gradient_is_derivative: bool = True  # False: tested against the definition, not with differences

    def __str__(self) -> str:
        return f"{self.op}-{self.case}"

    def arguments(self, device: torch.device | str = "cpu") -> tuple:
        return self.make(Inputs(str(self), torch.device(device)))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Arguments that an operator refuses, and its sentence."""

    op: str
    case: str
    make: Callable[[Inputs], tuple]
    sentence: str
    error: type[Exception] = ValueError
    by_value: bool = False  # only a kernel that sees the values can tell

    def __str__(self) -> str:
        return f"{self.op}-{self.case}"

    def arguments(self, device: torch.device | str = "cpu") -> tuple:
        return self.make(Inputs(str(self), torch.device(device)))


def operator(name: str):
    return getattr(torch.ops.edl, name).default


def turn(matrices: Tensor) -> Tensor:
    """The same numbers with columns that lie side by side."""
    return matrices.mT.contiguous().mT
