"""Contributions that pull the wrong way: how far the rule `clip` lets them, one attacker among eight."""

import asyncio

import pytest
from support.rounds import Ring
from support.value_attacks import ATTACKS, Pull, pull


def pulls(rule: str, names: list[str]) -> dict[str, Pull]:
    async def scenario() -> dict[str, Pull]:
        async with Ring.open() as ring:
            return {name: await pull(ring, rule, name, attackers=1) for name in names}

    return asyncio.run(scenario())


def test_nobody_pulls_a_clipped_mean_further_than_its_share_of_three_medians() -> None:
    for name, seen in pulls("clip", list(ATTACKS)).items():
        assert not seen.exceeds, name
        assert seen.cosine >= 0.8, name


def test_without_the_clip_one_peer_turns_the_mean_round() -> None:
    for name, seen in pulls("mean", ["-10 g", "-1000 g"]).items():
        assert seen.exceeds, name
        assert seen.cosine < 0, name


def test_below_the_clip_the_rules_agree() -> None:
    name = "-g, at an honest norm"
    assert pulls("clip", [name])[name].cosine == pytest.approx(pulls("mean", [name])[name].cosine, abs=1e-9)
