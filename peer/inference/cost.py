"""What a run has cost: anyone can compute it from the signed chain alone.

Device time and tokens are what the contributors said, in metrics that the coordinator summed and signed: claims, which
nothing proves. Bytes follow from the signed rounds themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hivegrpo.peer.learn.device_time import DEVICE_SECONDS, GPU_SECONDS
from hivegrpo.protocol.chain import Entry
from hivegrpo.protocol.errors import ConfigError

HOUR = 3600.0
KILO = 1000.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the contributions that some versions were made of; work that came to nothing is in none of them."""

    versions: int
    """Those that have metrics: all but version 0 and rollbacks."""
    device_seconds: float
    """That the contributors' machines worked, by their clocks: sampling, scoring, gradients, steps."""
    gpu_seconds: float
    """Those of `device_seconds` that were GPUs'; the rest were CPUs'."""
    untimed: int
    """Versions whose contributors did not say how long they worked."""
    tokens: int
    """Of prompts, once for each completion, and of completions."""
    completion_tokens: int
    """Those of `tokens` that were sampled."""
    bytes_exchanged: int
    """That contributors sent each other; see `exchanged`."""

    @property
    def timed(self) -> bool:
        """Whether there is anything to know of device time."""
        return self.untimed < self.versions or not self.versions


@dataclass(frozen=True, slots=True)
class Prices:
    """What to reckon with, in any currency; None leaves that part out."""

    per_hour: float | None = None
    """Of a device's hour."""
    watts: float | None = None
    """That a working device takes."""
    per_kwh: float | None = None

    def __post_init__(self) -> None:
        """ConfigError for a price of energy without the power that it is paid for."""
        if self.per_kwh is not None and self.watts is None:
            raise ConfigError("A price per kWh needs to know the power.", "Say with --watts what one device takes.")


def cost_of(entries: Iterable[Entry]) -> Cost:
    """The cost of a part of a chain."""
    made = [entry for entry in entries if entry.plan is not None]
    return total_cost([entry.manifest.message.metrics for entry in made], sum(map(exchanged, made)))


def total_cost(versions: Sequence[Mapping[str, float]], bytes_exchanged: int = 0) -> Cost:
    """The cost that versions' metrics add up to."""

    def total(name: str, of: Iterable[Mapping[str, float]]) -> float:
        return sum(metrics.get(name, 0.0) for metrics in of)

    # A later gradient of a rollout says again how many tokens it has, as a weight, and samples none.
    sampled = [metrics for metrics in versions if "num_tokens" in metrics]
    return Cost(
        versions=len(versions),
        device_seconds=total(DEVICE_SECONDS, versions),
        gpu_seconds=total(GPU_SECONDS, versions),
        untimed=sum(DEVICE_SECONDS not in metrics for metrics in versions),
        tokens=int(total("num_tokens", sampled)),
        completion_tokens=int(total("num_completion_tokens", sampled)),
        bytes_exchanged=bytes_exchanged,
    )


def exchanged(entry: Entry) -> int:
    """Bytes of gradient that a version's contributors sent each other, computed from its plan and its spans.

    Each of n contributors sends its part of a span to the span's reducer, and gets the reduced span from it, unless it
    is that reducer: where all reducers contribute, 2 (n - 1) times the encoded vector. Not in it are framing,
    attempts that failed, audits, and states for late joiners.
    """
    assert entry.plan is not None
    manifest = entry.manifest.message
    contributors = {contributor.peer for contributor in manifest.contributors}
    others = [len(contributors - {reducer.peer}) for reducer in entry.plan.message.reducers]
    return sum(2 * span.size * count for span, count in zip(manifest.spans, others, strict=True))


def energy(cost: Cost, prices: Prices) -> float | None:
    """kWh; None without the power of a device, or its time."""
    return None if prices.watts is None or not cost.timed else cost.device_seconds / HOUR * prices.watts / KILO


def money(cost: Cost, prices: Prices) -> float | None:
    """In the currency of the prices: hours and energy, as far as these have one; None if neither has."""
    kwh = energy(cost, prices)
    parts = []
    if prices.per_hour is not None and cost.timed:
        parts.append(cost.device_seconds / HOUR * prices.per_hour)
    if prices.per_kwh is not None and kwh is not None:
        parts.append(kwh * prices.per_kwh)
    return sum(parts) if parts else None


def describe_cost(cost: Cost, prices: Prices | None = None) -> str:
    """The cost in a line, without a word on whom to believe."""
    prices = prices or Prices()
    parts = _device_hours(cost) if cost.timed else []
    parts.append(f"{cost.tokens:,} tokens ({cost.completion_tokens:,} of them sampled)")
    if cost.bytes_exchanged:
        parts.append(f"{cost.bytes_exchanged / 1e6:,.1f} MB exchanged")
    kwh, sum_of_money = energy(cost, prices), money(cost, prices)
    if kwh is not None:
        parts.append(f"{kwh:.3g} kWh")
    if sum_of_money is not None:
        parts.append(f"{sum_of_money:,.2f} at these prices")
    untimed = f"; {cost.untimed} of {cost.versions} versions do not say what time they took" if cost.untimed else ""
    return f"Cost: {', '.join(parts)}{untimed}."


def _device_hours(cost: Cost) -> list[str]:
    on_gpus, on_cpus = cost.gpu_seconds / HOUR, (cost.device_seconds - cost.gpu_seconds) / HOUR
    hours = [f"{on_gpus:.3g} GPU-hours"] if cost.gpu_seconds else []
    if on_cpus or not hours:
        hours.append(f"{on_cpus:.3g} device-hours on CPUs")
    return hours


CLAIMED = (
    "Hours and tokens are what the contributors reported, which nothing proves; bytes are computed from the signed "
    "rounds, without failed attempts and late joiners."
)
