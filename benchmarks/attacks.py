"""Attacks on the averaging layer, at full size; writes the table in docs/security.md: `make bench-attacks`.

PYTHONPATH=tests .venv/bin/python benchmarks/attacks.py [--only WORDS]

Against the wire and by reducing: a real coordinator and real peers on the in-memory network, 5 of them with one
byzantine, 8 with one, and 8 with a quarter; then once more, 5 with one, without the check that holds the attack off.
By value: rounds of the real exchange among 8 peers. Exits with 1 if an attack did what it should not, or if a control
run was not ruined. Each line is written as soon as it is measured.
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
LINEAR_RULES = ("mean", "clip")
"""Rules that add a multiple of each contribution; with the others a contribution has no part of its own."""


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


@dataclass(frozen=True)
class Row:
    """A line of a table, still to be measured."""

    key: tuple[str, ...]
    """The first cells, by which a line is found again."""
    measure: Callable[[], tuple[list[str], bool]]
    """The other cells, and whether they are as they should be."""

    @property
    def start(self) -> str:
        return f"| {' | '.join(self.key)} | "


@dataclass(frozen=True)
class Table:
    title: str
    head: str
    rows: list[Row]


def swarm_table(title: str, cases: Iterator[Case]) -> Table:
    beds = "".join(f" {peers} peers, {bad} byzantine |" for peers, bad in BEDS)
    head = f"| attack |{beds} named in | most memory | with the defence off |"
    return Table(title, head, [Row((case.name,), lambda case=case: _stand(case)) for case in cases])


def _stand(case: Case) -> tuple[list[str], bool]:
    runs = [_run(case, peers, bad, SECONDS) for peers, bad in BEDS]
    control = _control(case)
    named = sorted(set.intersection(*(_places(seen) for seen in runs)))
    ruined = "no single check to leave out" if control is None else "; ".join(control.wrong)
    cells = [
        *("; ".join(seen.wrong) or "exact" for seen in runs),
        "; ".join(named),
        f"{max(seen.memory for seen in runs) / (1 << 20):.0f} MiB",
        ruined or "not ruined",
    ]
    passed = not any(seen.wrong for seen in runs) and (bool(named) or not case.is_named) and bool(ruined)
    return cells, passed


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


def value_table(rules: list[str]) -> Table:
    rows = [
        Row((rule, name, str(attackers)), lambda case=(rule, name, attackers): _pull(*case))
        for rule in rules
        for name in ATTACKS
        for attackers in (1, 2)
    ]
    return Table("By value", "| rule | attack | attackers of 8 | cosine to the honest mean | reach |", rows)


def _pull(rule: str, name: str, attackers: int) -> tuple[list[str], bool]:
    async def play() -> Pull:
        async with Ring.open() as ring:
            return await pull(ring, rule, name, attackers)

    seen = asyncio.run(play())
    reach = f"{seen.reach:.2f}" if rule in LINEAR_RULES else ""
    return [f"{seen.cosine:.3f}", reach], _stands(seen)


def _stands(seen: Pull) -> bool:
    """The bar: of the rule clip, and for the cosine of one attacker."""
    return seen.rule != "clip" or (not seen.exceeds and (seen.attackers > 1 or seen.cosine >= LEAST_COSINE))


def measured() -> tuple[str, list[str], str]:
    """The page before its tables, their lines, and the page after them."""
    head, begin, rest = PAGE.read_text().partition(BEGIN)
    tables, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} lacks the lines {BEGIN} and {END}")
    return head, tables.splitlines(), tail


def write(tables: list[Table], new: dict[str, str]) -> None:
    """The page with lines that are `new`, by their start, in the place of older ones; other lines stay."""
    head, old, tail = measured()
    parts = []
    for table in tables:
        lines = {row.start: line for row in table.rows for line in old if line.startswith(row.start)}
        lines |= {row.start: new[row.start] for row in table.rows if row.start in new}
        rows = [lines[row.start] for row in table.rows if row.start in lines]
        rule = "|" + "---|" * (table.head.count("|") - 1)
        parts.append("\n".join([f"### {table.title}", "", ABOUT[table.title], "", table.head, rule, *rows]))
    PAGE.write_text(f"{head}{BEGIN}\n\n{chr(10).join(f'{part}{chr(10)}' for part in parts)}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="attacks whose name contains this; other lines of the page stay")
    options = parser.parse_args()
    tables = [swarm_table(title, cases()) for title, cases in SWARM_CASES.items()]
    tables.append(value_table(list(RULES)))
    good, new = True, dict[str, str]()
    for row in [row for table in tables for row in table.rows if options.only in " ".join(row.key)]:
        cells, passed = row.measure()
        good = good and passed
        new[row.start] = row.start + " | ".join(cells) + " |"
        print("" if passed else "FAILED ", new[row.start], sep="", file=sys.stderr, flush=True)
        write(tables, new)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
