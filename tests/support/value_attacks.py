"""Attacks by value: contributions that are in order on the wire, and pull the wrong way; real rounds of a `Ring`.

Honest gradients are g + noise_i, with |noise_i| = |g|: a signal-to-noise ratio of 1 at each peer. All weigh the same,
and an attacker knows g itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt

import numpy as np

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import chunk_count, split_evenly
from support.reference import Double, Single
from support.rounds import PEERS, Case, Ring

VALUES = 20_000
WEIGHT = 7
CLIP_FACTOR = 3

FP32_ROUNDING = Fraction(1) + Fraction(1, 1 << 24)
"""A coefficient is rounded to the nearest fp32, so it may exceed its formula by half a unit in its last place."""

Attack = Callable[[Double, Double, np.random.Generator], Double]
"""What an attacker contributes, given g and an honest contribution."""


def _random(g: Double, other: Double, rng: np.random.Generator) -> Double:
    noise = rng.standard_normal(len(g))
    return noise * np.linalg.norm(other) / np.linalg.norm(noise)


ATTACKS: dict[str, Attack] = {
    "-g, at an honest norm": lambda g, other, rng: -g * (np.linalg.norm(other) / np.linalg.norm(g)),
    "-10 g": lambda g, other, rng: -10 * g,
    "1000 g": lambda g, other, rng: 1000 * g,
    "-1000 g": lambda g, other, rng: -1000 * g,
    "random": _random,
    "zero": lambda g, other, rng: np.zeros_like(g),
    "a copy of another's": lambda g, other, rng: other,
}


@dataclass(frozen=True)
class Pull:
    """How far one attack moved one round's result."""

    rule: str
    attack: str
    attackers: int
    cosine: float
    """Of the result to the mean of the honest contributions."""
    reach: float
    """The largest |coefficient x contribution| of an attacker, over its weight share x 3 x the sealed median norm."""
    exceeds: bool
    """Whether an attacker's reach is above 1, exactly, but for the coefficient's own rounding."""


async def pull(ring: Ring, rule: str, attack: str, attackers: int, seed: int = 0) -> Pull:
    """One round of eight peers, the last ones of which attack."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal(VALUES)
    honest = [g + noise * (np.linalg.norm(g) / np.linalg.norm(noise)) for noise in _noises(rng, PEERS - attackers)]
    bad = [ATTACKS[attack](g, honest[0], rng) for _ in range(attackers)]
    attacked = await ring.play(_case(rule, [*honest, *bad]))
    reaches = [_reach(attacked.seal, peer) for peer in range(PEERS - attackers, PEERS)]
    return Pull(
        rule,
        attack,
        attackers,
        cosine=cosine(attacked.result, np.mean(honest, axis=0)),
        reach=max(sqrt(reach) for reach in reaches),
        exceeds=any(reach > FP32_ROUNDING**2 for reach in reaches),
    )


def _noises(rng: np.random.Generator, count: int) -> Double:
    return rng.standard_normal((count, VALUES))


def _case(rule: str, vectors: Sequence[Double]) -> Case:
    roster = range(len(vectors))
    spans = split_evenly(chunk_count(VALUES), min(len(vectors), chunk_count(VALUES)))
    return Case(
        codec="mxint8",
        rule=rule,
        vectors={peer: _single(vectors[peer]) for peer in roster},
        weights=dict.fromkeys(roster, WEIGHT),
        spans=dict(enumerate(spans)),
    )


def _reach(seal: pb.Seal, peer: int) -> Fraction:
    """Square of |c x| over share x 3 x the sealed median norm: exact, from the sealed integers."""
    norms = [int.from_bytes(item.norm_squared, "big") for item in seal.contributors]
    coefficient = Fraction(float(np.uint32(seal.contributors[peer].coefficient).view(np.float32)))
    median = sorted(norms)[(len(norms) - 1) // 2]
    share = Fraction(1, len(norms))
    return coefficient**2 * norms[peer] / (share**2 * CLIP_FACTOR**2 * median)


def cosine(one: Single | Double, other: Single | Double) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _single(vector: Double) -> Single:
    return vector.astype(np.float32)
