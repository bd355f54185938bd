"""`hivegrpo cost`: what a run has cost, from its verified chain."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from hivegrpo.cli.output import configure_logging
from hivegrpo.peer.inference.cost import CLAIMED, Prices, cost_of, describe_cost, energy, money
from hivegrpo.peer.inference.locate import LocalRun, is_address, open_run


def show_cost(run: str | None, prices: Prices, *, as_json: bool) -> None:
    """Print the cost of all versions in a line, or as a JSON object.

    ConfigError if there is no such run, UnreachableError for an address where nobody answers, ChainError if the chain
    does not verify.
    """
    configure_logging(verbose=False)
    chain = _find(run).chain
    cost = cost_of(chain.entries)
    if not as_json:
        print(describe_cost(cost, prices))
        print(CLAIMED, file=sys.stderr)
        return
    priced = {"kwh": energy(cost, prices), "money": money(cost, prices)}
    print(json.dumps({"run_id": chain.run_id, "version": chain.height, **asdict(cost), **priced}))


def _find(run: str | None) -> LocalRun:
    if run is not None and is_address(run):
        from hivegrpo.peer.inference.load import find_run  # here: this import takes seconds

        return find_run(run, None)
    return open_run(Path(run).expanduser() if run is not None else None)
