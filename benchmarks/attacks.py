"""Attacks on the averaging layer, at full size; writes the table in docs/security.md: `make bench-attacks`.

PYTHONPATH=tests .venv/bin/python benchmarks/attacks.py [--only WORD] [--print]

Against the wire and by reducing: a real coordinator and real peers on the in-memory network, 5 of them with one
byzantine, 8 with one, and 8 with a quarter; then once more, 5 with one, without the check that holds the attack off.
By value: rounds of the real exchange among 8 peers. Exits with 1 if an attack did what it should not, or if a control
run was not ruined.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from support import liars, reduce_attacks
from support.byzantine import Fault
from support.rounds import Ring
from support.value_attacks import ATTACKS, Pull, pull
from support.wire_attacks import CONTROL_SECONDS, MEMORY_BOUND, SECONDS, Seen, attack, defence_off

from hivegrpo.peer.swarm.rules.registry import RULES

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
BEGIN, END = "<!-- begin: make bench-attacks -->", "<!-- end: make bench-attacks -->"
BEDS = ((5, 1), (8, 1), (8, 2))
"""Peers, and the byzantine ones among them."""

PACE = 2.0
"""Times of a round, over those of the tests: no honest peer may be late, however busy the machine is."""

LEAST_COSINE = 0.8


@dataclass(frozen=True)
class Case:
    """An attack that a swarm has to stand."""

    name: str
    run: Callable[[Path, int, int, float], Seen]
    """In a folder, with so many peers, of which so many are byzantine, for at most so many seconds."""
    without_defence: Callable[[], AbstractContextManager[object] | None]
    """The same swarm without the check that holds the attack off; None if no single one does."""
    is_named: bool = True
    """Whether whoever does it has to be named somewhere."""


def wire_cases() -> Iterator[Case]:
    for fault in Fault:
        yield Case(
            fault.value,
            lambda folder, peers, count, seconds, fault=fault: attack(
                folder, peers, [fault] * count, seconds, pace=PACE
            ),
            lambda fault=fault: defence_off(fault),
        )


ABOUT = {
    "Against the wire": f"""\
`exact`: every version is the rule over the contributions that were in order, to the last bit, with all honest ones
among them, and no invariant is violated. Memory is what the whole swarm, in one process, had allocated at the worst
moment; the bound is {MEMORY_BOUND >> 20} MiB. The last column is the same run (5 peers, 1 byzantine) with the check
that holds the attack off left out.""",
    "By reducing and auditing": """\
Every span is audited. `exact`: every version is the rule over the sealed contributions, to the last bit, no honest
peer is banned, and a liar is banned wherever what it signed proves its fault.""",
    "By value": """\
Honest gradients have a signal-to-noise ratio of 1 at each peer, all weigh the same, and the attacker knows g. The
reach is the length of what an attacker adds to the result, over its weight share x 3 x the sealed median norm: `clip`
keeps it at 1 or below, checked in exact arithmetic.""",
}
"""What is said above each table."""

REDUCING = (
    liars.Fault.LYING_REDUCER,
    liars.Fault.EQUIVOCATING_REDUCER,
    liars.Fault.BAD_HEADER,
    liars.Fault.FRAMING_AUDITOR,
)


def reducing_cases() -> Iterator[Case]:
    for fault in REDUCING:
        yield Case(
            fault.value,
            lambda folder, peers, count, seconds, fault=fault: reduce_attacks.attack(
                folder, peers, fault, count, seconds
            ),
            lambda fault=fault: reduce_attacks.without_audits() if fault is liars.Fault.LYING_REDUCER else None,
            is_named=fault in reduce_attacks.BANNED,
        )


SWARM_CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "Against the wire": wire_cases,
    "By reducing and auditing": reducing_cases,
}
"""By the title of their table."""


def swarm_table(cases: list[Case]) -> tuple[list[str], bool]:
    beds = "".join(f" {peers} peers, {bad} byzantine |" for peers, bad in BEDS)
    lines = [f"| attack |{beds} named in | most memory | with the defence off |", "|---|" + "---|" * (len(BEDS) + 3)]
    good = True
    for case in cases:
        runs = [_run(case, peers, bad, SECONDS) for peers, bad in BEDS]
        control = _control(case)
        named = sorted(set.intersection(*(set(_places(seen)) for seen in runs)))
        passed = (
            not any(seen.wrong for seen in runs)
            and (bool(named) or not case.is_named)
            and (control is None or bool(control.wrong))
        )
        good = good and passed
        cells = [
            case.name,
            *("; ".join(seen.wrong) or "exact" for seen in runs),
            "; ".join(named) or ("**nowhere**" if case.is_named else ""),
            f"{max(seen.memory for seen in runs) / (1 << 20):.0f} MiB",
            "no single check to leave out" if control is None else "; ".join(control.wrong) or "**not ruined**",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        print("" if passed else "FAILED ", lines[-1], sep="", file=sys.stderr, flush=True)
    return lines, good


def _run(case: Case, peers: int, bad: int, seconds: float) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        return case.run(Path(folder), peers, bad, seconds)


def _control(case: Case) -> Seen | None:
    defence = case.without_defence()
    if defence is None:
        return None
    with defence:
        return _run(case, *BEDS[0], CONTROL_SECONDS)


def _places(seen: Seen) -> set[str]:
    """Where every one of the byzantine is named."""
    return set.intersection(*(set(places) for places in seen.named.values()))


async def value_table(rules: list[str]) -> tuple[list[str], bool]:
    lines = ["| rule | attack | attackers of 8 | cosine to the honest mean | reach |", "|---|---|---|---|---|"]
    good = True
    async with Ring.open() as ring:
        for rule in rules:
            for name in ATTACKS:
                for attackers in (1, 2):
                    seen = await pull(ring, rule, name, attackers)
                    good = good and _stands(seen)
                    lines.append(f"| {rule} | {name} | {attackers} | {seen.cosine:.3f} | {seen.reach:.2f} |")
                    print(lines[-1], file=sys.stderr, flush=True)
    return lines, good


def _stands(seen: Pull) -> bool:
    """The bar: of the rule clip, and for the cosine of one attacker."""
    return seen.rule != "clip" or (not seen.exceeds and (seen.attackers > 1 or seen.cosine >= LEAST_COSINE))


def page(tables: dict[str, list[str]]) -> str:
    parts = [f"### {title}\n\n{ABOUT[title]}\n\n" + "\n".join(lines) for title, lines in tables.items()]
    return "\n\n".join(parts)


def write(text: str) -> None:
    """Between the page's two markers."""
    whole = PAGE.read_text()
    head, _, rest = whole.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise SystemExit(f"{PAGE} lacks the lines {BEGIN} and {END}")
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="attacks whose name contains this; prints, and writes nothing")
    parser.add_argument("--print", action="store_true", help="print the tables instead of writing the page")
    options = parser.parse_args()
    tables: dict[str, list[str]] = {}
    good = True
    for title, cases in SWARM_CASES.items():
        chosen = [case for case in cases() if options.only in case.name]
        tables[title], passed = swarm_table(chosen)
        good = good and passed
    if not options.only:
        tables["By value"], passed = asyncio.run(value_table(list(RULES)))
        good = good and passed
    if options.print or options.only:
        print(page(tables))
    else:
        write(page(tables))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
