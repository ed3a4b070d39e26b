"""The Expert Divergence loss on the router logits of a transformers model, which hooks capture."""

import math
import re
import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edl.divergence import ExpertDivergenceLoss
from edl.reduction.micro_batches import DomainMemory
from edl.routers import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import OutputRecorder


def _recorders(part: "PreTrainedModel") -> list["OutputRecorder"]:
    """What transformers itself records as router logits in this part of a model: the routers' classes, and where in
    their output the logits stand."""
    from transformers.utils.output_capturing import OutputRecorder

    recorders = (part._can_record_outputs or {}).get("router_logits", [])
    return [
        # transformers' convention for a bare class: the second output.
        recorder if isinstance(recorder, OutputRecorder) else OutputRecorder(recorder, index=1)
        for recorder in (recorders if isinstance(recorders, list) else [recorders])
    ]


# What PEFT puts around a module: the module as it was and a copy per adapter, of which one runs; or the module alone.
_WRAPPERS = re.compile(r"\.(original_module|modules_to_save\.[^.]+|base_layer)(?=\.|$)")


def _find_routers(model: nn.Module) -> tuple[nn.Module, list[tuple[str, nn.Module, int]]]:
    """The smallest model of transformers around all routers; and name, router, index of the logits in its output.
    Several of one name: PEFT has copied a router."""
    from transformers import PreTrainedModel

    found: dict[nn.Module, tuple[nn.Module, str, int]] = {}
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):  # outer ones first
        recorders = _recorders(part)
        for path, module in part.named_modules():
            name = _WRAPPERS.sub("", path)
            if isinstance(module, Router):
                found[module] = (part, name, 0)
            for recorder in recorders:
                in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
                is_target = isinstance(recorder.target_class, type) and isinstance(module, recorder.target_class)
                if is_target and in_layer:
                    found[module] = (part, name, recorder.index)
    parts = {part for part, _, _ in found.values()}
    if not parts:
        raise ValueError(
            "edl::attach: model must hold routers whose logits transformers records, or edl.MoELayer, inside a model "
            f"of transformers (got {type(model).__name__}, which has none)"
        )
    if len(parts) > 1:
        names = ", ".join(sorted(type(part).__name__ for part in parts))
        raise ValueError(
            "edl::attach: model must be a model of transformers with Mixture-of-Experts routers in exactly one of its "
            f"parts (got {len(parts)} parts with routers: {names})"
        )
    return parts.pop(), [(name, router, index) for router, (_, name, index) in found.items()]


def _frozen_routers(part: nn.Module, names: Sequence[str]) -> list[str]:
    """The routers without a trainable parameter, in themselves or in what PEFT put around them."""
    parameters = [(_WRAPPERS.sub("", path), parameter.requires_grad) for path, parameter in part.named_parameters()]
    trainable = {
        name: [requires_grad for path, requires_grad in parameters if path.startswith(f"{name}.")] for name in names
    }
    return [name for name, flags in trainable.items() if flags and not any(flags)]


class _Record:
    """The hook of a router. In a deep copy, as PEFT makes of a router inside a model, it records as before; pickled it
    does nothing."""

    def __init__(self, capture: "_Capture | None" = None, name: str = "", index: int = 0) -> None:
        self.capture = (lambda: None) if capture is None else weakref.ref(capture)
        self.name, self.index = name, index

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Record":
        return self

    def __reduce__(self) -> tuple[type["_Record"], tuple[()]]:
        return (_Record, ())

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        capture = self.capture()
        if capture is not None:
            capture.record(self.name, self.index, output)


class _Capture:
    """The router logits of the last training forward of one model, in the order in which its routers ran.

    A training forward is one in train mode with gradients enabled, or inside `memory.collect()`. Evaluation, generation
    and the replays of activation checkpointing, which run routers during the backward pass and outside a forward of the
    model, leave no trace. In a copy of the model the hooks do nothing; in a copy of a router that PEFT puts in its
    place they record as before.
    """

    def __init__(
        self,
        part: nn.Module | None = None,
        routers: Sequence[tuple[str, nn.Module, int]] = (),
        memory: DomainMemory | None = None,
    ) -> None:
        self.part = part
        self.memory = memory
        self.names = [name for name, _, _ in routers]
        self.warned_of_frozen = False
        self.clear()
        self.hooks: list[RemovableHandle] = []
        if part is not None:
            self.hooks.append(part.register_forward_pre_hook(self.begin, with_kwargs=True))
            self.hooks.append(part.register_forward_hook(self.end, always_call=True))
        for name, router, index in routers:
            self.hooks.append(router.register_forward_hook(_Record(self, name, index)))

    def __reduce__(self) -> tuple[type["_Capture"], tuple[()]]:
        return (_Capture, ())  # copied or pickled along with the hooks of a model

    def clear(self) -> None:
        self.is_recording = False
        self.needs_gradient = True
        self.lacks_gradient = False
        self.batch_shape: list[int] = [0]
        self.captured: list[tuple[str, Tensor]] = []

    def begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if part is not self.part or not part.training:
            return
        is_collecting = not torch.is_grad_enabled() and self.memory is not None and self.memory.in_use
        if not torch.is_grad_enabled() and not is_collecting:
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a replay of the whole model
        self.clear()
        if not torch.compiler.is_compiling():
            self.warn_of_frozen()
        self.is_recording, self.needs_gradient = True, not is_collecting
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        self.batch_shape = next((list(x.shape[:2]) for x in inputs if isinstance(x, Tensor) and x.dim() >= 2), [0])

    def record(self, name: str, index: int, output: Any) -> None:
        if self.is_recording:
            self.captured.append((name, output if isinstance(output, Tensor) else output[index]))
            if self.needs_gradient and not torch.is_grad_enabled():
                self.lacks_gradient = True  # the first pass of reentrant checkpointing

    def end(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.is_recording = False

    def warn_of_frozen(self) -> None:
        if self.part is None or self.warned_of_frozen:
            return
        self.warned_of_frozen = True
        frozen = _frozen_routers(self.part, self.names)
        if frozen:
            warnings.warn(
                "edl::attach: a router without trainable parameters, as under LoRA of PEFT, feels the loss only "
                "through what feeds it; modules_to_save or requires_grad_() trains it "
                f"(got no trainable parameter in {', '.join(frozen)})",
                stacklevel=2,
            )

    def take(self) -> list[Tensor]:
        """The logits of each layer, `Tensor[B, S_len, E]`; they are given once."""
        self.warn_of_frozen()  # of a compiled model
        captured, shape = self.captured, self.batch_shape
        needs_gradient, lacks_gradient = self.needs_gradient, self.lacks_gradient
        self.clear()
        missing = [name for name in self.names if name not in {ran for ran, _ in captured}]
        if not captured:
            raise ValueError(
                "edl::attach: loss() takes the router logits of the last training forward, and takes them once; attach "
                "before the model is compiled or copied (got no router logits since)"
            )
        if missing:
            raise ValueError(
                "edl::attach: every router must run in the training forward, as a module "
                f"(got no logits of {', '.join(missing)})"
            )
        if lacks_gradient:
            raise ValueError(
                "edl::attach: activation checkpointing must be non-reentrant, with use_reentrant=False "
                "(got router logits computed without gradient)"
            )
        if needs_gradient and not any(logits.requires_grad for _, logits in captured):
            raise ValueError(
                "edl::attach: at least one router must be trainable, or something before it (got router logits that "
                "require no gradient)"
            )
        # With its batch dimension, so that labels of another batch are refused.
        return [
            logits.unflatten(0, shape) if logits.dim() == 2 and logits.shape[0] == math.prod(shape) else logits
            for _, logits in captured
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.part, self.names, self.hooks = None, [], []
        self.clear()


class DivergenceHandle:
    """What `attach` returns: the Expert Divergence loss of an attached model.

    Attributes:
        beta (float): the weight of the loss; may be changed at any time.
        divergence (edl.ExpertDivergenceLoss): the loss.
        model (nn.Module): the attached model.
        value (Tensor or None): the last loss without beta, detached, for logs.
    """

    def __init__(self, model: nn.Module, divergence: ExpertDivergenceLoss, beta: float) -> None:
        self.model = model
        self.divergence = divergence
        self.beta = beta
        self.value: Tensor | None = None
        self._capture = _Capture(*_find_routers(model), divergence.memory)

    def loss(
        self,
        domain_ids: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """beta times the Expert Divergence loss of the model's last training forward, to be added to the model's own.

        Call it once after each training forward: the captured router logits are released. Forwards in eval mode or
        without gradients (evaluation, generation) do not count, but those inside `collect()` of the loss's memory do.
        The arguments are those of `edl.ExpertDivergenceLoss`.

        Args:
            domain_ids (Tensor): [B] one label per sequence, [B, S_len] one per token, int32 or int64 in [-1, D), -1 =
                not counted; floating [B, D] weights; with cu_seqlens also [N] per document.
            attention_mask (Tensor[B, S_len], optional): 1 = keep, 0 = padding.
            padding_mask (Tensor[B, S_len], optional): True = padding.
            cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents in the flattened batch.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: no training forward since the last call, a router that did not run, router logits without
                gradient (reentrant checkpointing, or all of it frozen), and what `edl.ExpertDivergenceLoss` raises.
        """
        value = self.divergence(self._capture.take(), domain_ids, attention_mask, padding_mask, cu_seqlens)
        self.value = value.detach()
        return self.beta * value

    def remove(self) -> None:
        """Takes the hooks off the model, releases what they captured, and frees the memory for another loss."""
        self._capture.remove()
        self.divergence.memory = None


def attach(model: nn.Module, num_domains: int, beta: float, **options: Any) -> DivergenceHandle:
    """Captures the router logits of a model's training forwards for the Expert Divergence loss.

    Forward hooks read what each router computes: the model's configuration, outputs and its own auxiliary loss stay as
    they are. The routers are those whose logits transformers records (`output_router_logits`), and those of
    `edl.MoELayer` in the place of a block. Attach before or after wrapping (DDP, FSDP, PEFT), before the first call of
    a compiled model. A copy of the model is not attached. Several handles on one model are independent of each other.

    Args:
        model (nn.Module): a model of transformers, or something around one.
        num_domains (int): D, at least 2.
        beta (float): weight of the loss, finite.
        options: as for `edl.ExpertDivergenceLoss`: `scores="sigmoid"` for DeepSeek-V3 and other routers with sigmoid
            scores, `input="probs"` for routers that give probabilities (Gemma 4).

    Returns:
        `DivergenceHandle`, with `.loss(domain_ids, attention_mask)` and `.remove()`.

    Raises:
        ValueError: a model without routers, or with routers in several parts (attach to one of the parts); options
            outside their range.

    Example:
        >>> handle = attach(model, num_domains=3, beta=1e-2)
        >>> loss = model(**batch).loss + handle.loss(domain_ids, batch["attention_mask"])
    """
    if not math.isfinite(beta):
        raise ValueError(f"edl::attach: beta must be finite (got {beta})")
    if options.get("layer_reduction") == "none":
        raise ValueError("edl::attach: layer_reduction must be 'mean' or 'sum' (got 'none')")
    return DivergenceHandle(model, ExpertDivergenceLoss(num_domains, **options), beta)
