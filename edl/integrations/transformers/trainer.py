"""Objectives of the routing in transformers' `Trainer`."""

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edl.integrations.transformers.blocks import names_in_blocks
from edl.integrations.transformers.capture import ObjectivesHandle, attach, unbound_objectives
from edl.integrations.transformers.data import label_of
from edl.labels.batch_sampler import DomainBatchSampler
from edl.objectives.base import Objective
from edl.objectives.objectives import Objectives
from edl.objectives.schedules import Weight
from edl.reduction.micro_batches import DomainMemory

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what the mixin is mixed into
else:
    _Trainer = object

_STATE_NAME = "objectives.pt"  # beside optimizer.pt
_FORMER_STATE_NAME = "domain_memory.pt"  # with the state of the memory alone


class _PackedDocuments:
    """Documents in a batch [B, S_len]. Their number is copied to the host from the beginning, so that boundaries, which
    have that size, do not wait for what the device was given since.

    Args:
        source (Tensor): what they are told apart by, as it stands in the batch.
        is_start (Tensor): [B or 1, S_len - 1] bool, where one begins, of all tokens but the first of a row.
        shape (torch.Size): [B, S_len].
    """

    def __init__(self, source: Tensor, is_start: Tensor, shape: torch.Size) -> None:
        self.source, self.shape = source, shape
        starts = torch.ones(shape, dtype=torch.bool, device=is_start.device)
        starts[:, 1:] = is_start
        self._starts = starts.flatten()
        self._count = starts.sum().to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(starts.device).record_event() if starts.is_cuda else None

    def boundaries(self) -> Tensor:
        """[N + 1], in the flattened batch."""
        if self._copied is not None:
            self._copied.synchronize()
        places = torch.nonzero_static(self._starts, size=int(self._count)).flatten()
        num_tokens = torch.full([1], self._starts.numel(), device=places.device)  # which copies nothing from the host
        return torch.cat([places, num_tokens])


def _packed_documents(
    inputs: dict[str, Any], shape: torch.Size, has_cache: bool, known: list[_PackedDocuments]
) -> _PackedDocuments | None:
    """Those that transformers' attention tells apart without boundaries, of `known` where they are there; None: each
    row is one."""
    seq_idx, positions = inputs.get("seq_idx"), inputs.get("position_ids")
    if seq_idx is None and (positions is None or inputs.get("attention_mask") is not None or has_cache):
        return None
    source: Any = positions if seq_idx is None else seq_idx
    for packed in known:
        if packed.source is source and packed.shape == shape:
            return packed
    if seq_idx is not None:
        return _PackedDocuments(source, source.diff(dim=-1) != 0, shape)
    if source.dim() != 3:
        return _PackedDocuments(source, source.diff(dim=-1) != 1, shape)
    # Of multimodal models: those of the text first, where there are four.
    return _PackedDocuments(source, source[0].diff(dim=-1) != 1, shape) if source.shape[0] == 4 else None


class _Sequences(torch.utils.data.Sampler[int]):
    """The sequences of batches one after another, which the Trainer cuts into batches of its processes again.

    Args:
        batches (DomainBatchSampler): of all processes together.
        num_sequences (int): of the data set.
    """

    def __init__(self, batches: DomainBatchSampler, num_sequences: int) -> None:
        self.batches = batches
        self._length = min(len(batches) * batches.batch_size, num_sequences)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)


def _labels_of_examples(dataset: Any, name: str) -> Any:
    """A column of a data set: at once where it has columns, else from one example after another."""
    try:
        if hasattr(dataset, "with_format"):
            return dataset.with_format("torch")[name][:]
        return [example[name] for example in dataset]
    except (KeyError, TypeError, IndexError, ValueError):
        raise ValueError(
            f"edl::EDTrainerMixin: domains_per_batch needs {name} in every example of the training data set "
            "(got one without)"
        ) from None


def _tokens_of(inputs: dict[str, Any]) -> Any:
    """Tokens [B, S_len] or their embeddings [B, S_len, H]; None where a batch has neither."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")


def _documents_in_rows(cu_seqlens: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The row of each document, and boundaries, where labels are per row: a document ends where its row does."""
    row_starts = torch.arange(0, shape.numel(), shape[1], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    cu_seqlens = torch.cat([cu_seqlens, torch.minimum(row_starts, cu_seqlens[-1:])]).sort().values
    rows = (cu_seqlens[:-1] // shape[1]).clamp(max=shape[0] - 1)
    return rows.long(), cu_seqlens


def _is_per_token(labels: Any) -> bool:
    return bool(labels.dim() == (3 if labels.is_floating_point() else 2))


def _has_mixed_documents(per_token: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Whether labels per token [B, S_len] differ inside what counts as one document."""
    labels = per_token.flatten().long()
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask.flatten() == 0, -1)
    if cu_seqlens is None:
        length = per_token.shape[1]
        cu_seqlens = torch.arange(0, labels.numel() + 1, max(length, 1), device=labels.device)
    places = torch.arange(labels.numel(), device=labels.device, dtype=cu_seqlens.dtype)
    documents = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
    highest = labels.new_full(cu_seqlens.shape, -1).scatter_reduce(0, documents, labels, "amax")
    return ((labels >= 0) & (labels != highest[documents])).any()


def _lacking(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """The missing names of a state_dict without those of weights that were loaded under another name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or []
    return [name for name in missing if id(parameters.get(name)) not in loaded and name not in ignored]


def _load_as_from_pretrained(model: nn.Module, checkpoint: str) -> Any:
    """Loads the weights of a checkpoint of transformers into a model that exists; returns what load_state_dict does."""
    from transformers import PreTrainedModel

    missing = ["all"]
    if isinstance(model, PreTrainedModel):
        fresh, report = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=model.dtype, output_loading_info=True
        )
        names = {theirs: ours for ours, theirs in names_in_blocks(model).items()}
        state = {names.get(name, name): value for name, value in fresh.state_dict().items()}
        missing = [name for name in (names.get(key, key) for key in report["missing_keys"]) if name in state]
        for name in missing:
            del state[name]
        result = model.load_state_dict(state, strict=False)
        lacking = _lacking(model, result.missing_keys)
        missing = [name for name, _ in model.named_parameters() if name in lacking]
    if missing:
        raise ValueError(
            "edl::EDTrainerMixin: the checkpoint must hold every parameter of the model "
            f"(got none for {', '.join(missing)} in {checkpoint})"
        )
    return result


def _steps_of(checkpoint: str) -> int:
    """The optimizer steps before a checkpoint."""
    from transformers import TrainerState

    path = os.path.join(checkpoint, "trainer_state.json")
    return TrainerState.load_from_json(path).global_step if os.path.exists(path) else 0


def _state_of(checkpoint: str) -> dict[str, Any]:
    """The state of objectives in a checkpoint, of one of former versions too; empty where it has none."""
    for file, prefix in ((_STATE_NAME, ""), (_FORMER_STATE_NAME, "memory.")):
        path = os.path.join(checkpoint, file)
        if os.path.exists(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {f"{prefix}{name}": value for name, value in state.items()}
    return {}


class EDTrainerMixin(_Trainer):
    """Adds objectives of the routing to the training loss of a Trainer: `class EDTrainer(EDTrainerMixin, Trainer)`.

        EDTrainer(model, args, train_dataset=dataset, objectives={
            "expert_divergence": (ExpertDivergence(num_domains=3), 1e-2),
            "load_balancing": (LoadBalancing(), linear_warmup(1e-2, steps=1000)),
        })

    For the Expert Divergence loss alone `num_domains=3, beta=1e-2` instead of `objectives` is enough.

    The dataset needs a column for each set of labels that an objective names, `domain_ids` for `ExpertDivergence`: a
    label per example in [-1, D), -1 = not counted, or a list with one per token. Columns are kept, collated (any
    collator that keeps them; else `DomainCollator`), and taken out before the batch reaches the model. Padding follows
    `attention_mask`. Documents packed into a row are told apart as in transformers' attention: by `cu_seq_lens_q`, by
    `seq_idx`, or by `position_ids` that do not go on ([B, S_len], [1, S_len] or, with positions of the text first, [4,
    B, S_len]; only without `attention_mask` and cache). Labels per token that change inside of what counts as one
    document are warned of once. Evaluation is left as it is.

    The objectives count with their weights once per optimizer step, as the mean over its micro-batches, whatever
    `num_items_in_batch` or `average_tokens_across_devices` do to the language-model loss. Over several processes they
    are those of their union (`group`). Under gradient accumulation each micro-batch is seen together with those before
    it (`edl.DomainMemory`, which also carries sums over steps), an approximation to the gradient of the whole batch;
    `two_passes` gives that gradient exactly. Every training begins with an empty memory and at the first step of the
    weights' schedules, or with those of the checkpoint it resumes from (the memory is saved where all processes share
    one).

    What is logged as `loss` includes them. Beside it stands what `Objectives.log` tells, as means over the
    micro-batches since the last log: `expert_divergence_loss`, without beta (lower is better), and
    `expert_divergence/nats`, the Jensen-Shannon divergence of the domains (higher is better, at most log 2), both of
    micro-batches that had two domains to compare; `expert_divergence/pairs`, the number of pairs of domains; and so on.
    100 steps in which an objective had nothing to act on are a warning.

    A `RoutingStatisticsCallback` among the callbacks shows what the experts do; with it there need be no objectives.

    Args:
        args: of the Trainer.
        objectives (Objectives, or a mapping of names to (objective, weight)): not bound to ranks or a memory, which
            happens here. `trainer.objectives` is the bound copy, whose `set_weight` changes a weight, from a callback
            for instance.
        num_domains (int): D, at least 2, in the place of objectives.
        beta (float): weight of the loss, with num_domains; `trainer.expert_divergence.beta` changes it.
        divergence_options (dict, optional): with num_domains: further options of `edl.ExpertDivergenceLoss`. Default of
            `memory` under gradient accumulation: `edl.DomainMemory(decay=0.9)`; None: each micro-batch on its own.
        two_passes (bool): under gradient accumulation run the micro-batches of a step once more, first, without
            gradients. Exact but for dropout, which differs between the passes. Default: False.
        domains_per_batch (int, optional): batches that hold so many domains, of all processes together, as
            `edl.labels.DomainBatchSampler` draws them from the labels of the training data set, one per example, in the
            place of a `train_sampling_strategy`. Default: the Trainer's own batches.
        sequences_per_domain (int): of each of these domains. Default: 1.
        kwargs: of the Trainer.

    Raises:
        ValueError: what `attach` raises; objectives that are bound; several devices in one process (DataParallel);
            tensor, context or sequence parallelism; two passes with a `memory` of one's own; layers of edl that
            `save_pretrained` refuses, where checkpoints are saved; while training, a batch without labels that an
            objective names, or labels that are no numbers; a checkpoint to resume from that lacks parameters.
    """

    def __init__(
        self,
        *args: Any,
        objectives: Objectives | Mapping[str, tuple[Objective, Weight]] | None = None,
        num_domains: int | None = None,
        beta: float | None = None,
        divergence_options: dict[str, Any] | None = None,
        two_passes: bool = False,
        domains_per_batch: int | None = None,
        sequences_per_domain: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check_parallelism()
        of_short_form = {"num_domains": num_domains, "beta": beta, "divergence_options": divergence_options}
        given = [name for name, option in of_short_form.items() if option is not None]
        is_short = "num_domains" in given and "beta" in given
        self._statistics = self._bind_statistics()
        if objectives is None and not given and self._statistics is not None:
            objectives = {}
        if (is_short and objectives is not None) or (not is_short and (objectives is None or given)):
            raise ValueError(
                "edl::EDTrainerMixin: either objectives, or num_domains and beta, must be given (got "
                f"{', '.join([*(['objectives'] if objectives is not None else []), *given]) or 'none'})"
            )
        if two_passes and "memory" in (divergence_options or {}):
            raise ValueError(
                "edl::EDTrainerMixin: two_passes has a memory of its own (got memory in divergence_options)"
            )
        binding: dict[str, Any] = {}
        if self.args.world_size > 1:
            binding["group"] = torch.distributed.group.WORLD
        accumulates = self.args.gradient_accumulation_steps > 1
        self._two_passes = two_passes and accumulates
        if accumulates and "memory" not in (divergence_options or {}):
            binding["memory"] = DomainMemory(decay=0.0 if two_passes else 0.9)
        watching: dict[str, Any] = {}
        if self._statistics is not None:
            watching["statistics"] = self._statistics.statistics
            watching["evaluation_statistics"] = self._statistics.evaluation
        if objectives is None:
            options = {"num_domains": num_domains, "beta": beta, **binding, **watching, **(divergence_options or {})}
            self._handle: ObjectivesHandle = attach(self.model, **options)
            is_common = self.args.world_size == 1 or options["group"] is binding["group"]
        else:
            is_empty = isinstance(objectives, Mapping) and not objectives
            unbound = Objectives({}, **watching) if is_empty else unbound_objectives(objectives)
            bound = unbound.bind(**binding)
            for name, statistics in watching.items():
                setattr(bound, name, statistics)
            self._handle = attach(self.model, bound)
            is_common = True
        self.objectives: Objectives = self._handle.objectives
        self._has_common_state = is_common  # whether every process has the same memory
        self._label_sets = sorted(self.objectives.label_sets)
        self._domains_per_batch, self._sequences_per_domain = domains_per_batch, sequences_per_domain
        self._sequences: _Sequences | None = None  # in the order of training, with domains_per_batch
        self._check_domains_per_batch()
        if self.args.save_strategy != "no":
            names_in_blocks(self.model)  # so that what cannot be saved is refused before it was trained
        self._packed: list[_PackedDocuments] = []  # of the micro-batches of a step
        self._has_mixed_documents: Any = False  # a tensor from the first labels per token on
        self._warned_of_mixed_documents = False
        self._warned_of_unlabelled_evaluation = False

    def _bind_statistics(self) -> Any:
        """The callback that shows the routing, if there is one."""
        from edl.integrations.transformers.statistics import RoutingStatisticsCallback

        found = [each for each in self.callback_handler.callbacks if isinstance(each, RoutingStatisticsCallback)]
        if len(found) > 1:
            raise ValueError(
                f"edl::EDTrainerMixin: callbacks must hold at most one RoutingStatisticsCallback (got {len(found)})"
            )
        for each in found:
            each.is_bound = True
        return found[0] if found else None

    @property
    def expert_divergence(self) -> ObjectivesHandle:
        """What `attach` returned for the model; its `beta` is the weight in the short form."""
        return self._handle

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

    def _check_domains_per_batch(self) -> None:
        if self._domains_per_batch is None:
            if self._sequences_per_domain != 1:
                raise ValueError(
                    "edl::EDTrainerMixin: sequences_per_domain needs domains_per_batch "
                    f"(got {self._sequences_per_domain!r} alone)"
                )
            return
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy != "random" or self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                "edl::EDTrainerMixin: domains_per_batch needs a training data set of known length and "
                "train_sampling_strategy 'random', in whose place it comes "
                f"(got {type(self.train_dataset).__name__} and {strategy!r})"
            )
        if "domain_ids" not in self._label_sets:
            raise ValueError(
                "edl::EDTrainerMixin: domains_per_batch needs an objective with labels domain_ids "
                f"(got labels {self._label_sets})"
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._domains_per_batch is None:
            return super()._get_train_sampler(*args, **kwargs)
        labels = _labels_of_examples(args[0] if args else self.train_dataset, "domain_ids")
        batches = DomainBatchSampler(
            labels,
            self._train_batch_size * (1 if self.accelerator.split_batches else self.args.world_size),
            self._domains_per_batch,
            self._sequences_per_domain,
            rank=0,
            num_ranks=1,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
        )
        self._sequences = _Sequences(batches, len(labels))
        return self._sequences

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._label_sets if name not in self._signature_columns]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.objectives.set_extra_state(0)
        if self.objectives.memory is not None:
            self.objectives.memory.set_extra_state(())
        if self._statistics is not None:
            self._statistics.begin_training()
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        if self._sequences is not None:  # which the data loader of a training that resumes may not reach
            self._sequences.set_epoch(int(self.state.epoch or 0))
        try:
            batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError):
            self._refuse_labels_that_are_no_numbers()  # which other collators cannot make tensors of
            raise
        if self._handle.model is not self.model:  # model_init made a new one, or FSDP wrapped it
            self._handle._attach(self.model)
        self._packed = []
        if self._label_sets:
            packed = [self._packed_documents_of(inputs) for inputs in batch_samples]
            self._packed = [documents for documents in packed if documents is not None]
        if self._two_passes:
            self._collect(batch_samples)
        return batch_samples, num_items_in_batch

    def _collect(self, batch_samples: list[dict[str, Any]]) -> None:
        """The first of two passes over the micro-batches of a step: sums only."""
        model = self.model_wrapped.train()
        memory = self.objectives.memory
        assert memory is not None
        with memory.collect(), self.compute_loss_context_manager():
            for inputs in batch_samples:
                inputs = self._prepare_inputs(inputs)
                model(**{name: value for name, value in self._inputs_of_model(inputs).items() if name != "labels"})
                self._objectives_loss(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:  # the last micro-batch before the optimizer steps
            self.objectives.step()
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
            self._inputs_of_model(inputs),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if not model.training:
            return result
        loss = self._objectives_loss(inputs) / self._num_shares(num_items_in_batch)
        language_loss = result[0] if return_outputs else result
        total = language_loss + loss.to(language_loss.device)  # of a model that is spread over devices
        return (total, result[1]) if return_outputs else total

    def _inputs_of_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in self._label_sets}

    def _objectives_loss(self, inputs: dict[str, Any]) -> Tensor:
        given = self._counted(inputs, self._label_sets)
        loss = self._handle.loss(**given)
        per_token = [given[name] for name in self._label_sets if _is_per_token(given[name])]
        per_token = [labels for labels in per_token if not labels.is_floating_point()]
        if per_token and not self._warned_of_mixed_documents:
            for labels in per_token:
                self._has_mixed_documents |= _has_mixed_documents(labels, given["attention_mask"], given["cu_seqlens"])
            if per_token[0].device.type == "cpu":  # on other devices once a log waits for them anyway
                self._warn_of_mixed_documents()
        return loss

    def _counted(self, inputs: dict[str, Any], label_sets: Sequence[str]) -> dict[str, Any]:
        """Masks, boundaries and labels of a batch, as objectives take them."""
        attention_mask = inputs.get("attention_mask")
        if not label_sets:
            return {"attention_mask": attention_mask}
        labels = {name: self._labels_of(name, inputs) for name in label_sets}
        tokens, cu_seqlens = _tokens_of(inputs), self._document_boundaries(inputs)
        if cu_seqlens is not None:
            of_rows = {
                name: given
                for name, given in labels.items()
                if not _is_per_token(given) and given.shape[:1] == tokens.shape[:1]
            }
            if of_rows:
                rows, cu_seqlens = _documents_in_rows(cu_seqlens, tokens.shape[:2])
                labels |= {name: given[rows] for name, given in of_rows.items()}
        return {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, **labels}

    def _labels_of(self, name: str, inputs: dict[str, Any]) -> Tensor:
        labels = inputs.get(name)
        if labels is None:
            self._refuse_labels_that_are_no_numbers()  # which the default collator drops
            raise ValueError(
                f"edl::EDTrainerMixin: every training batch must have {name}, from a column of the dataset and a "
                f"collator that keeps it, such as DomainCollator (got {sorted(inputs)})"
            )
        result: Tensor = labels
        return result

    def _document_boundaries(self, inputs: dict[str, Any]) -> Tensor | None:
        """Boundaries [N + 1] in the flattened batch [B, S_len] of the documents that transformers' attention tells
        apart; None: each row is one."""
        boundaries = inputs.get("cu_seq_lens_q")
        if boundaries is None or _tokens_of(inputs) is None:
            packed = self._packed_documents_of(inputs)
            return None if packed is None else packed.boundaries()
        if not isinstance(boundaries, Tensor) or boundaries.dim() != 1 or boundaries.is_floating_point():
            raise ValueError(
                "edl::EDTrainerMixin: cu_seq_lens_q must be a tensor of whole numbers of the shape [N + 1] "
                f"(got {list(boundaries.shape) if isinstance(boundaries, Tensor) else type(boundaries).__name__})"
            )
        return boundaries

    def _packed_documents_of(self, inputs: dict[str, Any]) -> _PackedDocuments | None:
        tokens = _tokens_of(inputs)
        if tokens is None or inputs.get("cu_seq_lens_q") is not None:
            return None
        uses_cache = getattr(self.args, "use_cache", False) and not self.args.gradient_checkpointing
        has_cache = uses_cache or inputs.get("past_key_values") is not None
        return _packed_documents(inputs, tokens.shape[:2], has_cache, self._packed)

    def _refuse_labels_that_are_no_numbers(self) -> None:
        example = None if self.train_dataset is None else next(iter(self.train_dataset), None)
        for name in self._label_sets:
            if isinstance(example, Mapping) and name in example:
                label_of("EDTrainerMixin", name, example[name])

    def _warn_of_mixed_documents(self) -> None:
        if not self._warned_of_mixed_documents and self._has_mixed_documents:
            self._warned_of_mixed_documents = True
            warnings.warn(
                "edl::EDTrainerMixin: labels per token should be the same inside each document; documents that "
                "share a row are told apart by position_ids without attention_mask and cache, cu_seq_lens_q or seq_idx "
                "(got a document of several domains, averaged once for each)",
                stacklevel=2,
            )

    def _num_shares(self, num_items_in_batch: Any) -> int:
        """What a micro-batch's loss must be divided by: training_step divides by the number of micro-batches unless the
        loss is already a sum over the items of the whole step."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = counts_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if is_scaled else 1

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._has_common_state and self.args.should_save:
            torch.save(self.objectives.state_dict(), os.path.join(output_dir, _STATE_NAME))
        if self._statistics is not None:
            self._statistics.save(self.args, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._statistics is not None:
            self._statistics.load(self.args, checkpoint)
        self.objectives.set_extra_state(_steps_of(checkpoint))
        if self._has_common_state:
            # A memory that only one of checkpoint and training has is left out.
            self.objectives.load_state_dict(_state_of(checkpoint), strict=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loaded_checkpoint = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loaded_checkpoint = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Follows each loading of a whole model, which leaves weights as they are where the file has other names or
        keeps experts one by one; `from_pretrained` knows them."""
        if _lacking(self.model, load_result.missing_keys):
            load_result = _load_as_from_pretrained(self.model, self._loaded_checkpoint)
        super()._issue_warnings_after_load(load_result)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(model, self._inputs_of_model(inputs), *args, **kwargs)
        if self._statistics is not None:
            self._observe(inputs)
        return result

    def _observe(self, inputs: dict[str, Any]) -> None:
        """Counts a batch of an evaluation."""
        needed = sorted(self._statistics.evaluation.label_sets)
        missing = [name for name in needed if inputs.get(name) is None]
        if not missing:
            self._handle.observe(**self._counted(self._prepare_inputs(inputs), needed))
        elif not self._warned_of_unlabelled_evaluation:
            self._warned_of_unlabelled_evaluation = True
            warnings.warn(
                f"edl::EDTrainerMixin: statistics count evaluation batches that have {missing[0]}, from a column of "
                f"the dataset and a collator that keeps it, such as DomainCollator (got {sorted(inputs)})",
                stacklevel=2,
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self._statistics is None:
            return super().evaluation_loop(*args, **kwargs)
        self._statistics.evaluation.reset()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = args[4] if len(args) > 4 else kwargs.get("metric_key_prefix", "eval")
        output.metrics.update(self._statistics.end_evaluation(self.args, prefix))
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._warn_of_mixed_documents()
        entries = self.objectives.log() if "loss" in logs else {}
        if entries:
            device = next(iter(entries.values())).device
            values = torch.stack([value.to(device).double() for value in entries.values()]).tolist()
            logs |= {name: value for name, value in zip(entries, values) if not math.isnan(value)}
        if "loss" in logs and self._statistics is not None:
            logs |= self._statistics.take_log()
        super().log(logs, *args, **kwargs)
