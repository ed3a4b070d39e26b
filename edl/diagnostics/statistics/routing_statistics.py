"""Sums of a routing, by layer, domain and expert, that are added up while a model trains or is evaluated."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from edl.diagnostics import files
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.statistics import state
from edl.diagnostics.statistics.ranks import summed
from edl.diagnostics.statistics.summary import measures_of
from edl.diagnostics.statistics.sums import OP, CourseSums, LayerSums, course_of, facts_of, nothing, sums_of
from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.objectives.batches import batch_of
from edl.ops import checks
from edl.reduction.ranks import Group, reads_values
from edl.routing import Observation, observations_of


class Snapshot(NamedTuple):
    """What was counted between two moments of a training.

    Attributes:
        step (int): of the optimizer, at its end; it begins with the snapshot before.
        sums (dict): number of a layer → CourseSums, on the CPU.
    """

    step: int
    sums: dict[int, CourseSums]


class RoutingStatistics:
    """Sums of what the tokens of each domain choose, added up while a model trains: do my experts specialise?

        statistics = edl.RoutingStatistics(["code", "news"])
        statistics.update(routings, domain_ids, attention_mask=mask)     # in a loop of one's own, of each micro-batch
        objectives.statistics = statistics                               # or of what objectives see, wherever they are
        statistics.snapshot(step)                                        # now and then, for the course of a training
        whole = statistics.reduce(group)                                 # over the ranks
        whole.measures()["moe/domain_information_mean"]
        whole.save("routing.safetensors")

    Nothing in `update` waits for a device or keeps a graph. Layers may differ in their numbers of experts; a layer is
    known by its number in the model where observations tell one (`layer`), else by its place among those of a call. A
    counted token whose scores are NaN makes the sums NaN that it is part of.

    Args:
        domains (sequence of str, or int): names of the domains, or their number D. With one, labels are not needed:
            where there are none, every token that the masks leave counts.
        scores (str): of logits, "softmax" (default) or "sigmoid"; not looked at where layers tell scores.
        top_k (int, optional): K of layers that do not tell their choices, which then are the K highest scores: of
            router logits alone, or Llama 4. A bias or a rule may have chosen others, which nobody can know. Default:
            such layers are refused.
        labels (str): the name of the set of labels to take, where there are several. Default: "domain_ids".
        facts (mapping, optional): of model and text, for people to read; JSON.

    Attributes:
        domains (tuple of str): names, D.
        sums (dict): number of a layer → LayerSums, by which `edl.diagnostics.statistics.LayerSums` says what is there.
        snapshots (list of Snapshot): each of what came since the one before.
        needs, label_sets (frozenset of str): what objectives must see for it.

    Raises:
        ValueError: no domain, names that are none or not different, options outside their range.
    """

    needs = frozenset({"logits", "scores", "experts"})

    def __init__(
        self,
        domains: Sequence[str] | int,
        scores: str = "softmax",
        top_k: int | None = None,
        labels: str = "domain_ids",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        checks.check_choice(OP, "scores", scores, checks.router_scores())
        checks.check_texts(OP, labels=labels)
        self.domains = _names_of(domains)
        self.scores, self.labels = scores, labels
        self.top_k = None if top_k is None else checks.as_integer(OP, "top_k", top_k, lowest=1)
        self.facts = _json_of(facts or {})
        self.label_sets = frozenset({labels} if len(self.domains) > 1 else ())
        self._layers: dict[int, LayerFacts] = {}
        self.sums: dict[int, LayerSums] = {}
        self.snapshots: list[Snapshot] = []

    @property
    def layers(self) -> tuple[LayerFacts, ...]:
        """The layers seen so far, in the order of the model."""
        return tuple(self._layers[number] for number in sorted(self._layers))

    def update(
        self,
        observations: Any,
        domain_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Counts the tokens of a forward pass. Call it once for each, and not in what activation checkpointing repeats.

        Args:
            observations (Routing, Observation or Tensor, or a list or tuple of them): one per layer, as `MoELayer`
                returns them; a tensor is router logits [T, E] or [B, S_len, E].
            domain_ids (Tensor): labels, int32 or int64 in [-1, D), -1 = not counted: [B] one per sequence, [B, S_len]
                or [T] one per token, [N] one per document with cu_seqlens.
            attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
            padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
            cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents.

        Raises:
            ValueError: wrong shapes or types, soft labels, no labels for several domains, both masks; a layer that does
                not tell its choices or number of experts, or another one than before.
            IndexError: a label outside [-1, D), a mask value other than 0 and 1, an expert outside [0, E] (on the CPU;
                elsewhere wrong labels make the sums of scores NaN).
        """
        layers = observations_of(observations, OP)
        given = {} if domain_ids is None else {self.labels: domain_ids}
        self.add(layers, batch_of(OP, layers, attention_mask, padding_mask, cu_seqlens, given))

    def add(self, layers: list[Observation], batch: Batch) -> None:
        """`update` for who made a batch already, as objectives and integrations.

        Args:
            layers (list of Observation): one per layer.
            batch (Batch): what is known of their tokens.

        Raises:
            ValueError, IndexError: as `update`.
        """
        with torch.no_grad():
            ids = self._domains_of(batch).segment_ids
            if reads_values(ids) and bool((ids >= len(self.domains)).any()):
                raise IndexError(
                    f"edl::{OP}: {self.labels} must be in [-1, {len(self.domains)}), masks must hold 0 and 1, and "
                    "cu_seqlens must grow from 0 to at most the number of tokens (got others)"
                )
            found: list[tuple[LayerFacts, LayerSums]] = []
            known = dict(self._layers)
            told = {layer.layer for layer in layers}
            for place, layer in enumerate(layers):
                if layer.layer < 0 and place in told:
                    raise ValueError(
                        f"edl::{OP}: layers must all tell their numbers in the model, or none (got one that is layer "
                        f"{place} and one in its place)"
                    )
                facts = facts_of(layer, place, len(ids), self.top_k)
                _compare(known.setdefault(facts.number, facts), facts)
                device = next(x.device for x in (layer.scores, layer.logits, layer.experts) if x is not None)
                found.append((facts, sums_of(layer, ids.to(device), facts, len(self.domains), self.scores)))
            for facts, sums in found:  # all of a call or nothing
                self._count(facts, sums)

    def _domains_of(self, batch: Batch) -> Segments:
        """The domain of each token."""
        given = batch.labels.get(self.labels)
        if given is None and len(self.domains) == 1:
            return batch.counted()
        if isinstance(given, Tensor) and given.is_floating_point():
            raise ValueError(
                f"edl::{OP}: {self.labels} must be one label per token, sequence or document, as a token is counted "
                f"once (got soft labels {list(given.shape)})"
            )
        return batch.segments(self.labels, len(self.domains), "token")

    def _count(self, facts: LayerFacts, sums: LayerSums) -> None:
        device = sums.choices.device
        known = self.sums.get(facts.number)
        if known is None:
            self._layers[facts.number] = facts
            known = nothing(len(self.domains), facts.num_experts, device)
        with torch.inference_mode(False):
            self.sums[facts.number] = known = LayerSums(*(x.to(device) for x in known))
            for total, own in zip(known, sums):
                total.add_(own)

    def snapshot(self, step: int) -> None:
        """Notes what was counted since the last snapshot: measures of the whole so far would show a change late. It
        waits for the device. Co-activation and mass are kept for the whole alone.

        Args:
            step (int): of the optimizer, above that of the last snapshot.

        Raises:
            ValueError: a step that is no number of steps, or not above the last one.
        """
        step = checks.as_integer(OP, "step", step)
        if self.snapshots and step <= self.snapshots[-1].step:
            raise ValueError(
                f"edl::{OP}: a snapshot must come after that of step {self.snapshots[-1].step} (got step {step})"
            )
        since = {}
        for number, sums in self.sums.items():
            before = [snapshot.sums[number] for snapshot in self.snapshots if number in snapshot.sums]
            total = [x.detach().to("cpu", copy=True) for x in course_of(sums)]
            since[number] = CourseSums(*(x - sum(of_field) for x, *of_field in zip(total, *before)))
        self.snapshots.append(Snapshot(step, since))

    def measures(
        self, per_layer: bool = False, per_pair: bool = False, snapshot: int | None = None
    ) -> dict[str, float]:
        """What the sums say, by names as others log them. It waits for the device.

        Args:
            per_layer (bool): also of each layer. Default: False.
            per_pair (bool): also the divergence of each pair of domains in each layer. Default: False.
            snapshot (int, optional): of this place in `snapshots`, -1 is the latest. Default: of the whole.

        Returns:
            Name → number; what there is nothing to measure of, as a divergence without two domains, is left out:
            `moe/cv_{mean,median,min,max}`, the coefficient of variation of the layers' loads;
            `moe/max_vio_{mean,max}`, (busiest expert - mean) / mean; `moe/expert_utilization_{p25,median,p75,min,max}`,
            the loads of all experts over their layer's mean; `moe/dead_expert_frac_mean`; `moe/token_entropy_mean`;
            `moe/margin_mean`, of the K-th score to the next; `moe/domain_information_mean`, I(E;D), and
            `moe/domain_divergence_mean`, Jensen-Shannon, of the choices, both with the bias of their sample;
            `moe/domain_coverage_mean`, how few experts hold 90 % of a domain's choices. Per layer i:
            `moe/layer_{i}/cv`, `max_vio`, `dead_expert_frac`, `token_entropy`, `margin`, `domain_information`,
            `domain_divergence` and `domain_coverage`. Per pair: `moe/layer_{i}/domain_divergence/{one}-{other}`.

        Raises:
            ValueError: no such snapshot.
        """
        if snapshot is None:
            sums = {number: course_of(each) for number, each in self.sums.items()}
        elif -len(self.snapshots) <= snapshot < len(self.snapshots):
            sums = self.snapshots[snapshot].sums
        else:
            raise ValueError(f"edl::{OP}: snapshot must be one of {len(self.snapshots)} (got {snapshot})")
        return measures_of(self.domains, sums, per_layer, per_pair)

    def reduce(
        self,
        group: Group | None = None,
        sequence_group: Group | None = None,
        stage_group: Group | None = None,
        only_latest: bool = False,
    ) -> "RoutingStatistics":
        """The sums of several ranks, on the CPU; all ranks call it, between the same steps, and all get them. A rank
        that shares its tokens with another, as tensor-parallel ranks without sequence parallelism, belongs in no group
        with it.

        Args:
            group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that hold different sequences.
            sequence_group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that hold different parts of
                the same sequences (context parallel; tensor parallel with sequence parallel).
            stage_group (ProcessGroup or DeviceMesh of one dimension, optional): pipeline stages, whose layers are put
                together by their numbers.
            only_latest (bool): leave out all snapshots but the latest, which is enough for a log. Default: False.

        Returns:
            New statistics; these stay as they are.

        Raises:
            ValueError: no such groups; ranks that differ in domains, snapshots, or what a layer is.
        """
        header, tensors = self._state(self.snapshots[-1:] if only_latest else self.snapshots)
        groups = {"group": group, "sequence_group": sequence_group, "stage_group": stage_group}
        for name, each in groups.items():
            if each is not None:
                header, tensors = summed(header, tensors, name, each)
        return self._of_state(header, tensors)

    def emptied(self) -> "RoutingStatistics":
        """New statistics of the same options, without sums."""
        return RoutingStatistics(self.domains, self.scores, self.top_k, self.labels, self.facts)

    def reset(self) -> None:
        """Forgets all sums and snapshots."""
        self._layers, self.sums, self.snapshots = {}, {}, []

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint: tensors on the CPU, and a header as text."""
        header, tensors = self._state(self.snapshots)
        return {"header": json.dumps(header), **tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up the sums of a checkpoint in the place of its own.

        Args:
            state_dict (mapping): what `state_dict` gave.

        Raises:
            ValueError: something else, or sums of other domains.
        """
        header, tensors = state.of_checkpoint(state_dict)
        if tuple(header["domains"]) != self.domains:
            raise ValueError(
                f"edl::{OP}: a state must be of the domains {list(self.domains)} (got {header['domains']})"
            )
        loaded = self._of_state(header, tensors)
        self._layers, self.sums, self.snapshots = loaded._layers, loaded.sums, loaded.snapshots

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sums; the file is whole or as before. Of several ranks, one writes what `reduce` gave.

        It holds, with n the number of a layer: `layer.{n}.choices` [D, E], `layer.{n}.mass` [D, E], `layer.{n}.tokens`
        [D], `layer.{n}.coactivation` [E, E], `layer.{n}.entropy` [D], `layer.{n}.margin` [D]; and of M snapshots
        `snapshots.{n}.choices` [M, D, E], `.tokens` [M, D], `.entropy` [M, D], `.margin` [M, D].

        Raises:
            ImportError: no safetensors.
            OSError: it cannot be written.
        """
        header, tensors = self._state(self.snapshots)
        files.save(path, state.KIND, state.VERSION, header, {name: x.numpy() for name, x in tensors.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingStatistics":
        """Reads statistics.

        Raises:
            ImportError: no safetensors.
            ValueError: no such file, or a broken or foreign one.
        """
        header, tensors = state.of_file(path)
        options = {name: header[name] for name in ("domains", "scores", "top_k", "labels", "facts")}
        return cls(**options)._of_state(header, tensors)

    def _state(self, snapshots: Sequence[Snapshot]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What describes the sums, and the sums by name, on the CPU."""
        header = {
            "layers": files.layers_to_json(self.layers),
            "domains": list(self.domains),
            "steps": [snapshot.step for snapshot in snapshots],
            "scores": self.scores,
            "top_k": self.top_k,
            "labels": self.labels,
            "facts": self.facts,
        }
        return header, state.named(self.layers, len(self.domains), self.sums, [each.sums for each in snapshots])

    def _of_state(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RoutingStatistics":
        """New statistics with these options and those sums."""
        other = self.emptied()
        layers = [LayerFacts(**layer) for layer in header["layers"]]
        other._layers = {layer.number: layer for layer in layers}
        other.sums, courses = state.unnamed(layers, len(header["steps"]), tensors)
        other.snapshots = [Snapshot(step, course) for step, course in zip(header["steps"], courses)]
        return other

    def __repr__(self) -> str:
        return f"RoutingStatistics({list(self.domains)}, {len(self.sums)} layers, {len(self.snapshots)} snapshots)"


if not TYPE_CHECKING:  # torch's decorator is untyped and would hide the types
    RoutingStatistics.add = torch.compiler.disable(RoutingStatistics.add)


def _compare(known: LayerFacts, facts: LayerFacts) -> None:
    """Raises where a layer is another one than before."""
    if (known.num_experts, known.top_k) != (facts.num_experts, facts.top_k):
        raise ValueError(
            f"edl::{OP}: layer {facts.number} must have {known.num_experts} experts, {known.top_k} for each token, as "
            f"before (got {facts.num_experts} and {facts.top_k})"
        )


def _names_of(domains: Any) -> tuple[str, ...]:
    if not isinstance(domains, (list, tuple)):
        number = checks.as_integer(OP, "domains, names or their number,", domains, lowest=1)
        return tuple(map(str, range(number)))
    if not domains or not all(isinstance(name, str) for name in domains) or len(set(domains)) < len(domains):
        raise ValueError(f"edl::{OP}: domains must be different names, at least one (got {domains!r})")
    return tuple(domains)


def _json_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what can be written."""
    try:
        return dict(json.loads(json.dumps(dict(facts), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"edl::{OP}: facts must be JSON, texts and numbers by name (got {error})") from None
