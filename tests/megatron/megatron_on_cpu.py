"""Lets megatron-core, which expects CUDA, run on the CPU with gloo: nothing of edl, and nothing that changes a
number."""

import contextlib
import functools
import warnings

import torch

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|full scope|core_attn)", category=UserWarning)


def _on_cpu(factory):
    """A function that makes tensors, with device="cuda" taken as the CPU."""

    @functools.wraps(factory)
    def made(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


@contextlib.contextmanager
def attach_of_0_19():
    """What `attach_and_log_load_balancing_loss` does with a loss per token from megatron-core 0.19 on."""
    from megatron.core.transformer.moe.router import TopKRouter

    from edl.integrations.megatron import router

    if router._attach_multiplies_by_group():
        yield
        return
    attach = TopKRouter.attach_and_log_load_balancing_loss

    def newer(self, activation, *args, valid_token_count=None):
        count = activation.shape[0] if valid_token_count is None else valid_token_count
        return attach(self, activation, *args, valid_token_count=count * self.tp_cp_group.size())

    TopKRouter.attach_and_log_load_balancing_loss = newer
    router._attach_multiplies_by_group.cache_clear()
    yield
    TopKRouter.attach_and_log_load_balancing_loss = attach
    router._attach_multiplies_by_group.cache_clear()


def enable() -> None:
    """Call it once in a process, before a model is built."""
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
