"""Random rounds of the real exchange against an independent reference; `make bench-rounds` plays a thousand."""

import asyncio

import pytest
from support.rounds import FIXED_SIZES, Ring, draw_case


def test_every_span_is_what_the_reference_makes_of_it() -> None:
    async def scenario() -> None:
        async with Ring.open() as ring, asyncio.timeout(120):
            for seed in range(len(FIXED_SIZES) + 40):
                case = draw_case(seed, longest=60_000)
                try:
                    await ring.play(case)
                except AssertionError as error:
                    pytest.fail(f"round {seed} ({case}): {error}")

    asyncio.run(scenario())
