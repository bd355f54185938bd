"""Metrics of a version out of those of its contributions, under TRL's names; how each adds up follows from its name."""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from hivegrpo.coordinator.round import EVALUATION_PREFIX, Held
from hivegrpo.protocol.checks import MAX_METRICS
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.values import value

TOKEN_METRICS = ("entropy", "kl", "cispo_clip_ratio")
TOKEN_PREFIXES = ("clip_ratio/", "sampling/")
"""Metrics that are means over completion tokens."""

TELLING = (
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "prompts/dropped",
    "groups/dropped",
    "numerics/failed",
)
"""Metrics that say why there was nothing to learn."""


class Aggregation(StrEnum):
    """How a metric of several contributions becomes one."""

    SUM = "sum"
    MINIMUM = "minimum"
    MAXIMUM = "maximum"
    BY_COMPLETIONS = "mean over completions"
    BY_TOKENS = "mean over completion tokens"
    BY_WEIGHT = "mean by the contributions' weights"


@value
class Counts:
    """What a contribution counts in means."""

    completions: float
    tokens: float
    weight: int


def aggregation_of(name: str) -> Aggregation:
    """Sums are called num_*, .../dropped or .../failed; extremes have min or max first or last in their last part.

    The loss is a mean by weight, as the gradient is; what is in TOKEN_METRICS or TOKEN_PREFIXES is a mean over tokens,
    and all others (rewards and lengths) are means over completions.
    """
    last = name.rpartition("/")[2]
    words = last.split("_")
    if words[0] == "num" or last in ("dropped", "failed"):
        return Aggregation.SUM
    if "min" in (words[0], words[-1]):
        return Aggregation.MINIMUM
    if "max" in (words[0], words[-1]):
        return Aggregation.MAXIMUM
    if name == "loss":
        return Aggregation.BY_WEIGHT
    if name in TOKEN_METRICS or name.startswith(TOKEN_PREFIXES):
        return Aggregation.BY_TOKENS
    return Aggregation.BY_COMPLETIONS


def merge_metrics(
    contributions: Iterable[Held], evaluation: Mapping[str, float], grpo: GrpoSection
) -> dict[str, float]:
    """Metrics of a version, and the held-out measurement. At most `MAX_METRICS` are kept, by name.

    A metric that only some contributions have is that of those.
    """
    values: dict[str, list[tuple[float, Counts]]] = {}
    for held in contributions:
        counts, metrics = _counts(held, grpo), held.message.metrics
        for name in metrics:
            if not name.startswith(EVALUATION_PREFIX):
                values.setdefault(name, []).append((metrics[name], counts))
    merged = {name: _combine(aggregation_of(name), parts) for name, parts in values.items()}
    kept = sorted({**merged, **evaluation}.items(), key=lambda item: (item[0] not in evaluation, item[0]))
    return dict(kept[:MAX_METRICS])


def why_empty(contributions: Iterable[Held], grpo: GrpoSection) -> str:
    """Why there was nothing to learn in these contributions, in one line, as far as they say it."""
    metrics = merge_metrics(contributions, {}, grpo)
    told = ", ".join(f"{name} = {metrics[name]:.4g}" for name in TELLING if name in metrics)
    return f"no contribution has weight: {told or 'the peers gave no metrics'}"


def _counts(held: Held, grpo: GrpoSection) -> Counts:
    """What it says, if its lease allows as much, else by the groups it uses."""
    metrics, used = held.message.metrics, max(len(held.message.used), 1) * grpo.num_generations
    most = held.lease.count * grpo.num_generations
    completions, tokens = metrics.get("num_completions", 0.0), metrics.get("num_completion_tokens", 0.0)
    return Counts(
        completions if 0.0 < completions <= most else used,
        tokens if 0.0 < tokens <= most * grpo.max_completion_length else used,
        max(held.message.weight, 1),
    )


def _combine(aggregation: Aggregation, parts: list[tuple[float, Counts]]) -> float:
    match aggregation:
        case Aggregation.SUM:
            return sum(value for value, _ in parts)
        case Aggregation.MINIMUM:
            return min(value for value, _ in parts)
        case Aggregation.MAXIMUM:
            return max(value for value, _ in parts)
        case Aggregation.BY_COMPLETIONS:
            return _mean([(value, counts.completions) for value, counts in parts])
        case Aggregation.BY_TOKENS:
            return _mean([(value, counts.tokens) for value, counts in parts])
        case Aggregation.BY_WEIGHT:
            return _mean([(value, counts.weight) for value, counts in parts])


def _mean(parts: list[tuple[float, float]]) -> float:
    return sum(value * factor for value, factor in parts) / sum(factor for _, factor in parts)
