"""Objectives from plain data, such as a file of JSON holds."""

import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

from edl.objectives.base import Objective, available
from edl.objectives.objectives import Objectives
from edl.objectives.schedules import Weight, linear_decay, linear_warmup, off_after


def objectives_of(configuration: Mapping[str, Any]) -> Objectives:
    """Makes objectives of plain data.

        {"expert_divergence": {"weight": 0.01, "num_domains": 3},
         "load_balancing": {"weight": 0.01, "scope": "global"},
         "router_z": {"weight": 0.001, "warmup_steps": 1000, "off_after_step": 20000}}

    Args:
        configuration (mapping): name → options: weight, a number; optionally warmup_steps, over which it rises from 0,
            decay_steps, [begin, end], between which it falls to 0, and off_after_step, from which it is 0; objective
            (optional), one of the names in `available()`, by default the name itself; the rest are the options of this
            objective.

    Returns:
        `Objectives` that are not bound to ranks yet.

    Raises:
        ValueError: data of another form, an unknown objective, options that it does not have or that are out of range.
    """
    if not isinstance(configuration, Mapping):
        raise ValueError(f"edl::objectives: a configuration must be a mapping (got {type(configuration).__name__})")
    return Objectives({name: _objective_of(name, options) for name, options in configuration.items()})


def objectives_from_file(path: str | os.PathLike[str]) -> Objectives:
    """Makes objectives of a file of JSON, in the form that `objectives_of` takes.

    Args:
        path (str or path): of the file.

    Raises:
        OSError: no such file.
        ValueError: no JSON, and what `objectives_of` raises.
    """
    with open(path, encoding="utf-8") as file:
        try:
            configuration = json.load(file)
        except ValueError as error:
            raise ValueError(f"edl::objectives: {os.fspath(path)} must hold JSON (got {error})") from error
    return objectives_of(configuration)


def _objective_of(name: str, options: Any) -> tuple[Objective, Weight]:
    if not isinstance(options, Mapping) or "weight" not in options:
        raise ValueError(f"edl::objectives: {name!r} must map to its options, weight among them (got {options!r})")
    rest = dict(options)
    weight = _weight_of(rest)
    kind = rest.pop("objective", name)
    if kind not in list(available()):  # a list also takes what has no hash
        raise ValueError(f"edl::objectives: an objective must be one of {sorted(available())} (got {kind!r})")
    objective = available()[kind]
    fields = [field for field in inspect.signature(objective).parameters if not field.startswith("_")]
    unknown = sorted(set(rest) - set(fields))
    if unknown:
        raise ValueError(f"edl::objectives: the options of {kind!r} must be among {fields} (got {unknown[0]!r})")
    try:
        made = objective(**rest)
    except TypeError as error:  # an option that has no default
        raise ValueError(f"edl::objectives: {name!r} must have all options of {kind!r} (got {error})") from error
    return made, weight


def _weight_of(options: dict[str, Any]) -> Weight:
    """The weight with its schedule, whose options are taken out."""
    weight: Weight = options.pop("weight")
    warmup_steps, decay_steps = options.pop("warmup_steps", None), options.pop("decay_steps", None)
    off_after_step = options.pop("off_after_step", None)
    if warmup_steps is not None:
        weight = linear_warmup(weight, warmup_steps)
    if decay_steps is not None:
        if not isinstance(decay_steps, (list, tuple)) or len(decay_steps) != 2:
            raise ValueError(f"edl::objectives: decay_steps must be [begin, end] (got {decay_steps!r})")
        weight = linear_decay(weight, *decay_steps)
    return weight if off_after_step is None else off_after(weight, off_after_step)
