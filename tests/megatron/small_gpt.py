"""A small `GPTModel` with MoE layers in float64, its batches, and one training step of Megatron's own schedules.

Parameters are made from their names, and cut as Megatron cuts them: every split of the model starts from the same
numbers.
"""

import dataclasses
import functools
import operator
import re
import zlib
from typing import ClassVar

import oracle
import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from plain_layers import GatheredAttention, Layout, SequenceParallelNorm
from torch import Tensor

VOCABULARY, EXPERTS, LAYERS, HIDDEN, LENGTH, DOMAINS = 64, 4, 2, 32, 16, 3
COEFF = 0.3
DEFAULTS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "moe_ffn_hidden_size": 64,
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_router_dtype": "fp64",
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
    "params_dtype": torch.float64,
    "pipeline_dtype": torch.float64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "add_bias_linear": False,
    "attention_softmax_in_fp32": False,
    "use_cpu_initialization": True,
    "batch_p2p_comm": False,
    "barrier_with_L1_time": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
}


@dataclasses.dataclass
class Step:
    """A training step: its micro-batches (of all data-parallel ranks together), and what the model is told of them."""

    tokens: Tensor  # [M, B, S_len]
    domain_ids: Tensor  # [M, B], or [M, B, S_len]
    padding: Tensor | None = None  # [M, B, S_len], True = padding, given to the model
    cu_seqlens: Tensor | None = None  # [N + 1] the same documents in every micro-batch, B = 1; domain_ids [M, N]

    @property
    def targets(self) -> Tensor:
        return self.tokens.roll(-1, dims=-1)

    @property
    def modality_ids(self) -> Tensor:
        """[M, B, S_len, 2] soft scores of modality, another set of labels; of some tokens there are none."""
        scores = torch.rand(*self.tokens.shape, 2, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
        return scores.masked_fill((self.tokens % 5 == 0).unsqueeze(-1), 0.0)


def make_step(kind: str = "sequences", micro_batches: int = 2, batch_size: int = 4) -> Step:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, VOCABULARY, (micro_batches, batch_size, LENGTH), generator=generator)
    domain_ids = torch.tensor([[0, 1, 2, 0], [2, 1, 1, 0], [1, -1, 1, 2]])[:micro_batches, :batch_size]
    if kind == "sequences":
        return Step(tokens, domain_ids)
    if kind == "single domain":  # in the second micro-batch
        return Step(tokens, torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1]]))
    if kind == "token labels":
        return Step(tokens, torch.randint(-1, DOMAINS, tokens.shape, generator=generator))
    if kind == "padding":
        lengths = torch.tensor([[16, 9, 13, 5], [12, 16, 7, 4]])
        return Step(tokens, domain_ids, torch.arange(LENGTH) >= lengths.unsqueeze(-1))
    assert kind == "documents"
    return Step(tokens[:, :1], torch.tensor([[0, 1, 2], [2, 1, 1]]), cu_seqlens=torch.tensor([0, 4, 12, 16]))


def make_config(**changes) -> TransformerConfig:
    return TransformerConfig(**{**DEFAULTS, **changes})


def _full_value(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "layernorm.weight" in name:
        return 1 + 0.1 * value
    return (0.3 if "router" in name else 0.15) * value


def _global_name(name: str) -> str:
    """The name that a parameter of this stage and rank has in the whole model."""
    stage, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    rank, ranks = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_model_parallel_world_size()
    name = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + stage * (LAYERS // stages)}", name)
    return re.sub(r"local_experts\.(\d+)", lambda m: f"local_experts.{int(m[1]) + rank * (EXPERTS // ranks)}", name)


def shard_of(full: Tensor, parameter: Tensor) -> Tensor:
    """The part of a parameter, or its gradient, that this rank holds."""
    for dim, (whole, part) in enumerate(zip(full.shape, parameter.shape)):
        if whole != part:
            return full.chunk(whole // part, dim)[parallel_state.get_tensor_model_parallel_rank()]
    return full


def build(config: TransformerConfig, patch=None, attention=None) -> GPTModel:
    """This rank's part of the model, with the spec that `patch` makes of Megatron's."""
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    spec.layer_norm = SequenceParallelNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SequenceParallelNorm
        if attention is not None:
            layer.submodules.self_attention.submodules.core_attention = attention
    model = GPTModel(
        config,
        spec if patch is None else patch(spec),
        VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
    ).double()
    shapes = whole_shapes()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = _global_name(name)
            # A dense layer, which no test splits, is whole.
            parameter.copy_(shard_of(_full_value(name, shapes.get(name, tuple(parameter.shape))), parameter))
    return model


@functools.lru_cache(maxsize=1)
def whole_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of the model that is not split."""
    shapes = {
        "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "embedding.position_embeddings.weight": (LENGTH, HIDDEN),
        "output_layer.weight": (VOCABULARY, HIDDEN),
    }
    layernorms = ["decoder.final_layernorm"]
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}"
        layernorms += [f"{prefix}.input_layernorm", f"{prefix}.pre_mlp_layernorm"]
        shapes[f"{prefix}.self_attention.linear_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.self_attention.linear_qkv.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[f"{prefix}.mlp.router.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            shapes[f"{prefix}.mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (64, HIDDEN)
            shapes[f"{prefix}.mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (HIDDEN, 64)
    return shapes | {f"{name}.{part}": (HIDDEN,) for name in layernorms for part in ("weight", "bias")}


# ---- one step as Megatron takes it ----


def positions_of_rank() -> Tensor:
    """Positions [S_len / cp] that this context-parallel rank holds: Megatron gives each rank an early and a late
    chunk."""
    rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    chunks = torch.arange(LENGTH).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]]) if ranks > 1 else torch.arange(LENGTH)


def _positions_in_documents(cu_seqlens: Tensor) -> Tensor:
    """The same for packed documents, each of which is cut."""
    rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return torch.arange(LENGTH)
    parts = []
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist()):
        chunks = torch.arange(begin, end).chunk(2 * ranks)
        parts += [chunks[rank], chunks[2 * ranks - 1 - rank]]
    return torch.cat(parts)


def rank_batches(step: Step) -> list[dict]:
    """The micro-batches as this rank's forward step sees them."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    positions = positions_of_rank() if step.cu_seqlens is None else _positions_in_documents(step.cu_seqlens)
    batches = []
    for m in range(len(step.tokens)):
        share = slice(None) if step.cu_seqlens is not None else slice(replica, None, replicas)
        cut = lambda x: x[m, share][:, positions]
        batch = {
            "tokens": cut(step.tokens),
            "targets": cut(step.targets),
            "positions": positions.unsqueeze(0),
            "domain_ids": cut(step.domain_ids) if step.domain_ids.dim() == 3 else step.domain_ids[m, share],
            "modality_ids": cut(step.modality_ids),
            "padding": None if step.padding is None else cut(step.padding),
            "cu_seqlens": step.cu_seqlens,
        }
        if step.cu_seqlens is not None:
            batch["domain_ids"] = step.domain_ids[m]
        batches.append(batch)
    return batches


def forward_step(batch: dict, model, scope, masks_model: bool = True):
    """One micro-batch; `scope(batch)` is the context manager around the model."""
    masked = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    padding = batch["padding"] if masks_model else None
    with scope(batch):
        logits = model(batch["tokens"], batch["positions"].expand_as(batch["tokens"]), masked, padding_mask=padding)

    def loss_func(logits: Tensor):
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        kept = torch.ones_like(losses) if batch["padding"] is None else (~batch["padding"]).flatten().double()
        total, count, report = (losses * kept).sum(), kept.sum(), {"language": (losses * kept).sum().detach()}
        if model.config.calculate_per_token_loss or batch["padding"] is None:
            return total, count.int(), report
        # Of ranks with different numbers of tokens Megatron averages the means; here every token weighs the same.
        torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return total * parallel_state.get_data_parallel_world_size() / count, report

    return logits, loss_func


def wrap(model: GPTModel) -> DistributedDataParallel:
    """The model as Megatron trains it."""
    model.config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def train_step(model: GPTModel, batches: list[dict], step_function, data_iterator, wrapped=None) -> dict[str, Tensor]:
    """Gradients by global name after Megatron's schedule, data-parallel reduction and finalisation; several steps need
    one wrapped model."""
    wrapped = wrapped or wrap(model)
    wrapped.zero_grad_buffer()
    Layout.current = (batches[0]["positions"][0], batches[0]["cu_seqlens"])
    get_forward_backward_func()(
        forward_step_func=step_function,
        data_iterator=data_iterator,
        model=[wrapped],
        num_microbatches=len(batches),
        seq_length=batches[0]["tokens"].shape[1] * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=len(batches[0]["tokens"]),
        forward_only=False,
    )
    return {name: p.main_grad.clone() for name, p in named_parameters(model)}


def named_parameters(model: GPTModel) -> list[tuple[str, torch.nn.Parameter]]:
    """This rank's, by the names that they have in the whole model."""
    return [(_global_name(name), parameter) for name, parameter in model.named_parameters()]


def init_micro_batches(micro_batch_size: int, micro_batches: int) -> None:
    """What Megatron-LM does on start."""
    replicas = parallel_state.get_data_parallel_world_size()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        0, None, micro_batch_size * micro_batches * replicas, micro_batch_size, replicas
    )


# ---- the same step in one process, without Megatron's schedules and without edl ----


class RecordingRouter(TopKRouter):
    """Megatron's router, which leaves its logits where the reference finds them."""

    recorded: ClassVar[list[Tensor]] = []

    def routing(self, logits, padding_mask=None):
        RecordingRouter.recorded.append(logits)
        return super().routing(logits, padding_mask=padding_mask)


def _tokens_for_oracle(step: Step, m: int) -> list:
    """(sequence, domain) of every router row s·B + b, None where it does not count."""
    tokens = []
    for s in range(LENGTH):
        for b in range(step.tokens.shape[1]):
            sequence = (m, b)
            if step.cu_seqlens is not None:
                document = int(torch.searchsorted(step.cu_seqlens[1:], s, right=True))
                sequence, domain = (m, document), int(step.domain_ids[m, document])
            elif step.domain_ids.dim() == 3:
                domain = int(step.domain_ids[m, b, s])
                sequence = (m, b, domain)
            else:
                domain = int(step.domain_ids[m, b])
            padded = step.padding is not None and bool(step.padding[m, b, s])
            tokens.append(None if padded else (sequence, domain))
    return tokens


def reference_gradients(
    step: Step,
    coeff: float = COEFF,
    per_token: bool = False,
    accumulate: bool = False,
    scores=oracle.softmax,
    **changes,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Gradients by name of the step's loss, and the divergence losses by micro-batch and layer."""
    attention = GatheredAttention if step.cu_seqlens is not None else None
    model = build(make_config(**changes), None, attention)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.__class__ = RecordingRouter
    Layout.current = (torch.arange(LENGTH), step.cu_seqlens)
    earlier: list[tuple[list[Tensor], list]] = []
    values, totals, weights = [], [], []
    for m, batch in enumerate(rank_batches(step)):
        RecordingRouter.recorded.clear()
        logits, _ = forward_step(batch, model, lambda batch: torch.enable_grad())
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        kept = torch.ones_like(losses) if step.padding is None else (~step.padding[m]).flatten().double()
        distributions = [scores(layer.flatten(0, 1)) for layer in RecordingRouter.recorded]
        tokens = _tokens_for_oracle(step, m)
        earlier = [*earlier, (distributions, tokens)] if accumulate else [(distributions, tokens)]
        divergences = [
            oracle.paper_loss(
                torch.cat([d[i].detach() for d, _ in earlier[:-1]] + [earlier[-1][0][i]]),
                functools.reduce(operator.iadd, (t for _, t in earlier), []),
            )
            for i in range(LAYERS)
        ]
        values.append([float(divergence.detach()) for divergence in divergences])
        # The memory's contract: the gradient as if the micro-batches so far were one batch, averaged over them.
        totals.append((losses * kept).sum() / kept.sum() + coeff * len(earlier) * sum(divergences))
        weights.append(float(kept.sum()) if per_token else 1.0)
    sum(weight * total for weight, total in zip(weights, totals)).div(sum(weights)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, values
