"""A thousand random rounds of the exchange against an independent reference: `make bench-rounds`.

PYTHONPATH=tests .venv/bin/python benchmarks/rounds.py [--rounds N] [--first SEED] [--longest VALUES]

Eight peers on the in-memory network, each with the exchange that the product runs; sizes from 1 to 3,000,000 values,
weights, codecs, rules, reducers, spans and lost contributors are drawn by the round's seed. Exits with 1 at the first
round that differs from the reference, and says which.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter

from support.rounds import MOST_VALUES, Ring, draw_case


async def play(seeds: range, longest: int) -> None:
    began = time.perf_counter()
    seen: Counter[str] = Counter()
    async with Ring.open() as ring:
        for done, seed in enumerate(seeds, 1):
            case = draw_case(seed, longest)
            try:
                await ring.play(case)
            except Exception as error:
                raise SystemExit(f"round {seed} ({case}) failed: {type(error).__name__}: {error}") from error
            seen.update((case.codec, case.rule, "contributors lost" if len(case.sealed) < len(case.vectors) else "all"))
            seen["values"] += case.values
            if done % 50 == 0:
                print(f"{done} rounds, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(seeds)} rounds, seeds {seeds.start} to {seeds.stop - 1}, in {seconds:.0f} s; one digest a span")
    print("everywhere, every span equal to the reference: bytes, norms, coefficients, and values in fp64")
    for name, count in sorted(seen.items()):
        print(f"  {name:<20}{count:>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first round")
    parser.add_argument("--longest", type=int, default=MOST_VALUES, help="values of the longest vector")
    options = parser.parse_args()
    asyncio.run(play(range(options.first, options.first + options.rounds), options.longest))


if __name__ == "__main__":
    main()
