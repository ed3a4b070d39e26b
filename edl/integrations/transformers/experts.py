"""edl's kernels as an experts implementation of transformers v5."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from edl import ops


def _obstacle(experts: nn.Module) -> str | None:
    """What these experts have that `edl.ops.expert_mlp` does not compute; None for plain SwiGLU."""
    # Experts with a gate of their own may have none.
    activation = type(experts.act_fn).__name__ if hasattr(experts, "act_fn") else "SiLU"
    own_gate = getattr(type(experts), "_apply_gate", None)
    obstacles = {
        "no gate": not getattr(experts, "has_gate", True),
        "biases": experts.has_bias,
        "transposed weights": experts.is_transposed,
        "interleaved gate and up weights": not getattr(experts, "is_concatenated", True),
        "a norm behind each expert": getattr(experts, "has_post_expert_norm", False),
        "a gate of their own": own_gate is not None and own_gate.__module__ != "transformers.integrations.moe",
        f"the activation {activation}": activation not in ("SiLU", "SiLUActivation"),
    }
    present = [name for name, is_present in obstacles.items() if is_present]
    return " and ".join(present) or None


_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_warned: set[str] = set()


@torch.compiler.assume_constant_result  # torch.compile runs it while tracing
def _warn_once(kind: str, obstacle: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(
            f"edl::register: {kind} runs on transformers' grouped_mm, edl has plain SwiGLU experts only "
            f"(got {obstacle})",
            stacklevel=2,
        )


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module on `edl.ops`, with the signature that transformers' registry asks for.

    Args:
        experts (nn.Module): has `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]`.
        hidden_states (Tensor[T, H]): the tokens.
        top_k_index (Tensor[T, K]): chosen experts in [0, E]; E: none here (a sentinel of expert parallelism).
        top_k_weights (Tensor[T, K]): their weights.

    Returns:
        output (Tensor[T, H]) in the type of `hidden_states`.

    Raises:
        ValueError: weights of another type than float32, float64, bfloat16 and float16, as those of quantised models.
    """
    obstacle = _obstacle(experts)
    if obstacle is not None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        _warn_once(type(experts).__name__, obstacle)
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    parts: Any = experts  # whose types nn.Module does not know
    for name in ("gate_up_proj", "down_proj"):
        kind = getattr(parts, name).dtype
        if kind not in _TYPES:
            raise ValueError(
                "edl::register: expert weights must be float32, float64, bfloat16 or float16, not quantised "
                f"(got {name} of {kind})"
            )
    tokens = hidden_states.to(parts.gate_up_proj.dtype)
    weights = top_k_weights.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    row_order, offsets = ops.sort_by_expert(top_k_index, parts.num_experts)
    output = ops.expert_mlp(tokens, weights, row_order, offsets, parts.gate_up_proj, parts.down_proj)
    return output.to(hidden_states.dtype)


def register() -> None:
    """Makes `experts_implementation="edl"` known to transformers: in `from_pretrained`, `from_config` and
    `model.set_experts_implementation`.

    Models whose experts are plain SwiGLU (gate and up concatenated, SiLU, no bias) run on edl's kernels: Mixtral,
    Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3, GraniteMoE and most others. The rest, such as GPT-OSS, run on
    transformers' own grouped_mm, with one warning. Needs transformers 5.7 or newer.
    """
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("edl", experts_forward)
