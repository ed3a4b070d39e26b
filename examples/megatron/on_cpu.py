"""Lets megatron-core, which expects CUDA, run on the CPU with gloo: nothing of edl, and nothing that changes a
number."""

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch


def _on_cpu(factory: Callable) -> Callable:
    """A function that makes tensors, with device="cuda" taken as the CPU."""

    @functools.wraps(factory)
    def made(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


def enable() -> None:
    """Call it once in a process, before a model is built."""
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|full scope|core_attn)", category=UserWarning)
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda device=None: torch.cpu.current_stream()
    for name in ("empty", "tensor", "zeros"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    moe_utils.te_general_gemm = None
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    random.CudaRNGStatesTracker.add = lambda self, name, seed: None
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *args, **kwargs: None
