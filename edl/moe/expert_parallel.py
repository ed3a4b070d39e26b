"""Experts spread over ranks: rank r of R owns the experts r·E/R to (r+1)·E/R, and tokens travel to them and back.

    tokens ─► dispatch_tokens ─► all-to-all ─► expert_mlp ─► all-to-all ─► combine_tokens ─► output

The weights are DTensors of all E experts, sharded by expert: checkpoints, gathered state dicts and optimizer states are
those of one tensor [E, ...] whatever R is, and the norm of a gradient cannot silently be that of one rank. The
computation takes the local shards.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from edl import ops
from edl.moe import router_weights
from edl.ops import checks
from edl.reduction.ranks import Group, first_problem

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def as_mesh(group: Group, device: torch.device) -> "dist.device_mesh.DeviceMesh":
    """The one-dimensional mesh of an expert group.

    Args:
        group (ProcessGroup or DeviceMesh): holds this process; a mesh has one dimension.
        device (torch.device): of the weights; "meta" stands for the accelerator, if there is one. A mesh has its own.

    Returns:
        The mesh.

    Raises:
        ValueError: anything else.
    """
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return dist.DeviceMesh.from_group(group, (accelerator if device.type == "meta" else device).type)
    if not (dist.is_available() and isinstance(group, dist.DeviceMesh)):
        got = type(group).__name__
    elif group.ndim != 1:
        got = f"a mesh of {group.ndim} dimensions"
    elif group.get_coordinate() is None:
        got = "a mesh of other processes"
    else:
        return group
    raise ValueError(
        "edl::MoELayer: expert_group must be a process group or a one-dimensional DeviceMesh that holds this process "
        f"(got {got})"
    )


def empty_experts(
    num_experts: int,
    rows: int,
    columns: int,
    mesh: "dist.device_mesh.DeviceMesh",
    device: torch.types.Device = None,
    dtype: torch.dtype | None = None,
) -> "DTensor":
    """Uninitialised weights, sharded by expert over the R ranks of a mesh.

    Args:
        num_experts (int): E, a multiple of R.
        rows (int): of one expert's matrix.
        columns (int): of one expert's matrix.
        mesh (DeviceMesh): of one dimension.
        device (torch.device, str or int, optional): where they are created.
        dtype (torch.dtype, optional): their type.

    Returns:
        DTensor[E, rows, columns], of which each rank holds `Tensor[E/R, rows, columns]`.

    Raises:
        ValueError: R does not divide E.
    """
    from torch.distributed.tensor import DTensor, Shard

    if num_experts % mesh.size() != 0:
        raise ValueError(
            "edl::MoELayer: num_experts must be a multiple of the number of ranks in expert_group "
            f"(got {num_experts} for {mesh.size()})"
        )
    shard = torch.empty(num_experts // mesh.size(), rows, columns, device=device, dtype=dtype)
    return DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)


@torch.no_grad()
def uniform_experts_(weight: Tensor, bound: float) -> None:
    """Fills weights [E, ...] uniformly in ±bound, expert after expert.

    Where the weights are sharded, over experts or by FSDP2, every rank draws all of them and keeps what it holds: from
    one seed come the values, and the state of the generator, of a single process. transformers, while it initialises
    what a checkpoint lacks, leaves a weight alone that it has loaded and marked as such.

    Args:
        weight (Tensor or DTensor[E, rows, columns]): filled in place.
        bound (float): of the absolute value.
    """
    if weight.is_meta:
        return
    if not checks.is_dtensor(weight):
        for expert in weight:
            nn.init.uniform_(_with_marks_of(weight, expert), -bound, bound)
        return
    shard = weight.to_local()
    (chunk,) = weight.__create_chunk_list__()  # which block of the whole it is
    first, *inner = [slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes)]
    drawn = _with_marks_of(weight, torch.empty(weight.shape[1:], dtype=shard.dtype, device=shard.device))
    for expert in range(weight.shape[0]):
        own = shard[expert - first.start] if first.start <= expert < first.stop else None
        if own is not None:
            drawn[inner[0], inner[1]] = own  # comes back where nothing is drawn
        nn.init.uniform_(drawn, -bound, bound)
        if own is not None:
            own.copy_(drawn[inner[0], inner[1]])


def _with_marks_of(weight: Tensor, part: Tensor) -> Tensor:
    """A part of a weight with the attributes that a framework set on the whole, by which `nn.init` may skip it."""
    part.__dict__.update(weight.__dict__)
    return part


def _as_dtensor(tensor: Tensor) -> "DTensor":
    """A tensor that is known to be a DTensor, as one."""
    return tensor  # type: ignore[return-value]  # torch does not say that an nn.Parameter of a DTensor is one


class _AllToAll(torch.autograd.Function):
    """Rows in the order of the ranks that they go to → rows in the order of the ranks that they come from."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, to_ranks: list[int], from_ranks: list[int], group: "dist.ProcessGroup"
    ) -> Tensor:
        ctx.to_ranks, ctx.from_ranks, ctx.group = to_ranks, from_ranks, group
        received = rows.new_empty(sum(from_ranks), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), from_ranks, to_ranks, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.from_ranks, ctx.to_ranks, ctx.group), None, None, None


_all_to_all: Callable[[Tensor, list[int], list[int], "dist.ProcessGroup"], Tensor] = _AllToAll.apply  # untyped in torch


def _exchange_counts(
    sent: Tensor, mesh: "dist.device_mesh.DeviceMesh", problem: Exception | None = None
) -> tuple[Tensor, list[int], list[int]]:
    """What arrives here, by rank and expert [E], and the number of rows to and from each rank: the one host read.

    A rank with a problem sends counts below 0, so that all learn of it and none waits for its rows.
    """
    group = mesh.get_group()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    to_ranks, from_ranks = torch.stack([sent, received]).view(2, mesh.size(), -1).sum(dim=2).tolist()
    if not torch.compiler.is_compiling() and min(from_ranks) < 0:
        first = first_problem(group, problem, "edl::MoELayer")
        if problem is None:
            assert first is not None
            raise first
    return received, to_ranks, from_ranks


@contextlib.contextmanager
def reporting_failures(weight: Tensor, mesh: "dist.device_mesh.DeviceMesh") -> Iterator[None]:
    """Around what a rank does before its exchange: an error inside is raised on all ranks, which would wait for it
    otherwise.

    Args:
        weight (DTensor[E, ...]): of the experts.
        mesh (DeviceMesh): over which they are spread. (While compiling an error ends the compilation instead.)
    """
    try:
        yield
    except Exception as error:
        if not torch.compiler.is_compiling():
            failed = torch.full([weight.shape[0]], -1, dtype=torch.int32, device=weight.device)
            _exchange_counts(failed, mesh, error)
        raise


def _sort_received(received: Tensor, num_rows: int, num_local: int) -> tuple[Tensor, Tensor]:
    """`sort_by_expert` of rows that stand in the order of their ranks, and of the local experts within each."""
    experts = torch.arange(received.shape[0], device=received.device) % num_local
    return ops.sort_by_expert(experts.repeat_interleave(received, output_size=num_rows).unsqueeze(1), num_local)


def _as_experts_take(tokens: Tensor, weight: Tensor) -> Tensor:
    """Tokens in the type in which they travel: under autocast that in which the experts run."""
    device_type = tokens.device.type
    if torch.is_autocast_enabled(device_type):
        return tokens if tokens.dtype == torch.float64 else tokens.to(torch.get_autocast_dtype(device_type))
    if tokens.dtype != weight.dtype:
        raise ValueError(
            f"edl::MoELayer: hidden must have the type of the experts, {weight.dtype} (got {tokens.dtype})"
        )
    return tokens


def expert_mlp(
    tokens: Tensor,
    weights: Tensor,
    row_order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    down: Tensor,
    mesh: "dist.device_mesh.DeviceMesh",
    output_gram: bool = False,
    recompute_activations: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`edl.ops.expert_mlp` with the experts spread over the ranks of a mesh, each rank with tokens of its own.

    All ranks call it together, forward and backward; T may differ, and be 0. Routing weights stay at home and are
    applied to what comes back, in float32 for 16-bit rows as in one process. Sizes are exchanged first and read by the
    host once.

    Args:
        tokens (Tensor[T, H]): this rank's.
        weights (Tensor[T, K]): as for `edl.ops.expert_mlp`.
        row_order (Tensor[N]): from `edl.ops.sort_by_expert` over all E experts; without sentinels where it is compiled.
        offsets (Tensor[E + 1]): from the same.
        gate_up (DTensor[E, 2I, H]): sharded by expert over the mesh.
        down (DTensor[E, H, I]): sharded alike.
        mesh (DeviceMesh): of one dimension.
        output_gram (bool): whether the inner products of a token's outputs are asked for: of the rows that come back.
            Default: False.
        recompute_activations (bool): as for `edl.ops.expert_mlp`; the rows that travelled are kept. Default: False.

    Returns:
        output (Tensor[T, H]) in the type of tokens, under autocast in its type, and output_gram (Tensor[T, K, K]) or
        None. The gradients of gate_up and down are sums over the tokens of all ranks of the mesh.

    Raises:
        ValueError: another type of tokens than of experts, or of routing weights than of tokens, experts that are
            sharded further, a call under torch.export, or under torch.compile on torch 2.11.
        RuntimeError: another rank failed before the exchange.
    """
    num_local = gate_up.shape[0] // mesh.size()
    with reporting_failures(gate_up, mesh):
        # Also true while torch 2.11 compiles, which would lose what the exchange receives and give wrong numbers.
        if torch.compiler.is_exporting():
            raise ValueError(
                "edl::MoELayer: a layer with expert_group cannot be exported, nor compiled on torch 2.11 "
                "(got a call under torch.export or torch.compile)"
            )
        gate_up, down = _as_dtensor(gate_up).to_local(), _as_dtensor(down).to_local()
        if gate_up.shape[0] != num_local:
            raise ValueError(
                f"edl::MoELayer: this rank must hold {num_local} experts, FSDP2 gathers them where the module is "
                f"called and not its forward (got {gate_up.shape[0]})"
            )
        tokens = _as_experts_take(tokens, gate_up)
        if weights.dtype != tokens.dtype and (weights.dtype != torch.float32 or tokens.dtype == torch.float64):
            raise ValueError(
                "edl::MoELayer: weights must have the type of the tokens, or float32 beside 16-bit tokens (got "
                f"{weights.dtype} and {tokens.dtype})"
            )
    group = mesh.get_group()
    received, to_ranks, from_ranks = _exchange_counts(offsets[1:] - offsets[:-1], mesh)
    rows = ops.dispatch_tokens(tokens, row_order, weights.shape[1])
    num_none = 0 if torch.compiler.is_compiling() else rows.shape[0] - sum(to_ranks)
    if num_none > 0:  # sentinels, which stand last and stay here
        rows = rows[:-num_none]
    rows = _all_to_all(rows, to_ranks, from_ranks, group)
    local_order, local_offsets = _sort_received(received, rows.shape[0], num_local)
    ones = rows.new_ones(rows.shape[0], 1)
    rows = ops.expert_mlp(rows, ones, local_order, local_offsets, gate_up, down, recompute_activations)
    rows = _all_to_all(rows, from_ranks, to_ranks, group)
    if num_none > 0:
        rows = F.pad(rows, (0, 0, 0, num_none))
    gram = ops.token_gram(rows, weights, row_order, weights.shape[1]) if output_gram else None
    return ops.combine_tokens(rows, weights, row_order, weights.shape[1]), gram


def router_responses(weight: Tensor, gate_up: Tensor, mesh: "dist.device_mesh.DeviceMesh") -> tuple[Tensor, int]:
    """`edl.moe.router_weights.responses_of` for the experts of this rank.

    Args:
        weight (Tensor[E, H]): of the router.
        gate_up (DTensor[E, 2I, H]): sharded by expert over the mesh.
        mesh (DeviceMesh): of one dimension.

    Returns:
        Tensor[E, E/R], and the first of these experts.
    """
    own = _as_dtensor(gate_up).to_local()
    return router_weights.responses_of(weight, own), mesh.get_local_rank() * own.shape[0]


# ---- around the layer: data parallelism, clipping ----


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are spread over expert groups: `gate_up_proj` and `down_proj` of each layer with `expert_group`.

    Args:
        model (nn.Module): also wrapped by FSDP2 or DistributedDataParallel.

    Returns:
        The parameters, DTensors, by name in the model.

    Raises:
        ValueError: no module, as from every function here that takes a model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"edl::expert_parallel: model must be an nn.Module (got {type(model).__name__})")
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if getattr(module, "expert_mesh", None) is not None:
            found.update(module.named_parameters(prefix=name, recurse=False))
    return found


def fully_shard_layer(
    layer: nn.Module, mesh: "dist.device_mesh.DeviceMesh", replica_mesh: "dist.device_mesh.DeviceMesh", **options: Any
) -> None:
    """Shards a layer with `expert_group` by FSDP2: its experts over their replicas, all else over all data ranks.

    Call it before `fully_shard` of the modules around the layer. With fewer experts on a rank than replicas, their rows
    are sharded instead; 2I and H must then be multiples of the number of replicas.

    Args:
        layer (MoELayer): made with a DeviceMesh as `expert_group`.
        mesh (DeviceMesh): all data ranks; of one dimension, or of two for hybrid sharding.
        replica_mesh (DeviceMesh): the ranks that hold the same experts; of one dimension, beside `expert_group` in one
            DeviceMesh.
        **options: for `fully_shard`, such as `mp_policy` or `reshard_after_forward`.

    Raises:
        ValueError: a layer without `expert_group`, or data ranks that are not its ranks times the replicas.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    expert_mesh = getattr(layer, "expert_mesh", None)
    if expert_mesh is None:
        raise ValueError("edl::fully_shard_layer: layer must be made with expert_group (got one without)")
    for name, given in (("mesh", mesh), ("replica_mesh", replica_mesh)):
        if not isinstance(given, dist.DeviceMesh):
            raise ValueError(f"edl::fully_shard_layer: {name} must be a DeviceMesh (got {type(given).__name__})")
    expert_ranks, replicas = expert_mesh.size(), replica_mesh.size()
    if mesh.size() != expert_ranks * replicas:
        raise ValueError(
            "edl::fully_shard_layer: mesh must hold as many ranks as expert_group times replica_mesh "
            f"(got {mesh.size()} for {expert_ranks} times {replicas})"
        )

    def divide(gradients: Tensor) -> None:
        gradients.div_(expert_ranks)

    num_experts = layer.get_parameter("gate_up_proj").shape[0]
    dimension = 0 if num_experts // expert_ranks >= replicas else 1
    # The layer casts what comes in and goes out; in between, the expert bias that its router gets and the weights that
    # the router gives stay what they are.
    policy = options.get("mp_policy", MixedPrecisionPolicy())
    inside = {**options, "mp_policy": dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None)}
    if layer.router_gram or layer.router_responses:
        inside["reshard_after_forward"] = False  # the layer looks at the router's rows once more behind it
    fully_shard(list(layer.children()), mesh=mesh, **inside)
    sharded = fully_shard(layer, mesh=replica_mesh, shard_placement_fn=lambda parameter: Shard(dimension), **options)
    # FSDP2 divides by the replicas; with this, by all data ranks. `set_gradient_divide_factor(mesh.size())` means the
    # same, but needs NCCL's PreMulSum, and torch 2.13 divides twice by it with one replica in float16 or float64.
    sharded.set_all_reduce_hook(divide)


def exclude_from_ddp(model: nn.Module) -> None:
    """Keeps the experts of a model out of the DistributedDataParallel that will be put around it.

    DistributedDataParallel would average them over ranks that hold other experts. It then neither broadcasts nor
    reduces them: replicas must start equal, from one seed or one checkpoint, and `average_expert_gradients` does the
    rest.

    Args:
        model (nn.Module): changed in place.
    """
    names = list(expert_parameters(model))
    names += [f".{name}" for name in names if "." not in name]  # what the reducer calls those of the model itself
    names += getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@torch.no_grad()
def average_expert_gradients(model: nn.Module, replica_group: Optional["dist.ProcessGroup"] = None) -> None:
    """Makes the experts' gradients those of the mean over all data ranks, as DistributedDataParallel makes all others.

    They arrive summed over the expert group; they are summed over their replicas and divided by the number of ranks in
    both. Call it once per optimizer step, after the last backward.

    Args:
        model (nn.Module): the model, or the DistributedDataParallel around it, after `exclude_from_ddp`.
        replica_group (ProcessGroup, optional): the ranks that hold the same experts. Default: this rank alone.
    """
    if replica_group is not None and not isinstance(replica_group, dist.ProcessGroup):
        raise ValueError(
            "edl::average_expert_gradients: replica_group must be a process group that holds this process (got "
            f"{type(replica_group).__name__})"
        )
    replicas = 1 if replica_group is None else replica_group.size()
    for parameter in expert_parameters(model).values():
        if parameter.grad is None:
            continue
        gradient = _as_dtensor(parameter.grad).to_local()
        gradient.div_(_as_dtensor(parameter).device_mesh.size() * replicas)
        if replica_group is not None:
            dist.all_reduce(gradient, group=replica_group)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a model with experts spread over ranks, whose norm no rank has alone.

    Args:
        model (nn.Module): with gradients that are averaged already.
        max_norm (float): the largest Euclidean norm of all gradients together that is left as it is.

    Returns:
        The norm before clipping, a scalar, the same on every rank.

    Raises:
        ValueError: no module, or `max_norm` is no number.
    """
    checks.check_numbers("clip_grad_norm_", max_norm=max_norm)
    experts = list(expert_parameters(model).values())
    own = {id(parameter) for parameter in experts}
    others = [parameter for parameter in model.parameters() if id(parameter) not in own]
    norms = []
    for parameters in (experts, others):  # torch takes no plain tensors beside DTensors
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            norms.append(norm.full_tensor() if checks.is_dtensor(norm) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for parameters in (experts, others):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total
