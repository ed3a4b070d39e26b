"""Domain labels from the data: the index of the data set in the blend, which Megatron's `BlendedDataset` adds to every
sample."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from torch import Tensor, nn

import edl
from edl.integrations.megatron.router import EDTopKRouter

KEY = "dataset_id"


def with_domain_ids(forward_step: Callable, domains: Sequence[int] | None = None) -> Callable:
    """Opens `edl.domain_scope` around a forward step, with the labels that `BlendedDataset` put into its batch.

    Every sequence gets the index of its data path in the blend. The batch is taken from the iterator on the first rank
    of each tensor-parallel group, which reads the data; its labels are sent to the other ranks of that group. The
    forward step finds the same batch in the iterator that it is given.

    Args:
        forward_step (callable): `forward_step(data_iterator, model, ...)` of Megatron-LM.
        domains (sequence of int, optional): the domain of each data path, -1 = not counted; default: each path its own
            domain.

    Returns:
        The forward step to pass to Megatron.

    Raises (the forward step, where the model has objectives that need `domain_ids`, and trains):
        ValueError: the batch has no `dataset_id`, or another shape; a pipeline stage with MoE layers gets no data
            (build the data set on every stage).
        IndexError: a data set without entry in `domains`.
    """

    @functools.wraps(forward_step)
    def labelled(data_iterator: Iterator | None, model: nn.Module, *args, **kwargs):
        if not (model.training and _needs_domain_ids(model)):
            return forward_step(data_iterator, model, *args, **kwargs)
        batch = None if data_iterator is None else next(data_iterator)
        domain_ids = _on_all_tensor_ranks(_domain_ids(batch, domains), next(model.parameters()).device)
        with edl.domain_scope(domain_ids):
            return forward_step(data_iterator if batch is None else iter([batch]), model, *args, **kwargs)

    return labelled


def _needs_domain_ids(model: nn.Module) -> bool:
    return any(isinstance(module, EDTopKRouter) and "domain_ids" in module.label_sets for module in model.modules())


def _domain_ids(batch: dict | None, domains: Sequence[int] | None) -> Tensor | None:
    """Labels [B] of the batch; None on a rank that reads no data for others."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None
    if batch is None:
        raise ValueError(
            "edl::megatron.with_domain_ids: a pipeline stage with MoE layers needs the labels, so build the data set "
            f"on every stage (got no data on stage {parallel_state.get_pipeline_model_parallel_rank()} of "
            f"{parallel_state.get_pipeline_model_parallel_world_size()})"
        )
    if KEY not in batch:
        raise ValueError(
            f"edl::megatron.with_domain_ids: the batch must hold '{KEY}', which BlendedDataset adds where several "
            f"data paths are blended (got {list(batch)})"
        )
    ids = torch.as_tensor(batch[KEY]).long()
    if ids.dim() != 1:
        raise ValueError(f"edl::megatron.with_domain_ids: '{KEY}' must have the shape [B] (got {list(ids.shape)})")
    if domains is None:
        return ids
    if int(ids.max()) >= len(domains):
        raise IndexError(
            "edl::megatron.with_domain_ids: domains must have an entry for every data path "
            f"(got {len(domains)} for path {int(ids.max())})"
        )
    return torch.tensor(domains)[ids]


def _on_all_tensor_ranks(domain_ids: Tensor | None, device: torch.device) -> Tensor:
    """The labels of the first rank of the tensor-parallel group, on `device`."""
    if domain_ids is not None and parallel_state.get_tensor_model_parallel_world_size() == 1:
        return domain_ids.to(device, non_blocking=True)
    batch_size = num_microbatches_calculator.get_micro_batch_size()
    if domain_ids is None:
        domain_ids = torch.empty(batch_size, dtype=torch.long, device=device)
    elif len(domain_ids) != batch_size:
        raise ValueError(
            f"edl::megatron.with_domain_ids: the batch must have micro_batch_size {batch_size} labels (got "
            f"{len(domain_ids)})"
        )
    domain_ids = domain_ids.to(device)
    source = parallel_state.get_tensor_model_parallel_src_rank()
    torch.distributed.broadcast(domain_ids, source, group=parallel_state.get_tensor_model_parallel_group())
    return domain_ids
