"""Expert Divergence in torchtitan: each router gets a loss of its own, whose gradient enters through the top-k scores.

torchtitan has two interfaces, told apart by what is there. Its development version has `AuxLoss`, a module that the
configuration of a router names: `ExpertDivergenceAuxLoss` is one. Up to 0.3.0 there is none, and
`ExpertDivergenceRouter` takes the router's place. Either way `add_expert_divergence(model_config, ...)` sets it up, and
labels come from `edl.domain_scope`. The router is tested on torchtitan 0.3.0 itself, the auxiliary loss on a stand-in
for its interface.

Which factor makes the gradient right. torchtitan adds gradients up, over data and context ranks and over micro-batches,
and averages nothing; its losses are sums over tokens, divided by N, the tokens of the step. A micro-batch m, of T_m
tokens over all ranks, therefore counts T_m / N, and a step has the gradient coeff · Σ_m (T_m / N) ∇L_m: that of the
mean loss of its micro-batches, where L_m is the loss of all ranks' tokens. Rank r contributes ∇_r L_m, its own part of
it (`edl.ExpertDivergenceLoss`), and these add up to ∇L_m.
"""

import dataclasses
import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from spmd_types import no_typecheck
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torchtitan.distributed.spmd_types import current_spmd_mesh
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from edl.divergence import ExpertDivergenceLoss
from edl.divergence_log import DivergenceLog, PairWatch, has_pair, warn_of_no_pair
from edl.ops import inject
from edl.reduction.micro_batches import DomainMemory
from edl.scope import current_labels

try:
    from torchtitan.models.common.aux_loss import AuxLoss
except ModuleNotFoundError:  # up to 0.3.0
    AuxLoss = None


@dataclasses.dataclass(kw_only=True, frozen=True)
class DivergenceOptions:
    """Options of the loss of a router; see `edl.ExpertDivergenceLoss`.

    Attributes:
        num_domains (int): D.
        eps (float): default 1e-6.
        sequence_reduction (str): "sequence" (default) or "token".
        pair_reduction (str): "mean_of_logs" (default) or "log_of_mean".
        bias_correction (bool): default False.
        memory (bool): carry the domain moments over the micro-batches of a step (`edl.DomainMemory`). Default: False.
    """

    num_domains: int
    eps: float = 1e-6
    sequence_reduction: str = "sequence"
    pair_reduction: str = "mean_of_logs"
    bias_correction: bool = False
    memory: bool = False


class _Ranks:
    """Groups of torchtitan's mesh: ranks that share a batch (`data`), ranks with slices of it (`context`), or None."""

    def __init__(self) -> None:
        mesh = current_spmd_mesh()
        if mesh is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "edl::torchtitan: with several ranks the model must run in torchtitan's training context, with "
                "parallelism.spmd_backend='spmd_types' (got no mesh)"
            )
        sizes = {} if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape))
        if sizes.get("tp", 1) > 1:
            raise ValueError(f"edl::torchtitan: tensor parallelism is not supported (got a degree of {sizes['tp']})")
        self.data = mesh.get_group("dp") if sizes.get("dp", 1) > 1 else None
        self.context = mesh.get_group("cp") if sizes.get("cp", 1) > 1 else None
        self.data_size, self.context_size = sizes.get("dp", 1), sizes.get("cp", 1)


class _RouterDivergence:
    """The loss of one router. No module, so that checkpoints and parallelisation do not see it.

    Args:
        options (DivergenceOptions): of the loss.
        shares_tokens (bool): whether the caller multiplies the loss by T_m / R, the share of one of R data ranks, which
            the gradient then makes up for.
    """

    def __init__(self, options: DivergenceOptions, shares_tokens: bool) -> None:
        arguments = dataclasses.asdict(options)
        self.memory = DomainMemory() if arguments.pop("memory") else None
        self._arguments = arguments
        self._shares_tokens = shares_tokens
        self._module: ExpertDivergenceLoss | None = None
        self.ranks: _Ranks  # from the first pass on
        self.has_pair: Tensor  # in the latest pass
        self.value: Tensor | None = None  # of the latest pass with a pair of domains, NaN before
        self.log = DivergenceLog()
        self.watch = PairWatch()
        self.passes = 0

    def _prepare(self) -> ExpertDivergenceLoss:
        """Makes the loss at the first pass: the mesh is known in training only; models are copied and split before."""
        self.ranks = _Ranks()
        self._module = ExpertDivergenceLoss(
            **self._arguments,
            input="probs",
            group=self.ranks.data,
            sequence_group=self.ranks.context,
            averaging_ranks=self.ranks.data_size if self._shares_tokens else 1,
            memory=self.memory,
        )
        self._module.keep_moments()
        return self._module

    def __call__(self, scores: Tensor, padding_mask: Tensor | None = None) -> Tensor | None:
        """The loss of the forward pass in which it is called; None where it has no labels or keeps no gradient.

        Args:
            scores (Tensor[T, E] or Tensor[B, S_len, E]): of all experts, not negative: softmax, sigmoid or else.
            padding_mask (Tensor[T], optional): True = padding; a mask of the scope comes first.
        """
        labels = current_labels()
        if labels is None or not torch.is_grad_enabled():
            return None
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "edl::torchtitan: a CUDA graph would replay the labels of its capture, training.disable_cuda_graphs "
                "must be set (got a capture)"
            )
        module = self._prepare() if self._module is None else self._module
        if scores.dim() == 2 and self.ranks.context is not None and module.sequence_reduction == "sequence":
            raise ValueError(
                "edl::torchtitan: context parallelism cuts the token stream anywhere and needs "
                "sequence_reduction='token' with the labels of the slice (got sequence_reduction='sequence')"
            )
        if labels.attention_mask is None and labels.padding_mask is None:
            labels = labels._replace(padding_mask=padding_mask)
        # Every score function becomes a distribution over experts, as in torchtitan's own balancing losses.
        loss = module(F.normalize(scores, p=1, dim=-1), **labels._asdict())
        if not _is_replay():
            self.passes += 1
            moments = module.last_moments()
            self.has_pair = has_pair(moments)
            self.value = loss.detach().where(self.has_pair, torch.nan if self.value is None else self.value)
            self.log.add(loss, moments)
            self.watch.see(self.has_pair)
        return loss

    def watch_for_pairs(self) -> None:
        """Once for each step of the optimizer; more often changes nothing."""
        if self.watch.end_step():
            _warn_of_no_pair()

    def end_step(self) -> None:
        self.watch_for_pairs()
        self.passes = 0
        if self.memory is not None:
            self.memory.step()


def _is_replay() -> bool:
    """Whether a forward pass runs within a backward pass, as checkpointing has it."""
    return torch._C._current_autograd_node() is not None


class _LoggedMean:
    """Makes torchtitan, which adds up the losses of a step's passes, log the mean of those with a pair of domains.

    A pass without a pair has the loss 0, which would look perfect: it counts as the mean of the others of the step, or
    of the latest step that had one; 0 before there was any.
    """

    _loss: Tensor | float
    _logged: Tensor | float
    _share: Tensor | float
    _share_with_pair: Tensor | float

    def __init__(self) -> None:
        self._mean: Tensor | float = 0.0
        self.end_step()

    def add(self, loss: Tensor, share: Tensor | int, has_pair: Tensor) -> Tensor:
        """What is to be added for a pass, whose loss is multiplied by its share already."""
        self._loss, self._share = self._loss + loss, self._share + share
        self._share_with_pair = self._share_with_pair + has_pair.to(loss.dtype) * share
        self._mean = torch.where(self._share_with_pair > 0, self._loss / self._share_with_pair, self._mean)
        before, self._logged = self._logged, self._mean * self._share
        return self._logged - before

    def end_step(self) -> None:
        self._loss = self._logged = self._share = self._share_with_pair = 0.0


if AuxLoss is not None:

    class ExpertDivergenceAuxLoss(AuxLoss):
        """Expert Divergence (arXiv 2603.00054) as an auxiliary loss of torchtitan's routers.

        On each of R data ranks the value is L_m · T_m / R. Divided by the tokens of the step and added over ranks and
        micro-batches, as torchtitan does, it is logged as `expert_divergence_loss/mean`: the mean of the L_m, over
        layers too, of the passes with a pair of domains. The gradient is multiplied by R, once. Tokens are those that
        `padding_mask_T` leaves. A forward pass outside any `edl.domain_scope` has no loss.

        Args:
            config (Config): coeff, the factor of this router's loss; divergence, its `DivergenceOptions`; also, the
                configuration of another auxiliary loss of the router, or None; the rest as `AuxLoss.Config`.
        """

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(AuxLoss.Config):
            divergence: DivergenceOptions
            also: AuxLoss.Config | None = None

        metric_name = "expert_divergence_loss"

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.divergence = _RouterDivergence(config.divergence, shares_tokens=True)
            self._logged_mean = _LoggedMean()
            self.also = None if config.also is None else config.also.build()

        def _share_of_tokens(self, scores: Tensor, padding_mask: Tensor | None) -> Tensor | int:
            """T_m / R: the tokens of this pass over all ranks, per data rank."""
            ranks = self.divergence.ranks
            if padding_mask is None:
                return scores.shape[0] * ranks.context_size  # the same on all ranks
            tokens = (~padding_mask).sum().to(scores.dtype)
            for group in (ranks.context, ranks.data):
                if group is not None:
                    tokens = all_reduce(tokens, "sum", group)
            return tokens / ranks.data_size

        def forward(
            self,
            scores_TE: Tensor,
            routing_map_TE: Tensor,
            *,
            carrier: Tensor,
            padding_mask_T: Tensor | None = None,
            denominator: Tensor,
        ) -> Tensor:
            """Injects the gradient.

            Args:
                scores_TE (Tensor[T, E]): scores of all experts.
                routing_map_TE (Tensor[T, E]): for `also` only.
                carrier (Tensor[T, K]): top-k scores.
                padding_mask_T (Tensor[T], optional): True = padding.
                denominator (Tensor): a scalar, the tokens of the step over all ranks.

            Returns:
                The carrier.
            """
            if self.also is not None:
                carrier = self.also(
                    scores_TE, routing_map_TE, carrier=carrier, padding_mask_T=padding_mask_T, denominator=denominator
                )
            with no_typecheck():
                loss = self.divergence(scores_TE, padding_mask_T)
                if loss is None:
                    return carrier
                share = self._share_of_tokens(scores_TE, padding_mask_T)
                loss = loss * share
                if not _is_replay():
                    logged = self._logged_mean.add(loss.detach(), share, self.divergence.has_pair)
                    loss = loss + (logged - loss.detach())  # the gradient stays
            return self.inject(loss, carrier=carrier, denominator=denominator)

        def _reset_accumulators(self) -> None:
            super()._reset_accumulators()
            self.divergence.end_step()
            self._logged_mean.end_step()

else:

    class ExpertDivergenceRouter(TokenChoiceTopKRouter):
        """torchtitan's router up to 0.3.0, with Expert Divergence (arXiv 2603.00054) inside a `domain_scope`.

        Args:
            config (Config): coeff, the factor of this router's loss; divergence, its `DivergenceOptions`;
                micro_batches, the forward passes of a step on one rank, over which the loss is averaged; the rest as
                `TokenChoiceTopKRouter.Config`.
        """

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(TokenChoiceTopKRouter.Config):
            coeff: float
            divergence: DivergenceOptions
            micro_batches: int = 1

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            if config.micro_batches < 1:
                raise ValueError(f"edl::torchtitan: micro_batches must be at least 1 (got {config.micro_batches})")
            self.coeff = config.coeff
            self.micro_batches = config.micro_batches
            self.divergence = _RouterDivergence(config.divergence, shares_tokens=False)

        def forward(
            self,
            x_BLD: Tensor,
            expert_bias_E: Tensor | None = None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            """As `TokenChoiceTopKRouter.forward`; the top-k scores carry the gradient of the loss."""
            topk_scores, topk_expert_ids, scores = super().forward(x_BLD, expert_bias_E)
            if self.training:
                with no_typecheck():
                    loss = self.divergence(scores)
                    if self.divergence.passes % self.micro_batches == 0:
                        self.divergence.watch_for_pairs()
                    if loss is not None:
                        topk_scores = inject(topk_scores, loss * (self.coeff / self.micro_batches))
            return topk_scores, topk_expert_ids, scores

    def register_step_hook(
        optimizers: torch.optim.Optimizer, model_parts: list[nn.Module], parallel_dims: Any = None
    ) -> None:
        """Ends the step of all routers after each optimizer step: a `post_optimizer_build_fn` of `ModelSpec`.

        Needed with `memory=True`. It also makes every step check that it had `micro_batches` forward passes.

        Args:
            optimizers (Optimizer): torchtitan's container, or any optimizer.
            model_parts (list[Module]): the parts of the model on this rank.
            parallel_dims: not used.
        """
        optimizers.register_step_post_hook(lambda *arguments: _end_step(model_parts))

    def _end_step(model_parts: list[nn.Module]) -> None:
        modules = [module for part in model_parts for module in part.modules()]
        routers = [module for module in modules if isinstance(module, ExpertDivergenceRouter)]
        passes = [(router.divergence.passes, router.micro_batches) for router in routers]
        for router in routers:
            router.divergence.end_step()
        for counted, micro_batches in passes:
            if counted not in (0, micro_batches):
                raise ValueError(
                    "edl::torchtitan: micro_batches must be the number of labelled forward passes of a step, "
                    f"{counted} (got {micro_batches})"
                )


def add_expert_divergence(
    model_config: Any, *, num_domains: int, coeff: float, micro_batches: int = 1, memory: bool = False, **options: Any
) -> None:
    """Gives every router of a model the Expert Divergence loss; what else its configuration says stays.

    Call it before the model is built. A step then has `coeff` times the mean over layers of `edl.ExpertDivergenceLoss`,
    of the tokens of all data and context ranks, averaged over micro-batches. Open an `edl.domain_scope` around each
    forward pass. Under context parallelism labels per token are those of the rank's slice. Not for tensor parallelism,
    torch.compile or CUDA graphs.

    Args:
        model_config (Configurable.Config): of a torchtitan model; changed in place.
        num_domains (int): D, at least 2.
        coeff (float): factor of the loss (beta of the paper).
        micro_batches (int): forward passes of a step on one rank: gradient accumulation steps times micro-batches of
            the pipeline. Up to torchtitan 0.3.0; later versions count tokens and it is not looked at. Default: 1.
        memory (bool): carry the domain moments over the micro-batches of a step (`edl.DomainMemory`); up to 0.3.0 it
            needs `register_step_hook`. Default: False.
        **options: eps, sequence_reduction, pair_reduction, bias_correction of `edl.ExpertDivergenceLoss`.

    Raises:
        ValueError: options outside their range; no router, a router of another class (up to 0.3.0), or one that has
            the loss already.
    """
    divergence = DivergenceOptions(num_domains=num_domains, memory=memory, **options)
    ExpertDivergenceLoss(num_domains, **options)  # refuses them here already
    found = list(model_config.traverse(TokenChoiceTopKRouter.Config))
    if not found:
        raise ValueError(f"edl::torchtitan: a model must have routers (got {type(model_config).__qualname__})")
    if any(_has_divergence(router) for _, router, _, _ in found):
        raise ValueError(
            "edl::torchtitan: add_expert_divergence must be called once for a model (got a router that has the loss)"
        )
    if AuxLoss is None:
        for name, router, _, _ in found:
            if type(router) is not TokenChoiceTopKRouter.Config:
                raise ValueError(
                    f"edl::torchtitan: {name} must be a TokenChoiceTopKRouter, derive from ExpertDivergenceRouter for "
                    f"others (got {type(router).__qualname__})"
                )
    coeff = coeff / len(found)
    for _, router, parent, field in found:
        if AuxLoss is None:
            same = {entry.name: getattr(router, entry.name) for entry in dataclasses.fields(router)}
            added: dict[str, Any] = {"coeff": coeff, "divergence": divergence, "micro_batches": micro_batches}
            setattr(parent, field, ExpertDivergenceRouter.Config(**same, **added))
        elif not _has_divergence(router):  # layers may share one configuration
            also = router.aux_loss
            router.aux_loss = ExpertDivergenceAuxLoss.Config(coeff=coeff, divergence=divergence, also=also)


def _has_divergence(router: Any) -> bool:
    if AuxLoss is None:
        return isinstance(router, ExpertDivergenceRouter.Config)
    return isinstance(router.aux_loss, ExpertDivergenceAuxLoss.Config)


def layer_losses(model: nn.Module) -> dict[str, Tensor]:
    """The latest value of the loss of each layer, for logging.

    Args:
        model (Module): a model, or a part of one.

    Returns:
        Name of the router or auxiliary loss → a scalar, the loss of all ranks' tokens in its latest labelled pass that
        held a pair of domains; NaN where none did.
    """
    return {name: each.value for name, each in _divergences(model).items() if each.value is not None}


def divergence_metrics(model: nn.Module) -> dict[str, Tensor]:
    """What to log of the losses of all layers since the last call; nothing waits for the device.

    Args:
        model (Module): a model, or a part of one.

    Returns:
        Three float64 scalars, means over layers and labelled passes, or nothing where there were none.
        `expert_divergence_loss` without `coeff` (lower is better) and `expert_divergence/nats`, the Jensen-Shannon
        divergence itself (higher is better): of passes with a pair of domains, NaN where none had one; without a pair
        the loss is 0, which is not counted. `expert_divergence/pairs`: the number of pairs of domains.
    """
    logs = [each.log for each in _divergences(model).values()]
    sums = [each for each in (log.sums() for log in logs) if each is not None]
    for log in logs:
        log.clear()
    if not sums:
        return {}
    losses, nats, pairs, with_pair, count = torch.stack(sums).sum(0).unbind()
    means = (losses / with_pair, nats / with_pair, pairs / count)
    return dict(zip(("expert_divergence_loss", "expert_divergence/nats", "expert_divergence/pairs"), means))


def _divergences(model: nn.Module) -> dict[str, _RouterDivergence]:
    found = {name: getattr(module, "divergence", None) for name, module in model.named_modules()}
    return {name: each for name, each in found.items() if isinstance(each, _RouterDivergence)}


@functools.cache
def _warn_of_no_pair() -> None:
    warn_of_no_pair("torchtitan")
