"""Domain labels from the data: the index of the data set in the blend, which Megatron's `BlendedDataset` adds to every
sample, or those of a sample's documents."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

import edl
from edl.integrations.megatron import documents
from edl.integrations.megatron.router import EDTopKRouter

KEY = "dataset_id"


def with_domain_ids(
    forward_step: Callable, domains: Sequence[int] | None = None, sequence_length: int | None = None
) -> Callable:
    """Opens `edl.domain_scope` around a forward step, with the labels that its batch holds.

    Every sequence gets the index of its data path in the blend, which `BlendedDataset` put there; or with
    `sequence_length` every token the label of its document, which a data set of `label_documents` put there, cut for
    this context-parallel rank as Megatron cuts the batch. The batch is taken from the iterator on the first rank
    of each tensor-parallel group, which reads the data; its labels are sent to the other ranks of that group. The
    forward step finds the same batch in the iterator that it is given.

    Args:
        forward_step (callable): `forward_step(data_iterator, model, ...)` of Megatron-LM.
        domains (sequence of int, optional): the domain of each data path, -1 = not counted; default: each path its own
            domain.
        sequence_length (int, optional): S_len of the batch's labels per token.

    Returns:
        The forward step to pass to Megatron.

    Raises:
        ValueError: both `domains` and `sequence_length`.

    Raises (the forward step, where the model has objectives that need `domain_ids`, and trains, or statistics that do):
        ValueError: the batch has no `dataset_id` or no `domain_ids`, or another shape; a pipeline stage with MoE layers
            gets no data (build the data set on every stage).
        IndexError: a data set without entry in `domains`.
    """

    if domains is not None and sequence_length is not None:
        raise ValueError(
            "edl::megatron.with_domain_ids: domains are those of data paths, sequence_length is that of labels per "
            "token, give one of them (got both)"
        )

    @functools.wraps(forward_step)
    def labelled(data_iterator: Iterator | None, model: nn.Module, *args, **kwargs):
        if not _needs_domain_ids(model):
            return forward_step(data_iterator, model, *args, **kwargs)
        batch = None if data_iterator is None else next(data_iterator)
        own = _domain_ids(batch, domains, sequence_length)
        domain_ids = _on_all_tensor_ranks(own, sequence_length, next(model.parameters()).device)
        if sequence_length is not None:
            domain_ids = get_batch_on_this_cp_rank({"domain_ids": domain_ids})["domain_ids"]
        with edl.domain_scope(domain_ids):
            return forward_step(data_iterator if batch is None else iter([batch]), model, *args, **kwargs)

    return labelled


def _needs_domain_ids(model: nn.Module) -> bool:
    routers = [module for module in model.modules() if isinstance(module, EDTopKRouter)]
    label_sets = [each.label_sets if model.training else each.evaluation_label_sets for each in routers]
    return any("domain_ids" in names for names in label_sets)


def _domain_ids(batch: dict | None, domains: Sequence[int] | None, sequence_length: int | None) -> Tensor | None:
    """Labels [B] of the batch, or [B, sequence_length]; None on a rank that reads no data for others."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None
    if batch is None:
        raise ValueError(
            "edl::megatron.with_domain_ids: a pipeline stage with MoE layers needs the labels, so build the data set "
            f"on every stage (got no data on stage {parallel_state.get_pipeline_model_parallel_rank()} of "
            f"{parallel_state.get_pipeline_model_parallel_world_size()})"
        )
    if sequence_length is not None:
        ids = batch.get(documents.KEY)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != sequence_length:
            got = "none" if ids is None else list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(
                f"edl::megatron.with_domain_ids: the batch must hold '{documents.KEY}' [B, {sequence_length}], which "
                f"the data sets of label_documents add (got {got})"
            )
        return ids.long()
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


def _on_all_tensor_ranks(domain_ids: Tensor | None, sequence_length: int | None, device: torch.device) -> Tensor:
    """The labels of the first rank of the tensor-parallel group, on `device`."""
    if domain_ids is not None and parallel_state.get_tensor_model_parallel_world_size() == 1:
        return domain_ids.to(device, non_blocking=True)
    batch_size = num_microbatches_calculator.get_micro_batch_size()
    if domain_ids is None:
        shape = [batch_size] if sequence_length is None else [batch_size, sequence_length]
        domain_ids = torch.empty(shape, dtype=torch.long, device=device)
    elif len(domain_ids) != batch_size:
        raise ValueError(
            f"edl::megatron.with_domain_ids: the batch must have micro_batch_size {batch_size} labels (got "
            f"{len(domain_ids)})"
        )
    domain_ids = domain_ids.to(device).contiguous()
    source = parallel_state.get_tensor_model_parallel_src_rank()
    torch.distributed.broadcast(domain_ids, source, group=parallel_state.get_tensor_model_parallel_group())
    return domain_ids
