"""What the reports say of each contribution to a version: for people to look at, and no proof of anything.

Norms and clip factors follow from the seal; cosines are what the reducers say, each of its span, and are as honest as
these; refusals are a reducer's word against a sender's.
"""

import math
from typing import Any

from hivegrpo.coordinator.round import Attempt
from hivegrpo.protocol.scalars import fp32_from_bits

HALF_NORM_BITS = 149
"""Squared norms are in units of 2^-298."""


def norm_of(norm_squared: int) -> float:
    """A norm from its exact square, in units of 2^-298."""
    return math.sqrt(norm_squared) * 2.0**-HALF_NORM_BITS


def contribution_evidence(attempt: Attempt) -> list[dict[str, Any]]:
    """One record a contributor of the plan, in the roster's order.

    {"peer", "sealed", "norm", "clip_factor", "cosine", "refused": {reducer: reason}}: `norm` of the vector,
    `clip_factor` by which the rule scaled it down (1: not at all), `cosine` to the result; None where it is not known.
    """
    sealed = {item.peer: item for item in attempt.seal.contributors} if attempt.seal else {}
    total = sum(contributor.weight for contributor in attempt.plan.contributors if contributor.peer in sealed)
    cosines = _cosines(attempt)
    records = []
    for contributor in attempt.plan.contributors:
        peer, item = contributor.peer, sealed.get(contributor.peer)
        records.append(
            {
                "peer": peer,
                "sealed": item is not None,
                "norm": norm_of(int.from_bytes(item.norm_squared, "big")) if item else None,
                "clip_factor": fp32_from_bits(item.coefficient) * total / contributor.weight if item else None,
                "cosine": cosines.get(peer),
                "refused": {who: said[peer] for who, said in attempt.refused.items() if peer in said},
            }
        )
    return records


def _cosines(attempt: Attempt) -> dict[str, float]:
    """Of each sealed contribution and the result; none before all reducers have told of their spans."""
    sealed = attempt.seal.contributors if attempt.seal else ()
    told = [attempt.dots.get(reducer.peer, ()) for reducer in attempt.plan.reducers]
    if not sealed or any(len(dots) != len(sealed) + 1 for dots in told):
        return {}
    *with_result, result = (math.fsum(column) for column in zip(*told, strict=True))
    found = {}
    for item, dot in zip(sealed, with_result, strict=True):
        length = norm_of(int.from_bytes(item.norm_squared, "big")) * math.sqrt(max(result, 0.0))
        if length > 0.0 and math.isfinite(dot):
            found[item.peer] = max(-1.0, min(1.0, dot / length))
    return found
