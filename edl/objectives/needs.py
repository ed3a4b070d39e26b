"""Whether what somebody observes of layers is enough for objectives."""

from collections.abc import Mapping

from edl.objectives.base import Objective


def refuse_unobserved(op: str, objectives: Mapping[str, Objective], observed: frozenset[str]) -> None:
    """Raises where an objective needs what no router of an integration hands over.

    Args:
        op (str): in whose name it refuses.
        objectives (mapping): name → objective.
        observed (frozenset of str): the fields of an `edl.routing.Observation` that may be there.

    Raises:
        ValueError: it needs others, as those on experts do: only an `edl.MoELayer` tells of them.
    """
    for name, objective in objectives.items():
        missing = sorted(objective.needs - observed)
        if missing:
            raise ValueError(
                f"edl::{op}: objectives must do with {', '.join(sorted(observed))}, which is what routers hand over "
                f"(got {name!r}, which needs {', '.join(missing)})"
            )
