"""The Expert Divergence loss in transformers' `Trainer`."""

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edl.integrations.transformers.capture import attach
from edl.memory import DomainMemory

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what the mixin is mixed into
else:
    _Trainer = object

_MEMORY_NAME = "domain_memory.pt"  # beside optimizer.pt
_STEPS_WITHOUT_PAIR = 100  # before a warning


def _document_boundaries(position_ids: Tensor) -> Tensor:
    """Boundaries [N + 1] in the flattened batch of the documents in `position_ids [B, S_len]`: at each row, and
    wherever a position does not follow the one before it (transformers' own rule)."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    num_tokens = torch.tensor([starts.numel()], device=starts.device)
    return torch.cat([starts.flatten().nonzero().flatten(), num_tokens])


class EDTrainerMixin(_Trainer):
    """Adds the Expert Divergence loss to the training loss of a Trainer: `class EDTrainer(EDTrainerMixin, Trainer)`.

    The dataset needs a column `domain_ids`: a label per example in [-1, D), -1 = not counted, or a list with one per
    token. The column is kept, collated (any collator that keeps it; else `DomainCollator`), and taken out before the
    batch reaches the model. Padding follows `attention_mask`. With labels per token, documents packed into a row are
    told apart by their `position_ids`. Evaluation is left as it is.

    beta times the loss counts once per optimizer step, as the mean over its micro-batches, whatever
    `num_items_in_batch` or `average_tokens_across_devices` do to the language-model loss. Over several processes the
    loss is that of their union (`group`). Under gradient accumulation each micro-batch is compared with those before it
    (`edl.DomainMemory`, which also carries moments over steps), an approximation to the gradient of the whole batch;
    `two_passes` gives that gradient exactly. Every training begins with an empty memory, or with that of the checkpoint
    it resumes from (saved where all processes share one).

    What is logged as `loss` includes it. Beside it stand, as means over the micro-batches since the last log,
    `expert_divergence_loss`, without beta (lower is better), and `expert_divergence/nats`, the Jensen-Shannon
    divergence of the domains (higher is better, at most log 2), both of micro-batches that had two domains to compare;
    and `expert_divergence/pairs`, the number of pairs of domains. 100 steps without a pair are a warning.

    Args:
        args: of the Trainer.
        num_domains (int): D, at least 2.
        beta (float): weight of the loss; `trainer.expert_divergence.beta` changes it, from a callback for instance.
        divergence_options (dict, optional): further options of `edl.ExpertDivergenceLoss`. Default of `memory` under
            gradient accumulation: `edl.DomainMemory(decay=0.9)`; None: each micro-batch on its own.
        two_passes (bool): under gradient accumulation run the micro-batches of a step once more, first, without
            gradients. Exact but for dropout, which differs between the passes. Default: False.
        kwargs: of the Trainer.

    Raises:
        ValueError: what `attach` raises; several devices in one process (DataParallel); tensor, context or sequence
            parallelism; two passes with a `memory` of one's own; while training, a batch without `domain_ids`.
    """

    def __init__(
        self,
        *args: Any,
        num_domains: int,
        beta: float,
        divergence_options: dict[str, Any] | None = None,
        two_passes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check_parallelism()
        if two_passes and "memory" in (divergence_options or {}):
            raise ValueError(
                "edl::EDTrainerMixin: two_passes has a memory of its own (got memory in divergence_options)"
            )
        self._divergence_options = {"num_domains": num_domains, "beta": beta, **(divergence_options or {})}
        if self.args.world_size > 1:
            self._divergence_options.setdefault("group", torch.distributed.group.WORLD)
        accumulates = self.args.gradient_accumulation_steps > 1
        self._two_passes = two_passes and accumulates
        if accumulates:
            self._divergence_options.setdefault("memory", DomainMemory(decay=0.0 if two_passes else 0.9))
        self._attach(beta)
        self._log_sums: Tensor | None = None  # since the last log: losses, nats, pairs, how many had one, how many
        self._step_with_pair: int | None = None  # the last known
        self._warned_of_no_pair = False

    def _attach(self, beta: float) -> None:
        self.expert_divergence = attach(self.model, **{**self._divergence_options, "beta": beta})
        self.expert_divergence.divergence.keep_moments()

    def _check_parallelism(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                "edl::EDTrainerMixin: each process must have one device, start with torchrun or accelerate launch "
                f"(got DataParallel over {self.args.n_gpu})"
            )
        sizes = (self.get_tp_size(), self.get_cp_size(), self.get_sp_size())
        if max(sizes) > 1:
            raise ValueError(
                "edl::EDTrainerMixin: ranks must not share sequences "
                f"(got tensor, context and sequence parallel sizes {sizes})"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "domain_ids" not in self._signature_columns:
            self._signature_columns.append("domain_ids")

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        memory = self._divergence_options.get("memory")
        if memory is not None:
            memory.set_extra_state(())
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.expert_divergence.model is not self.model:  # model_init made a new one, or FSDP wrapped it
            self.expert_divergence.remove()
            self._attach(self.expert_divergence.beta)
        if self._two_passes:
            self._collect(batch_samples)
        return batch_samples, num_items_in_batch

    def _collect(self, batch_samples: list[dict[str, Any]]) -> None:
        """The first of two passes over the micro-batches of a step: domain moments only."""
        model = self.model_wrapped.train()
        memory = self.expert_divergence.divergence.memory
        assert memory is not None
        with memory.collect(), self.compute_loss_context_manager():
            for inputs in batch_samples:
                inputs = self._prepare_inputs(inputs)
                model(**{name: value for name, value in inputs.items() if name not in ("domain_ids", "labels")})
                self._divergence_loss(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        memory = self.expert_divergence.divergence.memory
        if memory is not None and self.accelerator.sync_gradients:  # the last micro-batch before the optimizer steps
            memory.step()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        result = super().compute_loss(
            model,
            {name: value for name, value in inputs.items() if name != "domain_ids"},
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if not model.training:
            return result
        loss = self._divergence_loss(inputs) / self._num_shares(num_items_in_batch)
        self._note_for_log()
        return (result[0] + loss, result[1]) if return_outputs else result + loss

    def _divergence_loss(self, inputs: dict[str, Any]) -> Tensor:
        domain_ids = inputs.get("domain_ids")
        if domain_ids is None:
            raise ValueError(
                "edl::EDTrainerMixin: every training batch must have domain_ids, from a column of the dataset and a "
                f"collator that keeps it, such as DomainCollator (got {sorted(inputs)})"
            )
        cu_seqlens = None
        position_ids = inputs.get("position_ids")
        is_per_token = domain_ids.dim() == 2 and not domain_ids.is_floating_point()
        if is_per_token and position_ids is not None and position_ids.shape == domain_ids.shape:
            cu_seqlens = _document_boundaries(position_ids)
        return self.expert_divergence.loss(domain_ids, inputs.get("attention_mask"), cu_seqlens=cu_seqlens)

    def _num_shares(self, num_items_in_batch: Any) -> int:
        """What a micro-batch's loss must be divided by: training_step divides by the number of micro-batches unless the
        loss is already a sum over the items of the whole step."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = counts_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if is_scaled else 1

    @property
    def _shares_memory(self) -> bool:
        """Whether there is a memory, and every process has the same."""
        options = self._divergence_options
        is_common = self.args.world_size == 1 or options["group"] is torch.distributed.group.WORLD
        return options.get("memory") is not None and is_common

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._shares_memory and self.args.should_save:
            torch.save(self._divergence_options["memory"].state_dict(), os.path.join(output_dir, _MEMORY_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._shares_memory:
            return
        path = os.path.join(checkpoint, _MEMORY_NAME)
        if os.path.exists(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._divergence_options["memory"].load_state_dict(state)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {name: value for name, value in inputs.items() if name != "domain_ids"}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _note_for_log(self) -> None:
        """Adds up what the log says of the last loss, without waiting for the device; a loss without a pair is 0, which
        would look perfect, and does not count."""
        pairs, nats = self.expert_divergence.divergence.pairs_and_nats()
        value, has_pair = self.expert_divergence.value, pairs > 0
        assert value is not None
        numbers = torch.stack([value.where(has_pair, 0.0).float(), nats.where(has_pair, 0.0).float(), pairs.float()])
        counts = torch.stack([has_pair.float(), torch.ones_like(has_pair, dtype=torch.float32)])
        sums = torch.cat([numbers, counts])
        self._log_sums = sums if self._log_sums is None else self._log_sums + sums
        if self._step_with_pair is None:
            self._step_with_pair = self.state.global_step

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._log_sums is not None:
            loss, nats, pairs, num_with_pair, num = self._log_sums.tolist()
            self._warn_of_no_pair(num_with_pair > 0)
            if "loss" in logs:
                logs["expert_divergence/pairs"] = pairs / num
                if num_with_pair > 0:
                    logs["expert_divergence_loss"] = loss / num_with_pair
                    logs["expert_divergence/nats"] = nats / num_with_pair
                self._log_sums = None
        super().log(logs, *args, **kwargs)

    def _warn_of_no_pair(self, has_pair: bool) -> None:
        step = self.state.global_step
        if has_pair or self._step_with_pair is None:
            self._step_with_pair = step
        elif step - self._step_with_pair >= _STEPS_WITHOUT_PAIR and not self._warned_of_no_pair:
            self._warned_of_no_pair = True
            warnings.warn(
                "edl::EDTrainerMixin: a batch must hold two domains for a divergence loss, mix domains in batches or "
                f"check the labels (got none with two for {step - self._step_with_pair} steps)",
                stacklevel=3,
            )
