"""Pre-trains a small GPT of megatron-core in the manner of Megatron-LM's pretrain_gpt.py. What edl adds is marked with
`# +`.

torchrun --nproc-per-node=1 pretrain_gpt.py --expert-divergence-coeff 0.01 --expert-divergence-num-domains 3

Without CUDA add --cpu.
"""

import argparse
import sys

import numpy
import on_cpu
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from edl.integrations import megatron as edl_megatron  # +

VOCABULARY, LENGTH = 96, 32
NUM_DOMAINS = 3


class Counting(MegatronDataset):
    """One data path: sequences that count upwards in their domain's own third of the vocabulary, by a step of the
    domain."""

    @staticmethod
    def numel_low_level_dataset(low_level_dataset) -> int:
        return 4096

    @staticmethod
    def build_low_level_dataset(dataset_path, config):
        return None

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict:
        third = VOCABULARY // NUM_DOMAINS
        domain = int(self.dataset_path)
        text = domain * third + (7 * index + (domain + 1) * numpy.arange(LENGTH + 1)) % third
        return {"tokens": text[:-1], "labels": text[1:]}


def build_data(args: argparse.Namespace) -> BlendedDataset:
    """A blend of three data paths, whose index Megatron adds to every sample as dataset_id."""
    config = BlendedMegatronDatasetConfig(random_seed=1, sequence_length=LENGTH, split="1,0,0")
    paths = [
        Counting(None, str(domain), numpy.arange(4096), 4096, Split.train, config) for domain in range(NUM_DOMAINS)
    ]
    return BlendedDataset(paths, [1.0] * NUM_DOMAINS, 4096, config)


def model_provider(args: argparse.Namespace) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        moe_ffn_hidden_size=64,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_router_dtype="fp32",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    transformer_layer_spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    transformer_layer_spec = edl_megatron.patch_spec(transformer_layer_spec, **edl_megatron.options(args))  # +
    return GPTModel(config, transformer_layer_spec, VOCABULARY, max_sequence_length=LENGTH)


def loss_func(output: torch.Tensor):
    loss = output.float().sum()
    return (
        loss,
        torch.tensor(output.numel(), dtype=torch.int, device=output.device),
        {"lm loss": loss.detach() / output.numel()},
    )


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    tokens, labels = (batch[key].to(torch.cuda.current_device()) for key in ("tokens", "labels"))
    position_ids = torch.arange(LENGTH, device=tokens.device).expand_as(tokens)
    attention_mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).triu(1)[
        None, None
    ]  # True = hidden
    output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, loss_func


def pretrain(args: argparse.Namespace, forward_step) -> None:
    """What Megatron-LM's `pretrain` does with the functions above."""
    model = model_provider(args).to(torch.cuda.current_device())
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=args.lr, clip_grad=0.0), [model])
    sampler = torch.utils.data.DistributedSampler(
        data := build_data(args), parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    )
    batches = iter(torch.utils.data.DataLoader(data, args.micro_batch_size, sampler=sampler, drop_last=True))
    model.train()
    for iteration in range(args.train_iters):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=args.num_microbatches,
            seq_length=LENGTH,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        losses = {"lm loss": sum(report["lm loss"] for report in reports) / len(reports)}
        moe_utils.track_moe_metrics(
            1 / args.num_microbatches,
            iteration,
            total_loss_dict=losses,
            num_layers=2,
            track_names=["load_balancing_loss"],
        )
        print(f"iteration {iteration:3} | " + " | ".join(f"{name}: {float(loss):.3f}" for name, loss in losses.items()))


def parse_args(extra_args_provider=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, with gloo")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--num-microbatches", type=int, default=2)
    parser.add_argument("--train-iters", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-2)
    return (parser if extra_args_provider is None else extra_args_provider(parser)).parse_args()


if __name__ == "__main__":
    if "--cpu" in sys.argv:
        on_cpu.enable()
    elif not torch.cuda.is_available():
        sys.exit("pretrain_gpt.py: Megatron expects CUDA, and torch finds none; with --cpu it runs on the CPU")
    torch.distributed.init_process_group("gloo" if "--cpu" in sys.argv else None)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    pretrain(
        parse_args(extra_args_provider=edl_megatron.add_arguments),  # +
        edl_megatron.with_domain_ids(forward_step),  # +
    )
