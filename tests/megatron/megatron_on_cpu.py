"""Lets megatron-core run on the CPU, as the example does, and as if it were newer."""

import contextlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "megatron"))
import on_cpu

enable = on_cpu.enable


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
