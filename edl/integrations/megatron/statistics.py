"""Statistics of Megatron's routers, over all ranks."""

from typing import Any

from megatron.core import parallel_state

from edl.diagnostics.statistics import RoutingStatistics


def reduce_statistics(statistics: RoutingStatistics, config: Any, only_latest: bool = False) -> RoutingStatistics:
    """The sums of all ranks: data and context parallel ones hold different tokens, tensor parallel ones with sequence
    parallelism, and count once without; pipeline stages hold different layers.

        statistics = edl.RoutingStatistics(["code", "news"])
        spec = patch_spec(spec, Objectives({...}, statistics=statistics))  # without objectives it only looks
        ...
        statistics.snapshot(iteration)  # on every rank, as all of this
        whole = reduce_statistics(statistics, model.config)
        if torch.distributed.get_rank() == 0:
            whole.save("routing.safetensors")

    Args:
        statistics (RoutingStatistics): of this rank. All ranks call, between the same steps.
        config (TransformerConfig): of the model.
        only_latest (bool): as `RoutingStatistics.reduce` takes it. Default: False.

    Returns:
        New statistics, the same on all ranks.

    Raises:
        ValueError: what `RoutingStatistics.reduce` raises.
    """
    parts = parallel_state.get_context_parallel_group()
    if config.sequence_parallel:
        parts = parallel_state.get_tensor_and_context_parallel_group()
    return statistics.reduce(
        group=parallel_state.get_data_parallel_group(),
        sequence_group=parts,
        stage_group=parallel_state.get_pipeline_model_parallel_group(),
        only_latest=only_latest,
    )
