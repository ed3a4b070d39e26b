"""Small models of transformers v5, of random weights large enough that experts and routing matter."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

VOCABULARY = 99
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=8),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, intermediate_size=37, moe_intermediate_size=12, shared_expert_intermediate_size=36, num_experts=8
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=16, intermediate_size=37, moe_intermediate_size=12, num_experts=8
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=12, num_experts=8),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SIZES, **LATENT, **GROUPS, "num_hidden_layers": 3},
        intermediate_size=37,
        moe_intermediate_size=12,
        n_routed_experts=8,
    ),
    "granitemoe": lambda: GraniteMoeConfig(**SIZES, intermediate_size=24, num_local_experts=8),
    "gpt_oss": lambda: GptOssConfig(**SIZES, head_dim=16, intermediate_size=24, num_local_experts=8),
    "phimoe": lambda: PhimoeConfig(
        **SIZES, intermediate_size=24, num_local_experts=8, router_jitter_noise=0.0, input_jitter_noise=0.0
    ),
    "llama4": lambda: Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size=24, intermediate_size_mlp=24, num_local_experts=8
    ),
}

# Not for causal language modelling alone, and without a part in the lists of families above.
MULTIMODAL = {
    "qwen3_vl_moe": lambda: Qwen3VLMoeConfig(
        text_config={
            **SIZES,
            "bos_token_id": 0,
            "head_dim": 16,
            "intermediate_size": 37,
            "moe_intermediate_size": 12,
            "num_experts": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 32},
    )
}


def make_model(family: str, dtype: torch.dtype = torch.float32, experts: str = "eager", **config) -> nn.Module:
    """A model for causal language modelling, in train mode."""
    settings = {**CONFIGS, **MULTIMODAL}[family]()
    for name, value in config.items():
        assert hasattr(settings, name)
        setattr(settings, name, value)
    kind = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    model = kind.from_config(settings, experts_implementation=experts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype).train()


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routers, found by their weight alone: 8 experts, 32 inputs."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "shape", None) == (8, 32)
    }
