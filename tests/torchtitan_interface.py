"""A stand-in for torchtitan's auxiliary losses: the interface of its development version of September 2026.

No release has it yet. Here is what a loss sees, no more: `AuxLoss` (division by the tokens of the step, injection and
accumulation of the metric in a region that replays leave out), the collection of the metric, a router that hands over
scores, and the mesh of the training context. Tokens are folded to [T, D_model].
"""

import contextlib
import dataclasses
import functools
import importlib
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
import torchtitan_objectives as samples
from torch import nn

import edl

try:
    import torch_remat as remat
except ModuleNotFoundError:  # torchtitan's own checkpointing is then not tested
    remat = None

NUM_DOMAINS, NUM_EXPERTS, SIZE, COEFF, TOP_K = 3, 8, 16, 0.7, 2
BATCH, LENGTH = 4, 6
DOMAINS = torch.tensor([0, 1, 2, 0])

OWN = "edl.integrations.torchtitan"

_meshes: list[Any] = []  # of the training contexts that are open


@contextlib.contextmanager
def training_context(mesh):
    _meshes.append(mesh)
    try:
        yield
    finally:
        _meshes.pop()


class Config:
    """Builds the class it is nested in; finds configurations in itself and in lists."""

    def build(self):
        return self.owner(self)

    def traverse(self, kind):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, kind):
                    yield field.name, entry, self, field.name
                elif isinstance(entry, Config):
                    yield from entry.traverse(kind)


class _Injection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, loss):
        ctx.save_for_backward(loss)
        return carrier

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.saved_tensors[0])


class Configurable(nn.Module):
    """A module with a configuration, a class nested in it, which it tells whom to build."""

    def __init_subclass__(cls):
        if "Config" in vars(cls):
            cls.Config.owner = cls


class AuxLoss(Configurable):
    """Divides by the tokens of the step, injects the gradient, adds up the metric."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Config):
        coeff: float
        reduce_mesh: str = "dp"

    def __init__(self, config):
        super().__init__()
        self.coeff, self.reduce_mesh = config.coeff, config.reduce_mesh
        self.register_buffer("instance_acc", torch.zeros((), dtype=torch.float64), persistent=False)

    @property
    def metric_name(self):
        return type(self).__name__

    def _reset_accumulators(self):
        self.instance_acc.zero_()

    def inject(self, raw_sum, *, carrier, denominator):
        if remat is None:
            return self._accumulate_and_inject(raw_sum, carrier=carrier, denominator=denominator)
        region = remat.region(self._accumulate_and_inject, f"aux_loss_{id(self)}", recompute=False)
        injected = region(raw_sum, carrier=carrier, denominator=denominator)
        remat.recompute_needs_tensor(injected)
        return injected

    def _accumulate_and_inject(self, raw_sum, *, carrier, denominator):
        share = raw_sum / denominator.clamp_min(1)
        self.instance_acc += share.detach()
        return _Injection.apply(carrier, share * self.coeff)


def collect_aux_loss_metrics(model, mesh=None):
    """Metric → its mean over layers, added over the ranks of `reduce_mesh`; ends the step."""
    losses = [module for module in model.modules() if isinstance(module, AuxLoss)]
    metrics = {}
    for name in {loss.metric_name for loss in losses}:
        same = [loss for loss in losses if loss.metric_name == name]
        total = torch.stack([loss.instance_acc for loss in same]).mean()
        if mesh is not None:
            dist.all_reduce(total, group=mesh.get_group(same[0].reduce_mesh))
        metrics[f"{name}/mean"] = total
    for loss in losses:
        loss._reset_accumulators()
    return metrics


class MeanScore(AuxLoss):
    """Another loss: the sum over tokens of the first expert's score."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        pass

    def forward(self, scores_TE, routing_map_TE, *, carrier, padding_mask_T=None, denominator):
        return self.inject(scores_TE[:, 0].sum(), carrier=carrier, denominator=denominator)


class TokenChoiceTopKRouter(Configurable):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Config):
        num_experts: int
        aux_loss: AuxLoss.Config | None = None

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(SIZE, config.num_experts, bias=False, dtype=torch.float64)
        self.aux_loss = None if config.aux_loss is None else config.aux_loss.build()

    def forward(self, x_TD, expert_bias_E=None, *, padding_mask_T=None, aux_loss_denominator=None):
        scores = self.gate(x_TD).sigmoid()
        topk_scores, topk_expert_ids = (found.flip(-1) for found in scores.topk(TOP_K, dim=-1))  # in no order
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, topk_expert_ids, True)
        if self.training and self.aux_loss is not None:
            topk_scores = self.aux_loss(
                scores,
                routing_map,
                carrier=topk_scores,
                padding_mask_T=padding_mask_T,
                denominator=aux_loss_denominator,
            )
        return topk_scores, topk_expert_ids, routing_map


class Model(Configurable):
    """Two layers that weigh tokens by their top-k scores."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Config):
        layers: list

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(layer.build() for layer in config.layers)

    def forward(self, hidden, denominator, padding_mask=None):
        for layer in self.layers:
            scores, _, _ = layer(hidden.detach(), padding_mask_T=padding_mask, aux_loss_denominator=denominator)
            hidden = hidden + scores.sum(-1, keepdim=True) * hidden.detach().tanh()
        return hidden


@functools.cache
def integration():
    """`edl.integrations.torchtitan` with the stand-in for torchtitan, beside the one of what is installed."""
    names = ("torchtitan", "distributed", "distributed.spmd_types", "models", "models.common")
    modules = {name if name == "torchtitan" else f"torchtitan.{name}": types.ModuleType(name) for name in names}
    modules["torchtitan.distributed.spmd_types"].current_spmd_mesh = lambda: _meshes[-1] if _meshes else None
    modules["torchtitan.models.common.aux_loss"] = modules["torchtitan.models.common.moe"] = sys.modules[__name__]
    modules["spmd_types"] = types.SimpleNamespace(no_typecheck=contextlib.nullcontext)
    is_replaced = lambda name: name in modules or name.startswith(("torchtitan.", OWN))
    others = {name: module for name, module in sys.modules.items() if is_replaced(name)}
    for name in others:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        return importlib.import_module(OWN)
    finally:
        for name in list(filter(is_replaced, sys.modules)):
            del sys.modules[name]
        sys.modules.update(others)
        vars(edl.integrations).pop("torchtitan", None)  # which is that of the stand-in
        if OWN in others:
            edl.integrations.torchtitan = others[OWN]


def model_with_divergence(also=None, **options):
    routers = [TokenChoiceTopKRouter.Config(num_experts=NUM_EXPERTS, aux_loss=also) for _ in range(2)]
    config = Model.Config(layers=routers)
    integration().add_expert_divergence(config, num_domains=NUM_DOMAINS, coeff=COEFF, **options)
    torch.manual_seed(1)
    return config.build()


def model_with_objectives(objectives, **options):
    config = Model.Config(layers=[TokenChoiceTopKRouter.Config(num_experts=NUM_EXPERTS) for _ in range(2)])
    integration().add_objectives(config, objectives, **options)
    torch.manual_seed(1)
    return config.build()


def inputs():
    """[T, D_model], T = BATCH · LENGTH."""
    return torch.randn(BATCH * LENGTH, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def train(model, domain_ids, hidden, tokens_of_step, padding_mask=None, **masks):
    """A forward and a backward pass with no gradient but that of the auxiliary losses."""
    with edl.domain_scope(domain_ids, **masks):
        output = model(hidden, torch.tensor(float(tokens_of_step)), padding_mask)
    (output * 0.0).sum().backward()


def gate_gradients(model):
    return [layer.gate.weight.grad.clone() for layer in model.layers]


def expected(batches, weights, **options):
    """(gradients of the gates, mean of the layers' losses) of one process; a batch is (hidden, ids, masks)."""
    model = model_with_divergence().eval()
    gradients, values = [], []
    for layer in model.layers:
        weight = layer.gate.weight.detach().requires_grad_()
        total = sum(
            share
            * edl.expert_divergence_loss(hidden @ weight.T, ids, NUM_DOMAINS, scores="sigmoid", **options, **masks)
            for share, (hidden, ids, masks) in zip(weights, batches, strict=True)
        )
        gradients.append(torch.autograd.grad(total * COEFF / len(model.layers), weight)[0])
        values.append(total.detach())
        with torch.no_grad():
            batches = [
                (hidden + layer(hidden)[0].sum(-1, keepdim=True) * hidden.tanh(), ids, masks)
                for hidden, ids, masks in batches
            ]
    return gradients, torch.stack(values).mean()


def of_plain_loop(batches, shares, objectives=samples.objectives):
    """(gradients of the gates, metric of each objective) of one process; a batch is (hidden, arguments)."""
    model, gradients, metrics = model_with_objectives(objectives()).eval(), [], []
    bound = objectives("sigmoid")
    for layer in model.layers:
        gradient, values = samples.plain_loop(bound, layer.gate.weight, batches, shares)
        gradients.append(gradient / len(model.layers))
        metrics.append({name: sum(share * of[name] for share, of in zip(shares, values)) for name in values[0]})
        with torch.no_grad():
            batches = [
                (hidden + layer(hidden)[0].sum(-1, keepdim=True) * hidden.tanh(), arguments)
                for hidden, arguments in batches
            ]
    return gradients, {f"{name}_loss/mean": torch.stack([of[name] for of in metrics]).mean() for name in metrics[0]}


def _mesh(data_size, context_size):
    return dist.init_device_mesh("cpu", (data_size, context_size, 1), mesh_dim_names=("dp", "cp", "tp"))


def _added_up(model, mesh):
    """Gradients added over all ranks, as torchtitan's FSDP does, and the metric."""
    gradients = gate_gradients(model)
    for gradient in gradients:
        dist.all_reduce(gradient)
    return gradients, collect_aux_loss_metrics(model, mesh)["expert_divergence_loss/mean"]


def data_parallel(padding):
    """Two micro-batches of two sequences, one of each on each rank."""
    rank, mesh = dist.get_rank(), _mesh(dist.get_world_size(), 1)
    model, hidden = model_with_divergence(), inputs().unflatten(0, (BATCH, LENGTH))
    tokens_of_step = padding.numel() - padding.sum().item()
    batches, shares = [], []
    for sequences in ([0, 1], [2, 3]):
        mine = sequences[rank]
        with training_context(mesh):
            train(model, DOMAINS[[mine]], hidden[mine], tokens_of_step, padding[mine])
        mask = padding[sequences].flatten()
        batches.append((hidden[sequences].flatten(0, 1), DOMAINS[sequences], {"padding_mask": mask}))
        shares.append((~mask).sum() / tokens_of_step)
    return _added_up(model, mesh), expected(batches, shares)


def context_parallel(border, has_mask):
    """The token stream cut between two ranks, before token `border`."""
    mesh, labels = _mesh(1, dist.get_world_size()), DOMAINS.repeat_interleave(LENGTH)
    model = model_with_divergence(sequence_reduction="token")
    mine = slice(border, None) if dist.get_rank() else slice(border)
    padding = torch.zeros(BATCH * LENGTH, dtype=torch.bool)[mine] if has_mask else None
    with training_context(mesh):
        train(model, labels[mine], inputs()[mine], BATCH * LENGTH, padding)
    return _added_up(model, mesh), expected([(inputs(), labels, {})], [1.0], sequence_reduction="token")


def several_objectives_of_data_parallel(padding):
    """As `data_parallel`, in one micro-batch of two sequences on each rank."""
    mesh, model, mine = _mesh(dist.get_world_size(), 1), model_with_objectives(samples.objectives()), dist.get_rank()
    hidden = inputs().chunk(2)[mine]
    tokens_of_step = padding.numel() - padding.sum().item()
    with training_context(mesh):
        train(model, DOMAINS.chunk(2)[mine], hidden, tokens_of_step, padding.flatten().chunk(2)[mine])
    gradients, metrics = gate_gradients(model), collect_aux_loss_metrics(model, mesh)
    for gradient in gradients:
        dist.all_reduce(gradient)
    arguments = {"domain_ids": DOMAINS, "padding_mask": padding.flatten()}
    return (gradients, metrics), of_plain_loop([(inputs(), arguments)], [1.0])


def context_parallel_of_sequences():
    model, mesh = model_with_divergence(), _mesh(1, dist.get_world_size())
    try:
        with training_context(mesh):
            train(model, DOMAINS[:2], inputs()[: 2 * LENGTH], BATCH * LENGTH)
    except ValueError as error:
        return str(error)
    return None


def on_ranks_of_interface():
    """What the functions on ranks return, by a name."""
    nothing = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    some = torch.arange(LENGTH) >= torch.tensor([[6], [2], [3], [5]])
    return {
        "data": data_parallel(nothing),
        "data, unequal padding": data_parallel(some),
        "context": context_parallel(12, has_mask=False),
        "context, inside a sequence": context_parallel(15, has_mask=True),
        "sequences": context_parallel_of_sequences(),
        "several objectives": several_objectives_of_data_parallel(some),
    }
